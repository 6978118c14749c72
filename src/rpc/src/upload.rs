//! A client's stream of pieces as a reader for a blocking thread.

use std::io;

use bytes::{Buf as _, Bytes};
use castore::proto::BlobChunk;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tonic::{Request, Status, Streaming};

use crate::cut_off::CutOff;
use crate::limits::{QUEUE_ITEMS, UPLOAD_IDLE};

/// A client that hangs up and one that is done both end the queue; only the second says so first.
enum Piece {
    Bytes(Bytes),
    End,
}

/// The end of the queue that the connection fills.
pub(crate) struct UploadWriter(mpsc::Sender<Piece>);

/// The bytes of an upload. When the client goes away in the middle, reading fails: it never looks like the end.
pub(crate) struct UploadReader {
    pieces: mpsc::Receiver<Piece>,
    current: Bytes,
    ended: bool,
}

/// A bounded queue from a connection to a thread.
pub(crate) fn upload() -> (UploadWriter, UploadReader) {
    let (sender, pieces) = mpsc::channel(QUEUE_ITEMS);
    (UploadWriter(sender), UploadReader { pieces, current: Bytes::new(), ended: false })
}

impl UploadWriter {
    /// Passes the whole stream on. Returns early, without an error, when the reader is gone: it knows why.
    pub(crate) async fn pass_on(self, mut messages: Messages<BlobChunk>) -> Result<(), Status> {
        while let Some(BlobChunk { data }) = messages.next().await? {
            if self.0.send(Piece::Bytes(data)).await.is_err() {
                return Ok(());
            }
        }
        let _ = self.0.send(Piece::End).await;
        Ok(())
    }
}

/// The messages of an upload.
pub(crate) struct Messages<T> {
    stream: Streaming<T>,
    cut_off: CutOff,
}

impl<T> Messages<T> {
    pub(crate) fn of(request: Request<Streaming<T>>) -> Messages<T> {
        let cut_off = request.extensions().get::<CutOff>().cloned().unwrap_or_default();
        Messages { stream: request.into_inner(), cut_off }
    }

    /// The next message; `None` where the client ended the upload, and only there.
    pub(crate) async fn next(&mut self) -> Result<Option<T>, Status> {
        match timeout(UPLOAD_IDLE, self.stream.message()).await {
            Ok(Ok(None)) => self.cut_off.check().map(|()| None),
            Ok(message) => message,
            Err(_) => Err(Status::deadline_exceeded(format!("nothing was sent for {} s", UPLOAD_IDLE.as_secs()))),
        }
    }
}

impl io::Read for UploadReader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() && !self.ended {
            match self.pieces.blocking_recv() {
                Some(Piece::Bytes(bytes)) => self.current = bytes,
                Some(Piece::End) => self.ended = true,
                None => return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the upload broke off")),
            }
        }
        let len = into.len().min(self.current.len());
        self.current.copy_to_slice(&mut into[..len]);
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn pieces_are_joined_until_the_end() {
        let (writer, mut reader) = upload();
        for piece in [&b"ab"[..], b"", b"cde"] {
            writer.0.blocking_send(Piece::Bytes(Bytes::from_static(piece))).unwrap();
        }
        writer.0.blocking_send(Piece::End).unwrap();
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        assert_eq!(all, b"abcde");
        assert_eq!(reader.read(&mut [0; 4]).unwrap(), 0, "the end is the end when asked again");
    }

    #[test]
    fn hanging_up_is_not_the_end() {
        let (writer, mut reader) = upload();
        writer.0.blocking_send(Piece::Bytes(Bytes::from_static(b"ab"))).unwrap();
        drop(writer);
        let mut all = Vec::new();
        let error = reader.read_to_end(&mut all).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
    }
}
