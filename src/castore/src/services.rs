//! The two services every backend offers: blobs and directories by digest.
//!
//! They are synchronous: what is behind them hashes, compresses and reads disks. A caller in async code hands the call
//! to a blocking thread. Whoever implements one runs the lists of [`contract`] over it.

pub mod contract;
pub(crate) mod memory;

use std::collections::HashSet;
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::sync::Arc;

use bytes::Bytes;

use crate::{Digest, Directory, Error};

/// Bytes asked for at a time when a whole blob is copied out.
const COPY_PIECE: usize = 1024 * 1024;

/// What a service knows of a blob without its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobStat {
    /// The blob's length in bytes.
    pub size: u64,
    /// The chunks it is made of, in order, with their lengths in bytes; each can be read as a blob. None for the empty
    /// blob, or when the service does not know any.
    pub chunks: Vec<(Digest, u64)>,
}

/// File contents by digest.
pub trait BlobService: Send + Sync {
    /// What is known of the blob or chunk of this digest; `None` when it is not here.
    fn stat(&self, digest: &Digest) -> Result<Option<BlobStat>, Error>;

    /// Up to `len` bytes of the blob from `offset`: fewer only where the blob ends, none beyond its end.
    ///
    /// # Errors
    /// [`Error::BlobNotFound`] when the blob is not here.
    fn read_at(&self, digest: &Digest, offset: u64, len: usize) -> Result<Bytes, Error>;

    /// Stores everything `from` gives as one blob, readable from then on. Returns its digest and length.
    fn put(&self, from: &mut dyn Read) -> Result<(Digest, u64), Error>;

    /// Writes the whole blob to `to` and returns its length. Errors as for [`BlobService::read_at`].
    fn copy_to(&self, digest: &Digest, to: &mut dyn Write) -> Result<u64, Error> {
        let mut offset = 0;
        loop {
            let piece = self.read_at(digest, offset, COPY_PIECE)?;
            if piece.is_empty() {
                return Ok(offset);
            }
            to.write_all(&piece).map_err(|error| Error::Output { digest: *digest, error })?;
            offset += piece.len() as u64;
        }
    }
}

/// Directories by digest.
pub trait DirectoryService: Send + Sync {
    /// The directory of this digest; `None` when it is not here.
    fn get(&self, digest: &Digest) -> Result<Option<Arc<Directory>>, Error>;

    /// Stores directories, children before parents, readable from then on. Returns the digest of the last one.
    ///
    /// # Errors
    /// [`Error::ChildNotFound`] and [`Error::ChildSize`] when a directory in one of them was not given before it and is
    /// not here already with the claimed size; nothing of that call can be relied on then.
    fn put(&self, directories: &[Directory]) -> Result<Digest, Error>;

    /// Gives `each` the directory of this digest and every one below it: parents before children, each digest once.
    /// `each` can end the walk.
    ///
    /// # Errors
    /// [`Error::DirectoryNotFound`] when one is not here.
    fn get_recursive(
        &self,
        digest: &Digest,
        each: &mut dyn FnMut(Arc<Directory>) -> ControlFlow<()>,
    ) -> Result<(), Error> {
        // Breadth first; a digest below itself cannot be made, and one that occurs twice is given where it is first seen.
        let mut seen = HashSet::from([*digest]);
        let mut waiting = VecDeque::from([*digest]);
        while let Some(digest) = waiting.pop_front() {
            let directory = self.get(&digest)?.ok_or(Error::DirectoryNotFound(digest))?;
            waiting.extend(directory.directories().map(|(child, _)| *child).filter(|child| seen.insert(*child)));
            if each(directory).is_break() {
                break;
            }
        }
        Ok(())
    }
}

/// Checks that every directory in `parent` is known with the size it claims. `size_of` tells a known directory's size.
pub(crate) fn check_children(
    parent: &Directory,
    mut size_of: impl FnMut(&Digest) -> Result<Option<u64>, Error>,
) -> Result<(), Error> {
    for (child, claimed) in parent.directories() {
        match size_of(child)? {
            Some(actual) if actual == claimed => {}
            Some(actual) => return Err(Error::ChildSize { parent: parent.digest(), child: *child, claimed, actual }),
            None => return Err(Error::ChildNotFound { parent: parent.digest(), child: *child }),
        }
    }
    Ok(())
}
