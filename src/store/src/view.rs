//! What the mount and the gRPC services need to know of a store: a read-only view.
//!
//! The view speaks of *roots* (a store path with its castore node) and of the castore objects below them. It knows
//! nothing of registrations, locks or garbage collection, so the crates that only show a store cannot change one.

use std::sync::Arc;

use bytes::Bytes;
use castore::{Digest, Directory, Node};
use nix_compat::store_path::{StoreDir, StorePath};

/// The smallest number a store path can have. One is left free for the store directory itself.
pub const FIRST_ROOT_NUMBER: u32 = 2;

/// A valid store path and the tree behind it.
#[derive(Clone, Debug)]
pub struct Root {
    /// The path's number: given at registration, never below [`FIRST_ROOT_NUMBER`], never used again for another path.
    /// Inode numbers are made from it, so it survives a restart.
    pub number: u32,
    /// The store path; its base name is the name in the store directory.
    pub path: StorePath,
    /// What the path holds.
    pub node: Node,
}

/// A change of the set of valid paths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreEvent {
    /// The path of this name is about to become valid, to stop being valid, or to get another number. Told before that is
    /// committed, and it may come to nothing. Unlike the others this one is told with locks held: a subscriber must not
    /// read the view.
    Changing {
        /// The base name.
        name: String,
    },
    /// A path became valid: [`StoreView::lookup`] finds it already.
    Added {
        /// The base name.
        name: String,
        /// The path's number.
        number: u32,
    },
    /// A path stopped being valid: [`StoreView::lookup`] no longer finds it.
    Removed {
        /// The base name.
        name: String,
        /// The number the path had.
        number: u32,
    },
    /// Paths may have come that nobody told of: the view is of a store elsewhere, and what it listed grows old.
    Outdated,
}

/// Told of every [`StoreEvent`], in the order in which the changes became visible for one name; what changed at once is
/// told at once.
///
/// Called on the thread that made the change, before that change is answered to the client and with no lock of the
/// store held (but see [`StoreEvent::Changing`]): a subscriber may read the view, and whatever it makes visible is visible when the client hears "done".
pub type Subscriber = Arc<dyn Fn(&[StoreEvent]) + Send + Sync>;

/// The filesystem the store's data lies on, as `statvfs` tells it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Space {
    /// Unit of the block counts, in bytes.
    pub block_size: u32,
    /// All blocks.
    pub blocks: u64,
    /// Blocks nobody uses.
    pub blocks_free: u64,
    /// Blocks an unprivileged user may use.
    pub blocks_available: u64,
    /// All inodes.
    pub files: u64,
    /// Inodes nobody uses.
    pub files_free: u64,
}

/// Why a view could not answer.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    /// A digest that a valid path refers to is not in the castore.
    #[error("object {0} is missing from the castore")]
    Missing(Digest),
    /// Contents that are still at the source they are to come from.
    #[error("blob {0} has not come from its source yet")]
    Elsewhere(Digest),
    /// The index or a pack could not be read, or holds something damaged.
    #[error("cannot read the store: {0}")]
    Storage(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// What is done once contents are here, or cannot be had.
pub type Then = Box<dyn FnOnce(Result<(), ViewError>) + Send>;

/// A store, read-only. Every method may be called from many threads at once and may block on the disk.
pub trait StoreView: Send + Sync {
    /// The directory the paths of this store begin with.
    fn store_dir(&self) -> &StoreDir;

    /// The valid path of this base name (`<hash>-<name>`). A name that is no store path is simply not there.
    fn lookup(&self, base_name: &str) -> Result<Option<Root>, ViewError>;

    /// The valid path that has this number.
    fn by_number(&self, number: u32) -> Result<Option<Root>, ViewError>;

    /// Valid paths with numbers above `after`, in the order of their numbers, at most `limit`; empty at the end.
    fn list(&self, after: u32, limit: usize) -> Result<Vec<Root>, ViewError>;

    /// The directory of this digest.
    fn directory(&self, digest: &Digest) -> Result<Arc<Directory>, ViewError>;

    /// Up to `len` bytes of a blob from `offset`. Shorter only at the blob's end. Never waits for another machine where
    /// [`StoreView::bring`] can.
    ///
    /// The bytes must lie in anonymous memory, never in a mapped file (a page fault in the middle of a reply to the
    /// kernel would turn a killed server into an I/O error at the reader).
    fn read(&self, digest: &Digest, offset: u64, len: usize) -> Result<Bytes, ViewError>;

    /// Has a blob fetched of which [`StoreView::read`] said [`ViewError::Elsewhere`]. Returns at once; `then` is called when it
    /// is here or could not be had, on a thread that may read.
    fn bring(&self, digest: &Digest, then: Then) {
        then(Err(ViewError::Elsewhere(*digest)));
    }

    /// Calls `subscriber` for every later change.
    fn subscribe(&self, subscriber: Subscriber);

    /// Room on the filesystem that holds the store.
    fn space(&self) -> Result<Space, ViewError>;

    /// Tells that something of this path could not be read. Whoever can have it repaired does, after this has returned.
    fn report_damage(&self, _path: &StorePath) {}
}
