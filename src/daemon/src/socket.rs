//! A client's socket.
//!
//! It is watched for what the client sends, and for room to write only while there is none. tokio's own sockets are
//! watched for both, and then each answer that a client reads wakes a worker for nothing: as often as requests do.
//!
//! Taking a request out of the socket would wake its sender in the same way, who sleeps until the answer comes: Linux
//! tells all who wait at a Unix socket that there is room again. So a request is first only looked at, and taken when the
//! answer has been sent.

use std::cell::RefCell;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::BytesMut;
use nix::sys::socket::{MsgFlags, recv};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Bytes received at most at a time.
pub(crate) const MAX_READ: usize = 256 * 1024;

thread_local! {
    /// Where bytes arrive: one for each worker, and not one for each of many idle clients.
    static ARRIVALS: RefCell<Vec<u8>> = RefCell::new(vec![0; MAX_READ]);
}

#[expect(
    deprecated,
    reason = "its successor is unsafe, for types that lie about their descriptor; std's sockets do not"
)]
fn watch(stream: UnixStream, interest: Interest) -> io::Result<AsyncFd<UnixStream>> {
    AsyncFd::with_interest(stream, interest)
}

#[derive(Debug)]
pub(crate) struct Socket {
    watched: AsyncFd<UnixStream>,
    /// Bytes in the system's queue that were looked at, and are known here.
    seen: AtomicUsize,
}

impl Socket {
    pub(crate) fn new(stream: tokio::net::UnixStream) -> io::Result<Self> {
        Ok(Self { watched: watch(stream.into_std()?, Interest::READABLE)?, seen: AtomicUsize::new(0) })
    }

    /// Waits for bytes and adds them to `buffer`, at most `room` of them. 0 at the end of the stream.
    pub(crate) async fn receive(&self, buffer: &mut BytesMut, room: usize) -> io::Result<usize> {
        self.get(buffer, room, MsgFlags::empty()).await
    }

    /// The same for the beginning of a request: its bytes are not taken out of the queue before the next call.
    pub(crate) async fn look(&self, buffer: &mut BytesMut, room: usize) -> io::Result<usize> {
        self.get(buffer, room, MsgFlags::MSG_PEEK).await
    }

    async fn get(&self, buffer: &mut BytesMut, room: usize, flags: MsgFlags) -> io::Result<usize> {
        loop {
            let mut ready = self.watched.readable().await?;
            let seen = self.seen.load(Ordering::Relaxed);
            // Bytes that were looked at are taken now, together with those behind them.
            let flags = if seen == 0 { flags } else { MsgFlags::empty() };
            let room = (seen + room).min(MAX_READ);
            let received = ARRIVALS.with_borrow_mut(|arrivals| {
                let arrivals = &mut arrivals[..room];
                let n = recv(self.watched.get_ref().as_raw_fd(), arrivals, flags)?;
                buffer.extend_from_slice(&arrivals[seen.min(n)..n]);
                Ok::<_, io::Error>(n)
            });
            match received {
                Ok(n) if flags.contains(MsgFlags::MSG_PEEK) => {
                    self.seen.store(n, Ordering::Relaxed);
                    return Ok(n);
                }
                Ok(n) => {
                    self.seen.store(seen.saturating_sub(n), Ordering::Relaxed);
                    // Less than there was room for: nothing more is there, and need not be asked for.
                    if n < room && n > 0 {
                        ready.clear_ready();
                    }
                    if n > seen || n == 0 {
                        return Ok(n.saturating_sub(seen));
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Writes what there is room for.
    pub(crate) fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        self.watched.get_ref().write(bytes)
    }

    /// Waits for room to write.
    pub(crate) async fn writable(&self) -> io::Result<()> {
        // Another descriptor of the same socket, since one cannot be watched twice.
        let watched = watch(self.watched.get_ref().try_clone()?, Interest::WRITABLE)?;
        watched.writable().await?.retain_ready();
        Ok(())
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.watched.as_fd()
    }
}

impl Drop for Socket {
    /// A Unix socket that is closed with bytes in its queue resets the connection, and what was sent last is lost.
    fn drop(&mut self) {
        let mut seen = vec![0; *self.seen.get_mut()];
        if !seen.is_empty() {
            let _ = recv(self.watched.get_ref().as_raw_fd(), &mut seen, MsgFlags::empty());
        }
    }
}
