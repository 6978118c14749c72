//! The way of a file from the thread that downloads it to the one that unpacks it.

use std::io::{self, BufRead, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use nix_compat::hash::{Algorithm, Hash, Hasher};

/// Pieces of at most 64 KiB that a download may be ahead of the import.
const PIECES: usize = 32;
/// Time between two looks whether anybody still waits.
const LOOK: Duration = Duration::from_millis(100);
/// Bytes that may follow the end of the NAR in a file whose size nobody has told.
const MAX_TRAILING: u64 = 1 << 20;

/// What both ends and the watcher know.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    /// Nobody wants it any more.
    pub(crate) cancelled: AtomicBool,
    /// All that matters has been read: what follows is only hashed.
    pub(crate) complete: AtomicBool,
    /// Bytes of the file that came.
    pub(crate) file: AtomicU64,
    /// Bytes that it has, or 0.
    pub(crate) of_file: AtomicU64,
}

impl Shared {
    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}

/// The end that a download writes to.
pub(crate) struct PipeSink {
    send: Sender<Vec<u8>>,
    shared: Arc<Shared>,
    hasher: Option<Hasher>,
    limit: Option<u64>,
    length: u64,
    trailing: u64,
}

/// The end that a decoder reads from.
pub(crate) struct PipeReader {
    shared: Arc<Shared>,
    receive: Receiver<Vec<u8>>,
    piece: Vec<u8>,
    at: usize,
}

/// A pipe for a file with this hash and size, as far as they are known.
pub(crate) fn pipe(shared: Arc<Shared>, hash: Option<Algorithm>, size: Option<u64>) -> (PipeSink, PipeReader) {
    let (send, receive) = crossbeam_channel::bounded(PIECES);
    let hasher = hash.map(Hasher::new);
    let reader = PipeReader { shared: shared.clone(), receive, piece: Vec::new(), at: 0 };
    (PipeSink { send, shared, hasher, limit: size, length: 0, trailing: 0 }, reader)
}

impl PipeSink {
    /// What came: its length, and its hash if that was asked for.
    pub(crate) fn finish(self) -> (u64, Option<Hash>) {
        (self.length, self.hasher.map(Hasher::finalize))
    }
}

impl fetch::Sink for PipeSink {
    fn begin(&mut self, offset: u64, expected: u64) -> io::Result<()> {
        if offset != self.length {
            return Err(io::Error::other("the server began again in the middle of the file"));
        }
        self.shared.of_file.store(expected, Ordering::Relaxed);
        Ok(())
    }

    fn take(&mut self, piece: &[u8]) -> io::Result<()> {
        if self.shared.is_cancelled() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.length += piece.len() as u64;
        self.shared.file.store(self.length, Ordering::Relaxed);
        if let Some(limit) = self.limit.filter(|limit| self.length > *limit) {
            return Err(io::Error::other(format!("it is longer than {limit} bytes")));
        }
        if let Some(hasher) = &mut self.hasher {
            hasher.update(piece);
        }
        if self.send.send(piece.to_vec()).is_ok() {
            return Ok(());
        }
        if !self.shared.complete.load(Ordering::Acquire) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.trailing += piece.len() as u64;
        if self.trailing > MAX_TRAILING {
            return Err(io::Error::other("it goes on after the end of the archive"));
        }
        Ok(())
    }

    fn can_restart(&self) -> bool {
        self.length == 0
    }

    fn is_wanted(&self) -> bool {
        !self.shared.is_cancelled()
    }

    fn retrying(&mut self, why: &str) {
        tracing::info!("{why}");
    }
}

impl BufRead for PipeReader {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.at == self.piece.len() {
            // Looks up now and then: a server that stands still must not keep what nobody wants any more.
            match self.receive.recv_timeout(LOOK) {
                Ok(piece) => (self.piece, self.at) = (piece, 0),
                Err(RecvTimeoutError::Disconnected) => return Ok(&[]),
                Err(RecvTimeoutError::Timeout) if self.shared.is_cancelled() => {
                    return Err(io::Error::other("cancelled"));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
        Ok(&self.piece[self.at..])
    }

    fn consume(&mut self, count: usize) {
        self.at += count;
    }
}

impl Read for PipeReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let bytes = self.fill_buf()?;
        let count = bytes.len().min(buf.len());
        buf[..count].copy_from_slice(&bytes[..count]);
        self.consume(count);
        Ok(count)
    }
}
