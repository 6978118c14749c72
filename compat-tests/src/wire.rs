//! A bare worker-protocol client (minor 37), written apart from castored's own codec, for what no stock client would
//! ever send and for knowing to the millisecond when an answer came.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::error::{Context, Error, Result};
use crate::nar;

const CLIENT_MAGIC: u64 = 0x6e69_7863;
const SERVER_MAGIC: u64 = 0x6478_696f;
/// Major 1, minor 37: framed uploads, no feature lists.
const VERSION: u64 = 0x125;
/// The longest string this client accepts from a daemon.
const MAX_STRING: u64 = 1 << 26;
/// No answer may take longer than this.
const PATIENCE: Duration = Duration::from_secs(60);

/// The operations used here, by their numbers in the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Op {
    /// Is this path valid?
    IsValidPath = 1,
    /// Add contents, the daemon computes the path.
    AddToStore = 7,
    /// All valid paths.
    QueryAllValidPaths = 23,
    /// What is known about a path.
    QueryPathInfo = 26,
    /// A path's archive.
    NarFromPath = 38,
    /// Add an archive under a path that the client names.
    AddToStoreNar = 39,
}

/// What the daemon knows about a path, as far as tests look at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathInfo {
    /// Base 16.
    pub nar_hash: String,
    /// Bytes.
    pub nar_size: u64,
    /// Full paths.
    pub references: Vec<String>,
}

/// A connection after its handshake.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    /// Whether the daemon said that it trusts us.
    pub trusted: bool,
}

impl Client {
    /// Shakes hands over a fresh connection.
    pub fn new(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(PATIENCE)).doing("setting up", "a connection")?;
        stream.set_write_timeout(Some(PATIENCE)).doing("setting up", "a connection")?;
        let mut client = Self { stream, trusted: false };
        client.send(&words(&[CLIENT_MAGIC]))?;
        let magic = client.word()?;
        let version = client.word()?;
        if magic != SERVER_MAGIC || version < VERSION {
            return Err(Error::Protocol(format!("greeted with {magic:#x}, version {version:#x}")));
        }
        client.send(&words(&[VERSION, 0, 0]))?;
        client.string()?;
        client.trusted = client.word()? == 1;
        client.finish()?;
        Ok(client)
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).doing("sending to", "the daemon")
    }

    /// Ends our side of the connection; the daemon sees the end of the stream.
    pub fn shut_down_sending(&self) -> Result<()> {
        self.stream.shutdown(std::net::Shutdown::Write).doing("shutting down", "the connection")
    }

    /// Reads messages until the request is done or refused.
    pub fn finish(&mut self) -> Result<()> {
        loop {
            match self.word()? {
                0x616c_7473 => return Ok(()),
                0x6378_7470 => return Err(self.refusal()?),
                0x6f6c_6d67 => self.string().map(drop)?,
                0x5354_5254 => {
                    self.skip_words(3)?;
                    self.string()?;
                    self.skip_fields()?;
                    self.word()?;
                }
                0x5354_4f50 => self.skip_words(1)?,
                0x5253_4c54 => {
                    self.skip_words(2)?;
                    self.skip_fields()?;
                }
                tag => return Err(Error::Protocol(format!("unknown message {tag:#x}"))),
            }
        }
    }

    /// The rest of an error message.
    fn refusal(&mut self) -> Result<Error> {
        self.string()?;
        self.word()?;
        self.string()?;
        let message = String::from_utf8_lossy(&self.string()?).into_owned();
        self.word()?;
        for _ in 0..self.word()? {
            self.word()?;
            self.string()?;
        }
        Ok(Error::Refused(message))
    }

    /// Whether a path is valid.
    pub fn is_valid(&mut self, path: &str) -> Result<bool> {
        self.send(&Request::new(Op::IsValidPath).string(path).0)?;
        self.finish()?;
        Ok(self.word()? != 0)
    }

    /// Every valid path.
    pub fn all_valid_paths(&mut self) -> Result<Vec<String>> {
        self.send(&Request::new(Op::QueryAllValidPaths).0)?;
        self.finish()?;
        self.strings()
    }

    /// What is known about a path, if it is valid.
    pub fn path_info(&mut self, path: &str) -> Result<Option<PathInfo>> {
        self.send(&Request::new(Op::QueryPathInfo).string(path).0)?;
        self.finish()?;
        if self.word()? == 0 { Ok(None) } else { self.info().map(Some) }
    }

    /// Adds a tree under its content address and answers the path.
    pub fn add(&mut self, name: &str, tree: &nar::Tree) -> Result<String> {
        let request = Request::new(Op::AddToStore).string(name).string("fixed:r:sha256").word(0).word(0);
        self.send(&request.framed(&tree.archive()).0)?;
        self.finish()?;
        let path = String::from_utf8_lossy(&self.string()?).into_owned();
        self.info()?;
        Ok(path)
    }

    /// Reads a path's archive from the daemon: SHA-256 and size. Its length is known only from its info.
    pub fn archive_hash(&mut self, path: &str, size: u64) -> Result<[u8; 32]> {
        self.send(&Request::new(Op::NarFromPath).string(path).0)?;
        self.finish()?;
        let mut sink = nar::HashSink::default();
        let copied = io::copy(&mut (&mut self.stream).take(size), &mut sink).doing("reading the archive of", path)?;
        if copied != size {
            return Err(Error::Protocol(format!("the archive of {path} ended after {copied} of {size} bytes")));
        }
        Ok(sink.finish().0)
    }

    /// Waits until the daemon has closed the connection; an error if it does not.
    pub fn closed(&mut self) -> Result<()> {
        match io::copy(&mut (&mut self.stream).take(MAX_STRING), &mut io::sink()) {
            Err(e) if !matches!(e.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {
                Err(e).doing("waiting for the end of", "a connection")
            }
            _ => Ok(()),
        }
    }

    fn info(&mut self) -> Result<PathInfo> {
        self.string()?;
        let nar_hash = String::from_utf8_lossy(&self.string()?).into_owned();
        let references = self.strings()?;
        self.word()?;
        let nar_size = self.word()?;
        self.word()?;
        self.strings()?;
        self.string()?;
        Ok(PathInfo { nar_hash, nar_size, references })
    }

    fn skip_words(&mut self, count: usize) -> Result<()> {
        (0..count).try_for_each(|_| self.word().map(drop))
    }

    fn skip_fields(&mut self) -> Result<()> {
        for _ in 0..self.word()? {
            if self.word()? == 0 { self.word().map(drop)? } else { self.string().map(drop)? }
        }
        Ok(())
    }

    fn strings(&mut self) -> Result<Vec<String>> {
        let count = self.word()?;
        (0..count).map(|_| Ok(String::from_utf8_lossy(&self.string()?).into_owned())).collect()
    }

    /// One integer.
    pub fn word(&mut self) -> Result<u64> {
        let mut bytes = [0; 8];
        self.stream.read_exact(&mut bytes).doing("reading from", "the daemon")?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// One string with its padding.
    pub fn string(&mut self) -> Result<Vec<u8>> {
        let length = self.word()?;
        if length > MAX_STRING {
            return Err(Error::Protocol(format!("a string of {length} bytes")));
        }
        let mut bytes = Vec::new();
        (&mut self.stream)
            .take(length.next_multiple_of(8))
            .read_to_end(&mut bytes)
            .doing("reading from", "the daemon")?;
        if (bytes.len() as u64) < length {
            return Err(Error::Protocol("the stream ended inside a string".into()));
        }
        bytes.truncate(usize::try_from(length).unwrap_or(usize::MAX));
        Ok(bytes)
    }
}

/// Integers one after the other.
fn words(all: &[u64]) -> Vec<u8> {
    all.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// A request's bytes as they grow.
#[derive(Debug, Clone)]
pub struct Request(pub Vec<u8>);

impl Request {
    /// Begins with the operation's number.
    pub fn new(op: Op) -> Self {
        Self(words(&[op as u64]))
    }

    /// Adds an integer or a bool.
    #[must_use]
    pub fn word(mut self, word: u64) -> Self {
        self.0.extend_from_slice(&word.to_le_bytes());
        self
    }

    /// Adds a string.
    #[must_use]
    pub fn string(mut self, bytes: impl AsRef<[u8]>) -> Self {
        nar::put(&mut self.0, bytes.as_ref());
        self
    }

    /// Adds a framed stream that holds these bytes, in several frames.
    #[must_use]
    pub fn framed(mut self, bytes: &[u8]) -> Self {
        for frame in bytes.chunks(30_000) {
            self = self.word(frame.len() as u64);
            self.0.extend_from_slice(frame);
        }
        self.word(0)
    }

    /// AddToStoreNar of an archive with these claims and no signature.
    pub fn add_nar(path: &str, nar_hash: [u8; 32], archive: &[u8], unchecked: bool) -> Self {
        Self::new(Op::AddToStoreNar)
            .string(path)
            .string("")
            .string(nar::hex(&nar_hash))
            .word(0)
            .word(0)
            .word(archive.len() as u64)
            .word(0)
            .word(0)
            .string("")
            .word(0)
            .word(u64::from(unchecked))
            .framed(archive)
    }
}
