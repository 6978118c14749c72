//! Builds as a client sees them: a real store, mounted, and real sandboxes.
//!
//! Every test has a store of its own. Without root or FUSE they say so and pass.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod addressed;
mod attacks;
mod attacks_inside;
mod builtins;
mod downloads;
mod failures;
mod hooks;
mod machines;
mod outputs;
mod rig;
mod server;
mod settings;
mod sharing;
