//! The traps of the worker protocol: places where daemons and clients are known to have gone wrong. Each has one test
//! named after it, which drives a daemon over its socket with bytes written out by hand.

#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod framing;
mod objects;
mod processes;
mod raw;
mod values;
mod versions;
