//! What of a path is damaged or missing, from another castore: the digests say what is wanted, so it may be anybody's.

use std::collections::{BTreeSet, HashSet};
use std::io::{self, Read};

use bytes::{Buf, Bytes};
use castore::engine::Session;
use castore::objects::{ObjectKey, ObjectKind};
use castore::{BlobService, Digest, DirectoryService, Node};
use nix_compat::store_path::StorePath;

use crate::error::Result;
use crate::store::Store;

/// Bytes asked for at a time.
const PIECE: usize = 1 << 20;

/// Another castore.
#[derive(Clone, Copy)]
pub struct Elsewhere<'a> {
    /// Its blobs.
    pub blobs: &'a dyn BlobService,
    /// Its directories.
    pub directories: &'a dyn DirectoryService,
}

impl Store {
    /// Puts what of a valid path's contents cannot be read here again, from another castore. Whether the path is whole
    /// then, and as it was registered.
    ///
    /// # Errors
    /// When the other castore fails or does not have it, and when the own one cannot be written.
    pub fn heal_from(&self, path: &StorePath, elsewhere: Elsewhere<'_>) -> Result<bool> {
        let Some(entry) = self.entry(path)? else { return Ok(false) };
        // Marks what is damaged, so that what is put takes its place.
        if self.check_path(path)?.is_none() {
            return Ok(true);
        }
        let mut session = self.engine.session();
        let mut seen = HashSet::new();
        let mut waiting = vec![entry.node];
        while let Some(node) = waiting.pop() {
            match node {
                Node::Symlink { .. } => {}
                Node::Directory { digest, .. } if seen.insert((true, digest)) => {
                    let key = ObjectKey { kind: ObjectKind::Directory, digest };
                    let here = if self.is_sound(key)? { self.engine.get(&digest)? } else { None };
                    let directory = match here {
                        Some(directory) => directory,
                        None => {
                            let found = elsewhere.directories.get(&digest)?;
                            let found = found.ok_or(castore::Error::DirectoryNotFound(digest))?;
                            session.put_directory(&found)?;
                            found
                        }
                    };
                    waiting.extend(directory.entries().map(|(_, node)| node.clone()));
                }
                Node::File { digest, size, .. } if seen.insert((false, digest)) && !self.is_blob_sound(&digest)? => {
                    fetch(&mut session, elsewhere.blobs, digest, size)?;
                }
                _ => {}
            }
        }
        let _hold = session.finish()?;
        Ok(self.check_path(path)?.is_none())
    }

    /// Whether the object is here and right, read from disk.
    fn is_sound(&self, key: ObjectKey) -> Result<bool> {
        let objects = self.engine.objects();
        let damaged = objects.check_some(&BTreeSet::from([key])).map_err(castore::Error::from)?;
        objects.mark_damaged(damaged.iter().map(|object| object.key));
        // The empty ones are nowhere, and known to everybody.
        let here = key.digest == Digest::EMPTY || objects.contains(&key).map_err(castore::Error::from)?;
        Ok(damaged.is_empty() && here)
    }

    /// The same for all that a blob is made of.
    fn is_blob_sound(&self, digest: &Digest) -> Result<bool> {
        let list = ObjectKey { kind: ObjectKind::ChunkList, digest: *digest };
        let objects = self.engine.objects();
        if objects.contains(&list).map_err(castore::Error::from)? && !self.is_sound(list)? {
            return Ok(false);
        }
        let Ok(Some(stat)) = self.engine.stat(digest) else { return Ok(false) };
        for (digest, _) in stat.chunks {
            if !self.is_sound(ObjectKey { kind: ObjectKind::Chunk, digest })? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Puts a blob of another castore's, all of it.
fn fetch(session: &mut Session, blobs: &dyn BlobService, digest: Digest, size: u64) -> Result<(), castore::Error> {
    let mut reader = Reader { blobs, digest, left: size, offset: 0, piece: Bytes::new(), failed: None };
    let put = session.put_blob(&mut reader);
    if let Some(failed) = reader.failed {
        return Err(failed);
    }
    // What has another digest is garbage now, and what was wanted is not here.
    if put? == (digest, size) { Ok(()) } else { Err(castore::Error::BlobNotFound(digest)) }
}

/// Reads a blob of another castore's, no more of it than it should have.
struct Reader<'a> {
    blobs: &'a dyn BlobService,
    digest: Digest,
    left: u64,
    offset: u64,
    piece: Bytes,
    failed: Option<castore::Error>,
}

impl Read for Reader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.piece.is_empty() && self.left > 0 {
            let wanted = usize::try_from(self.left).map_or(PIECE, |left| left.min(PIECE));
            match self.blobs.read_at(&self.digest, self.offset, wanted) {
                Ok(piece) => self.piece = piece.slice(..piece.len().min(wanted)),
                Err(error) => {
                    self.failed = Some(error);
                    return Err(io::Error::other("the other castore failed"));
                }
            }
            self.offset += self.piece.len() as u64;
            self.left -= self.piece.len() as u64;
        }
        let length = buf.len().min(self.piece.len());
        self.piece.copy_to_slice(&mut buf[..length]);
        Ok(length)
    }
}
