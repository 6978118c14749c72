//! Checking that a tree is whole, and keeping it so.

use std::collections::HashSet;

use super::Engine;
use crate::blob::{chunk, chunk_list, directory as directory_key};
use crate::session::Hold;
use crate::{BlobDamage, Digest, Error, Node};

impl Engine {
    /// Checks that everything below `root` is here and has the sizes it claims, and keeps it from being collected until
    /// the answer is dropped.
    ///
    /// For trees whose contents came earlier or from elsewhere: directories say what they want, and only this makes
    /// sure. Memory: 32 bytes and the set's overhead for each different directory and blob of the tree.
    ///
    /// # Errors
    /// [`Error::DirectoryNotFound`], [`Error::BlobNotFound`], [`Error::ChildSize`] or [`Error::BlobSize`] name the first
    /// thing that is not as it should be.
    pub fn hold(&self, root: &Node) -> Result<Hold, Error> {
        self.hold_or(root, &mut |digest, _| Err(Error::BlobNotFound(digest)))
    }

    /// The same, but what is to be done about a blob that is not here, of which digest and size are given, `missing` says.
    pub(super) fn hold_or(
        &self,
        root: &Node,
        missing: &mut dyn FnMut(Digest, u64) -> Result<(), Error>,
    ) -> Result<Hold, Error> {
        let mut hold = Hold::new(self.objects.writer());
        let mut seen_directories = HashSet::new();
        let mut seen_blobs = HashSet::new();
        let mut waiting = Vec::new();
        match root {
            Node::Directory { digest, size } => waiting.push((*digest, *digest, *size)),
            Node::File { digest, size, .. } => self.hold_blob(digest, *size, &mut hold, missing)?,
            Node::Symlink { .. } => {}
        }
        while let Some((parent, digest, claimed)) = waiting.pop() {
            // The size belongs to what is seen: the same directory with another size is another claim.
            if !seen_directories.insert((digest, claimed)) {
                continue;
            }
            let directory = self.directories.read(&digest)?.ok_or(Error::DirectoryNotFound(digest))?;
            if digest != Digest::EMPTY && !hold.add(&directory_key(&digest))? {
                return Err(Error::DirectoryNotFound(digest));
            }
            if directory.size() != claimed {
                return Err(Error::ChildSize { parent, child: digest, claimed, actual: directory.size() });
            }
            for (_, node) in directory.entries() {
                match node {
                    Node::Directory { digest: child, size } => waiting.push((digest, *child, *size)),
                    Node::File { digest: blob, size, .. } if seen_blobs.insert((*blob, *size)) => {
                        self.hold_blob(blob, *size, &mut hold, missing)?;
                    }
                    Node::File { .. } | Node::Symlink { .. } => {}
                }
            }
        }
        Ok(hold)
    }

    fn hold_blob(
        &self,
        digest: &Digest,
        claimed: u64,
        hold: &mut Hold,
        missing: &mut dyn FnMut(Digest, u64) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let actual = if *digest == Digest::EMPTY {
            0
        } else if hold.add(&chunk(digest))? {
            u64::from(self.objects.length(&chunk(digest))?.ok_or(Error::BlobNotFound(*digest))?)
        } else if hold.add(&chunk_list(digest))? {
            let list = self.blobs.list(digest)?.ok_or(Error::BlobNotFound(*digest))?;
            for (piece, _) in list.chunks() {
                if !hold.add(&chunk(&piece))? {
                    return Err(Error::DamagedBlob { digest: *digest, damage: BlobDamage::MissingChunk(piece) });
                }
            }
            list.size()
        } else {
            return missing(*digest, claimed);
        };
        if actual != claimed {
            return Err(Error::BlobSize { digest: *digest, claimed, actual });
        }
        Ok(())
    }
}
