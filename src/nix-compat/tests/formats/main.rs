//! The formats against what stock Nix (2.34.8) made, and against themselves.
//!
//! `data/derivations` holds `.drv` files as `nix-instantiate` wrote them, `data/tree.nar` what `nix-store --dump` made
//! of a small tree. The texts in the tests are output of the commands named beside them.

// The helpers below are no test functions, but only tests call them.
#![allow(clippy::unwrap_used)]

mod derivations;
mod machines;
mod narinfos;
mod nars;
mod path_infos;
mod store_paths;
