//! Reading ahead on a thread of its own, so that who takes what is read need not wait for what it takes to make it.

use std::io::{self, Read};

use crossbeam_channel::{Receiver, Sender};

/// Bytes of a piece.
const PIECE: usize = 256 * 1024;
/// Pieces that may be read ahead: 2 MiB.
const PIECES: usize = 8;

/// What a reader may be: one that decompresses.
type Source = Box<dyn Read + Send>;

enum Event {
    Bytes(Vec<u8>),
    /// Why there is no more.
    Failed(io::Error),
    /// All of it is read. The source comes back, so that it lives as long as it would without the thread.
    End(#[expect(dead_code, reason = "it is only held")] Source),
}

/// The bytes of a source, in their order.
pub(crate) struct Ahead {
    receive: Receiver<Event>,
    piece: Vec<u8>,
    at: usize,
    end: Option<Event>,
}

impl Ahead {
    /// Reads `source` on a new thread, which ends by itself when this is dropped and the source says something.
    ///
    /// # Errors
    /// When there can be no more threads.
    pub(crate) fn new(source: Source) -> io::Result<Self> {
        let (send, receive) = crossbeam_channel::bounded(PIECES);
        std::thread::Builder::new().name("decompress".to_owned()).spawn(move || read(source, &send))?;
        Ok(Self { receive, piece: Vec::new(), at: 0, end: None })
    }
}

fn read(mut source: Source, send: &Sender<Event>) {
    loop {
        let mut piece = vec![0; PIECE];
        let mut length = 0;
        // Full pieces where that needs no waiting for the next one: decoders give little at a time.
        let ended = loop {
            match source.read(&mut piece[length..]) {
                Ok(0) => break Some(None),
                Ok(count) => length += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break Some(Some(error)),
            }
            if length == piece.len() || send.is_empty() {
                break None;
            }
        };
        piece.truncate(length);
        if !piece.is_empty() && send.send(Event::Bytes(piece)).is_err() {
            return;
        }
        // Nobody may want to know any more.
        let _ = match ended {
            None => continue,
            Some(None) => send.send(Event::End(source)),
            Some(Some(error)) => send.send(Event::Failed(error)),
        };
        return;
    }
}

impl Read for Ahead {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.at == self.piece.len() {
            if self.end.is_some() {
                return Ok(0);
            }
            match self.receive.recv() {
                Ok(Event::Bytes(piece)) => (self.piece, self.at) = (piece, 0),
                Ok(Event::Failed(error)) => return Err(error),
                Ok(end @ Event::End(_)) => {
                    self.end = Some(end);
                    return Ok(0);
                }
                Err(_) => return Err(io::Error::other("the thread that decompresses panicked")),
            }
        }
        let count = buf.len().min(self.piece.len() - self.at);
        buf[..count].copy_from_slice(&self.piece[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives a byte at a time, and then an error if it is told to.
    struct Slow(u32, bool);

    impl Read for Slow {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            if self.0 == 0 {
                return if self.1 { Err(io::Error::other("broken")) } else { Ok(0) };
            }
            self.0 -= 1;
            buf[0] = self.0 as u8;
            Ok(1)
        }
    }

    #[test]
    fn all_comes_in_order_and_then_what_ends_it() {
        for fails in [false, true] {
            let mut ahead = Ahead::new(Box::new(Slow(1_000_000, fails))).unwrap();
            let mut read = Vec::new();
            let result = ahead.read_to_end(&mut read);
            assert_eq!(result.is_err(), fails);
            assert!(read.iter().copied().eq((0..1_000_000_u32).rev().map(|n| n as u8)));
        }
    }

    #[test]
    fn who_is_not_listened_to_ends() {
        let (told, ended) = crossbeam_channel::bounded::<()>(0);
        struct Endless(#[expect(dead_code, reason = "dropped at the end")] Sender<()>);
        impl Read for Endless {
            fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
                Ok(buf.len())
            }
        }
        let mut ahead = Ahead::new(Box::new(Endless(told))).unwrap();
        ahead.read_exact(&mut [0; 1000]).unwrap();
        drop(ahead);
        assert_eq!(ended.recv(), Err(crossbeam_channel::RecvError));
    }
}
