//! Another castore as a source, over gRPC: only what is not here crosses the wire.
//!
//! What comes out is a NAR, as from any other source, so that it passes the same checks; but it is put together here.
//! Directories and contents that this castore has are read from it, the rest is fetched chunk by chunk and compared with
//! the digest that it was asked by. [`walk`] goes through the tree, [`flow`] asks for what will be needed. Everything here
//! blocks.

mod contents;
mod flow;
mod promise;
mod walk;

use std::cell::RefCell;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use castore::engine::Engine;
use castore::{BlobService as _, Digest};
use fetch::{DownloadError, Sink, Trouble};
use nix_compat::nar::{NarWriter, WriteError};
use nix_compat::narinfo::{Compression, NarInfo};
use nix_compat::path_info::PathInfo;
use nix_compat::realisation::{DrvOutput, Realisation};
use nix_compat::store_path::{StoreDir, StorePath};
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use rpc_client::{Ahead, Channel, ClientError, RemoteDirectories, RemotePaths};
use store::{NewPath, Store};
use tokio::runtime::Handle;

use crate::error::Error;
use crate::origin::{Origin, SourceInfo};
use flow::{Flow, Part};
use walk::{Step, Walk};

/// As for other stores that are no binary caches: they are asked before those.
const PRIORITY: u64 = 0;
/// Bytes handed on at once, and read at once from this castore.
const PIECE: usize = 64 * 1024;
/// Bytes asked for and not used yet, of all transfers from one castore together.
const UNDERWAY: u64 = 32 << 20;
/// One transfer's share of these.
const SHARES: std::ops::RangeInclusive<u64> = 256 << 10..=8 << 20;
/// Memory for contents that came lately, of one castore: what is in a path twice is fetched once. In bytes.
const RECENT: u64 = 8 << 20;
/// A piece that is kept tends to have this many bytes; it sizes the table.
const TYPICAL_PIECE: u64 = 16 << 10;

/// Another castore.
pub(crate) struct Castore {
    /// Its URL without parameters.
    name: String,
    here: Arc<Engine>,
    paths: RemotePaths,
    ahead: Ahead,
    directories: RemoteDirectories,
    recent: Cache<Digest, Bytes, ByLength>,
    transfers: AtomicUsize,
    /// Bytes asked for and not used yet, of all transfers together.
    underway: u64,
    attempts: u64,
}

#[derive(Clone)]
struct ByLength;

impl Weighter<Digest, Bytes> for ByLength {
    fn weight(&self, _: &Digest, piece: &Bytes) -> u64 {
        (size_of::<Digest>() + piece.len()) as u64
    }
}

/// Why a path could not be copied.
enum Failure {
    Peer(ClientError),
    Nar(WriteError),
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self::Peer(error)
    }
}

impl From<WriteError> for Failure {
    fn from(error: WriteError) -> Self {
        Self::Nar(error)
    }
}

impl Castore {
    /// The castore at the other end of `channel`, of which nothing is fetched that is `here`. A call that the connection
    /// breaks under is made `attempts` times at most.
    pub(crate) fn new(name: String, here: Arc<Engine>, channel: Channel, runtime: Handle, attempts: u64) -> Self {
        // Within a machine bytes cost less than compressing them.
        let compressed = !name.starts_with("grpc+unix:");
        Self {
            name,
            here,
            paths: RemotePaths::new(channel.clone(), runtime.clone()),
            directories: RemoteDirectories::new(channel.clone(), runtime.clone()),
            ahead: Ahead::new(channel, runtime, compressed, attempts),
            recent: Cache::with_weighter((RECENT / TYPICAL_PIECE) as usize, RECENT, ByLength),
            transfers: AtomicUsize::new(0),
            underway: UNDERWAY,
            attempts,
        }
    }

    /// With so many bytes in memory of what was asked for, instead of the usual ones, and as many of what came lately.
    pub(crate) fn within(self, bytes: u64) -> Self {
        let recent = Cache::with_weighter((bytes / TYPICAL_PIECE) as usize, bytes, ByLength);
        Self { underway: bytes, recent, ..self }
    }

    /// What the peer says of a path. Asked again when others' calls broke the connection.
    fn said(&self, path: &StorePath) -> Result<Option<NewPath>, ClientError> {
        self.again(ClientError::is_broken, || self.paths.info(&path.digest()))
    }

    /// Makes a call, and makes it again as often as is allowed while the connection breaks under it.
    fn again<T, E>(&self, is_broken: impl Fn(&E) -> bool, mut call: impl FnMut() -> Result<T, E>) -> Result<T, E> {
        let mut got = call();
        for _ in 1..self.attempts {
            match got {
                Err(error) if is_broken(&error) => got = call(),
                _ => break,
            }
        }
        got
    }

    fn failed(&self, action: &'static str) -> impl Fn(ClientError) -> Error {
        let uri = self.name.clone();
        move |source| Error::Castore { action, uri: uri.clone(), source }
    }

    fn write(&self, root: &castore::Node, sink: &mut dyn Sink) -> Result<(), Failure> {
        let share = Share::of(&self.transfers, self.underway);
        // Who waits for the peer looks now and then whether the other end of the sink still does.
        let sink = RefCell::new(sink);
        let mut nar = NarWriter::new(Pieces(&sink));
        let is_wanted = || sink.borrow().is_wanted();
        let walk = Walk::new(root.clone(), &self.here, &self.ahead, &is_wanted);
        let mut flow = Flow::new(walk, &self.here, &self.ahead, &self.recent);
        while let Some(part) = flow.next(share.bytes(), &is_wanted)? {
            match part {
                Part::Step(Step::Enter) => nar.enter_directory()?,
                Part::Step(Step::Entry(name)) => nar.entry(name.as_bytes())?,
                Part::Step(Step::Symlink(target)) => nar.symlink(target.as_bytes())?,
                Part::Step(Step::Leave) => nar.leave_directory()?,
                Part::Step(Step::File { size, executable, .. }) => nar.regular_header(executable, size)?,
                Part::Here { digest, size, blob, offset } => {
                    let mut pass = |piece: &[u8]| Ok::<_, Failure>(nar.contents(piece)?);
                    let done = self.copy_local(&digest, size, &mut pass)?;
                    if done < size {
                        self.copy_range(blob, offset + done, size - done, &mut pass)?;
                    }
                }
                Part::Bytes(bytes) => nar.contents(&bytes)?,
                Part::Large(digest) => {
                    self.ahead.stream(digest, 0, &mut |piece| Ok::<_, Failure>(nar.contents(piece)?))?;
                }
                Part::EndOfFile => nar.end_regular()?,
            }
        }
        nar.finish()?;
        Ok(())
    }
}

impl Castore {
    /// Gives what is here of a blob or chunk of `size` bytes; answers how much that was. What is damaged, or was collected
    /// since it was looked for, is not.
    fn copy_local(
        &self,
        digest: &Digest,
        size: u64,
        each: &mut dyn FnMut(&[u8]) -> Result<(), Failure>,
    ) -> Result<u64, Failure> {
        let mut done = 0;
        while done < size {
            match self.here.read_at(digest, done, (PIECE as u64).min(size - done) as usize) {
                Ok(piece) if !piece.is_empty() => {
                    each(&piece)?;
                    done += piece.len() as u64;
                }
                _ => break,
            }
        }
        Ok(done)
    }

    /// Gives `size` bytes of a blob of the peer from `offset` on.
    fn copy_range(
        &self,
        blob: Digest,
        offset: u64,
        mut size: u64,
        each: &mut dyn FnMut(&[u8]) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        self.ahead.stream(blob, offset, &mut |piece| {
            let length = usize::try_from(size).map_or(piece.len(), |size| size.min(piece.len()));
            size -= length as u64;
            if length == 0 { Ok(()) } else { each(&piece[..length]) }
        })
    }
}

/// One of the transfers from a castore, which share what may be under way.
struct Share<'a>(&'a AtomicUsize, u64);

impl<'a> Share<'a> {
    fn of(transfers: &'a AtomicUsize, underway: u64) -> Self {
        transfers.fetch_add(1, Ordering::Relaxed);
        Self(transfers, underway)
    }

    /// Bytes that it may ask for in advance, as things are.
    fn bytes(&self) -> u64 {
        (self.1 / self.0.load(Ordering::Relaxed).max(1) as u64).clamp(*SHARES.start(), *SHARES.end())
    }
}

impl Drop for Share<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Hands a NAR on in pieces that are not too large.
struct Pieces<'a, 's>(&'a RefCell<&'s mut (dyn Sink + 's)>);

impl Write for Pieces<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = bytes.len().min(PIECE);
        self.0.borrow_mut().take(&bytes[..length])?;
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Origin for Castore {
    fn is_local(&self) -> bool {
        false
    }

    fn info(&self, _: &StoreDir) -> Result<SourceInfo, Error> {
        // That it is for the same store directory shows in what is signed.
        self.paths.get(&[0; 20]).map_err(self.failed("open"))?;
        Ok(SourceInfo { priority: PRIORITY, want_mass_query: true })
    }

    fn narinfo(&self, _: &StoreDir, path: &StorePath) -> Result<Option<NarInfo>, Error> {
        let Some(said) = self.said(path).map_err(self.failed("ask"))? else { return Ok(None) };
        let corrupt = |source| Error::NarInfo { file: self.file(&path.to_string()), source };
        if said.info.nar_size == 0 {
            return Err(corrupt(nix_compat::narinfo::Error::EmptyNar));
        }
        NarInfo::new(said.info, path.to_string(), Compression::None).map(Some).map_err(corrupt)
    }

    /// The protocol has no realisations.
    fn realisation(&self, _: &DrvOutput) -> Result<Option<Realisation>, Error> {
        Ok(None)
    }

    fn promise(&self, store: &Store, info: &PathInfo) -> Result<Option<NewPath>, Error> {
        self.promise_path(store, info).map(Some)
    }

    fn copy(&self, narinfo: &NarInfo, sink: &mut dyn Sink) -> Result<(), Error> {
        let path = &narinfo.info.path;
        let failed = self.failed("copy from");
        let stopped =
            |error| Error::Download(DownloadError { url: self.file(narinfo.url()), cause: Trouble::Disk(error) });
        let said = self.said(path).map_err(&failed)?;
        let said = said.ok_or_else(|| Error::Vanished { uri: self.name.clone(), path: path.to_string() })?;
        sink.begin(0, narinfo.info.nar_size).map_err(stopped)?;
        self.write(&said.node, sink).map_err(|failure| match failure {
            Failure::Peer(error) => failed(error),
            Failure::Nar(WriteError::Io(error)) => stopped(error),
            Failure::Nar(source) => Error::Tree { uri: self.name.clone(), path: path.to_string(), source },
        })
    }

    fn file(&self, name: &str) -> String {
        format!("{}/{name}", self.name)
    }
}
