//! NAR: Nix's archive format, read and written one node at a time.
//!
//! An archive is a tree of regular files (contents and executable bit), symlinks and directories, in a form that is
//! fully determined by the tree; so it can be hashed. [`NarReader`] turns its bytes into [`NarEvent`]s and
//! [`NarWriter`] does the reverse; both keep no more than one name per open directory, so memory is bounded whatever
//! the archive.
//!
//! Reading is strict: everything a writer could not have produced is an error (names out of order, non-zero padding,
//! an `executable` marker with text), and so is what exceeds the limits below, which are stock Nix's since 2.34.8.

mod format;
mod reader;
mod writer;

pub use format::NameError;
pub use reader::{Contents, NarError, NarEvent, NarReader};
pub use writer::{NarWriter, WriteError};

/// The longest name of a directory entry, in bytes.
pub const MAX_NAME_LEN: usize = 255;
/// The longest symlink target, in bytes.
pub const MAX_TARGET_LEN: usize = 4095;
/// How many nodes may lie one inside the other, the root included.
pub const MAX_DEPTH: usize = 64;
/// The largest file, in bytes: no file system has larger ones.
pub const MAX_FILE_SIZE: u64 = i64::MAX as u64;
