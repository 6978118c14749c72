//! Bytes out: the NAR of a tree, rendered from the castore.

use std::io::{self, Write};
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
        let mut nar = NarWriter::new(out);
        let mut levels: Vec<(Arc<Directory>, usize)> = Vec::new();
        self.write_node(node, &mut nar, &mut levels)?;
        while let Some((directory, at)) = levels.last_mut() {
            let directory = Arc::clone(directory);
            *at += 1;
            match directory.entry(*at - 1) {
                Some((name, node)) => {
                    nar.entry(name.as_bytes())?;
                    self.write_node(node, &mut nar, &mut levels)?;
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
        nar: &mut NarWriter<&mut dyn Write>,
        levels: &mut Vec<(Arc<Directory>, usize)>,
    ) -> Result<()> {
        match node {
            Node::File { digest, size, executable } => {
                nar.regular_header(*executable, *size)?;
                self.for_each_piece(digest, *size, &mut |piece| Ok(nar.contents(piece)?))?;
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
        let mut offset = 0;
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
