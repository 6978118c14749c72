//! The two directions of a client's socket.
//!
//! Both are safe to abandon in the middle of a wait: what was received or is still to be sent stays in the
//! buffers here. So one task can do the work of a request and write its log at the same time.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix_compat::wire::{Invalid, ReadError, Reader, Writer};
use nix_compat::worker::stderr::Message;
use nix_compat::worker::{MAX_REQUEST, Protocol, Request};
use tokio::sync::Semaphore;

use crate::record::Tape;
use crate::socket::{MAX_READ, Socket};

/// Bytes received at a time while nothing larger is known to come.
const SMALL_READ: usize = 8 * 1024;
/// Bytes received at a time within a large message or a payload.
pub(crate) const LARGE_READ: usize = MAX_READ;
/// A request that has so many bytes and goes on is a large one.
const LARGE_REQUEST: usize = 64 * 1024;
/// How often a client is looked after while its request runs. A build dies at most this late after its client.
const HANGUP_INTERVAL: Duration = Duration::from_millis(200);

/// The connection cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The client is gone, or its stream broke off in the middle of something.
    #[error("the client disconnected")]
    Disconnected,
    /// The socket failed.
    #[error("cannot {action} the client: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// What the client sent is not the protocol; where the next request begins cannot be known.
    #[error("{0}")]
    Invalid(#[from] Invalid),
    /// A request is larger than any that makes sense.
    #[error("the request is larger than {MAX_REQUEST} bytes")]
    TooLarge,
}

/// What the client sends.
#[derive(Debug)]
pub(crate) struct Input {
    stream: Arc<Socket>,
    buffer: BytesMut,
    tape: Tape,
    /// The share of the client's user in large requests, if it has only a share.
    large: Option<Arc<Semaphore>>,
}

impl Input {
    /// Receives from `stream`.
    pub(crate) fn new(stream: Arc<Socket>, tape: Tape) -> Self {
        Self { stream, buffer: BytesMut::new(), tape, large: None }
    }

    /// From now on, a large request has to have one of these places before it is received.
    pub(crate) fn limit_large_requests(&mut self, places: Arc<Semaphore>) {
        self.large = Some(places);
    }

    /// What has been received and not been used yet.
    pub(crate) fn buffer(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// Waits for more bytes; false at the end of the stream.
    ///
    /// # Errors
    /// When the socket fails.
    pub(crate) async fn fill(&mut self, room: usize) -> Result<bool, ConnectionError> {
        let received = self.stream.receive(&mut self.buffer, room).await;
        self.filled(received)
    }

    /// What became of waiting for more bytes.
    fn filled(&mut self, received: io::Result<usize>) -> Result<bool, ConnectionError> {
        let failed = |source| ConnectionError::Io { action: "receive from", source };
        match received {
            Ok(n) => {
                self.tape.put(&self.buffer[self.buffer.len() - n..]);
                Ok(n > 0)
            }
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => Ok(false),
            Err(e) => Err(failed(e)),
        }
    }

    /// Waits until `decode` succeeds on what has been received, and takes what it used.
    ///
    /// # Errors
    /// [`ConnectionError::Disconnected`] when the stream ends before.
    pub(crate) async fn decode<T>(
        &mut self,
        decode: impl FnMut(&mut Reader<'_>) -> Result<T, ReadError>,
    ) -> Result<T, ConnectionError> {
        self.decode_with(None, decode).await
    }

    /// The same with a place of `large` taken for the time in which much is received.
    async fn decode_with<T>(
        &mut self,
        large: Option<Arc<Semaphore>>,
        mut decode: impl FnMut(&mut Reader<'_>) -> Result<T, ReadError>,
    ) -> Result<T, ConnectionError> {
        let mut place = None;
        loop {
            let mut reader = Reader::new(&self.buffer);
            let needed = match decode(&mut reader) {
                Ok(value) => {
                    let used = reader.position();
                    self.buffer.advance(used);
                    return Ok(value);
                }
                Err(ReadError::Invalid(invalid)) => return Err(invalid.into()),
                Err(ReadError::Incomplete { needed }) => needed,
            };
            if needed > MAX_REQUEST {
                return Err(ConnectionError::TooLarge);
            }
            while self.buffer.len() < needed {
                if let Some(large) = &large
                    && place.is_none()
                    && self.buffer.len() >= LARGE_REQUEST
                {
                    // Nobody closes the semaphore.
                    place = large.clone().acquire_owned().await.ok();
                }
                // The buffer grows by what arrives, not by what was announced.
                let missing = needed - self.buffer.len();
                if !self.fill(missing.clamp(SMALL_READ, LARGE_READ)).await? {
                    return Err(ConnectionError::Disconnected);
                }
            }
        }
    }

    /// The next request; `None` when the client is done.
    ///
    /// # Errors
    /// When what comes is no request, or breaks off.
    pub(crate) async fn request(&mut self, protocol: &Protocol) -> Result<Option<Request>, ConnectionError> {
        if self.buffer.is_empty() {
            // An idle connection keeps no buffer.
            self.buffer = BytesMut::new();
            let received = self.stream.look(&mut self.buffer, SMALL_READ).await;
            if !self.filled(received)? {
                return Ok(None);
            }
        }
        self.decode_with(self.large.clone(), |reader| Request::decode(reader, protocol)).await.map(Some)
    }
}

/// What is sent to the client.
#[derive(Debug)]
pub(crate) struct Output {
    stream: Arc<Socket>,
    pending: BytesMut,
    tape: Tape,
}

impl Output {
    /// Sends to `stream`.
    pub(crate) fn new(stream: Arc<Socket>, tape: Tape) -> Self {
        Self { stream, pending: BytesMut::new(), tape }
    }

    /// Queues bytes to be sent.
    pub(crate) fn queue(&mut self, bytes: &[u8]) {
        self.pending.extend_from_slice(bytes);
    }

    /// Queues what was written.
    pub(crate) fn queue_written(&mut self, writer: Writer) {
        if self.pending.is_empty() {
            self.pending = writer.into_buffer();
        } else {
            self.queue(writer.as_bytes());
        }
    }

    /// Queues messages to be sent.
    pub(crate) fn queue_messages(&mut self, protocol: &Protocol, messages: &[Message]) {
        let mut writer = Writer::new();
        for message in messages {
            message.encode(protocol, &mut writer);
        }
        self.queue_written(writer);
    }

    /// Sends everything queued.
    ///
    /// # Errors
    /// When the client is gone or the socket fails.
    pub(crate) async fn flush(&mut self) -> Result<(), ConnectionError> {
        let failed = |source| ConnectionError::Io { action: "send to", source };
        while !self.pending.is_empty() {
            match self.stream.try_write(&self.pending) {
                Ok(n) => {
                    self.tape.put(&self.pending[..n]);
                    self.pending.advance(n);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.stream.writable().await.map_err(failed)?,
                Err(e) if matches!(e.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {
                    return Err(ConnectionError::Disconnected);
                }
                Err(e) => return Err(failed(e)),
            }
        }
        self.pending = BytesMut::new();
        Ok(())
    }
}

/// Waits until the client is gone altogether. One that has only finished writing still wants its answer, so
/// this asks for a hang-up, not for the end of the stream.
pub(crate) async fn hung_up(stream: &Socket) {
    loop {
        tokio::time::sleep(HANGUP_INTERVAL).await;
        let mut fds = [PollFd::new(stream.as_fd(), PollFlags::empty())];
        if poll(&mut fds, PollTimeout::ZERO).is_ok()
            && fds[0].revents().is_some_and(|events| events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR))
        {
            return;
        }
    }
}
