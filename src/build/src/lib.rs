//! Building derivations: scheduling across all clients, and the sandbox.
//!
//! | module | what it knows |
//! |---|---|
//! | [`scheduler`] | who wants what, what depends on what, whose turn it is |
//! | `run` | one build, from inputs to registered outputs |
//! | `place`, `room`, `environment`, `attributes`, `graphs` | where it runs, and what the builder is told |
//! | `remote` | builds on other machines |
//! | `recursive` | the store for a builder that asks for it |
//! | [`helper`], [`sandbox`], `cgroup` | the process it runs in, and its control group |
//! | [`builtin`] | the builders that are part of Nix |
//! | [`dump`], `output`, `kept` | taking what it left behind, or keeping it |
//! | `log`, `said` | what it says: the log that is kept, and messages among its lines |
//! | `hooks` | programs that settings have run around it |
//!
//! A build happens in three processes: the daemon (everything but `sandbox`), its helper (one thread, [`sandbox_main`]),
//! and the builder.

mod attributes;
pub mod builtin;
mod cgroup;
pub mod dump;
mod environment;
mod failure;
mod graphs;
pub mod helper;
mod hooks;
mod kept;
pub mod log;
pub mod oom;
mod options;
mod output;
mod own;
mod place;
mod recursive;
mod remote;
mod remove;
mod room;
mod run;
mod said;
pub mod sandbox;
pub mod scheduler;
mod users;

pub use dump::{dump_tree, dump_tree_knowing};
pub use failure::{exit_status, request_error};
pub use recursive::{Gate, GateError, RecursiveStore, Serving};
pub use sandbox::sandbox_main;
pub use scheduler::{BuildConfig, Client, Events, RunningBuild, Scheduler, activity_id};
