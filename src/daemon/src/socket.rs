//! A client's socket.
//!
//! It is watched for what the client sends, and for room to write only while there is none. tokio's own sockets are
//! watched for both, and then each answer that a client reads wakes a worker for nothing: as often as requests do.

use std::cell::RefCell;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use bytes::BytesMut;
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
pub(crate) struct Socket(AsyncFd<UnixStream>);

impl Socket {
    pub(crate) fn new(stream: tokio::net::UnixStream) -> io::Result<Self> {
        Ok(Self(watch(stream.into_std()?, Interest::READABLE)?))
    }

    /// Waits for bytes and adds them to `buffer`, at most `room` of them. 0 at the end of the stream.
    pub(crate) async fn receive(&self, buffer: &mut BytesMut, room: usize) -> io::Result<usize> {
        let room = room.min(MAX_READ);
        loop {
            let mut ready = self.0.readable().await?;
            let received = ARRIVALS.with_borrow_mut(|arrivals| {
                let arrivals = &mut arrivals[..room];
                let n = self.0.get_ref().read(arrivals)?;
                buffer.extend_from_slice(&arrivals[..n]);
                Ok::<_, io::Error>(n)
            });
            match received {
                Ok(n) => {
                    // Less than there was room for: nothing more is there, and need not be asked for.
                    if n < room && n > 0 {
                        ready.clear_ready();
                    }
                    return Ok(n);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Writes what there is room for.
    pub(crate) fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        self.0.get_ref().write(bytes)
    }

    /// Waits for room to write.
    pub(crate) async fn writable(&self) -> io::Result<()> {
        // Another descriptor of the same socket, since one cannot be watched twice.
        let watched = watch(self.0.get_ref().try_clone()?, Interest::WRITABLE)?;
        watched.writable().await?.retain_ready();
        Ok(())
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
