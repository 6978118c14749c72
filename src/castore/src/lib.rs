//! Content-addressed storage: blobs, Merkle directories, and the local engine of packs and an index.
//!
//! Everything is named by its BLAKE3 [`Digest`]. A *blob* is the contents of a file; a [`Directory`] lists names with
//! the [`Node`]s behind them; both are handed out by services ([`BlobService`], [`DirectoryService`]) that know nothing
//! of store paths.
//!
//! The modules, from what others see down to the bytes on disk:
//!
//! * [`engine`]: the services over one directory of the machine; imports are sessions of it. Blobs are cut into chunks
//!   here, trees are walked to hold them or to find what is alive.
//! * [`objects`]: chunks, chunk lists and directories, each an object known by kind and digest; [`collect`] removes
//!   those nothing refers to, [`repack`] rewrites packs for the space.
//! * [`pack`] and [`index`]: append-only files of compressed blocks, and the database that says where in them an object
//!   is. `FORMAT.md` tells their bytes. [`check`] holds the one against the other, [`rebuild`] makes the index from the
//!   packs.
//! * [`proto`]: the messages of `tvix.castore.v1`, for those who speak to other machines.

mod blob;
mod cache;
pub mod check;
mod chunk;
pub mod collect;
mod digest;
mod directory;
pub mod engine;
mod error;
pub mod index;
mod names;
mod node;
pub mod objects;
pub mod pack;
pub mod parallel;
mod prefetch;
pub mod proto;
pub mod rebuild;
pub mod repack;
mod services;
mod session;

pub use digest::{Digest, DigestError};
pub use directory::{DecodeError, Directory, DirectoryError};
pub use error::{BlobDamage, Error, is_disk_full};
pub use names::{NameError, NodeName, SymlinkTarget, TargetError};
pub use node::Node;
pub use proto::NodeError;
#[doc(hidden)]
pub use services::contract;
pub use services::memory::MemoryStore;
pub use services::{BlobService, BlobStat, DirectoryService};
