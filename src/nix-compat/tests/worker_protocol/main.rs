//! The worker and the serve protocol's encodings: golden vectors, recorded sessions of stock Nix, and properties of every message at
//! every version.

// clippy.toml allows it in test functions only, not in their helpers.
#![allow(clippy::unwrap_used)]

mod expressible;
mod golden;
mod handshake;
mod properties;
mod recordings;
mod serve;
mod strategies;
mod support;
