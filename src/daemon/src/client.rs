//! The other end: a client of the worker protocol, blocking, for castored's own commands and for tests.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix_compat::store_path::StoreDir;
use nix_compat::wire::{ReadError, Reader, Writer};
use nix_compat::worker::handshake::{ClientHandshake, Progress, Trust};
use nix_compat::worker::stderr::Message;
use nix_compat::worker::{Features, NEWEST_MINOR, Payload, Protocol, Request, Response};

/// Bytes of a frame.
const FRAME: usize = 256 * 1024;
/// Bytes received at a time.
const READ: usize = 16 * 1024;

/// A conversation with a daemon failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no daemon listens on '{}': {source}; start one with `castored daemon`", path.display())]
    NoDaemon {
        /// Where it was looked for.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The connection broke off.
    #[error("the connection to the daemon broke off: {0}")]
    Broken(#[from] io::Error),
    /// What the daemon says is not the protocol.
    #[error("the daemon does not speak the worker protocol: {0}")]
    Protocol(String),
    /// The daemon says no.
    #[error("the daemon answers: {0}")]
    Refused(String),
}

type Result<T> = std::result::Result<T, ClientError>;

/// A connection to a daemon.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    received: Vec<u8>,
    protocol: Protocol,
    trust: Trust,
}

impl Connection {
    /// Connects and shakes hands.
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
        let mut stream =
            UnixStream::connect(socket).map_err(|source| ClientError::NoDaemon { path: socket.to_owned(), source })?;
        let mut output = Writer::new();
        let mut handshake = ClientHandshake::new(store_dir.clone(), minor, Features::ALL, &mut output);
        let mut received = Vec::new();
        let welcome = loop {
            stream.write_all(&output.take())?;
            receive(&mut stream, &mut received)?;
            let (used, progress) =
                handshake.advance(&received, &mut output).map_err(|e| ClientError::Protocol(e.to_string()))?;
            received.drain(..used);
            if let Progress::Done(welcome) = progress {
                break welcome;
            }
        };
        stream.write_all(&output.take())?;
        let mut connection = Self { stream, received, protocol: welcome.protocol, trust: welcome.trust };
        connection.wait_until_done(&mut &[][..])?;
        Ok(connection)
    }

    /// Whether the daemon said that it trusts us.
    pub fn trust(&self) -> Trust {
        self.trust
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
        let mut writer = Writer::new();
        request.encode(&self.protocol, &mut writer);
        self.stream.write_all(writer.as_bytes())?;
        let mut asked_for = Vec::new();
        match request.payload(&self.protocol) {
            Payload::None => {}
            Payload::InlineNar => payload(&mut self.stream)?,
            Payload::StderrRead => payload(&mut asked_for)?,
            Payload::Framed => {
                let mut frames = Frames { stream: &mut self.stream, frame: Vec::with_capacity(FRAME) };
                payload(&mut frames).and_then(|()| frames.finish())?;
            }
        }
        self.wait_until_done(&mut &asked_for[..])?;
        let protocol = self.protocol.clone();
        self.decode(|reader| Response::decode(request, reader, &protocol))
    }

    /// Reads bytes that follow a response, such as the NAR of `NarFromPath`.
    ///
    /// # Errors
    /// When the connection breaks off.
    pub fn read_exact(&mut self, bytes: &mut [u8]) -> Result<()> {
        let buffered = bytes.len().min(self.received.len());
        bytes[..buffered].copy_from_slice(&self.received[..buffered]);
        self.received.drain(..buffered);
        Ok(self.stream.read_exact(&mut bytes[buffered..])?)
    }

    /// Reads the log until the request is done, handing out `payload` as it is asked for.
    fn wait_until_done(&mut self, payload: &mut &[u8]) -> Result<()> {
        let protocol = self.protocol.clone();
        loop {
            match self.decode(|reader| Message::decode(reader, &protocol))? {
                Message::Last => return Ok(()),
                Message::Error(error) => {
                    return Err(ClientError::Refused(String::from_utf8_lossy(&error.message).into_owned()));
                }
                Message::Read(wanted) => {
                    let (piece, rest) = payload.split_at(payload.len().min(usize::try_from(wanted).unwrap_or(FRAME)));
                    let mut writer = Writer::new();
                    writer.bytes(piece);
                    self.stream.write_all(writer.as_bytes())?;
                    *payload = rest;
                }
                _ => {}
            }
        }
    }

    fn decode<T>(&mut self, mut decode: impl FnMut(&mut Reader<'_>) -> std::result::Result<T, ReadError>) -> Result<T> {
        loop {
            let mut reader = Reader::new(&self.received);
            match decode(&mut reader) {
                Ok(value) => {
                    let used = reader.position();
                    self.received.drain(..used);
                    return Ok(value);
                }
                Err(ReadError::Invalid(invalid)) => return Err(ClientError::Protocol(invalid.to_string())),
                Err(ReadError::Incomplete { .. }) => receive(&mut self.stream, &mut self.received)?,
            }
        }
    }
}

fn receive(stream: &mut UnixStream, received: &mut Vec<u8>) -> Result<()> {
    let mut buffer = [0; READ];
    match stream.read(&mut buffer)? {
        0 => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
        n => {
            received.extend_from_slice(&buffer[..n]);
            Ok(())
        }
    }
}

/// Cuts what is written into frames.
struct Frames<'a> {
    stream: &'a mut UnixStream,
    frame: Vec<u8>,
}

impl Frames<'_> {
    fn send(&mut self) -> io::Result<()> {
        let mut writer = Writer::new();
        writer.frame(&self.frame);
        self.stream.write_all(writer.as_bytes())?;
        self.frame.clear();
        Ok(())
    }

    fn finish(mut self) -> io::Result<()> {
        if !self.frame.is_empty() {
            self.send()?;
        }
        let mut writer = Writer::new();
        writer.end_frames();
        self.stream.write_all(writer.as_bytes())
    }
}

impl Write for Frames<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.frame.extend_from_slice(buf);
        if self.frame.len() >= FRAME {
            self.send()?;
        }
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
