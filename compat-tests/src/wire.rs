//! A bare worker-protocol client (minors 18 to 38, 37 unless told otherwise), written apart from castored's own codec,
//! for what no stock client would ever send and for knowing to the millisecond when an answer came.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::error::{Context, Error, Result};
use crate::nar;

const CLIENT_MAGIC: u64 = 0x6e69_7863;
const SERVER_MAGIC: u64 = 0x6478_696f;
/// The major version, as it stands in a version word.
const MAJOR: u64 = 0x100;
/// The minor spoken unless told otherwise: framed uploads, no feature lists.
const MINOR: u64 = 37;
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
    /// What would be built and fetched.
    QueryMissing = 40,
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

/// What the daemon said about itself in the handshake.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Greeting {
    /// Its version word.
    pub version: u64,
    /// Its feature strings, since 38.
    pub features: Vec<String>,
    /// The Nix version it gives itself, since 33.
    pub nix_version: Option<String>,
    /// Its word on whether it trusts us, since 35.
    pub trust: Option<u64>,
}

/// A message that comes before the answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// The answer follows.
    Last,
    /// There will be no answer.
    Error(Refusal),
    /// A line of the log.
    Next(Vec<u8>),
    /// At most so many bytes of a payload are wanted.
    Read(u64),
    /// A piece of data.
    Write(Vec<u8>),
    /// An activity begins, ends, or has news.
    Activity,
}

/// An error as it stands on the wire.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Refusal {
    /// What went wrong.
    pub text: Vec<u8>,
    /// The exit status, below 26.
    pub status: Option<u64>,
    /// The rest, since 26.
    pub structure: Option<Structure>,
}

/// What structured errors have beside their text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Structure {
    /// Always "Error".
    pub kind: String,
    /// The verbosity level.
    pub level: u64,
    /// The class of the error.
    pub name: String,
    /// Whether a position follows, which is never so.
    pub have_pos: u64,
    /// The hints.
    pub traces: Vec<String>,
}

/// A connection after its handshake.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    minor: u64,
    /// Whether the daemon said that it trusts us.
    pub trusted: bool,
    /// What else it said.
    pub greeting: Greeting,
}

impl Client {
    /// Shakes hands over a fresh connection.
    pub fn new(stream: UnixStream) -> Result<Self> {
        Self::with_minor(stream, MINOR)
    }

    /// Shakes hands as a client of that minor, 18 or later, which the daemon must know.
    pub fn with_minor(stream: UnixStream, minor: u64) -> Result<Self> {
        stream.set_read_timeout(Some(PATIENCE)).doing("setting up", "a connection")?;
        stream.set_write_timeout(Some(PATIENCE)).doing("setting up", "a connection")?;
        let mut client = Self { stream, minor, trusted: false, greeting: Greeting::default() };
        client.send(&words(&[CLIENT_MAGIC]))?;
        let magic = client.word()?;
        let version = client.word()?;
        client.greeting.version = version;
        if magic != SERVER_MAGIC || version < MAJOR + minor {
            return Err(Error::Protocol(format!("greeted with {magic:#x}, version {version:#x}")));
        }
        client.send(&words(&[MAJOR + minor]))?;
        if minor >= 38 {
            client.send(&words(&[0]))?;
            client.greeting.features = client.strings()?;
        }
        client.send(&words(&[0, 0]))?;
        if minor >= 33 {
            client.greeting.nix_version = Some(String::from_utf8_lossy(&client.string()?).into_owned());
        }
        if minor >= 35 {
            client.greeting.trust = Some(client.word()?);
            client.trusted = client.greeting.trust == Some(1);
        }
        client.finish()?;
        Ok(client)
    }

    /// The minor spoken.
    pub fn minor(&self) -> u64 {
        self.minor
    }

    /// Replaces the time that an answer may take.
    pub fn set_patience(&self, patience: Duration) -> Result<()> {
        self.stream.set_read_timeout(Some(patience)).doing("setting up", "a connection")
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
            match self.message()? {
                Message::Last => return Ok(()),
                Message::Error(refusal) => {
                    return Err(Error::Refused(String::from_utf8_lossy(&refusal.text).into_owned()));
                }
                Message::Next(_) | Message::Activity => {}
                other => return Err(Error::Protocol(format!("unexpected: {other:?}"))),
            }
        }
    }

    /// One message.
    pub fn message(&mut self) -> Result<Message> {
        Ok(match self.word()? {
            0x616c_7473 => Message::Last,
            0x6378_7470 => Message::Error(self.refusal()?),
            0x6f6c_6d67 => Message::Next(self.string()?),
            0x6461_7461 => Message::Read(self.word()?),
            0x6461_7416 => Message::Write(self.string()?),
            0x5354_5254 => {
                self.skip_words(3)?;
                self.string()?;
                self.skip_fields()?;
                self.word()?;
                Message::Activity
            }
            0x5354_4f50 => {
                self.word()?;
                Message::Activity
            }
            0x5253_4c54 => {
                self.skip_words(2)?;
                self.skip_fields()?;
                Message::Activity
            }
            tag => return Err(Error::Protocol(format!("unknown message {tag:#x}"))),
        })
    }

    /// The rest of an error message.
    fn refusal(&mut self) -> Result<Refusal> {
        if self.minor < 26 {
            return Ok(Refusal { text: self.string()?, status: Some(self.word()?), structure: None });
        }
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        let mut structure = Structure { kind: text(self.string()?), level: self.word()?, ..Structure::default() };
        structure.name = text(self.string()?);
        let message = self.string()?;
        structure.have_pos = self.word()?;
        for _ in 0..self.word()? {
            self.word()?;
            structure.traces.push(text(self.string()?));
        }
        Ok(Refusal { text: message, status: None, structure: Some(structure) })
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

    /// A list of strings.
    pub fn strings(&mut self) -> Result<Vec<String>> {
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
        let padding = bytes.split_off(usize::try_from(length).unwrap_or(usize::MAX).min(bytes.len()));
        if padding.iter().any(|b| *b != 0) {
            return Err(Error::Protocol("padding that is not zero".into()));
        }
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
        Self::numbered(op as u64)
    }

    /// Begins with any number, an operation's or not.
    pub fn numbered(op: u64) -> Self {
        Self(words(&[op]))
    }

    /// Adds bytes as they are.
    #[must_use]
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Adds a list of strings.
    #[must_use]
    pub fn strings<S: AsRef<[u8]>>(self, all: &[S]) -> Self {
        let counted = self.word(all.len() as u64);
        all.iter().fold(counted, |request, string| request.string(string))
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
            self = self.word(frame.len() as u64).bytes(frame);
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
