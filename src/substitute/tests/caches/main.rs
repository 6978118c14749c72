//! Real stores that fetch from binary caches: in directories, and from a small server that can do everything wrong.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod closures;
mod failures;
mod faults;
mod formats;
mod limits;
mod realisations;
mod remembered;
mod rig;
mod server;
mod servers;
