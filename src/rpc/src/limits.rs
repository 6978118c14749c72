//! What one client, and all of them together, can make this process hold.
//!
//! Peers on loopback TCP are strangers, so every queue, buffer and count that they influence is bounded here.

use std::time::Duration;

pub use rpc_client::limits::{
    CONNECTION_WINDOW_BYTES, KEEPALIVE_INTERVAL, MAX_MESSAGE_BYTES, PIECE_BYTES, QUEUE_ITEMS, STREAM_WINDOW_BYTES,
};

/// Connections open at the same time; more wait in the listen queue of the kernel.
pub const MAX_CONNECTIONS: usize = 256;

/// Calls under way on one connection; HTTP/2 makes the client wait with the next.
pub const MAX_CALLS_PER_CONNECTION: u32 = 64;

/// Bytes of the headers of one request.
pub const MAX_HEADER_BYTES: u32 = 16 << 10;

/// The same for a client that has it compressed: as much as castored's largest chunk.
pub const COMPRESSED_PIECE_BYTES: usize = 128 << 10;

/// Blob uploads under way at the same time, in all connections. Each holds a thread.
pub const MAX_BLOB_UPLOADS: usize = 64;

/// Directory uploads under way at the same time, in all connections.
pub const MAX_DIRECTORY_UPLOADS: usize = 64;

/// Directories of an upload that are stored together.
pub const DIRECTORIES_PER_PUT: usize = 1024;

/// Encoded bytes of directories of an upload after which they are stored.
pub const DIRECTORY_BYTES_PER_PUT: usize = 1 << 20;

/// Different directories in one upload; the digest of each is remembered until the root has come.
pub const MAX_DIRECTORIES_PER_PUT: usize = 1 << 20;

/// Directories that one recursive Get sends; it remembers the digest of each.
pub const MAX_DIRECTORIES_PER_GET: usize = 1 << 22;

/// Directories that are fetched at once, on one thread, while a recursive Get goes on.
pub const DIRECTORIES_PER_STEP: usize = 64;

/// Path infos that are fetched at once, on one thread, while a List goes on.
pub const PATHS_PER_STEP: usize = 256;

/// NARs computed at the same time for CalculateNAR and Put.
pub const MAX_NARS: usize = 4;

/// How long an upload may pause before it is given up.
pub const UPLOAD_IDLE: Duration = Duration::from_secs(60);

/// How long calls under way may take to finish once the server was told to stop.
pub const SHUTDOWN_GRACE: Duration = Duration::from_secs(1);
