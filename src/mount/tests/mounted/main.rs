//! The mount as programs see it: a store in memory, really mounted.
//!
//! Every test mounts a store of its own. Where that cannot be done (no FUSE, no right to mount) it says so and passes.
#![allow(clippy::unwrap_used)]

mod attributes;
mod changes;
mod contents;
mod digests;
mod elsewhere;
mod fixture;
mod life;
mod names;
mod read_only;
mod users;
