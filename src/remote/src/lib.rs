//! Other stores that speak one of Nix's protocols: a daemon's socket on this machine, or another machine over ssh.
//!
//! | module | what it knows |
//! |---|---|
//! | [`worker`] | the client's side of the worker protocol: `unix://`, `ssh-ng://` |
//! | [`serve`] | that of the serve protocol: `ssh://` |
//! | `wire` | a stream with what was received of it, its limits of time and size |
//! | `ssh`, `process` | the command that reaches another machine, and its process |
//! | [`store`] | what both protocols can do, under one name |
//! | `order` | references first |
//!
//! Everything here blocks, and belongs on threads of its own. The protocols run over any [`Stream`]; processes are
//! connected by socket pairs, so that every wait can have an end.

mod error;
mod order;
mod process;
pub mod serve;
mod ssh;
pub mod store;
mod wire;
pub mod worker;

pub use error::ClientError;
pub use order::references_first;
pub use process::Stopper;
pub use store::{BuildLog, Download, OutputNames, RemoteStore, SharedLog};
pub use wire::{Limits, Ready, Stream};
pub use worker::Connection;
