//! The NAR format written from its description, apart from castored's own code: for checking results, and for
//! building archives that a correct writer would never produce.

use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::error::{Context, Result};

/// A tree to archive. Entries are written in the order given, right or wrong.
#[derive(Debug, Clone)]
pub enum Tree {
    /// Contents; not executable.
    File(Vec<u8>),
    /// Contents; executable.
    Program(Vec<u8>),
    /// Target.
    Link(Vec<u8>),
    /// Names and what is below them.
    Directory(Vec<(Vec<u8>, Tree)>),
}

impl Tree {
    /// The archive of this tree.
    pub fn archive(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put(&mut out, b"nix-archive-1");
        self.node(&mut out);
        out
    }

    fn node(&self, out: &mut Vec<u8>) {
        put(out, b"(");
        put(out, b"type");
        match self {
            Self::File(contents) => [b"regular".as_slice(), b"contents", contents].iter().for_each(|s| put(out, s)),
            Self::Program(contents) => {
                let strings: [&[u8]; 5] = [b"regular", b"executable", b"", b"contents", contents];
                strings.iter().for_each(|s| put(out, s));
            }
            Self::Link(target) => [b"symlink".as_slice(), b"target", target].iter().for_each(|s| put(out, s)),
            Self::Directory(entries) => {
                put(out, b"directory");
                for (name, tree) in entries {
                    [b"entry".as_slice(), b"(", b"name", name, b"node"].iter().for_each(|s| put(out, s));
                    tree.node(out);
                    put(out, b")");
                }
            }
        }
        put(out, b")");
    }
}

/// One string: length, bytes, zeros up to a multiple of eight.
pub fn put(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
    out.extend_from_slice(bytes);
    out.resize(out.len().next_multiple_of(8), 0);
}

/// Reads the tree at `path` through the filesystem and answers the SHA-256 and the size of its archive.
pub fn hash_path(path: &Path) -> Result<([u8; 32], u64)> {
    let mut sink = HashSink::default();
    write_path(path, &mut sink)?;
    Ok(sink.finish())
}

/// Reads the tree at `path` through the filesystem and writes its archive.
pub fn write_path(path: &Path, out: &mut impl Write) -> Result<()> {
    string(out, b"nix-archive-1").and_then(|()| node(out, path)).doing("archiving", path)
}

/// SHA-256 of bytes in memory.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// Lower-case base 16.
pub fn hex(bytes: &[u8]) -> String {
    data_encoding::HEXLOWER.encode(bytes)
}

/// An archive that is only counted and hashed.
#[derive(Default)]
pub(crate) struct HashSink {
    hasher: Sha256,
    size: u64,
}

impl Write for HashSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.hasher.update(bytes);
        self.size += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl HashSink {
    /// SHA-256 and size of what was written.
    pub(crate) fn finish(self) -> ([u8; 32], u64) {
        (self.hasher.finalize().into(), self.size)
    }
}

fn string(out: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    let mut piece = Vec::with_capacity(bytes.len() + 16);
    put(&mut piece, bytes);
    out.write_all(&piece)
}

fn strings(out: &mut impl Write, all: &[&[u8]]) -> io::Result<()> {
    all.iter().try_for_each(|s| string(out, s))
}

fn node(out: &mut impl Write, path: &Path) -> io::Result<()> {
    let meta = fs::symlink_metadata(path)?;
    strings(out, &[b"(", b"type"])?;
    if meta.is_symlink() {
        strings(out, &[b"symlink", b"target", fs::read_link(path)?.as_os_str().as_bytes()])?;
    } else if meta.is_dir() {
        string(out, b"directory")?;
        let mut entries: Vec<_> = fs::read_dir(path)?.collect::<io::Result<_>>()?;
        entries.sort_by_key(|e| e.file_name().as_bytes().to_vec());
        for entry in entries {
            strings(out, &[b"entry", b"(", b"name", entry.file_name().as_bytes(), b"node"])?;
            node(out, &entry.path())?;
            string(out, b")")?;
        }
    } else {
        string(out, b"regular")?;
        if meta.permissions().mode() & 0o100 != 0 {
            strings(out, &[b"executable", b""])?;
        }
        string(out, b"contents")?;
        out.write_all(&meta.len().to_le_bytes())?;
        let copied = io::copy(&mut fs::File::open(path)?, out)?;
        if copied != meta.len() {
            return Err(io::Error::other("the file is not as long as its size says"));
        }
        let padding = (8 - (copied % 8) as usize) % 8;
        out.write_all(&[0; 8][..padding])?;
    }
    string(out, b")")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archive_of_a_path_is_the_archive_of_its_tree() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), "hello").unwrap();
        std::os::unix::fs::symlink("a", dir.path().join("b")).unwrap();
        let tree = Tree::Directory(vec![
            (b"a".to_vec(), Tree::File(b"hello".to_vec())),
            (b"b".to_vec(), Tree::Link(b"a".to_vec())),
        ]);
        let archive = tree.archive();
        assert_eq!(hash_path(dir.path()).unwrap(), (sha256(&archive), archive.len() as u64));
        assert_eq!(archive.len() % 8, 0);
        let mut written = Vec::new();
        write_path(dir.path(), &mut written).unwrap();
        assert_eq!(written, archive);
    }
}
