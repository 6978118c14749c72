//! The client's side of the worker protocol.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix_compat::store_path::StoreDir;
use nix_compat::wire::Writer;
use nix_compat::worker::handshake::{ClientHandshake, Progress, Trust};
use nix_compat::worker::stderr::Message;
use nix_compat::worker::{Features, NEWEST_MINOR, Payload, Protocol, Request, Response};

use crate::error::{ClientError, Result};
use crate::wire::{Limits, Sink, Stream, Wire};

/// Bytes of a frame.
const FRAME: usize = 256 * 1024;

/// A connection to a daemon.
#[derive(Debug)]
pub struct Connection<S = UnixStream> {
    wire: Wire<S>,
    protocol: Protocol,
    trust: Trust,
}

impl Connection {
    /// Connects to a socket and shakes hands.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn open(socket: &Path, store_dir: &StoreDir) -> Result<Self> {
        Self::open_as(socket, store_dir, NEWEST_MINOR)
    }

    /// As [`Connection::open`], as a client that speaks no newer version than 1.`minor`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn open_as(socket: &Path, store_dir: &StoreDir, minor: u16) -> Result<Self> {
        let stream =
            UnixStream::connect(socket).map_err(|source| ClientError::NoDaemon { path: socket.to_owned(), source })?;
        Self::over(stream, store_dir, minor, Limits::default())
    }
}

impl<S: Stream> Connection<S> {
    /// Shakes hands over a stream, as a client that speaks no newer version than 1.`minor`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn over(stream: S, store_dir: &StoreDir, minor: u16, limits: Limits) -> Result<Self> {
        let mut wire = Wire::new(stream, limits);
        let mut output = Writer::new();
        let mut handshake = ClientHandshake::new(store_dir.clone(), minor, Features::ALL, &mut output);
        let welcome = loop {
            wire.send(&output.take())?;
            wire.receive_some()?;
            let progress = wire.consume(|received| {
                handshake.advance(received, &mut output).map_err(|e| ClientError::Protocol(e.to_string()))
            })?;
            if let Progress::Done(welcome) = progress {
                break welcome;
            }
        };
        wire.send(&output.take())?;
        let mut connection = Self { wire, protocol: welcome.protocol, trust: welcome.trust };
        connection.wait_until_done(&mut |_| {})?;
        Ok(connection)
    }

    /// Whether the daemon said that it trusts us.
    pub fn trust(&self) -> Trust {
        self.trust
    }

    /// What both ends agreed on.
    pub fn protocol(&self) -> &Protocol {
        &self.protocol
    }

    /// How long to wait for the daemon from now on.
    pub fn set_limits(&mut self, limits: Limits) {
        self.wire.limits = limits;
    }

    /// Sends a request with what follows it, and waits for the answer.
    ///
    /// # Errors
    /// [`ClientError::Refused`] leaves the connection usable, unless the daemon closes it.
    pub fn call(
        &mut self,
        request: &Request,
        payload: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<Response> {
        self.call_watching(request, payload, &mut |_| {})
    }

    /// As [`Connection::call`]; `watch` is given what the daemon has to say meanwhile.
    ///
    /// # Errors
    /// As there.
    pub fn call_watching(
        &mut self,
        request: &Request,
        payload: impl FnOnce(&mut dyn Write) -> io::Result<()>,
        watch: &mut dyn FnMut(Message),
    ) -> Result<Response> {
        let mut writer = Writer::new();
        request.encode(&self.protocol, &mut writer);
        self.wire.send(writer.as_bytes())?;
        match request.payload(&self.protocol) {
            Payload::None => self.wait_until_done(watch)?,
            Payload::InlineNar => {
                let mut sink = Sink::new(&mut self.wire);
                let written = payload(&mut sink);
                sink.finish(written)?;
                self.wait_until_done(watch)?;
            }
            Payload::StderrRead => {
                let mut asked = Asked { connection: self, watch, ended: None };
                let written = payload(&mut asked);
                match asked.ended {
                    Some(ended) => ended?,
                    None => {
                        written.map_err(ClientError::Payload)?;
                        self.wait_until_done(watch)?;
                    }
                }
            }
            Payload::Framed => {
                let mut frames = Frames { sink: Sink::new(&mut self.wire), frame: Vec::with_capacity(FRAME) };
                let written = payload(&mut frames).and_then(|()| frames.finish());
                frames.sink.finish(written)?;
                self.wait_until_done(watch)?;
            }
        }
        let protocol = self.protocol.clone();
        self.wire.decode(|reader| Response::decode(request, reader, &protocol))
    }

    /// Reads bytes that follow a response, such as the NAR of `NarFromPath`.
    ///
    /// # Errors
    /// When the connection breaks off.
    pub fn read_exact(&mut self, bytes: &mut [u8]) -> Result<()> {
        Ok(self.wire.read_exact(bytes)?)
    }

    /// What follows a response, to its end and not further: more would be the next one.
    pub fn payload(&mut self) -> &mut dyn Read {
        &mut self.wire
    }

    fn next_message(&mut self) -> Result<Message> {
        let protocol = &self.protocol;
        self.wire.decode(|reader| Message::decode(reader, protocol))
    }

    /// Reads the log until the request is done. There is no more payload for one who asks.
    fn wait_until_done(&mut self, watch: &mut dyn FnMut(Message)) -> Result<()> {
        loop {
            match self.next_message()? {
                Message::Last => return Ok(()),
                Message::Error(error) => {
                    return Err(ClientError::Refused(String::from_utf8_lossy(&error.message).into_owned()));
                }
                Message::Read(_) => self.give(&[])?,
                other => watch(other),
            }
        }
    }

    fn give(&mut self, piece: &[u8]) -> Result<()> {
        let mut writer = Writer::new();
        writer.bytes(piece);
        self.wire.send(writer.as_bytes())
    }
}

/// Hands out what is written as the daemon asks for it.
struct Asked<'a, S> {
    connection: &'a mut Connection<S>,
    watch: &'a mut dyn FnMut(Message),
    /// The daemon is done, or the connection is: the rest of the payload interests nobody.
    ended: Option<Result<()>>,
}

impl<S: Stream> Asked<'_, S> {
    fn give(&mut self, buf: &[u8]) -> Result<Option<usize>> {
        loop {
            match self.connection.next_message()? {
                Message::Last => return Ok(None),
                Message::Error(error) => {
                    return Err(ClientError::Refused(String::from_utf8_lossy(&error.message).into_owned()));
                }
                Message::Read(wanted) => {
                    let length = buf.len().min(usize::try_from(wanted).unwrap_or(FRAME)).min(FRAME);
                    self.connection.give(&buf[..length])?;
                    return Ok(Some(length));
                }
                other => (self.watch)(other),
            }
        }
    }
}

impl<S: Stream> Write for Asked<'_, S> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if buf.is_empty() || self.ended.is_some() {
            return Ok(buf.len());
        }
        match self.give(buf) {
            Ok(Some(length)) => Ok(length),
            Ok(None) => {
                self.ended = Some(Ok(()));
                Ok(buf.len())
            }
            Err(error) => {
                self.ended = Some(Err(error));
                Err(io::ErrorKind::BrokenPipe.into())
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Cuts what is written into frames.
struct Frames<'a, S> {
    sink: Sink<'a, S>,
    frame: Vec<u8>,
}

impl<S: Stream> Frames<'_, S> {
    fn send(&mut self) -> io::Result<()> {
        let mut writer = Writer::new();
        writer.frame(&self.frame);
        self.frame.clear();
        self.sink.send(writer.as_bytes())
    }

    fn finish(&mut self) -> io::Result<()> {
        self.send()?;
        let mut writer = Writer::new();
        writer.end_frames();
        self.sink.send(writer.as_bytes())
    }
}

impl<S: Stream> Write for Frames<'_, S> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        // A frame is never longer than its buffer, whatever is written at once.
        let length = buf.len().min(FRAME - self.frame.len());
        self.frame.extend_from_slice(&buf[..length]);
        if self.frame.len() == FRAME {
            self.send()?;
        }
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
