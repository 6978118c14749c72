//! What one end may make the other hold, where both ends have to agree.

use std::time::Duration;

/// Bytes of the largest message that is accepted, once it is decompressed: a large Directory, or one piece of a blob.
pub const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// Bytes of one piece of a blob as it is sent.
pub const PIECE_BYTES: usize = 1 << 20;

/// Bytes the other end may send ahead of what was consumed, for one call.
pub const STREAM_WINDOW_BYTES: u32 = 1 << 20;

/// Bytes the other end may send ahead of what was consumed, for all calls of a connection.
pub const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;

/// Items (pieces, directories, path infos) between who makes or stores them and the connection.
pub const QUEUE_ITEMS: usize = 4;

/// A silent connection is asked after this long whether it is still there.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
