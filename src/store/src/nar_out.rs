//! Bytes out: the NAR of a tree, rendered from the castore.

use std::io::{self, Write};
use std::ops::Range;
use std::sync::Arc;

use castore::{BlobService, Digest, Directory, DirectoryService, Node};
use nix_compat::hash::Algorithm;
use nix_compat::nar::NarWriter;
use nix_compat::store_path::StorePath;

use crate::error::{Error, Result};
use crate::nar_digest::{NarDigest, NarFacts};
use crate::store::Store;

/// Bytes read from a blob at a time.
const PIECE: usize = 256 * 1024;

impl Store {
    /// Writes the NAR of a valid path.
    ///
    /// # Errors
    /// [`Error::NotValid`] before anything is written; failures of the castore or of `out`.
    pub fn write_nar(&self, path: &StorePath, out: &mut dyn Write) -> Result<()> {
        let entry = self.valid_entry(path)?;
        self.check_readable(path)?;
        self.write_nar_of(&entry.node, out)
    }

    /// Writes the NAR of any tree in the castore.
    ///
    /// # Errors
    /// Failures of the castore or of `out`.
    pub fn write_nar_of(&self, node: &Node, out: &mut dyn Write) -> Result<()> {
        self.write_nar_from(node, 0, out)
    }

    /// Writes the bytes of a NAR that lie in `part`; fewer where the NAR ends before.
    ///
    /// Where they lie is only known from what comes before: all its directories are read, but the contents of its files
    /// are not.
    ///
    /// # Errors
    /// Failures of the castore or of `out`.
    pub fn write_nar_part(&self, node: &Node, part: Range<u64>, out: &mut dyn Write) -> Result<()> {
        let start = part.start;
        let mut window = Window { out, position: 0, part };
        match self.write_nar_from(node, start, &mut window) {
            Err(_) if window.is_past() => Ok(()),
            written => written,
        }
    }

    /// Writes a NAR. Of contents that lie before `start` there may be zeros in their place.
    fn write_nar_from(&self, node: &Node, start: u64, out: &mut dyn Write) -> Result<()> {
        let mut nar = NarWriter::new(out);
        let mut levels: Vec<(Arc<Directory>, usize)> = Vec::new();
        self.write_node(node, start, &mut nar, &mut levels)?;
        while let Some((directory, at)) = levels.last_mut() {
            let directory = Arc::clone(directory);
            *at += 1;
            match directory.entry(*at - 1) {
                Some((name, node)) => {
                    nar.entry(name.as_bytes())?;
                    self.write_node(node, start, &mut nar, &mut levels)?;
                }
                None => {
                    levels.pop();
                    nar.leave_directory()?;
                }
            }
        }
        nar.finish()?;
        Ok(())
    }

    fn write_node(
        &self,
        node: &Node,
        start: u64,
        nar: &mut NarWriter<&mut dyn Write>,
        levels: &mut Vec<(Arc<Directory>, usize)>,
    ) -> Result<()> {
        match node {
            Node::File { digest, size, executable } => {
                nar.regular_header(*executable, *size)?;
                let unwanted = start.saturating_sub(nar.position()).min(*size);
                nar.empty_contents(unwanted)?;
                self.for_each_piece_from(digest, unwanted, *size, &mut |piece| Ok(nar.contents(piece)?))?;
                Ok(nar.end_regular()?)
            }
            Node::Symlink { target } => Ok(nar.symlink(target.as_bytes())?),
            Node::Directory { digest, .. } => {
                nar.enter_directory()?;
                let directory = self.engine.get(digest)?.ok_or_else(|| castore::Error::DirectoryNotFound(*digest))?;
                levels.push((directory, 0));
                Ok(())
            }
        }
    }

    /// Gives a blob's bytes in pieces.
    pub(crate) fn for_each_piece(
        &self,
        digest: &Digest,
        size: u64,
        each: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        self.for_each_piece_from(digest, 0, size, each)
    }

    fn for_each_piece_from(
        &self,
        digest: &Digest,
        mut offset: u64,
        size: u64,
        each: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        while offset < size {
            let piece = self.engine.read_at(digest, offset, PIECE.min((size - offset) as usize))?;
            if piece.is_empty() {
                let source = io::Error::from(io::ErrorKind::UnexpectedEof);
                return Err(Error::Stream { action: "read", what: format!("blob {digest}"), source });
            }
            each(&piece)?;
            offset += piece.len() as u64;
        }
        Ok(())
    }

    /// Hash and size of the NAR of any tree in the castore, and the hash by another algorithm if one is given.
    ///
    /// # Errors
    /// Failures of the castore.
    pub fn nar_facts(&self, node: &Node, other: Option<Algorithm>) -> Result<NarFacts> {
        struct Sink(NarDigest);
        impl Write for Sink {
            fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
                self.0.update(buf);
                Ok(buf.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut sink = Sink(NarDigest::new(other, None));
        self.write_nar_of(node, &mut sink)?;
        Ok(sink.0.finish())
    }
}

/// Lets through what lies in a part of what is written, and fails when more is written after that.
struct Window<'a> {
    out: &'a mut dyn Write,
    position: u64,
    part: Range<u64>,
}

impl Window<'_> {
    fn is_past(&self) -> bool {
        self.position >= self.part.end
    }
}

impl Write for Window<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if self.is_past() {
            return Err(io::Error::other("the part that is wanted has ended"));
        }
        let index =
            |at: u64| usize::try_from(at.saturating_sub(self.position)).map_or(buf.len(), |at| at.min(buf.len()));
        let wanted = index(self.part.start)..index(self.part.end);
        if !wanted.is_empty() {
            self.out.write_all(&buf[wanted])?;
        }
        self.position += buf.len() as u64;
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use nix_compat::store_path::StoreDir;

    use super::*;
    use crate::store::Config;

    /// Small files, one of several pieces, an empty one and a link, in two directories.
    fn nar() -> Vec<u8> {
        let mut nar = NarWriter::new(Vec::new());
        nar.enter_directory().unwrap();
        for (name, size) in [("a", 5), ("b", 3 * PIECE + 17), ("c", 0)] {
            nar.entry(name.as_bytes()).unwrap();
            nar.regular_header(name == "a", size as u64).unwrap();
            nar.contents(&(0..size).map(|i| (i % 251) as u8).collect::<Vec<u8>>()).unwrap();
            nar.end_regular().unwrap();
        }
        nar.entry(b"d").unwrap();
        nar.enter_directory().unwrap();
        nar.entry(b"link").unwrap();
        nar.symlink(b"../a").unwrap();
        nar.leave_directory().unwrap();
        nar.leave_directory().unwrap();
        nar.finish().unwrap()
    }

    #[test]
    fn a_part_of_a_nar_is_what_the_whole_one_has_there() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(Config::new(StoreDir::default(), dir.path())).unwrap();
        let whole = nar();
        let node = store.import_nar(&mut &whole[..], NarDigest::new(None, None)).unwrap().node;
        let part = |from: usize, to: usize| {
            let mut out = Vec::new();
            store.write_nar_part(&node, from as u64..to as u64, &mut out).unwrap();
            out
        };
        let places = [0, 1, 7, 300, 1000, PIECE, 2 * PIECE + 1, 3 * PIECE + 900, whole.len() - 1, whole.len()];
        for (at, from) in places.into_iter().enumerate() {
            for to in places.into_iter().skip(at) {
                assert!(part(from, to) == whole[from..to], "{from}..{to}");
            }
            assert!(part(from, whole.len() + 10) == whole[from..], "{from}..");
        }
    }

    #[test]
    fn contents_before_the_part_are_not_read_and_failures_of_the_sink_are_told() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(Config::new(StoreDir::default(), dir.path())).unwrap();
        // Of a blob that is not there.
        let node = Node::File { digest: Digest::of(b"nowhere"), size: 1 << 40, executable: false };
        let mut end = Vec::new();
        let size = (1 << 40) + 112;
        store.write_nar_part(&node, size - 16..size, &mut end).unwrap();
        assert_eq!(end, b"\x01\0\0\0\0\0\0\0)\0\0\0\0\0\0\0");
        assert!(store.write_nar_part(&node, 0..size, &mut Vec::new()).is_err());
        assert!(store.write_nar_part(&node, 0..20, &mut Full).is_err());
    }
}
