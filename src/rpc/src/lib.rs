//! The store over gRPC: `tvix.castore.v1`, `tvix.store.v1`, the same under their `snix` names, reflection and health.
//!
//! A request enters in [`server`], is routed by tonic to one of the three services (`blobs`, `directories`, `paths`),
//! and each of those does its I/O on the blocking pool through `blocking`. What a client may make the
//! process hold is in [`limits`]. The messages, and the other direction, are the `rpc-client` crate's.

mod blobs;
mod blocking;
mod connection;
mod cut_off;
mod directories;
pub mod limits;
mod paths;
pub mod server;
mod snix_names;
mod status;
mod store_paths;
mod upload;

pub use connection::{Origin, Peer, Trust, TrustOf};
pub use paths::{PathInfos, PathsError};
pub use server::{Listen, Listeners, ServeError, Services, serve};
