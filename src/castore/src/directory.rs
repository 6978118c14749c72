//! Directories: sorted names with their nodes, their canonical encoding, and the positions inode numbers come from.

mod encoding;

use bytes::Bytes;

use crate::{Digest, NameError, Node, NodeName};

pub use encoding::DecodeError;

/// A directory: names in bytewise order, each once, with the node behind it.
///
/// Positions number a tree in pre-order. The directory itself has position 0, its first entry 1, and an entry comes
/// after everything below the entries before it. The [`size`](Node::Directory::size) every directory node carries makes
/// this computable without looking further down, in both directions: see [`Directory::position`] and
/// [`Directory::locate`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Directory {
    entries: Box<[Entry]>,
    size: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    name: NodeName,
    node: Node,
    position: u64,
}

/// Why nodes do not make a directory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DirectoryError {
    /// An entry has a name no entry can have.
    #[error(transparent)]
    Name(#[from] NameError),
    /// Two entries have the same name.
    #[error("two entries are named \"{0}\"")]
    Duplicate(NodeName),
    /// The sizes of the directories in it add up to more than a `u64`.
    #[error("the sizes of the directories below overflow at \"{0}\"")]
    SizeOverflow(NodeName),
}

impl Directory {
    /// Makes a directory of `entries` in whatever order they come.
    pub fn new(entries: impl IntoIterator<Item = (NodeName, Node)>) -> Result<Directory, DirectoryError> {
        let mut entries: Vec<_> = entries.into_iter().collect();
        entries.sort_by(|(left, _), (right, _)| left.cmp(right));
        Directory::from_sorted(entries)
    }

    /// Makes a directory of entries that are in order already; two of one name are still an error.
    fn from_sorted(sorted: Vec<(NodeName, Node)>) -> Result<Directory, DirectoryError> {
        let mut entries: Vec<Entry> = Vec::with_capacity(sorted.len());
        let mut size = 0u64;
        for (name, node) in sorted {
            if entries.last().is_some_and(|previous| previous.name == name) {
                return Err(DirectoryError::Duplicate(name));
            }
            // The size so far is the number of positions taken, and the directory itself takes one more.
            let position = size.checked_add(1);
            let end = node.span().and_then(|span| size.checked_add(span));
            let (Some(position), Some(end)) = (position, end) else {
                return Err(DirectoryError::SizeOverflow(name));
            };
            size = end;
            entries.push(Entry { name, node, position });
        }
        Ok(Directory { entries: entries.into(), size })
    }

    /// Decodes a directory, refusing every encoding but the canonical one.
    ///
    /// The directory keeps nothing of `encoded` alive, so it may be a slice of something larger.
    pub fn decode(encoded: &[u8]) -> Result<Directory, DecodeError> {
        encoding::decode(Bytes::copy_from_slice(encoded))
    }

    /// The canonical encoding: a `tvix.castore.v1.Directory` with each list in the order of names.
    pub fn encode(&self) -> Vec<u8> {
        encoding::encode(self)
    }

    /// The digest of the canonical encoding. It is computed each time.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.encode())
    }

    /// How many entries there are at every depth below it.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// How many entries it has itself.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether it has no entries.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The entries in bytewise order of their names.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = (&NodeName, &Node)> + DoubleEndedIterator {
        self.entries.iter().map(|entry| (&entry.name, &entry.node))
    }

    /// The entry at `index` in the order of names.
    pub fn entry(&self, index: usize) -> Option<(&NodeName, &Node)> {
        self.entries.get(index).map(|entry| (&entry.name, &entry.node))
    }

    /// The entry of this name with its index; O(log n).
    pub fn find(&self, name: &[u8]) -> Option<(usize, &Node)> {
        let index = self.entries.binary_search_by(|entry| entry.name.as_bytes().cmp(name)).ok()?;
        Some((index, &self.entries[index].node))
    }

    /// The position of the entry at `index` counted from this directory, which has 0.
    ///
    /// # Panics
    /// When there is no such entry.
    pub fn position(&self, index: usize) -> u64 {
        self.entries[index].position
    }

    /// The entry that `position` lies in, and the position counted from that entry (0 is the entry itself); O(log n).
    ///
    /// `None` for 0, which is this directory, and for positions beyond its [`size`](Directory::size). Going down with the
    /// remainder until it is 0 resolves any position of the tree.
    pub fn locate(&self, position: u64) -> Option<(usize, u64)> {
        if position > self.size {
            return None;
        }
        let index = self.entries.partition_point(|entry| entry.position <= position).checked_sub(1)?;
        Some((index, position - self.entries[index].position))
    }

    /// The directories in it, with the size each claims, in the order of names.
    pub fn directories(&self) -> impl Iterator<Item = (&Digest, u64)> {
        self.entries.iter().filter_map(|entry| match &entry.node {
            Node::Directory { digest, size } => Some((digest, *size)),
            Node::File { .. } | Node::Symlink { .. } => None,
        })
    }

    /// The node that stands for this directory in its parent. It encodes and hashes the directory.
    pub fn to_node(&self) -> Node {
        Node::Directory { digest: self.digest(), size: self.size }
    }

    /// Bytes of memory it takes, about: what a cache should count.
    pub fn memory(&self) -> usize {
        // Names and targets are slices of one buffer when decoded; on average it has this much beside the digests.
        const TEXT_PER_ENTRY: usize = 64;
        size_of::<Directory>() + self.entries.len() * (size_of::<Entry>() + TEXT_PER_ENTRY)
    }
}

#[cfg(test)]
mod tests;
