//! Threads for work that waits for a client.
//!
//! What reads a client's payload or renders a NAR for it goes at the client's pace. Such work must not take the
//! places of work that only waits for the disk, so it has threads of its own, and a bound of its own.

use std::sync::Arc;

use tokio::sync::{Semaphore, oneshot};

use crate::error::OpError;
use crate::shares::Shares;

/// Payloads and NARs under way at once, unless told otherwise; more wait for their turn.
pub const MAX_STREAMS: usize = 512;
/// What each holds at most in its buffers, in bytes.
pub const STREAM_BYTES: u64 = 3 << 20;
/// Those of one user who is not trusted; where there are few in all it is half of them.
const MAX_STREAMS_OF_USER: usize = 64;

/// Starts the threads.
#[derive(Debug)]
pub(crate) struct Streams {
    most: usize,
    places: Arc<Semaphore>,
    shares: Shares,
}

/// A thread's result, when it comes.
pub(crate) type Running<T> = oneshot::Receiver<T>;

impl Streams {
    /// So many at once.
    pub(crate) fn new(most: usize) -> Self {
        let of_user = MAX_STREAMS_OF_USER.min(most.div_ceil(2));
        Self { most, places: Arc::new(Semaphore::new(most)), shares: Shares::new(of_user) }
    }

    /// How many there are now.
    pub(crate) fn running(&self) -> usize {
        self.most.saturating_sub(self.places.available_permits())
    }

    /// Runs `work` on a thread of its own, once there is a place for it, and one in the share of that user if one is
    /// named.
    pub(crate) async fn start<T: Send + 'static>(
        &self,
        user: Option<u32>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<Running<T>, OpError> {
        let failed = |e: &dyn std::fmt::Display| OpError::internal(format!("cannot start a thread: {e}"));
        let share = match user {
            Some(uid) => Some(self.shares.of(uid).acquire_owned().await.map_err(|e| failed(&e))?),
            None => None,
        };
        let place = self.places.clone().acquire_owned().await.map_err(|e| failed(&e))?;
        let (send, receive) = oneshot::channel();
        let thread = move || {
            // Nobody waits for the result when the client is gone.
            let _ = send.send(work());
            drop((place, share));
        };
        std::thread::Builder::new().name("stream".into()).spawn(thread).map_err(|e| failed(&e))?;
        Ok(receive)
    }
}
