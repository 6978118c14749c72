//! The nix-daemon side: sockets, sessions, and the operations of the worker protocol.
//!
//! ```text
//! server ── accepts ──> session (one task per client)
//!                          │ connection: bytes in, bytes out, hang-up
//!                          │ ops: what each request does ──> store, build
//!                          │ payload: a client's stream ──> a worker thread
//!                          └ events: log and activities ──> the client
//! ```

mod config;
mod connection;
mod context;
mod daemon;
mod error;
mod events;
mod listen;
mod ops;
mod options;
mod payload;
mod peer;
mod record;
mod recursive;
mod server;
mod session;
mod shares;
mod socket;
mod streams;

pub use config::{
    ConfigError, Locations, durability, http_listen, http_push_token_file, load_settings, memory_budget,
    optimise_when_idle, parse_listen, upload_to,
};
pub use connection::ConnectionError;
pub use daemon::{Client, Daemon, Extras};
pub use error::OpError;
pub use events::Events;
pub use listen::{ListenError, adopt, bind};
pub use peer::{Peer, Trust};
pub use record::Recorder;
pub use server::Door;
pub use session::NIX_VERSION;
pub use streams::{MAX_STREAMS, STREAM_BYTES};
