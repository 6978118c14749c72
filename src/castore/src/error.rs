//! What can go wrong between a service and whoever uses it.

use std::io;

use crate::index::IndexError;
use crate::objects::ObjectError;
use crate::{DecodeError, Digest};

/// Why a service could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No blob has this digest.
    #[error("blob {0} is not here")]
    BlobNotFound(Digest),
    /// A blob that was promised and that nobody fetches now, or at least not here.
    #[error("blob {0} has not come from its source yet")]
    Elsewhere(Digest),
    /// A blob that was promised could not be had.
    #[error("blob {digest} cannot be fetched: {reason}")]
    NotFilled {
        /// The blob.
        digest: Digest,
        /// What was tried, and why it failed.
        reason: String,
    },
    /// What is to be remembered with a promise is too long.
    #[error("a note of more than {limit} bytes cannot be kept with a promise")]
    LongNote {
        /// Bytes that it may have.
        limit: usize,
    },
    /// No directory has this digest.
    #[error("directory {0} is not here")]
    DirectoryNotFound(Digest),
    /// Directories were to be put, but there was none.
    #[error("no directory was given to put")]
    NoDirectory,
    /// A directory was put before one of the directories in it.
    #[error("directory {parent} refers to {child}, which was neither sent before it nor is here")]
    ChildNotFound {
        /// The directory that was put.
        parent: Digest,
        /// The directory it refers to.
        child: Digest,
    },
    /// A directory claims another size for a directory in it than that one has. Positions would lead astray.
    #[error("directory {parent} says that {child} has {claimed} entries below it, but it has {actual}")]
    ChildSize {
        /// The directory that was put.
        parent: Digest,
        /// The directory it refers to.
        child: Digest,
        /// The size its parent claims.
        claimed: u64,
        /// The size it has.
        actual: u64,
    },
    /// A file claims another length than its blob has.
    #[error("a file of {claimed} bytes names blob {digest}, which has {actual}")]
    BlobSize {
        /// The blob.
        digest: Digest,
        /// The length the file's node claims.
        claimed: u64,
        /// The length it has.
        actual: u64,
    },
    /// A blob is larger than a chunk list can describe.
    #[error("a blob of more than {limit} bytes cannot be stored")]
    BlobTooLarge {
        /// How many bytes were read before giving up.
        limit: u64,
    },
    /// The bytes of a blob could not be read from where they come from.
    #[error("cannot read the bytes of a blob to store: {0}")]
    Input(#[source] io::Error),
    /// The bytes of a blob could not be written to where they go.
    #[error("cannot write out the bytes of blob {digest}: {error}")]
    Output {
        /// The blob.
        digest: Digest,
        /// What happened.
        #[source]
        error: io::Error,
    },
    /// What is stored as a directory is not one.
    #[error("directory {digest} is damaged: {error}")]
    DamagedDirectory {
        /// The digest it is stored under.
        digest: Digest,
        /// What is wrong with it.
        #[source]
        error: DecodeError,
    },
    /// What is stored for a blob does not make one.
    #[error("blob {digest} is damaged: {damage}")]
    DamagedBlob {
        /// The blob.
        digest: Digest,
        /// What is wrong with it.
        damage: BlobDamage,
    },
    /// The object store failed.
    #[error(transparent)]
    Objects(#[from] ObjectError),
    /// The index failed.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// Another implementation of a service failed in a way of its own.
    #[error(transparent)]
    Backend(#[from] Box<dyn std::error::Error + Send + Sync>),
}

/// What can be wrong with a stored blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BlobDamage {
    /// The chunk list's length is no multiple of an entry's, or its sizes are impossible.
    #[error("its chunk list makes no sense")]
    ChunkList,
    /// A chunk in its list is not stored.
    #[error("its chunk {0} is missing")]
    MissingChunk(Digest),
    /// A chunk has another length than the list says.
    #[error("its chunk {0} has another length than its list says")]
    ChunkLength(Digest),
}

/// Whether an error comes from a full disk, or a user's quota, at its bottom.
#[must_use]
pub fn is_disk_full(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        let full = |kind: io::ErrorKind| matches!(kind, io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
        if let Some(io) = error.downcast_ref::<io::Error>() {
            // An error can be wrapped into another, which then has a kind of its own.
            if full(io.kind()) || io.get_ref().is_some_and(|inner| is_disk_full(inner)) {
                return true;
            }
        }
        // What a full disk does to the index beyond the first error.
        let index = match error.downcast_ref::<IndexError>() {
            None => error.downcast_ref::<std::sync::Arc<IndexError>>().map(|shared| &**shared),
            index => index,
        };
        if matches!(index, Some(IndexError::Closed | IndexError::Database { source: fjall::Error::Poisoned, .. })) {
            return true;
        }
        next = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::PackError;

    #[test]
    fn a_full_disk_is_found_at_the_bottom() {
        let full = || io::Error::from(io::ErrorKind::StorageFull);
        let pack = |source| PackError::Io { doing: "appending to", path: "/p".into(), source };
        assert!(is_disk_full(&Error::Objects(ObjectError::Pack(pack(full())))));
        assert!(!is_disk_full(&Error::Objects(ObjectError::Pack(pack(io::ErrorKind::Other.into())))));
        let database = |source| IndexError::Database { doing: "writing", source };
        let flush = |error| Error::Index(IndexError::Flush(std::sync::Arc::new(error)));
        assert!(is_disk_full(&flush(database(fjall::Error::Io(full())))));
        assert!(is_disk_full(&flush(database(fjall::Error::Poisoned))));
        assert!(is_disk_full(&flush(IndexError::Closed)));
        assert!(!is_disk_full(&flush(IndexError::Panicked)));
        assert!(is_disk_full(&io::Error::other(Error::Input(full()))));
    }
}
