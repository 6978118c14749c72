//! How a connection begins: both ends find the protocol they share.
//!
//! Both state machines take the bytes received so far, say how many of them they used, and append to a [`Writer`] what
//! must be sent (and flushed) before more can be expected. Neither depends on what the other end sends early.
//!
//! After the server's side is done, the server may log and then sends [`Message::Last`](super::stderr::Message::Last) to
//! accept, or [`Message::Error`](super::stderr::Message::Error) to refuse; the client's side ends before that.

use super::{Features, NEWEST_MINOR, OLDEST_MINOR, Protocol};
use crate::store_path::StoreDir;
use crate::wire::{Invalid, ReadError, Reader, Writer, wire_enum};

const CLIENT_MAGIC: u64 = 0x6e69_7863;
const SERVER_MAGIC: u64 = 0x6478_696f;
const MAJOR: u16 = 1;
/// Longest feature name or version text accepted, in bytes.
const MAX_NAME: usize = 4096;
/// Most features accepted from the other end.
const MAX_FEATURES: u64 = 256;

wire_enum! {
    /// Whether the server trusts the client.
    pub enum Trust {
        /// It does not say; always so below 1.35.
        Unknown = 0,
        /// It does.
        Trusted = 1,
        /// It does not.
        NotTrusted = 2,
    }
}

/// Why no connection comes about.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The first word is not the other end's magic number.
    #[error("protocol mismatch: the other end began with {0:#x}")]
    Magic(u64),
    /// Another major version.
    #[error("protocol version {major}.{minor} of the other end is not supported: only 1.x is")]
    Major {
        /// Its major version.
        major: u16,
        /// Its minor version.
        minor: u16,
    },
    /// A minor version that is not spoken here any more.
    #[error("protocol version 1.{0} of the other end is too old: at least 1.{OLDEST_MINOR} is needed")]
    TooOld(u16),
    /// The bytes follow no protocol.
    #[error(transparent)]
    Invalid(#[from] Invalid),
}

/// Whether a handshake needs more bytes.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress<T> {
    /// Send what was written, receive more, and go on.
    NeedMore,
    /// Send what was written; the handshake is done.
    Done(T),
}

/// What a server learned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connected {
    /// How to go on.
    pub protocol: Protocol,
    /// The minor version the client announced, which may be newer than ours.
    pub client_minor: u16,
}

/// What a client learned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Welcome {
    /// How to go on.
    pub protocol: Protocol,
    /// The server's version as text; none below 1.33.
    pub server_version: Option<String>,
    /// Whether the server trusts us.
    pub trust: Trust,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Magic,
    Version,
    Features { peer_minor: u16 },
    Rest { peer_minor: u16, features: Features },
}

/// The server's side.
#[derive(Debug)]
pub struct ServerHandshake {
    store_dir: StoreDir,
    version: String,
    trust: Trust,
    features: Features,
    step: Step,
}

impl ServerHandshake {
    /// A server that calls itself `version`, offers `features` and has decided about the client's `trust`.
    pub fn new(store_dir: StoreDir, version: impl Into<String>, trust: Trust, features: Features) -> Self {
        Self { store_dir, version: version.into(), trust, features, step: Step::Magic }
    }

    /// Takes what it can use from the front of `input` and returns how many bytes that was.
    pub fn advance(
        &mut self,
        input: &[u8],
        output: &mut Writer,
    ) -> Result<(usize, Progress<Connected>), HandshakeError> {
        drive(input, |reader| self.step(reader, output))
    }

    fn step(&mut self, reader: &mut Reader<'_>, output: &mut Writer) -> Result<Option<Connected>, StepError> {
        self.step = match self.step {
            Step::Magic => {
                read_magic(reader, CLIENT_MAGIC)?;
                output.u64(SERVER_MAGIC);
                write_version(NEWEST_MINOR, output);
                Step::Version
            }
            Step::Version => {
                let peer_minor = read_version(reader)?;
                if peer_minor >= 38 {
                    Step::Features { peer_minor }
                } else {
                    Step::Rest { peer_minor, features: Features::NONE }
                }
            }
            Step::Features { peer_minor } => {
                let theirs = read_features(reader)?;
                write_features(self.features, output);
                Step::Rest { peer_minor, features: self.features.intersection(theirs) }
            }
            Step::Rest { peer_minor, features } => {
                if reader.bool()? {
                    let _obsolete_cpu = reader.u64()?;
                }
                let _obsolete_reserve_space = reader.u64()?;
                let protocol =
                    Protocol { minor: peer_minor.min(NEWEST_MINOR), features, store_dir: self.store_dir.clone() };
                if protocol.since(33) {
                    output.bytes(&self.version);
                }
                if protocol.since(35) {
                    output.u64(self.trust.code());
                }
                return Ok(Some(Connected { protocol, client_minor: peer_minor }));
            }
        };
        Ok(None)
    }
}

/// The client's side.
#[derive(Debug)]
pub struct ClientHandshake {
    store_dir: StoreDir,
    minor: u16,
    features: Features,
    step: ClientStep,
}

#[derive(Debug, Clone, Copy)]
enum ClientStep {
    Magic,
    Version,
    Features,
    Rest { minor: u16, features: Features },
}

impl ClientHandshake {
    /// A client that announces 1.`minor` and offers `features`. Writes the first bytes to send.
    pub fn new(store_dir: StoreDir, minor: u16, features: Features, output: &mut Writer) -> Self {
        output.u64(CLIENT_MAGIC);
        write_version(minor, output);
        Self { store_dir, minor, features, step: ClientStep::Magic }
    }

    /// Takes what it can use from the front of `input` and returns how many bytes that was.
    pub fn advance(&mut self, input: &[u8], output: &mut Writer) -> Result<(usize, Progress<Welcome>), HandshakeError> {
        drive(input, |reader| self.step(reader, output))
    }

    fn step(&mut self, reader: &mut Reader<'_>, output: &mut Writer) -> Result<Option<Welcome>, StepError> {
        self.step = match self.step {
            ClientStep::Magic => {
                read_magic(reader, SERVER_MAGIC)?;
                ClientStep::Version
            }
            ClientStep::Version => {
                let minor = read_version(reader)?.min(self.minor).min(NEWEST_MINOR);
                if minor >= 38 {
                    write_features(self.features, output);
                    ClientStep::Features
                } else {
                    write_obsolete(output);
                    ClientStep::Rest { minor, features: Features::NONE }
                }
            }
            ClientStep::Features => {
                let features = self.features.intersection(read_features(reader)?);
                write_obsolete(output);
                ClientStep::Rest { minor: NEWEST_MINOR, features }
            }
            ClientStep::Rest { minor, features } => {
                let protocol = Protocol { minor, features, store_dir: self.store_dir.clone() };
                let server_version = match protocol.since(33) {
                    true => Some(reader.lossy_text(MAX_NAME)?),
                    false => None,
                };
                let trust = match protocol.since(35) {
                    true => reader.u64()?,
                    false => Trust::Unknown.code(),
                };
                let trust = Trust::from_code(trust).ok_or(Invalid::UnknownTag { what: "trust level", value: trust })?;
                return Ok(Some(Welcome { protocol, server_version, trust }));
            }
        };
        Ok(None)
    }
}

/// What ends a step before it is through.
enum StepError {
    Incomplete,
    Failed(HandshakeError),
}

impl From<ReadError> for StepError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Incomplete { .. } => Self::Incomplete,
            ReadError::Invalid(invalid) => Self::Failed(invalid.into()),
        }
    }
}

impl From<Invalid> for StepError {
    fn from(invalid: Invalid) -> Self {
        Self::Failed(invalid.into())
    }
}

/// Runs whole steps for as long as the input lasts. A step writes and changes state only after it has read everything.
fn drive<T>(
    input: &[u8],
    mut step: impl FnMut(&mut Reader<'_>) -> Result<Option<T>, StepError>,
) -> Result<(usize, Progress<T>), HandshakeError> {
    let mut used = 0;
    loop {
        let mut reader = Reader::new(&input[used..]);
        match step(&mut reader) {
            Ok(done) => {
                used += reader.position();
                if let Some(done) = done {
                    return Ok((used, Progress::Done(done)));
                }
            }
            Err(StepError::Incomplete) => return Ok((used, Progress::NeedMore)),
            Err(StepError::Failed(error)) => return Err(error),
        }
    }
}

fn read_magic(reader: &mut Reader<'_>, wanted: u64) -> Result<(), StepError> {
    match reader.u64()? {
        magic if magic == wanted => Ok(()),
        magic => Err(StepError::Failed(HandshakeError::Magic(magic))),
    }
}

fn read_version(reader: &mut Reader<'_>) -> Result<u16, StepError> {
    let word = reader.u32()?;
    let (major, minor) = (word >> 8, (word & 0xff) as u16);
    if major != u32::from(MAJOR) {
        let major = u16::try_from(major).unwrap_or(u16::MAX);
        return Err(StepError::Failed(HandshakeError::Major { major, minor }));
    }
    if minor < OLDEST_MINOR {
        return Err(StepError::Failed(HandshakeError::TooOld(minor)));
    }
    Ok(minor)
}

fn write_version(minor: u16, output: &mut Writer) {
    output.u64(u64::from(MAJOR << 8 | minor));
}

fn read_features(reader: &mut Reader<'_>) -> Result<Features, StepError> {
    let count = reader.u64()?;
    if count > MAX_FEATURES {
        return Err(Invalid::ListTooLong { count, limit: MAX_FEATURES }.into());
    }
    let mut features = Features::NONE;
    for _ in 0..count {
        features = features.union(Features::from_name(reader.bytes(MAX_NAME)?));
    }
    Ok(features)
}

fn write_features(features: Features, output: &mut Writer) {
    output.list(features.names(), |output, name| output.bytes(name));
}

/// CPU affinity and reserved space: none.
fn write_obsolete(output: &mut Writer) {
    output.bool(false);
    output.bool(false);
}
