//! A client that costs next to nothing, for load: requests are bytes prepared beforehand, replies are read in large
//! pieces, and nothing is kept of them that nobody asks for. Speaks any minor from 18 to 38.

use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::error::{Context, Error, Result};
use crate::nar;
use crate::wire::Request;

const CLIENT_MAGIC: u64 = 0x6e69_7863;
const SERVER_MAGIC: u64 = 0x6478_696f;
/// The major version, as it stands in a version word.
const MAJOR: u64 = 0x100;
/// STDERR_LAST.
const LAST: u64 = 0x616c_7473;
/// STDERR_ERROR.
const ERROR: u64 = 0x6378_7470;
/// STDERR_NEXT.
const NEXT: u64 = 0x6f6c_6d67;
/// STDERR_READ.
const READ: u64 = 0x6461_7461;
/// Bytes received at a time.
const BUFFER: usize = 256 * 1024;
/// No answer may take longer than this.
const PATIENCE: Duration = Duration::from_secs(120);
/// The longest string accepted.
const MAX_STRING: u64 = 1 << 26;

/// A message that comes before an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// The answer follows.
    Last,
    /// At most so many bytes of the payload are wanted.
    Read(u64),
}

/// A connection after its handshake.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    input: BufReader<UnixStream>,
    minor: u64,
}

impl Connection {
    /// Connects as a client of that minor.
    pub fn open(socket: &Path, minor: u64) -> Result<Self> {
        Self::over(UnixStream::connect(socket).doing("connecting to", socket)?, minor)
    }

    /// Shakes hands over a fresh connection.
    pub fn over(stream: UnixStream, minor: u64) -> Result<Self> {
        Self::with_buffer(stream, minor, BUFFER)
    }

    /// The same for one of very many connections.
    pub fn small(stream: UnixStream, minor: u64) -> Result<Self> {
        Self::with_buffer(stream, minor, 512)
    }

    fn with_buffer(stream: UnixStream, minor: u64, buffer: usize) -> Result<Self> {
        stream.set_read_timeout(Some(PATIENCE)).doing("setting up", "a connection")?;
        stream.set_write_timeout(Some(PATIENCE)).doing("setting up", "a connection")?;
        let copy = stream.try_clone().doing("copying", "a connection")?;
        let mut connection = Self { stream, input: BufReader::with_capacity(buffer, copy), minor };
        // All that a client may say before it has heard anything, in one piece.
        let mut hello = vec![CLIENT_MAGIC, MAJOR + minor];
        if minor >= 38 {
            hello.push(0);
        }
        hello.extend([0, 0]);
        let hello: Vec<u8> = hello.iter().flat_map(|w| w.to_le_bytes()).collect();
        connection.send(&hello)?;
        let (magic, version) = (connection.word()?, connection.word()?);
        if magic != SERVER_MAGIC || version < MAJOR + minor {
            return Err(Error::Protocol(format!("greeted with {magic:#x}, version {version:#x}")));
        }
        if minor >= 38 {
            for _ in 0..connection.word()? {
                connection.string()?;
            }
        }
        if minor >= 33 {
            connection.string()?;
        }
        if minor >= 35 {
            connection.word()?;
        }
        connection.finish()?;
        Ok(connection)
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).doing("sending to", "the daemon")
    }

    /// The sending direction.
    pub fn output(&mut self) -> &mut UnixStream {
        &mut self.stream
    }

    /// The receiving direction, with what is in its buffer.
    pub fn input(&mut self) -> &mut BufReader<UnixStream> {
        &mut self.input
    }

    /// The next message that is neither log nor activity; an error of the daemon's is ours.
    pub fn message(&mut self) -> Result<Message> {
        loop {
            match self.word()? {
                LAST => return Ok(Message::Last),
                READ => return Ok(Message::Read(self.word()?)),
                ERROR => return Err(self.refusal()?),
                NEXT => self.string().map(drop)?,
                0x5354_5254 => {
                    self.skip(24)?;
                    self.string()?;
                    self.fields()?;
                    self.word()?;
                }
                0x5354_4f50 => self.skip(8)?,
                0x5253_4c54 => {
                    self.skip(16)?;
                    self.fields()?;
                }
                tag => return Err(Error::Protocol(format!("unknown message {tag:#x}"))),
            }
        }
    }

    /// Reads messages until the answer follows.
    pub fn finish(&mut self) -> Result<()> {
        match self.message()? {
            Message::Last => Ok(()),
            other => Err(Error::Protocol(format!("unexpected: {other:?}"))),
        }
    }

    fn refusal(&mut self) -> Result<Error> {
        let mut message = self.string()?;
        if self.minor >= 26 {
            self.word()?;
            self.string()?;
            message = self.string()?;
            self.word()?;
            for _ in 0..self.word()? {
                self.word()?;
                self.string()?;
            }
        } else {
            self.word()?;
        }
        Ok(Error::Refused(String::from_utf8_lossy(&message).into_owned()))
    }

    fn fields(&mut self) -> Result<()> {
        for _ in 0..self.word()? {
            if self.word()? == 0 { self.word().map(drop)? } else { self.string().map(drop)? }
        }
        Ok(())
    }

    /// Sends a request and reads the messages before its answer.
    pub fn call(&mut self, request: &[u8]) -> Result<()> {
        self.send(request)?;
        self.finish()
    }

    /// Whether a path is valid.
    pub fn is_valid(&mut self, path: &str) -> Result<bool> {
        self.call(&is_valid(path))?;
        Ok(self.word()? != 0)
    }

    /// The length of the whole reply to a QueryPathInfo that finds the path, and the path's NAR hash (base 16) and size.
    pub fn path_info(&mut self, request: &[u8]) -> Result<PathInfoReply> {
        self.call(request)?;
        if self.word()? == 0 {
            return Err(Error::Wrong("the path is not valid".into()));
        }
        // LAST, the word that says that there is one, and what is read below.
        let mut length = 16;
        let mut string = |connection: &mut Self| -> Result<Vec<u8>> {
            let string = connection.string()?;
            length += 8 + string.len().next_multiple_of(8);
            Ok(string)
        };
        string(self)?;
        let nar_hash = String::from_utf8_lossy(&string(self)?).into_owned();
        for _ in 0..self.word()? {
            string(self)?;
        }
        self.word()?;
        let nar_size = self.word()?;
        self.word()?;
        for _ in 0..self.word()? {
            string(self)?;
        }
        string(self)?;
        Ok(PathInfoReply { length: length + 5 * 8, nar_hash, nar_size })
    }

    /// One integer.
    pub fn word(&mut self) -> Result<u64> {
        let mut bytes = [0; 8];
        self.input.read_exact(&mut bytes).doing("reading from", "the daemon")?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// One string with its padding.
    pub fn string(&mut self) -> Result<Vec<u8>> {
        let length = self.word()?;
        if length > MAX_STRING {
            return Err(Error::Protocol(format!("a string of {length} bytes")));
        }
        let mut bytes = vec![0; usize::try_from(length.next_multiple_of(8)).unwrap_or(0)];
        self.input.read_exact(&mut bytes).doing("reading from", "the daemon")?;
        bytes.truncate(usize::try_from(length).unwrap_or(0));
        Ok(bytes)
    }

    /// Passes over bytes.
    pub fn skip(&mut self, count: u64) -> Result<()> {
        let skipped = io::copy(&mut (&mut self.input).take(count), &mut io::sink());
        match skipped.doing("reading from", "the daemon")? {
            n if n == count => Ok(()),
            _ => Err(Error::Protocol("the stream ended in the middle".into())),
        }
    }
}

/// What is kept of the answer to a QueryPathInfo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathInfoReply {
    /// Bytes of the whole reply.
    pub length: usize,
    /// Base 16.
    pub nar_hash: String,
    /// Bytes.
    pub nar_size: u64,
}

/// IsValidPath.
pub fn is_valid(path: &str) -> Vec<u8> {
    Request::new(crate::wire::Op::IsValidPath).string(path).0
}

/// QueryPathInfo.
pub fn path_info(path: &str) -> Vec<u8> {
    Request::new(crate::wire::Op::QueryPathInfo).string(path).0
}

/// A made-up path, different for each seed: the base name's hash part follows from it.
pub fn made_up_path(seed: &str, name: &str) -> String {
    const DIGITS: &[u8; 32] = b"0123456789abcdfghijklmnpqrsvwxyz";
    let digest = Sha256::digest(seed.as_bytes());
    let hash: String = digest.iter().map(|byte| char::from(DIGITS[usize::from(byte % 32)])).collect();
    format!("/nix/store/{hash}-{name}")
}

/// A path that is offered to a daemon: what stands in its info, and its archive.
#[derive(Debug, Clone, Default)]
pub struct Offer {
    /// The path.
    pub path: String,
    /// Those it refers to, sorted.
    pub references: Vec<String>,
    /// The derivation it claims to come from, or nothing.
    pub deriver: String,
    /// Signatures.
    pub signatures: Vec<String>,
    /// What it contains.
    pub archive: Vec<u8>,
}

impl Offer {
    /// The deriver and what follows it in an info: all but the path.
    fn write_info(&self, out: &mut Vec<u8>) {
        let word = |out: &mut Vec<u8>, word: u64| out.extend_from_slice(&word.to_le_bytes());
        nar::put(out, self.path.as_bytes());
        nar::put(out, self.deriver.as_bytes());
        nar::put(out, nar::hex(&nar::sha256(&self.archive)).as_bytes());
        word(out, self.references.len() as u64);
        self.references.iter().for_each(|reference| nar::put(out, reference.as_bytes()));
        word(out, 0);
        word(out, self.archive.len() as u64);
        word(out, 0);
        word(out, self.signatures.len() as u64);
        self.signatures.iter().for_each(|signature| nar::put(out, signature.as_bytes()));
        nar::put(out, b"");
    }

    /// Its part of the stream of an AddMultipleToStore.
    pub fn write_into_multiple(&self, out: &mut Vec<u8>) {
        self.write_info(out);
        out.extend_from_slice(&self.archive);
    }

    /// An AddToStoreNar of it without a check of signatures, the archive in one frame.
    pub fn add_nar(&self) -> Vec<u8> {
        let mut out = 39_u64.to_le_bytes().to_vec();
        self.write_info(&mut out);
        for word in [0, 1, self.archive.len() as u64] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(&self.archive);
        out.extend_from_slice(&0_u64.to_le_bytes());
        out
    }
}

/// An AddMultipleToStore of all of them, without a check of signatures.
pub fn add_multiple(offers: impl ExactSizeIterator<Item = Offer>) -> Vec<u8> {
    let mut stream = (offers.len() as u64).to_le_bytes().to_vec();
    offers.for_each(|offer| offer.write_into_multiple(&mut stream));
    let mut request: Vec<u8> = [44_u64, 0, 1].iter().flat_map(|w| w.to_le_bytes()).collect();
    let mut frames = Frames::new(&mut request, 32 * 1024);
    // Into memory: that cannot fail.
    let _ = frames.write_all(&stream).and_then(|()| frames.end());
    request
}

/// Cuts what is written into frames; [`Frames::end`] sends the last ones.
#[derive(Debug)]
pub struct Frames<W> {
    inner: W,
    frame: Vec<u8>,
    size: usize,
}

impl<W: Write> Frames<W> {
    /// Frames of `size` bytes.
    pub fn new(inner: W, size: usize) -> Self {
        Self { inner, frame: vec![0; 8], size }
    }

    fn send(&mut self) -> io::Result<()> {
        let length = (self.frame.len() - 8) as u64;
        self.frame[..8].copy_from_slice(&length.to_le_bytes());
        self.inner.write_all(&self.frame)?;
        self.frame.truncate(8);
        Ok(())
    }

    /// Sends what is left and the end of the stream.
    pub fn end(mut self) -> io::Result<()> {
        if self.frame.len() > 8 {
            self.send()?;
        }
        self.send()
    }
}

impl<W: Write> Write for Frames<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(self.size + 8 - self.frame.len());
        self.frame.extend_from_slice(&bytes[..taken]);
        if self.frame.len() == self.size + 8 {
            self.send()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
