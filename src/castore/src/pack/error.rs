//! What can go wrong with pack files.

use std::io;
use std::path::{Path, PathBuf};

use super::{BlockError, PACK_VERSION};

/// Why an operation on pack files failed.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The system refused.
    #[error("{doing} {path}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Durable data is missing: a pack is shorter than the index remembers.
    #[error(
        "pack {path} is damaged: {actual} bytes long, but {committed} were committed; `castored fsck --rebuild-index` \
         makes the store usable without what was lost, and names the paths that it is missing from"
    )]
    Short {
        /// The pack.
        path: PathBuf,
        /// Its length.
        actual: u64,
        /// The length it had at least.
        committed: u64,
    },
    /// A file does not begin as the pack with its number does.
    #[error("{0} does not begin with the header of this pack")]
    Header(PathBuf),
    /// A pack of another version.
    #[error("pack {path} has format version {version}, this castored knows version {PACK_VERSION}")]
    Version {
        /// The pack.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// A block cannot be what the index says it is.
    #[error("block at {offset} of pack {pack:08x}")]
    Block {
        /// The pack's number.
        pack: u32,
        /// Where the block begins.
        offset: u64,
        /// What is wrong.
        source: BlockError,
    },
    /// zstd refused to compress.
    #[error("compressing a block")]
    Compress(#[source] io::Error),
    /// The pack is not there: it was collected.
    #[error("pack {0:08x} is gone")]
    Gone(u32),
    /// Somebody else deleted the file of a pack while it was in use.
    #[error("the file of pack {0} has been deleted")]
    Deleted(PathBuf),
    /// Somebody else cut the file of a pack short while it was in use.
    #[error("the file of pack {path} has been cut to {actual} of {written} bytes")]
    Cut {
        /// The pack.
        path: PathBuf,
        /// Its length, in bytes.
        actual: u64,
        /// The length it had, in bytes.
        written: u64,
    },
    /// The index remembers less of a pack than it did: it has lost what was durable.
    #[error(
        "the index has {committed} bytes of pack {path}, but had {floor} before: the index is damaged; `castored fsck \
         --rebuild-index` makes a new one from the packs"
    )]
    Forgotten {
        /// The pack.
        path: PathBuf,
        /// What the index knows.
        committed: u64,
        /// What it knew.
        floor: u64,
    },
    /// All pack numbers are used up.
    #[error("no pack number is left")]
    Exhausted,
}

impl PackError {
    /// Whether what is stored is not what was written, or cannot be read: another copy would help.
    pub(crate) fn is_damage(&self) -> bool {
        match self {
            Self::Block { .. } | Self::Header(_) | Self::Short { .. } | Self::Deleted(_) | Self::Cut { .. } => true,
            Self::Io { source, .. } => source.raw_os_error() == Some(nix::errno::Errno::EIO as i32),
            Self::Forgotten { .. } | Self::Version { .. } | Self::Compress(_) | Self::Gone(_) | Self::Exhausted => {
                false
            }
        }
    }
}

/// The error of a system call on a file, to be completed with what the system said.
pub(super) fn at<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> PackError + 'a {
    move |source| PackError::Io { doing, path: path.to_owned(), source }
}
