//! What one client, and all of them together, can make this process hold.

use std::time::Duration;

/// Connections open at the same time; more wait in the listen queue of the kernel.
pub const MAX_CONNECTIONS: usize = 256;

/// Large bodies (NARs, listings, logs) made at the same time, each on a thread; more wait for their turn.
pub const MAX_RENDERINGS: usize = 64;

/// Looks into the store for small answers at the same time; more wait for their turn.
pub const MAX_LOOKUPS: usize = 16;

/// Bytes of a request's line and headers.
pub const MAX_HEADER_BYTES: usize = 16 << 10;

/// Bytes read ahead of what is answered; and when so many wait for a client, no further piece of a body is taken.
pub const MAX_BUFFER_BYTES: usize = 64 << 10;

/// Headers of a request.
pub const MAX_HEADERS: usize = 64;

/// Bytes of a large body that are handed over at a time.
pub const PIECE_BYTES: usize = 256 << 10;

/// Pieces between the thread that makes a body and the connection.
pub const WAITING_PIECES: usize = 4;

/// How long a client may take to send a request, also the next one on a connection that is kept; and how long a pusher may
/// send nothing.
pub const REQUEST_TIME: Duration = Duration::from_secs(60);

/// Bytes that a client must accept within [`WRITE_TIME`], if there are so many for it.
pub const PACE_BYTES: usize = 64 << 10;

/// How long a client may take to accept [`PACE_BYTES`].
pub const WRITE_TIME: Duration = Duration::from_secs(60);

/// How long answers under way may take to finish once the server was told to stop.
pub const SHUTDOWN_GRACE: Duration = Duration::from_secs(1);

/// Entries of a tree that a page shows; the listing has all.
pub const MAX_SHOWN_ENTRIES: usize = 2000;

/// References, referrers or signatures that a page shows.
pub const MAX_SHOWN_PATHS: usize = 500;

/// Paths that are added up for a closure's size; of larger ones a page says so.
pub const MAX_CLOSURE: usize = 20_000;

/// NARs that are taken in at the same time, each on a thread; more wait for their turn.
pub const MAX_PUSHES: usize = 16;

/// NARs that were uploaded and that no narinfo has described yet.
pub const MAX_PENDING: usize = 512;

/// How long such a NAR is kept.
pub const PUSH_TIME: Duration = Duration::from_secs(600);

/// Bytes of a narinfo or realisation that is pushed: room for ten thousand references.
pub const MAX_DESCRIPTION_BYTES: usize = 1 << 20;

/// Bytes of the name of a NAR's file that is pushed.
pub const MAX_PUSH_NAME: usize = 128;

/// Bytes read of a file with tokens.
pub const MAX_TOKEN_FILE: u64 = 64 << 10;

/// What a test would not want to wait for, or fill. Otherwise the constants of the same names.
#[derive(Clone, Debug)]
pub struct Limits {
    /// [`MAX_CONNECTIONS`].
    pub max_connections: usize,
    /// [`MAX_RENDERINGS`].
    pub max_renderings: usize,
    /// [`REQUEST_TIME`].
    pub request_time: Duration,
    /// [`WRITE_TIME`].
    pub write_time: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: MAX_CONNECTIONS,
            max_renderings: MAX_RENDERINGS,
            request_time: REQUEST_TIME,
            write_time: WRITE_TIME,
        }
    }
}
