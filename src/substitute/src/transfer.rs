//! One NAR from a source into the castore: download, decompression and import side by side.
//!
//! The download has a thread of its own; a bounded pipe is between it and the worker thread that decompresses, parses
//! and stores. What is large is decompressed on one more thread, or on several. The NAR is neither in memory nor on disk at
//! any time.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::RecvTimeoutError;
use fetch::Trouble;
use nix_compat::hash::Hash;
use nix_compat::narinfo::Compression;
use store::{NewPath, Store};
use tokio::sync::OwnedSemaphorePermit;

use crate::ahead::Ahead;
use crate::compression::decompressed;
use crate::error::Error;
use crate::offers::Offer;
use crate::parallel_xz;
use crate::pipe::{PipeReader, Shared, pipe};
use crate::watch::{Copying, Watch};

/// Time between two news of progress.
const INTERVAL: Duration = Duration::from_millis(100);

/// Archives of so many bytes are decompressed beside the import: for smaller ones a thread costs more than it gains.
const LARGE: u64 = 4 << 20;

/// What a download ends with: how it went, how long it was, and its hash if that was asked for.
type Downloaded = (Result<(), Error>, (u64, Option<Hash>));

/// Fetches what was offered. Everything that was claimed of it is checked, so that it can be registered when what it
/// refers to is valid. Blocks, but not for long once it is cancelled: the download then ends by itself, and has `turn`
/// until it does.
pub(crate) fn transfer(
    store: &Store,
    offer: &Offer,
    shared: &Arc<Shared>,
    watch: &dyn Watch,
    copying: &Copying,
    turn: OwnedSemaphorePermit,
) -> Result<NewPath, Error> {
    let narinfo = &offer.narinfo;
    let (sink, reader) = pipe(shared.clone(), narinfo.file_hash.map(|hash| hash.algorithm()), narinfo.file_size);
    let (done, ended) = crossbeam_channel::bounded::<Downloaded>(1);
    let (source, wanted) = (offer.source.clone(), narinfo.clone());
    let download = move || {
        let _held = turn;
        let mut sink = sink;
        let result = source.origin.copy(&wanted, &mut sink);
        // With the sink goes the pipe's end, which is what the other one waits for.
        let _ = done.send((result, sink.finish()));
    };
    let thread = std::thread::Builder::new().name("download".to_owned()).spawn(download);
    thread.map_err(|e| Error::Thread(e.to_string()))?;
    let imported = import(store, offer, reader, shared, watch, copying);
    if imported.is_ok() {
        shared.complete.store(true, Ordering::Release);
    }
    let (downloaded, came) = loop {
        match ended.recv_timeout(INTERVAL) {
            _ if shared.is_cancelled() => return Err(Error::Cancelled),
            Ok(downloaded) => break downloaded,
            Err(RecvTimeoutError::Disconnected) => return Err(Error::Thread("a download panicked".to_owned())),
            Err(RecvTimeoutError::Timeout) => {}
        }
    };
    match downloaded {
        // When the import stopped reading, the download fails too, and the import's reason is the better one.
        Err(Error::Download(error)) if is_broken_pipe(&error.cause) => imported,
        Err(error) => Err(error),
        Ok(()) => imported.and_then(|new| check_file(offer, came).map(|()| new)),
    }
}

fn is_broken_pipe(cause: &Trouble) -> bool {
    matches!(cause, Trouble::Disk(error) if error.kind() == io::ErrorKind::BrokenPipe)
}

fn import(
    store: &Store,
    offer: &Offer,
    reader: PipeReader,
    shared: &Shared,
    watch: &dyn Watch,
    copying: &Copying,
) -> Result<NewPath, Error> {
    let compression = offer.narinfo.compression;
    let unsupported = || Error::Compression { file: copying.file.clone(), compression };
    let decoder = decoder(compression, reader, offer.info.nar_size).map_err(|e| stream_error(copying, e))?;
    let inner = decoder.ok_or_else(unsupported)?;
    let mut nar =
        Counted { inner, limit: offer.info.nar_size, length: 0, told: Instant::now(), shared, watch, copying };
    let new = store.import_with_info(offer.info.clone(), &mut nar)?;
    // The decoder has checks of its own at the end, which the archive does not reach.
    match io::copy(&mut nar.by_ref().take(1), &mut io::sink()) {
        Ok(0) => {}
        Ok(_) => return Err(store::Error::TrailingBytes.into()),
        Err(error) => return Err(stream_error(copying, error)),
    }
    nar.tell();
    Ok(new)
}

/// The archive, of so many bytes, from its file.
fn decoder(compression: Compression, file: PipeReader, size: u64) -> io::Result<Option<Box<dyn Read + Send>>> {
    let decoder = match compression {
        Compression::Xz => match parallel_xz::decompressed(file, size)? {
            Ok(decoder) => Some(decoder),
            Err(file) => decompressed(compression, file)?,
        },
        _ => decompressed(compression, file)?,
    };
    match decoder {
        Some(decoder) if size >= LARGE && compression != Compression::None => Ok(Some(Box::new(Ahead::new(decoder)?))),
        decoder => Ok(decoder),
    }
}

fn stream_error(copying: &Copying, source: io::Error) -> Error {
    store::Error::Stream { action: "decompress", what: copying.file.clone(), source }.into()
}

fn check_file(offer: &Offer, (length, hash): (u64, Option<Hash>)) -> Result<(), Error> {
    let narinfo = &offer.narinfo;
    let wrong = |what, specified, got| {
        let (uri, file) = (offer.source.uri().to_owned(), narinfo.url().to_owned());
        Err(Error::File { uri, file, what, specified, got })
    };
    if let Some(size) = narinfo.file_size.filter(|size| *size != length) {
        return wrong("size", size.to_string(), length.to_string());
    }
    match (narinfo.file_hash, hash) {
        (Some(specified), Some(got)) if specified != got => {
            wrong("hash", specified.to_prefixed_nix32(), got.to_prefixed_nix32())
        }
        _ => Ok(()),
    }
}

/// A NAR on its way in.
struct Counted<'a> {
    inner: Box<dyn Read + Send>,
    /// Its size by the narinfo: a few bytes of a compressed file can be very many.
    limit: u64,
    length: u64,
    told: Instant,
    shared: &'a Shared,
    watch: &'a dyn Watch,
    copying: &'a Copying,
}

impl Counted<'_> {
    fn tell(&mut self) {
        self.told = Instant::now();
        let [file, of_file] = [&self.shared.file, &self.shared.of_file].map(|number| number.load(Ordering::Relaxed));
        self.watch.progress(self.copying, file, of_file, self.length);
    }
}

impl Read for Counted<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.shared.is_cancelled() {
            return Err(io::Error::other("cancelled"));
        }
        let count = self.inner.read(buf)?;
        self.length += count as u64;
        if self.length > self.limit {
            return Err(io::Error::other(format!("the archive is longer than {} bytes", self.limit)));
        }
        if self.told.elapsed() >= INTERVAL {
            self.tell();
        }
        Ok(count)
    }
}
