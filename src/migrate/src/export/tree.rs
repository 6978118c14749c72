//! Writes the tree of a path as plain files, as stock has them: modes 0444 and 0555, modification time 1.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use castore::{BlobService, Directory, DirectoryService, Node};
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use nix_compat::nar::NarWriter;
use store::Store;
use store::nar_digest::{NarDigest, NarFacts};

use crate::error::{Error, Result};
use crate::progress::Progress;

/// Bytes of a file that are read and written at a time.
const PIECE: usize = 256 * 1024;

/// Computes a NAR's hash and size without keeping it.
pub(super) struct Digesting(pub(super) NarDigest);

impl Write for Digesting {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.update(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes one tree.
pub(super) struct TreeWriter<'a> {
    store: &'a Store,
    progress: &'a dyn Progress,
    /// Where equal files are linked to, if they are.
    links: Option<&'a Path>,
    nar: NarWriter<Digesting>,
}

impl<'a> TreeWriter<'a> {
    pub(super) fn new(store: &'a Store, progress: &'a dyn Progress, links: Option<&'a Path>) -> Self {
        Self { store, progress, links, nar: NarWriter::new(Digesting(NarDigest::new(None, None))) }
    }

    /// Writes `root` to `path`, where nothing is; tells what its NAR is.
    pub(super) fn write(mut self, root: &Node, path: &Path) -> Result<NarFacts> {
        let mut levels: Vec<(PathBuf, Arc<Directory>, usize)> = Vec::new();
        self.node(root, path, &mut levels)?;
        while let Some((dir, directory, at)) = levels.last_mut() {
            *at += 1;
            match directory.entry(*at - 1) {
                Some((name, node)) => {
                    let path = dir.join(std::ffi::OsStr::from_bytes(name.as_bytes()));
                    let node = node.clone();
                    self.nar.entry(name.as_bytes()).map_err(|e| nar_failed(&path, e))?;
                    self.node(&node, &path, &mut levels)?;
                }
                None => {
                    self.nar.leave_directory().map_err(|e| nar_failed(dir, e))?;
                    settle(dir, 0o555)?;
                    levels.pop();
                }
            }
        }
        Ok(self.nar.finish().map_err(|e| nar_failed(path, e))?.0.finish())
    }

    fn node(&mut self, node: &Node, path: &Path, levels: &mut Vec<(PathBuf, Arc<Directory>, usize)>) -> Result<()> {
        match node {
            Node::File { digest, size, executable } => {
                self.nar.regular_header(*executable, *size).map_err(|e| nar_failed(path, e))?;
                let open = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
                let mut file = open.map_err(Error::file("create", path))?;
                // Links are named by the hash of the file alone.
                let mut alone = self.links.map(|_| NarWriter::new(Digesting(NarDigest::new(None, None))));
                if let Some(alone) = &mut alone {
                    alone.regular_header(*executable, *size).map_err(|e| nar_failed(path, e))?;
                }
                let mut offset = 0;
                while offset < *size {
                    let wanted = usize::try_from(*size - offset).map_or(PIECE, |rest| rest.min(PIECE));
                    let piece = self.store.engine().read_at(digest, offset, wanted).map_err(store::Error::from)?;
                    if piece.is_empty() {
                        return Err(Error::file("read", path)(io::ErrorKind::UnexpectedEof.into()));
                    }
                    file.write_all(&piece).map_err(Error::file("write", path))?;
                    self.nar.contents(&piece).map_err(|e| nar_failed(path, e))?;
                    if let Some(alone) = &mut alone {
                        alone.contents(&piece).map_err(|e| nar_failed(path, e))?;
                    }
                    self.progress.bytes(piece.len() as u64);
                    offset += piece.len() as u64;
                }
                drop::<File>(file);
                self.nar.end_regular().map_err(|e| nar_failed(path, e))?;
                settle(path, if *executable { 0o555 } else { 0o444 })?;
                if let (Some(mut alone), Some(links)) = (alone, self.links) {
                    alone.end_regular().map_err(|e| nar_failed(path, e))?;
                    let facts = alone.finish().map_err(|e| nar_failed(path, e))?.0.finish();
                    let hash = nix_compat::hash::Hash::Sha256(*facts.nar_hash.as_bytes());
                    link(path, &links.join(hash.to_nix32()))?;
                }
            }
            Node::Symlink { target } => {
                self.nar.symlink(target.as_bytes()).map_err(|e| nar_failed(path, e))?;
                symlink(std::ffi::OsStr::from_bytes(target.as_bytes()), path).map_err(Error::file("create", path))?;
                set_time(path)?;
            }
            Node::Directory { digest, .. } => {
                self.nar.enter_directory().map_err(|e| nar_failed(path, e))?;
                fs::create_dir(path).map_err(Error::file("create", path))?;
                let missing = || store::Error::from(castore::Error::DirectoryNotFound(*digest));
                let directory = self.store.engine().get(digest).map_err(store::Error::from)?.ok_or_else(missing)?;
                levels.push((path.to_owned(), directory, 0));
            }
        }
        Ok(())
    }
}

/// Makes equal files one: the first becomes the link, later ones are replaced by it.
fn link(path: &Path, link: &Path) -> Result<()> {
    match fs::hard_link(path, link) {
        Ok(()) => return Ok(()),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(Error::file("link", path)(e)),
    }
    let new = path.with_file_name(format!(".castored-link-{:?}", std::thread::current().id()));
    match fs::hard_link(link, &new) {
        Ok(()) => fs::rename(&new, path).map_err(Error::file("replace", path)),
        // As many links as the file system allows: the file stays one of its own.
        Err(e) if e.kind() == io::ErrorKind::TooManyLinks => Ok(()),
        Err(e) => Err(Error::file("link", link)(e)),
    }
}

fn settle(path: &Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, Permissions::from_mode(mode)).map_err(Error::file("set the mode of", path))?;
    set_time(path)
}

fn set_time(path: &Path) -> Result<()> {
    let (access, modification) = (TimeSpec::UTIME_OMIT, TimeSpec::new(1, 0));
    utimensat(nix::fcntl::AT_FDCWD, path, &access, &modification, UtimensatFlags::NoFollowSymlink)
        .map_err(|errno| Error::file("set the time of", path)(errno.into()))
}

/// Only a tree that no NAR can hold comes here; the sink takes everything.
fn nar_failed(path: &Path, error: nix_compat::nar::WriteError) -> Error {
    Error::file("write", path)(io::Error::new(io::ErrorKind::InvalidData, error))
}
