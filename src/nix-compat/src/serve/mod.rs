//! The serve protocol: what `nix-store --serve` speaks, which is what a store called `ssh://…` is reached by.
//!
//! It is older and simpler than the [worker protocol](crate::worker): one [`Request`], its [`Response`], and no messages
//! in between. The server's log goes to its standard error, and an error ends it. Values have the worker protocol's
//! encodings. Versions 2.1 to 2.7 are here, which is Nix 1.9 to 2.34; newer servers speak these as well.

mod build;
mod handshake;
mod request;
mod response;

pub use build::{BuildOptions, read_build_result, write_build_result};
pub use handshake::{HandshakeError, read_answer, read_greeting, write_answer, write_greeting};
pub use request::Request;
pub use response::{Response, read_path_info, write_path_info};

use crate::store_path::StoreDir;
use crate::worker;

/// The newest minor version spoken here.
pub const NEWEST_MINOR: u16 = 7;
/// The oldest one.
pub const OLDEST_MINOR: u16 = 1;

/// The parameters of an established connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Protocol {
    /// Minor version: the lower one of client and server.
    pub minor: u16,
    /// The directory that store paths are printed and parsed with.
    pub store_dir: StoreDir,
}

impl Protocol {
    /// Whether the connection is at least at 2.`minor`.
    pub fn since(&self, minor: u16) -> bool {
        self.minor >= minor
    }

    /// The worker protocol whose values are encoded alike; below its 1.30 a derivation means all of its outputs.
    fn values(&self) -> worker::Protocol {
        worker::Protocol { minor: 29, features: worker::Features::NONE, store_dir: self.store_dir.clone() }
    }
}
