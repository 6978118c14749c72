//! Bodies: small ones, and large ones that are made while they are sent.
//!
//! A large body is made on a thread of its own, since it goes at the client's pace, and such work must not take the places
//! of work that only waits for the disk. When the connection ends, so does the work.

use std::io::{self, Write};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::failure::Failure;
use crate::limits::{PIECE_BYTES, WAITING_PIECES};

/// A response's body.
pub(crate) enum Body {
    /// Of known bytes.
    Whole(Bytes),
    /// Made by a thread: the first piece, and those to come. One that is an error ends the connection before the body's
    /// end, which is how a client knows.
    Made(Bytes, mpsc::Receiver<io::Result<Bytes>>),
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        match &mut *self {
            Body::Whole(bytes) if bytes.is_empty() => Poll::Ready(None),
            Body::Whole(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Body::Made(first, _) if !first.is_empty() => Poll::Ready(Some(Ok(Frame::data(std::mem::take(first))))),
            Body::Made(_, pieces) => pieces.poll_recv(context).map(|piece| Some(piece?.map(Frame::data))),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Body::Whole(bytes) if bytes.is_empty())
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Body::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Body::Made(..) => SizeHint::default(),
        }
    }
}

/// Starts threads that make bodies.
pub(crate) struct Renderers {
    places: Arc<Semaphore>,
}

impl Renderers {
    pub(crate) fn new(places: usize) -> Self {
        Self { places: Arc::new(Semaphore::new(places)) }
    }

    /// Has `work` write a body, once there is a place for it, and waits for the first piece. A later failure cuts the body
    /// off; `what` names it in the log.
    ///
    /// # Errors
    /// When no thread can be started, or what `work` fails with before the first piece.
    pub(crate) async fn start(
        &self,
        what: String,
        work: impl FnOnce(&mut Pieces) -> Result<(), Failure> + Send + 'static,
    ) -> io::Result<Body> {
        let place = self.places.clone().acquire_owned().await.map_err(io::Error::other)?;
        let (send, mut receive) = mpsc::channel(WAITING_PIECES);
        let thread = move || {
            let mut out = Pieces { piece: Vec::new(), begun: false, send, _place: place };
            let done = work(&mut out).and_then(|()| Ok(out.flush()?));
            let Err(error) = done else { return };
            if !out.is_abandoned() {
                // Of what fails at once, whoever waits for it tells.
                if out.begun {
                    tracing::warn!(%error, "cannot send {what} over http");
                }
                let _ = out.send.blocking_send(Err(io::Error::other(error)));
            }
        };
        std::thread::Builder::new().name("http-body".into()).spawn(thread)?;
        let first = receive.recv().await.transpose()?;
        Ok(Body::Made(first.unwrap_or_default(), receive))
    }
}

/// Where a body is written to.
pub(crate) struct Pieces {
    piece: Vec<u8>,
    /// Whether a piece was sent.
    begun: bool,
    send: mpsc::Sender<io::Result<Bytes>>,
    _place: OwnedSemaphorePermit,
}

impl Pieces {
    /// Whether nobody waits for the body any more.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.send.is_closed()
    }
}

impl Write for Pieces {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let taken = buf.len().min(PIECE_BYTES - self.piece.len());
        self.piece.extend_from_slice(&buf[..taken]);
        if self.piece.len() == PIECE_BYTES {
            self.flush()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.piece.is_empty() {
            return Ok(());
        }
        let piece = Bytes::from(std::mem::take(&mut self.piece));
        self.begun = true;
        self.send.blocking_send(Ok(piece)).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}
