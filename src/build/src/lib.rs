//! Building derivations: scheduling across all clients, and the sandbox.

pub mod helper;
pub mod sandbox;

pub use sandbox::sandbox_main;
