//! Nodes: what a store path or a directory entry is.

use crate::{Digest, SymlinkTarget};

/// A directory, a regular file or a symbolic link. Its name belongs to whoever holds it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Node {
    /// A directory.
    Directory {
        /// The digest of the [`Directory`](crate::Directory).
        digest: Digest,
        /// Entries below it at every depth: [`Directory::size`](crate::Directory::size).
        size: u64,
    },
    /// A regular file.
    File {
        /// The digest of the contents.
        digest: Digest,
        /// The length of the contents in bytes.
        size: u64,
        /// Whether it may be executed: mode 0555 rather than 0444.
        executable: bool,
    },
    /// A symbolic link.
    Symlink {
        /// Where it points.
        target: SymlinkTarget,
    },
}

impl Node {
    /// How many positions the node takes in its tree's pre-order: itself and everything below it.
    ///
    /// `None` when that is more than a `u64` can count, which only a made-up size can claim.
    pub fn span(&self) -> Option<u64> {
        match self {
            Node::Directory { size, .. } => size.checked_add(1),
            Node::File { .. } | Node::Symlink { .. } => Some(1),
        }
    }

    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        matches!(self, Node::Directory { .. })
    }
}
