//! Bodies that come in: small ones in memory, NARs through a bounded channel to a thread that imports them.

use std::future::poll_fn;
use std::io::{self, BufRead, Read};
use std::pin::Pin;
use std::time::Duration;

use bytes::{Buf, Bytes};
use http_body::Body as _;
use hyper::body::Incoming;
use nix_compat::narinfo::Compression;
use store::nar_digest::NarDigest;
use store::{Ingested, Store};
use tokio::sync::{mpsc, oneshot};

use super::PushError;
use crate::limits::{MAX_DESCRIPTION_BYTES, WAITING_PIECES};

/// The next bytes; `None` at the body's end.
async fn next(body: &mut Incoming, patience: Duration) -> Result<Option<Bytes>, PushError> {
    loop {
        let frame = poll_fn(|context| Pin::new(&mut *body).poll_frame(context));
        let frame = tokio::time::timeout(patience, frame).await.map_err(|_| PushError::Stalled)?;
        match frame {
            None => return Ok(None),
            Some(Err(error)) => return Err(PushError::Wrong(format!("the upload broke off: {error}"))),
            // Trailers are passed over; an empty piece would be taken for the end.
            Some(Ok(frame)) => match frame.into_data() {
                Ok(bytes) if !bytes.is_empty() => return Ok(Some(bytes)),
                _ => {}
            },
        }
    }
}

/// A small body.
pub(super) async fn whole(mut body: Incoming, patience: Duration) -> Result<Vec<u8>, PushError> {
    let mut bytes = Vec::new();
    while let Some(piece) = next(&mut body, patience).await? {
        if bytes.len() + piece.len() > MAX_DESCRIPTION_BYTES {
            return Err(PushError::TooLarge);
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes)
}

/// A body that is of no use.
pub(super) async fn discard(mut body: Incoming, patience: Duration) -> Result<(), PushError> {
    while next(&mut body, patience).await?.is_some() {}
    Ok(())
}

/// Has a thread of its own read the body, which goes at the pusher's pace.
pub(super) async fn stream(
    mut body: Incoming,
    patience: Duration,
    import: impl FnOnce(Reader) -> Result<(), PushError> + Send + 'static,
) -> Result<(), PushError> {
    let (send, receive) = mpsc::channel(WAITING_PIECES);
    let (done, ended) = oneshot::channel();
    let thread = move || {
        let _ = done.send(import(Reader { receive, piece: Bytes::new(), ended: false }));
    };
    let started = std::thread::Builder::new().name("http-push".into()).spawn(thread);
    started.map_err(|e| PushError::Thread(e.to_string()))?;
    let mut failed = None;
    loop {
        let (piece, last) = match next(&mut body, patience).await {
            Ok(Some(bytes)) => (Ok(bytes), false),
            Ok(None) => (Ok(Bytes::new()), true),
            Err(error) => {
                failed = Some(error);
                (Err(io::ErrorKind::BrokenPipe.into()), true)
            }
        };
        // An import that reads no further has failed, and says why.
        if send.send(piece).await.is_err() || last {
            break;
        }
    }
    let imported = ended.await.unwrap_or_else(|_| Err(PushError::Thread("an import panicked".to_owned())));
    // What is wrong with the body is why an import of it failed.
    failed.map_or(imported, Err)
}

/// A body, as the importing thread reads it.
pub(super) struct Reader {
    /// An empty piece is the end. A channel that closes without one belongs to a connection that is gone.
    receive: mpsc::Receiver<io::Result<Bytes>>,
    piece: Bytes,
    ended: bool,
}

impl BufRead for Reader {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.piece.is_empty() && !self.ended {
            self.piece = self.receive.blocking_recv().unwrap_or_else(|| Err(io::ErrorKind::BrokenPipe.into()))?;
            self.ended = self.piece.is_empty();
        }
        Ok(&self.piece)
    }

    fn consume(&mut self, count: usize) {
        self.piece.advance(count);
    }
}

impl Read for Reader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.fill_buf()?.read(buf)?;
        self.consume(count);
        Ok(count)
    }
}

/// The NAR that a body has, which ends where the body does.
pub(super) fn import(store: &Store, compression: Compression, reader: Reader) -> Result<Ingested, PushError> {
    let wrong = |error: io::Error| PushError::Wrong(format!("it cannot be decompressed as {compression}: {error}"));
    let decoder = substitute::decompressed(compression, reader).map_err(wrong)?;
    let unknown = || PushError::Wrong(format!("the compression '{compression}' is not supported"));
    let mut nar = decoder.ok_or_else(unknown)?;
    let ingested = store.import_nar(&mut nar, NarDigest::new(None, None))?;
    // Decoders have checks of their own at the end.
    match io::copy(&mut nar.take(1), &mut io::sink()) {
        Ok(0) => Ok(ingested),
        Ok(_) => Err(store::Error::TrailingBytes.into()),
        Err(error) => Err(wrong(error)),
    }
}
