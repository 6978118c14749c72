//! A stream to another store, and what was received of it and not looked at yet.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, send};
use nix_compat::wire::{ReadError, Reader};

use crate::error::{ClientError, Result};

/// Bytes received at a time.
const READ: usize = 64 * 1024;
/// Longest message that is received, in bytes: longer than anything that one request's worth of text makes.
const MAX_MESSAGE: usize = 256 << 20;
/// Bytes that are received while we are sending.
const MAX_EARLY: usize = 16 << 20;

/// A connection in both directions.
pub trait Stream: Read + Write {
    /// Waits until something can be written or, if we `listen`, read. A stream that cannot tell can be written to.
    fn wait(&self, _listen: bool, _patience: Option<Duration>) -> io::Result<Ready> {
        Ok(Ready { input: false, output: true })
    }

    /// Writes what can be written without waiting, if the stream can do so.
    fn write_some(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write(bytes)
    }

    /// Waits no longer than this for each read and write, if the stream can do so; then the error is
    /// [`io::ErrorKind::WouldBlock`].
    fn set_patience(&self, _patience: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}

/// What can be done with a stream without waiting. Neither: the patience is at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ready {
    /// Something can be read, be it the end.
    pub input: bool,
    /// Something can be written, if only in vain.
    pub output: bool,
}

impl Stream for UnixStream {
    fn wait(&self, listen: bool, patience: Option<Duration>) -> io::Result<Ready> {
        let wanted = if listen { PollFlags::POLLIN | PollFlags::POLLOUT } else { PollFlags::POLLOUT };
        let timeout = patience.map_or(PollTimeout::NONE, |patience| patience.try_into().unwrap_or(PollTimeout::MAX));
        let mut fds = [PollFd::new(self.as_fd(), wanted)];
        loop {
            match poll(&mut fds, timeout) {
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
                Ok(_) => break,
            }
        }
        let found = fds[0].revents().unwrap_or(PollFlags::empty());
        Ok(Ready {
            input: found.contains(PollFlags::POLLIN),
            // What is wrong with the stream the next write will tell.
            output: found.intersects(PollFlags::POLLOUT | PollFlags::POLLERR | PollFlags::POLLHUP),
        })
    }

    fn write_some(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(send(self.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL)?)
    }

    fn set_patience(&self, patience: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(patience)?;
        self.set_write_timeout(patience)
    }
}

/// How long to wait for the other end.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// Between two signs of life.
    pub silence: Option<Duration>,
    /// When everything has to be over.
    pub deadline: Option<Instant>,
}

impl Limits {
    /// The longest silence until the deadline, which is not over.
    fn patience(&self) -> Result<Option<Duration>> {
        let left = match self.deadline {
            Some(deadline) => match deadline.saturating_duration_since(Instant::now()) {
                Duration::ZERO => return Err(ClientError::Late),
                left => Some(left),
            },
            None => None,
        };
        Ok(self.silence.into_iter().chain(left).min())
    }
}

/// A stream with a buffer for what was received.
#[derive(Debug)]
pub(crate) struct Wire<S> {
    stream: S,
    received: Vec<u8>,
    pub(crate) limits: Limits,
}

impl<S: Stream> Wire<S> {
    pub(crate) fn new(stream: S, limits: Limits) -> Self {
        Self { stream, received: Vec::new(), limits }
    }

    /// What an error of the stream means.
    fn broken(&self, error: io::Error, patience: Option<Duration>) -> ClientError {
        match (error.kind(), patience) {
            (io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut, Some(patience)) => match self.limits.deadline {
                Some(deadline) if deadline <= Instant::now() => ClientError::Late,
                _ => ClientError::Silent(patience),
            },
            _ => ClientError::Broken(error),
        }
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) -> Result<()> {
        let patience = self.limits.patience()?;
        self.stream.set_patience(patience)?;
        self.stream.write_all(bytes).and_then(|()| self.stream.flush()).map_err(|e| self.broken(e, patience))
    }

    /// Sends, and receives meanwhile: an end that cannot get rid of what it has to say would not listen either.
    pub(crate) fn send_listening(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let patience = self.limits.patience()?;
            let ready = self.stream.wait(self.received.len() < MAX_EARLY, patience)?;
            if !ready.input && !ready.output {
                return Err(self.broken(io::ErrorKind::WouldBlock.into(), patience));
            }
            if ready.input {
                self.receive(READ)?;
            }
            if ready.output {
                match self.stream.write_some(bytes) {
                    Ok(length) => bytes = &bytes[length..],
                    Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }

    /// Takes a message from the front, waiting for as much of it as is missing.
    pub(crate) fn decode<T>(
        &mut self,
        mut decode: impl FnMut(&mut Reader<'_>) -> std::result::Result<T, ReadError>,
    ) -> Result<T> {
        loop {
            let mut reader = Reader::new(&self.received);
            match decode(&mut reader) {
                Ok(value) => {
                    let used = reader.position();
                    self.received.drain(..used);
                    return Ok(value);
                }
                Err(ReadError::Invalid(invalid)) => return Err(ClientError::Protocol(invalid.to_string())),
                Err(ReadError::Incomplete { needed }) if needed > MAX_MESSAGE => {
                    return Err(ClientError::Protocol(format!("a message of more than {MAX_MESSAGE} bytes")));
                }
                Err(ReadError::Incomplete { needed }) => {
                    // All that is known to be missing, so that a long message is not decoded again and again.
                    while self.received.len() < needed {
                        self.receive(READ)?;
                    }
                }
            }
        }
    }

    fn receive(&mut self, most: usize) -> Result<()> {
        let length = self.received.len();
        self.received.resize(length + most, 0);
        let patience = self.limits.patience()?;
        let read = self.stream.set_patience(patience).and_then(|()| {
            loop {
                match self.stream.read(&mut self.received[length..]) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    other => break other,
                }
            }
        });
        self.received.truncate(length + *read.as_ref().unwrap_or(&0));
        match read {
            Ok(0) => Err(ClientError::Broken(io::ErrorKind::UnexpectedEof.into())),
            Ok(_) => Ok(()),
            Err(error) => Err(self.broken(error, patience)),
        }
    }

    /// Lets `advance` take what it can from the front of what was received.
    pub(crate) fn consume<T>(&mut self, advance: impl FnOnce(&[u8]) -> Result<(usize, T)>) -> Result<T> {
        let (used, value) = advance(&self.received)?;
        self.received.drain(..used);
        Ok(value)
    }

    pub(crate) fn receive_some(&mut self) -> Result<()> {
        self.receive(READ)
    }
}

/// What follows a message and is none itself, such as a NAR.
impl<S: Stream> Read for Wire<S> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.received.is_empty() {
            let patience = self.limits.patience().map_err(io::Error::other)?;
            self.stream.set_patience(patience)?;
            return self.stream.read(buf).map_err(|error| match self.broken(error, patience) {
                ClientError::Broken(error) => error,
                other => io::Error::other(other),
            });
        }
        let length = buf.len().min(self.received.len());
        buf[..length].copy_from_slice(&self.received[..length]);
        self.received.drain(..length);
        Ok(length)
    }
}

/// Writes in large pieces that tell apart, afterwards, on which side they failed.
pub(crate) struct Sink<'a, S> {
    wire: &'a mut Wire<S>,
    piece: Vec<u8>,
    failed: Option<ClientError>,
}

impl<'a, S: Stream> Sink<'a, S> {
    pub(crate) fn new(wire: &'a mut Wire<S>) -> Self {
        Self { wire, piece: Vec::with_capacity(READ), failed: None }
    }

    /// Sends past the pieces.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.wire.send_listening(bytes).map_err(|error| {
            self.failed = Some(error);
            io::ErrorKind::BrokenPipe.into()
        })
    }

    /// Sends what is left, and says what became of it all: an error of the stream comes before one that follows from it.
    pub(crate) fn finish(mut self, written: io::Result<()>) -> Result<()> {
        let written = written.and_then(|()| self.flush());
        match (self.failed, written) {
            (Some(error), _) => Err(error),
            (None, written) => written.map_err(ClientError::Payload),
        }
    }
}

impl<S: Stream> Write for Sink<'_, S> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let length = buf.len().min(READ - self.piece.len());
        self.piece.extend_from_slice(&buf[..length]);
        if self.piece.len() == READ {
            self.flush()?;
        }
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.piece.is_empty() {
            return Ok(());
        }
        let piece = std::mem::take(&mut self.piece);
        let sent = self.send(&piece);
        self.piece = piece;
        self.piece.clear();
        sent
    }
}
