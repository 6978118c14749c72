//! A client of the worker protocol, as little of one as castored's own commands need.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix_compat::store_path::StoreDir;
use nix_compat::wire::{ReadError, Reader, Writer};
use nix_compat::worker::handshake::{ClientHandshake, Progress};
use nix_compat::worker::stderr::Message;
use nix_compat::worker::{Features, NEWEST_MINOR, Payload, Protocol, Request, Response};

use crate::failure::Failure;

/// Bytes of a frame.
const FRAME: usize = 256 * 1024;
/// Bytes received at a time.
const READ: usize = 16 * 1024;

/// A connection to a daemon.
pub(crate) struct Connection {
    stream: UnixStream,
    received: Vec<u8>,
    protocol: Protocol,
}

impl Connection {
    /// Connects and shakes hands.
    pub(crate) fn open(socket: &Path, store_dir: &StoreDir) -> Result<Self, Failure> {
        let mut stream =
            UnixStream::connect(socket).map_err(|source| Failure::NoDaemon { path: socket.to_owned(), source })?;
        let mut output = Writer::new();
        let mut handshake = ClientHandshake::new(store_dir.clone(), NEWEST_MINOR, Features::ALL, &mut output);
        let mut received = Vec::new();
        let welcome = loop {
            stream.write_all(output.as_bytes()).map_err(broken)?;
            output = Writer::new();
            receive(&mut stream, &mut received)?;
            let (used, progress) =
                handshake.advance(&received, &mut output).map_err(|e| Failure::Protocol(e.to_string()))?;
            received.drain(..used);
            if let Progress::Done(welcome) = progress {
                break welcome;
            }
        };
        stream.write_all(output.as_bytes()).map_err(broken)?;
        let mut connection = Self { stream, received, protocol: welcome.protocol };
        connection.wait_until_done()?;
        Ok(connection)
    }

    /// Sends a request with what follows it, and waits for the answer.
    pub(crate) fn call(
        &mut self,
        request: &Request,
        payload: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<Response, Failure> {
        let mut writer = Writer::new();
        request.encode(&self.protocol, &mut writer);
        self.stream.write_all(writer.as_bytes()).map_err(broken)?;
        if request.payload(&self.protocol) == Payload::Framed {
            let mut frames = Frames { stream: &mut self.stream, frame: Vec::with_capacity(FRAME) };
            payload(&mut frames).and_then(|()| frames.finish()).map_err(broken)?;
        }
        self.wait_until_done()?;
        let protocol = self.protocol.clone();
        self.decode(|reader| Response::decode(request, reader, &protocol))
    }

    /// Reads the log until the request is done.
    fn wait_until_done(&mut self) -> Result<(), Failure> {
        let protocol = self.protocol.clone();
        loop {
            match self.decode(|reader| Message::decode(reader, &protocol))? {
                Message::Last => return Ok(()),
                Message::Error(error) => {
                    return Err(Failure::Refused(String::from_utf8_lossy(&error.message).into_owned()));
                }
                Message::Next(line) => eprint!("{}", String::from_utf8_lossy(&line)),
                _ => {}
            }
        }
    }

    fn decode<T>(&mut self, mut decode: impl FnMut(&mut Reader<'_>) -> Result<T, ReadError>) -> Result<T, Failure> {
        loop {
            let mut reader = Reader::new(&self.received);
            match decode(&mut reader) {
                Ok(value) => {
                    let used = reader.position();
                    self.received.drain(..used);
                    return Ok(value);
                }
                Err(ReadError::Invalid(invalid)) => return Err(Failure::Protocol(invalid.to_string())),
                Err(ReadError::Incomplete { .. }) => receive(&mut self.stream, &mut self.received)?,
            }
        }
    }
}

fn broken(source: io::Error) -> Failure {
    Failure::Protocol(source.to_string())
}

fn receive(stream: &mut UnixStream, received: &mut Vec<u8>) -> Result<(), Failure> {
    let mut buffer = [0; READ];
    match stream.read(&mut buffer).map_err(broken)? {
        0 => Err(Failure::Protocol("it closed the connection".into())),
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
