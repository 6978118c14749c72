//! The store as a read-only FUSE filesystem.
//!
//! [`Tree`] is the filesystem without a kernel: inode numbers, names, attributes, listings, contents, over a
//! [`StoreView`](store::view::StoreView). It knows nothing of FUSE. The adapter puts it behind the fuser crate,
//! [`Mount`] puts that under a directory, and a thread of its own tells the kernel when the set of store paths changes.
//!
//! Three decisions make it as fast as a local filesystem, because they let the kernel answer from its own caches:
//!
//! * **No open.** `open` and `opendir` are refused with ENOSYS once; from then on the kernel opens without asking.
//! * **Nothing expires.** Store paths never change, so names and attributes are handed out for good. What *can* change
//!   is the store directory itself: its missing names are never remembered, and the rest is taken back by notification.
//! * **No inode table.** A [`NodeId`] says where its node is, so there is nothing to remember, forget or lock, and numbers
//!   survive a restart.
//!
//! A mount can outlive its server: [`Mount::kept`] hands out what has to stay open, [`Mount::take_over`] goes on from it.

mod device;
mod error;
mod fuse;
mod handshake;
mod invalidation;
mod journal;
mod kept;
mod last_words;
mod mount;
mod mount_table;
mod mountpoint;
mod node_id;
mod resent;
mod tree;
mod unmount;
mod waiting;

pub use error::MountError;
pub use kept::Kept;
pub use last_words::answer_for;
pub use mount::{Mount, Options, abandon};
pub use node_id::NodeId;
pub use tree::{Attributes, DigestAttribute, Kind, Listed, Tree, TreeError};
pub use unmount::{require_empty, unmount};
