//! From a client's stream to a worker thread: the data that follows some requests.
//!
//! The work on it (parsing, hashing, compressing) is synchronous and reads from a [`PayloadReader`]; this end
//! receives, and hands the bytes over in large pieces through a bounded channel. A payload that fits into one
//! piece is received whole first, so that a slow client with a small one holds no thread.
//!
//! Whatever becomes of the work, the payload is consumed to its end if that end can be known: the next request
//! begins there.

use std::io::{self, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};

use bytes::{Buf, Bytes, BytesMut};
use nix_compat::nar::{NarEvent, NarReader};
use nix_compat::wire::{Frame, FrameDecoder, MAX_STRING};
use nix_compat::worker::Payload;
use nix_compat::worker::stderr::Message;
use tokio::sync::mpsc;

use crate::connection::{ConnectionError, Input, LARGE_READ};
use crate::context::Session;
use crate::error::OpError;
use crate::streams::Running;

/// Bytes handed over at a time.
const PIECE: usize = 256 * 1024;
/// Pieces that may wait for the worker.
const WAITING_PIECES: usize = 4;
/// A payload of at most so many bytes is worked on where it was received: a derivation, or another short text.
const IN_PLACE: usize = 16 * 1024;
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

/// The work with what it leaves unread.
fn outcome<T>(mut reader: PayloadReader, work: impl FnOnce(&mut PayloadReader) -> Result<T, OpError>) -> Outcome<T> {
    let result = work(&mut reader);
    (result, reader.into_leftover())
}

async fn start<T: Send + 'static>(
    session: &Session,
    reader: PayloadReader,
    work: impl FnOnce(&mut PayloadReader) -> Result<T, OpError> + Send + 'static,
) -> Result<Running<Outcome<T>>, OpError> {
    session.daemon.streams.start(session.share_of(), move || outcome(reader, work)).await
}

fn ended<T>(received: Result<Outcome<T>, impl std::fmt::Display>) -> Outcome<T> {
    received.unwrap_or_else(|e| (Err(OpError::internal(format!("a worker thread failed: {e}"))), BytesMut::new()))
}

/// Works on a payload that is here already.
async fn whole<T: Send + 'static>(
    data: Bytes,
    work: impl FnOnce(&mut PayloadReader) -> Result<T, OpError> + Send + 'static,
) -> Result<T, OpError> {
    if data.len() <= IN_PLACE {
        // Two changes of threads cost as much as the work; the runtime's other tasks move to another thread meanwhile.
        let work = || outcome(PayloadReader::whole(data), work);
        let done = tokio::task::block_in_place(|| catch_unwind(AssertUnwindSafe(work)));
        return ended(done.map_err(|_| "it panicked")).0;
    }
    ended(tokio::task::spawn_blocking(move || outcome(PayloadReader::whole(data), work)).await).0
}

/// Receives the payload of a request and runs `work` on it.
///
/// # Errors
/// Those of `work`; fatal ones when the stream breaks off or its end cannot be found.
pub(crate) async fn receive<T: Send + 'static>(
    session: &Session,
    input: &mut Input,
    payload: Payload,
    work: impl FnOnce(&mut PayloadReader) -> Result<T, OpError> + Send + 'static,
) -> Result<T, OpError> {
    match payload {
        Payload::None => whole(Bytes::new(), work).await,
        Payload::Framed => framed(session, input, work).await,
        Payload::InlineNar => {
            session.events.hold();
            let result = inline(session, input, work).await;
            session.events.release();
            result
        }
        Payload::StderrRead => asked(session, input, work).await,
    }
}

/// Consumes a payload that nobody wants, because the request was refused or its path is there.
///
/// # Errors
/// When the stream breaks off, or its end cannot be found.
pub(crate) async fn discard(session: &Session, input: &mut Input, payload: Payload) -> Result<(), OpError> {
    match payload {
        // A client that has to be asked has sent nothing.
        Payload::None | Payload::StderrRead => Ok(()),
        Payload::Framed => {
            framed(session, input, |reader| {
                // A stream that breaks off is noticed at the other end of the channel.
                let _ = io::copy(reader, &mut io::sink());
                Ok(())
            })
            .await
        }
        Payload::InlineNar => {
            let skip = |reader: &mut PayloadReader| {
                let mut nar = NarReader::new(reader);
                while nar.next().map_err(store::Error::from)? != NarEvent::End {}
                Ok(())
            };
            inline(session, input, skip).await
        }
    }
}

async fn framed<T: Send + 'static>(
    session: &Session,
    input: &mut Input,
    work: impl FnOnce(&mut PayloadReader) -> Result<T, OpError> + Send + 'static,
) -> Result<T, OpError> {
    let mut frames = FrameDecoder::new();
    let mut piece = BytesMut::new();
    // Small payloads are received whole; only a larger one gets a thread that goes along.
    while piece.len() < PIECE {
        if !next_frame(input, &mut frames, &mut piece).await? {
            return whole(piece.freeze(), work).await;
        }
    }
    let (send, receive) = mpsc::channel(WAITING_PIECES);
    let reader = PayloadReader { current: piece.split().freeze(), ended: false, receive, ask: None };
    let worker = start(session, reader, work).await?;
    // A worker that has given up wants no more; the frames are read to their end all the same.
    while next_frame(input, &mut frames, &mut piece).await? {
        if piece.len() >= PIECE {
            let _ = send.send(Piece::Data(piece.split().freeze())).await;
        }
    }
    let _ = send.send(Piece::Data(piece.freeze())).await;
    let _ = send.send(Piece::End).await;
    ended(worker.await).0
}

/// Appends what comes next in a framed stream to `piece`; false at its end.
async fn next_frame(input: &mut Input, frames: &mut FrameDecoder, piece: &mut BytesMut) -> Result<bool, OpError> {
    loop {
        let mut received = &input.buffer()[..];
        let before = received.len();
        let frame = frames.decode(&mut received).map_err(ConnectionError::Invalid)?;
        let used = before - received.len();
        let goes_on = match frame {
            Frame::Data(data) => {
                piece.extend_from_slice(data);
                true
            }
            Frame::End => false,
            Frame::NeedMore => {
                input.buffer().clear();
                if !input.fill(LARGE_READ).await? {
                    return Err(ConnectionError::Disconnected.into());
                }
                continue;
            }
        };
        input.buffer().advance(used);
        return Ok(goes_on);
    }
}

async fn inline<T: Send + 'static>(
    session: &Session,
    input: &mut Input,
    work: impl FnOnce(&mut PayloadReader) -> Result<T, OpError> + Send + 'static,
) -> Result<T, OpError> {
    // No thread before there is something for it.
    if input.buffer().is_empty() && !input.fill(LARGE_READ).await? {
        return Err(ConnectionError::Disconnected.into());
    }
    let (send, receive) = mpsc::channel(WAITING_PIECES);
    let reader = PayloadReader { current: input.buffer().split().freeze(), ended: false, receive, ask: None };
    let mut worker = start(session, reader, work).await?;
    let (result, mut leftover) = loop {
        tokio::select! {
            outcome = &mut worker => break ended(outcome),
            more = input.fill(LARGE_READ) => {
                if !more? {
                    drop(send);
                    return ended(worker.await).0.map_err(OpError::out_of_step);
                }
            }
        }
        let piece = input.buffer().split().freeze();
        // The bytes are cheap to keep until it is known whether they were taken.
        if send.send(Piece::Data(piece.clone())).await.is_err() {
            let (result, mut leftover) = ended(worker.await);
            leftover.extend_from_slice(&piece);
            break (result, leftover);
        }
    };
    leftover.extend_from_slice(input.buffer());
    *input.buffer() = leftover;
    // After an error in the middle, what follows is the rest of a file and no request.
    result.map_err(OpError::out_of_step)
}

async fn asked<T: Send + 'static>(
    session: &Session,
    input: &mut Input,
    work: impl FnOnce(&mut PayloadReader) -> Result<T, OpError> + Send + 'static,
) -> Result<T, OpError> {
    let (send, receive) = mpsc::channel(1);
    let (ask, mut questions) = mpsc::channel(1);
    let current = ask_client(session, input).await?;
    let reader = PayloadReader { ended: current.is_empty(), current, receive, ask: Some(ask) };
    let mut worker = start(session, reader, work).await?;
    loop {
        tokio::select! {
            biased;
            question = questions.recv() => {
                if question.is_none() {
                    return ended(worker.await).0;
                }
                let data = ask_client(session, input).await?;
                let _ = send.send(if data.is_empty() { Piece::End } else { Piece::Data(data) }).await;
            }
            outcome = &mut worker => return ended(outcome).0,
        }
    }
}

/// Asks for the next piece. An empty one means that there is no more.
async fn ask_client(session: &Session, input: &mut Input) -> Result<Bytes, OpError> {
    session.events.push(Message::Read(ASKED));
    Ok(input.decode(|reader| Ok(Bytes::copy_from_slice(reader.bytes(MAX_STRING)?))).await?)
}
