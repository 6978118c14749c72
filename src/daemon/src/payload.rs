//! From a client's stream to a worker thread: the data that follows some requests.
//!
//! The work on it (parsing, hashing, compressing) is synchronous and reads from a [`PayloadReader`]; this end
//! receives, and hands the bytes over in large pieces through a bounded channel. A payload that fits into one
//! piece is received whole first, so that a slow client with a small one holds no thread.
//!
//! Whatever becomes of the work, the payload is consumed to its end if that end can be known: the next request
//! begins there.

use std::io::{self, Read};
use std::sync::Arc;

use bytes::{Buf, Bytes, BytesMut};
use nix_compat::wire::{Frame, FrameDecoder, MAX_STRING};
use nix_compat::worker::Payload;
use nix_compat::worker::stderr::Message;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::connection::{ConnectionError, Input, LARGE_READ};
use crate::error::OpError;
use crate::events::Events;

/// Bytes handed over at a time.
const PIECE: usize = 256 * 1024;
/// Pieces that may wait for the worker.
const WAITING_PIECES: usize = 4;
/// Bytes asked for at a time from clients that have to be asked.
const ASKED: u64 = 128 * 1024;

/// What comes through the channel. An end that is not announced is a stream that broke off.
#[derive(Debug)]
enum Piece {
    Data(Bytes),
    End,
}

/// The worker's end: a blocking reader.
#[derive(Debug)]
pub(crate) struct PayloadReader {
    current: Bytes,
    ended: bool,
    receive: mpsc::Receiver<Piece>,
    /// Where to ask for more, if the client must be asked.
    ask: Option<mpsc::Sender<()>>,
}

impl PayloadReader {
    /// A payload that is here already.
    fn whole(data: Bytes) -> Self {
        let (_, receive) = mpsc::channel(1);
        Self { current: data, ended: true, receive, ask: None }
    }

    /// Whether nothing follows. Waits for the next bytes if need be; not for transports without an end mark.
    ///
    /// # Errors
    /// When the stream broke off.
    pub(crate) fn is_at_end(&mut self) -> io::Result<bool> {
        self.next_piece()?;
        Ok(self.current.is_empty())
    }

    /// Makes `current` non-empty, unless the payload has ended.
    fn next_piece(&mut self) -> io::Result<()> {
        while self.current.is_empty() && !self.ended {
            if let Some(ask) = &self.ask {
                // The other end is only gone when the connection is.
                let _ = ask.blocking_send(());
            }
            match self.receive.blocking_recv() {
                Some(Piece::Data(data)) => self.current = data,
                Some(Piece::End) => self.ended = true,
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
        Ok(())
    }

    /// What was handed over and not read.
    fn into_leftover(mut self) -> BytesMut {
        let mut rest = BytesMut::from(&self.current[..]);
        self.receive.close();
        while let Ok(Piece::Data(data)) = self.receive.try_recv() {
            rest.extend_from_slice(&data);
        }
        rest
    }
}

impl Read for PayloadReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        self.next_piece()?;
        let n = buf.len().min(self.current.len());
        self.current.copy_to_slice(&mut buf[..n]);
        Ok(n)
    }
}

type Outcome<T> = (Result<T, OpError>, BytesMut);

fn start<T: Send + 'static>(
    mut reader: PayloadReader,
    work: impl FnOnce(&mut PayloadReader) -> Result<T, OpError> + Send + 'static,
) -> JoinHandle<Outcome<T>> {
    tokio::task::spawn_blocking(move || {
        let result = work(&mut reader);
        (result, reader.into_leftover())
    })
}

async fn finished<T>(worker: JoinHandle<Outcome<T>>) -> Outcome<T> {
    worker.await.unwrap_or_else(|e| (Err(OpError::internal(format!("a worker thread failed: {e}"))), BytesMut::new()))
}

/// Receives the payload of a request and runs `work` on it.
///
/// # Errors
/// Those of `work`; fatal ones when the stream breaks off or its end cannot be found.
pub(crate) async fn receive<T: Send + 'static>(
    input: &mut Input,
    events: &Arc<Events>,
    payload: Payload,
    work: impl FnOnce(&mut PayloadReader) -> Result<T, OpError> + Send + 'static,
) -> Result<T, OpError> {
    match payload {
        Payload::None => finished(start(PayloadReader::whole(Bytes::new()), work)).await.0,
        Payload::Framed => framed(input, work).await,
        Payload::InlineNar => {
            events.hold();
            let result = inline(input, work).await;
            events.release();
            result
        }
        Payload::StderrRead => asked(input, events, work).await,
    }
}

/// Consumes a payload that nobody wants, because the request was refused.
///
/// # Errors
/// When the stream breaks off, or its end cannot be found.
pub(crate) async fn discard(input: &mut Input, payload: Payload) -> Result<(), OpError> {
    match payload {
        // A client that has to be asked has sent nothing.
        Payload::None | Payload::StderrRead => Ok(()),
        Payload::Framed => {
            framed(input, |reader| {
                // A stream that breaks off is noticed at the other end of the channel.
                let _ = io::copy(reader, &mut io::sink());
                Ok(())
            })
            .await
        }
        Payload::InlineNar => {
            inline(input, |reader| {
                let mut nar = nix_compat::nar::NarReader::new(reader);
                loop {
                    match nar.next() {
                        Ok(nix_compat::nar::NarEvent::End) => return Ok(()),
                        Ok(_) => {}
                        Err(error) => return Err(OpError::fatal(error.to_string())),
                    }
                }
            })
            .await
        }
    }
}

async fn framed<T: Send + 'static>(
    input: &mut Input,
    work: impl FnOnce(&mut PayloadReader) -> Result<T, OpError> + Send + 'static,
) -> Result<T, OpError> {
    let mut work = Some(work);
    let mut worker = None;
    let mut frames = FrameDecoder::new();
    let mut piece = BytesMut::new();
    loop {
        let mut received = &input.buffer()[..];
        let before = received.len();
        let frame = frames.decode(&mut received).map_err(ConnectionError::Invalid)?;
        let used = before - received.len();
        let ended = match frame {
            Frame::Data(data) => {
                piece.extend_from_slice(data);
                false
            }
            Frame::End => true,
            Frame::NeedMore => {
                input.buffer().clear();
                if !input.fill(LARGE_READ).await? {
                    return Err(ConnectionError::Disconnected.into());
                }
                continue;
            }
        };
        input.buffer().advance(used);
        if ended {
            break;
        }
        if piece.len() >= PIECE {
            let (send, _) = worker.get_or_insert_with(|| {
                let (send, receive) = mpsc::channel(WAITING_PIECES);
                let reader = PayloadReader { current: Bytes::new(), ended: false, receive, ask: None };
                let Some(work) = work.take() else { unreachable!("the worker is started once") };
                (send, start(reader, work))
            });
            // A worker that has given up wants no more; the frames are read to their end all the same.
            let _ = send.send(Piece::Data(piece.split().freeze())).await;
        }
    }
    match (worker, work) {
        (Some((send, worker)), _) => {
            let _ = send.send(Piece::Data(piece.freeze())).await;
            let _ = send.send(Piece::End).await;
            finished(worker).await.0
        }
        (None, Some(work)) => finished(start(PayloadReader::whole(piece.freeze()), work)).await.0,
        (None, None) => Err(OpError::internal("a payload was worked on twice")),
    }
}

async fn inline<T: Send + 'static>(
    input: &mut Input,
    work: impl FnOnce(&mut PayloadReader) -> Result<T, OpError> + Send + 'static,
) -> Result<T, OpError> {
    let (send, receive) = mpsc::channel(WAITING_PIECES);
    let reader = PayloadReader { current: Bytes::new(), ended: false, receive, ask: None };
    let mut worker = start(reader, work);
    let (result, mut leftover) = loop {
        let piece = input.buffer().split().freeze();
        if !piece.is_empty() {
            // The bytes are cheap to keep until it is known whether they were taken.
            if send.send(Piece::Data(piece.clone())).await.is_err() {
                let (result, mut leftover) = finished(worker).await;
                leftover.extend_from_slice(&piece);
                break (result, leftover);
            }
        }
        tokio::select! {
            outcome = &mut worker => {
                break outcome.unwrap_or_else(|e| (Err(OpError::internal(e.to_string())), BytesMut::new()));
            }
            more = input.fill(LARGE_READ) => {
                if !more? {
                    drop(send);
                    return finished(worker).await.0;
                }
            }
        }
    };
    leftover.extend_from_slice(input.buffer());
    *input.buffer() = leftover;
    result
}

async fn asked<T: Send + 'static>(
    input: &mut Input,
    events: &Arc<Events>,
    work: impl FnOnce(&mut PayloadReader) -> Result<T, OpError> + Send + 'static,
) -> Result<T, OpError> {
    let (send, receive) = mpsc::channel(1);
    let (ask, mut questions) = mpsc::channel(1);
    let reader = PayloadReader { current: Bytes::new(), ended: false, receive, ask: Some(ask) };
    let mut worker = start(reader, work);
    loop {
        tokio::select! {
            biased;
            question = questions.recv() => {
                if question.is_none() {
                    return finished(worker).await.0;
                }
                events.push(Message::Read(ASKED));
                let data = input.decode(|reader| Ok(Bytes::copy_from_slice(reader.bytes(MAX_STRING)?))).await?;
                let piece = if data.is_empty() { Piece::End } else { Piece::Data(data) };
                let _ = send.send(piece).await;
            }
            outcome = &mut worker => {
                return outcome.unwrap_or_else(|e| (Err(OpError::internal(e.to_string())), BytesMut::new())).0;
            }
        }
    }
}
