//! Hashing a NAR while something else parses it.
//!
//! SHA-256 is the serial limit of an import, so for anything but small archives it has a thread of its own,
//! fed in large pieces. Reference scanning runs behind it on the same thread.

use std::collections::BTreeSet;
use std::io::{self, Read};
use std::thread::JoinHandle;

use bytes::Bytes;
use crossbeam_channel::{Sender, bounded};
use nix_compat::hash::{Algorithm, Hash, Hasher, NarHash};
use nix_compat::store_path::StorePath;
use sha2::{Digest as _, Sha256};

use crate::scan::ReferenceScanner;

/// Bytes handed to the hashing thread at a time; archives below this are hashed in place.
const PIECE: usize = 256 * 1024;
/// Pieces that may wait for the hashing thread.
const WAITING_PIECES: usize = 4;

/// What is computed over the bytes of a NAR.
pub struct NarDigest {
    sha256: Sha256,
    /// A second hash over the same bytes, for content addresses of another algorithm.
    other: Option<Hasher>,
    scanner: Option<ReferenceScanner>,
    size: u64,
}

/// The results of a [`NarDigest`].
#[derive(Debug)]
pub struct NarFacts {
    /// SHA-256 of the archive.
    pub nar_hash: NarHash,
    /// Its length in bytes.
    pub nar_size: u64,
    /// The second hash, when one was asked for.
    pub other: Option<Hash>,
    /// The candidates that occur in it; empty when none were given.
    pub references: BTreeSet<StorePath>,
}

impl NarDigest {
    /// Hashes with SHA-256, with `other` as well if given, and looks for the candidates of `scanner`.
    pub fn new(other: Option<Algorithm>, scanner: Option<ReferenceScanner>) -> Self {
        // SHA-256 is always computed; asking for it again costs nothing.
        let other = other.filter(|a| *a != Algorithm::Sha256).map(Hasher::new);
        Self { sha256: Sha256::new(), other, scanner, size: 0 }
    }

    /// Takes in the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.sha256.update(bytes);
        if let Some(other) = &mut self.other {
            other.update(bytes);
        }
        if let Some(scanner) = &mut self.scanner {
            scanner.feed(bytes);
        }
        self.size += bytes.len() as u64;
    }

    /// Everything computed.
    pub fn finish(self) -> NarFacts {
        NarFacts {
            nar_hash: NarHash::from(<[u8; 32]>::from(self.sha256.finalize())),
            nar_size: self.size,
            other: self.other.map(Hasher::finalize),
            references: self.scanner.map(ReferenceScanner::into_found).unwrap_or_default(),
        }
    }
}

/// Digests a stream that comes in pieces.
pub(crate) struct Digester(Stage);

enum Stage {
    /// So small yet that a thread is not worth it.
    Inline(Box<NarDigest>),
    Threaded(Sender<Bytes>, JoinHandle<NarDigest>),
    /// Only while moving from one to the other.
    Moving,
}

impl Digester {
    pub(crate) fn new(digest: NarDigest) -> Self {
        Self(Stage::Inline(Box::new(digest)))
    }

    /// Takes in a piece that is not the last one, on a thread for it.
    ///
    /// # Errors
    /// When there is no thread to be had, or it is gone.
    pub(crate) fn feed(&mut self, piece: Bytes) -> io::Result<()> {
        self.0 = match std::mem::replace(&mut self.0, Stage::Moving) {
            Stage::Inline(mut digest) => {
                let (send, receive) = bounded::<Bytes>(WAITING_PIECES);
                let thread = std::thread::Builder::new().name("nar-digest".into()).spawn(move || {
                    for piece in receive {
                        digest.update(&piece);
                    }
                    *digest
                })?;
                Stage::Threaded(send, thread)
            }
            other => other,
        };
        match &self.0 {
            Stage::Threaded(send, _) => send.send(piece).map_err(|_| io::Error::other("the digesting thread ended")),
            _ => Err(no_thread()),
        }
    }

    /// What was computed over all pieces and the last one.
    ///
    /// # Errors
    /// When the thread cannot be had back (it panicked).
    pub(crate) fn finish(self, last: Bytes) -> io::Result<NarFacts> {
        self.close(last)?.wait()
    }

    /// Takes in the last piece, without waiting for the thread.
    ///
    /// # Errors
    /// When the thread is gone.
    pub(crate) fn close(self, last: Bytes) -> io::Result<Closed> {
        match self.0 {
            Stage::Inline(mut digest) => {
                digest.update(&last);
                Ok(Closed::Done(digest))
            }
            Stage::Threaded(send, thread) => {
                send.send(last).map_err(|_| io::Error::other("the digesting thread ended"))?;
                Ok(Closed::Threaded(thread))
            }
            Stage::Moving => Err(no_thread()),
        }
    }
}

/// A stream that has ended, and may still be under way to the digest.
pub(crate) enum Closed {
    Done(Box<NarDigest>),
    Threaded(JoinHandle<NarDigest>),
}

impl Closed {
    /// What was computed over all of it.
    ///
    /// # Errors
    /// When the thread cannot be had back (it panicked).
    pub(crate) fn wait(self) -> io::Result<NarFacts> {
        match self {
            Self::Done(digest) => Ok(digest.finish()),
            Self::Threaded(thread) => {
                let digest = thread.join().map_err(|_| io::Error::other("the digesting thread panicked"))?;
                Ok(digest.finish())
            }
        }
    }
}

fn no_thread() -> io::Error {
    io::Error::other("the digesting thread could not be started")
}

/// Passes a stream through and digests it on the way.
pub(crate) struct DigestingReader<R> {
    inner: R,
    pending: Vec<u8>,
    digester: Digester,
}

impl<R: Read> DigestingReader<R> {
    /// Digests what is read from `inner`.
    pub(crate) fn new(inner: R, digest: NarDigest) -> Self {
        Self { inner, pending: Vec::new(), digester: Digester::new(digest) }
    }

    /// Ends the stream with what has been read through this one.
    ///
    /// # Errors
    /// Those of [`Digester::close`].
    pub(crate) fn close(self) -> io::Result<Closed> {
        self.digester.close(self.pending.into())
    }
}

impl<R: Read> Read for DigestingReader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.pending.extend_from_slice(&buf[..n]);
        if self.pending.len() >= PIECE {
            let piece = std::mem::replace(&mut self.pending, Vec::with_capacity(PIECE + PIECE / 4));
            self.digester.feed(piece.into())?;
        }
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_and_large_streams_hash_alike() {
        for len in [0usize, 1, PIECE - 1, PIECE, 3 * PIECE + 17] {
            let data: Vec<u8> = (0..len).map(|i| (i * 31 % 251) as u8).collect();
            let mut reader = DigestingReader::new(&data[..], NarDigest::new(Some(Algorithm::Sha1), None));
            let mut out = Vec::new();
            reader.read_to_end(&mut out).unwrap();
            let facts = reader.close().unwrap().wait().unwrap();
            assert_eq!(out, data);
            assert_eq!(facts.nar_size, len as u64);
            assert_eq!(*facts.nar_hash.as_bytes(), <[u8; 32]>::from(Sha256::digest(&data)));
            let mut sha1 = Hasher::new(Algorithm::Sha1);
            sha1.update(&data);
            assert_eq!(facts.other, Some(sha1.finalize()));
        }
    }
}
