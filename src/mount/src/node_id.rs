//! Inode numbers that are computed, not remembered.

use store::view::FIRST_ROOT_NUMBER;

/// The number of a file, directory or symlink in the mount: what `st_ino` shows.
///
/// The upper half is the number of the store path it belongs to, the lower half its position in that path's tree in
/// pre-order ([`castore::Directory::position`]). The store directory itself is 1, the number FUSE gives every root; no
/// path has the number 0 or 1, so it stays alone. Two names of one castore object are two nodes with two numbers: an
/// executable file and its plain twin differ in their mode, and a directory has one parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(u64);

impl NodeId {
    /// The store directory.
    pub const STORE: NodeId = NodeId(1);
    /// The directory `.links` in it; no path has number 0.
    pub const LINKS: NodeId = NodeId(2);

    /// The root of the store path with this number.
    pub fn of_path(number: u32) -> NodeId {
        debug_assert!(number >= FIRST_ROOT_NUMBER, "number {number} is kept for the store directory");
        NodeId(u64::from(number) << 32)
    }

    /// The node `distance` positions after this one in the same tree; `None` when positions run out of 32 bits.
    pub fn descendant(self, distance: u64) -> Option<NodeId> {
        let position = u64::from(self.position()).checked_add(distance)?;
        let position = u32::try_from(position).ok()?;
        Some(NodeId(u64::from(self.number()) << 32 | u64::from(position)))
    }

    /// The number of the store path it belongs to.
    pub fn number(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Its position in the tree of its store path.
    pub fn position(self) -> u32 {
        self.0 as u32
    }
}

impl From<u64> for NodeId {
    fn from(raw: u64) -> NodeId {
        NodeId(raw)
    }
}

impl From<NodeId> for u64 {
    fn from(id: NodeId) -> u64 {
        id.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_path_and_position() {
        let node = NodeId::of_path(7).descendant(5).unwrap();
        assert_eq!(u64::from(node), 7 << 32 | 5);
        assert_eq!((node.number(), node.position()), (7, 5));
        assert_eq!(node.descendant(3).unwrap().position(), 8);
    }

    #[test]
    fn the_store_directory_collides_with_no_path() {
        assert_eq!((NodeId::STORE.number(), NodeId::LINKS.number()), (0, 0));
        assert!(NodeId::of_path(FIRST_ROOT_NUMBER) > NodeId::STORE);
    }

    #[test]
    fn positions_do_not_spill_into_the_next_path() {
        let last = NodeId::of_path(2).descendant(u64::from(u32::MAX)).unwrap();
        assert_eq!((last.number(), last.position()), (2, u32::MAX));
        assert_eq!(last.descendant(1), None);
        assert_eq!(last.descendant(u64::MAX), None);
    }
}
