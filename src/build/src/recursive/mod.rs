//! The store for a running build ("recursive Nix").
//!
//! A derivation that requires the system feature `recursive-nix` gets a socket in its build directory. Who is asked
//! there is the daemon, which knows the protocol ([`RecursiveStore`]); what may be asked for is known here ([`Gate`]).
//! `socket` is the way there: it is there before the builder, and gone before the outputs are taken.

mod gate;
mod socket;

use std::os::unix::net::UnixListener;
use std::sync::Arc;

pub(crate) use self::gate::Opening;
pub use self::gate::{Gate, GateError};
pub(crate) use self::socket::{Served, Socket};

/// The system feature by which a derivation asks for it, and the experimental feature that allows it.
pub(crate) const FEATURE: &str = "recursive-nix";

/// Whoever can serve a store to builds.
pub trait RecursiveStore: Send + Sync {
    /// Begins to serve what `gate` lets through to everybody who connects.
    ///
    /// # Errors
    /// When the listener cannot be used.
    fn serve(&self, listener: UnixListener, gate: Arc<Gate>) -> std::io::Result<Box<dyn Serving>>;
}

/// A store that is being served.
pub trait Serving: Send {
    /// Ends all connections. When it returns nothing will pass the gate any more. Blocks.
    fn close(self: Box<Self>);
}
