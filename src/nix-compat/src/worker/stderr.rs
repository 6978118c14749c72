//! The side channel on which a server reports while it works, between a request and its response.

use super::Protocol;
use crate::wire::{Invalid, ReadError, Reader, Writer, wire_enum};

const NEXT: u64 = 0x6f6c_6d67;
const READ: u64 = 0x6461_7461;
const WRITE: u64 = 0x6461_7416;
const LAST: u64 = 0x616c_7473;
const ERROR: u64 = 0x6378_7470;
const START_ACTIVITY: u64 = 0x5354_5254;
const STOP_ACTIVITY: u64 = 0x5354_4f50;
const RESULT: u64 = 0x5253_4c54;

/// Longest text accepted in a message, in bytes.
const MAX_TEXT: usize = 16 << 20;
/// The exit status of an error that has none of its own.
pub const GENERAL_FAILURE: u64 = 1;

wire_enum! {
    /// How important a message is. The numbers are those of Nix 2.4 and later.
    pub enum Verbosity {
        /// Something failed.
        Error = 0,
        /// Something looks wrong.
        Warn = 1,
        /// Something the user should notice. Unknown to Nix 2.3.
        Notice = 2,
        /// What is going on; the default.
        Info = 3,
        /// More of it.
        Talkative = 4,
        /// Much more of it.
        Chatty = 5,
        /// For finding errors.
        Debug = 6,
        /// Everything.
        Vomit = 7,
    }
}

/// The last minor version whose clients count verbosity without [`Verbosity::Notice`].
const LAST_WITHOUT_NOTICE: u16 = 21;

impl Verbosity {
    /// The level a client means by `level`. Levels above the highest mean the highest.
    pub fn from_wire(level: u32, protocol: &Protocol) -> Self {
        let level = u64::from(level);
        let shifted = if !protocol.since(LAST_WITHOUT_NOTICE + 1) && level >= 2 { level + 1 } else { level };
        Self::from_code(shifted).unwrap_or(Self::Vomit)
    }

    /// The number that means this level to the other end. Nix 2.3 gets notices as info.
    pub fn to_wire(self, protocol: &Protocol) -> u64 {
        let code = self.code();
        if !protocol.since(LAST_WITHOUT_NOTICE + 1) && code > 2 { code - 1 } else { code }
    }
}

wire_enum! {
    /// What an activity is doing. Its fields are named in parentheses.
    pub enum ActivityKind {
        /// Nothing in particular.
        Unknown = 0,
        /// Copying a path: (path, source URI, destination URI).
        CopyPath = 100,
        /// Transferring a file: (URI).
        FileTransfer = 101,
        /// The whole of a build request: no fields.
        Realise = 102,
        /// The parent of all copies: no fields.
        CopyPaths = 103,
        /// The parent of all builds: no fields.
        Builds = 104,
        /// Building: (derivation path, machine or "", 1, 1).
        Build = 105,
        /// Deduplicating the store: no fields.
        OptimiseStore = 106,
        /// Checking the store: no fields.
        VerifyPaths = 107,
        /// Substituting: (path, substituter's URI).
        Substitute = 108,
        /// Asking a substituter: (path, substituter's URI).
        QueryPathInfo = 109,
        /// Running the post-build hook: (derivation path).
        PostBuildHook = 110,
        /// Waiting for something another build holds: no fields, or (derivation path).
        BuildWaiting = 111,
        /// Fetching a source tree: no fields.
        FetchTree = 112,
        /// Copying a source tree to the store: (source path, dry run).
        FetchToStore = 113,
    }
}

wire_enum! {
    /// What is reported about a running activity. Its fields are named in parentheses.
    pub enum ResultKind {
        /// A file was replaced by a link: (bytes, blocks).
        FileLinked = 100,
        /// The builder wrote a line: (line).
        BuildLogLine = 101,
        /// A path without a trusted signature: (path).
        UntrustedPath = 102,
        /// A corrupted path: (path).
        CorruptedPath = 103,
        /// The build entered a phase: (phase).
        SetPhase = 104,
        /// How far: (done, expected, running, failed).
        Progress = 105,
        /// What to expect of an activity type in total: (type, expected).
        SetExpected = 106,
        /// The post-build hook wrote a line: (line).
        PostBuildLogLine = 107,
        /// The state of a fetch: (text).
        FetchStatus = 108,
        /// A source tree was copied: (path).
        FetchToStore = 109,
    }
}

/// An argument of an activity or result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Field {
    /// A number.
    Int(u64),
    /// A text, not necessarily UTF-8.
    Text(Vec<u8>),
}

/// A failure as told to the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrorMessage {
    /// Its importance.
    pub level: Verbosity,
    /// The text, without "error:" in front.
    pub message: Vec<u8>,
    /// The exit status the client should end with; transmitted below 1.26 only. Never 0 there.
    pub status: u64,
    /// What was being done when it happened, innermost last. Below 1.26 appended to the text.
    pub traces: Vec<Vec<u8>>,
}

impl ErrorMessage {
    /// A failure with the general exit status.
    pub fn new(message: impl Into<Vec<u8>>) -> Self {
        Self { level: Verbosity::Error, message: message.into(), status: GENERAL_FAILURE, traces: Vec::new() }
    }

    fn encode(&self, protocol: &Protocol, writer: &mut Writer) {
        if !protocol.since(26) {
            let mut text = self.message.clone();
            for trace in &self.traces {
                text.push(b'\n');
                text.extend_from_slice(trace);
            }
            writer.bytes(text);
            // Nix 2.3.7 takes 0 for success and its daemon leaves such a word out altogether.
            writer.u64(self.status.max(GENERAL_FAILURE));
            return;
        }
        writer.bytes("Error");
        writer.u64(self.level.to_wire(protocol));
        writer.bytes("Error");
        writer.bytes(&self.message);
        // No source position: clients abort on anything but 0.
        writer.u64(0);
        writer.list(&self.traces, |writer, trace| {
            writer.u64(0);
            writer.bytes(trace);
        });
    }

    fn decode(reader: &mut Reader<'_>, protocol: &Protocol) -> Result<Self, ReadError> {
        if !protocol.since(26) {
            let message = reader.bytes(MAX_TEXT)?.to_vec();
            let status = reader.u64()?;
            return Ok(Self { level: Verbosity::Error, message, status, traces: Vec::new() });
        }
        reader.bytes(MAX_TEXT)?;
        let level = Verbosity::from_wire(reader.u32()?, protocol);
        reader.bytes(MAX_TEXT)?;
        let message = reader.bytes(MAX_TEXT)?.to_vec();
        no_position(reader)?;
        let traces = reader.list(2, |reader| {
            no_position(reader)?;
            Ok(reader.bytes(MAX_TEXT)?.to_vec())
        })?;
        Ok(Self { level, message, status: GENERAL_FAILURE, traces })
    }
}

fn no_position(reader: &mut Reader<'_>) -> Result<(), ReadError> {
    match reader.u64()? {
        0 => Ok(()),
        value => Err(Invalid::UnknownTag { what: "error position", value }.into()),
    }
}

/// One message of the side channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// A line of log.
    Next(Vec<u8>),
    /// The server wants at most this many bytes of payload; the client answers with one string.
    Read(u64),
    /// Data for the client (ExportPath).
    Write(Vec<u8>),
    /// The request succeeded: the response follows.
    Last,
    /// The request failed: no response follows.
    Error(ErrorMessage),
    /// Something began.
    StartActivity {
        /// Names the activity on this connection.
        id: u64,
        /// Its importance.
        level: Verbosity,
        /// What it does.
        kind: ActivityKind,
        /// The same for people.
        text: Vec<u8>,
        /// See [`ActivityKind`].
        fields: Vec<Field>,
        /// The activity it belongs to; 0 for none.
        parent: u64,
    },
    /// The activity ended. Clients crash on an id that was not started on their connection.
    StopActivity(u64),
    /// News of a running activity. Clients crash on an id that was not started on their connection.
    Result {
        /// The activity.
        id: u64,
        /// What kind of news.
        kind: ResultKind,
        /// See [`ResultKind`].
        fields: Vec<Field>,
    },
}

impl Message {
    /// Appends the message. Clients below 1.20 know no activities: their start becomes a line of log, the rest nothing.
    pub fn encode(&self, protocol: &Protocol, writer: &mut Writer) {
        match self {
            Self::Next(text) => {
                writer.u64(NEXT);
                writer.bytes(text);
            }
            Self::Read(wanted) => {
                writer.u64(READ);
                writer.u64(*wanted);
            }
            Self::Write(data) => {
                writer.u64(WRITE);
                writer.bytes(data);
            }
            Self::Last => writer.u64(LAST),
            Self::Error(error) => {
                writer.u64(ERROR);
                error.encode(protocol, writer);
            }
            Self::StartActivity { text, .. } if !protocol.since(20) => {
                if !text.is_empty() {
                    writer.u64(NEXT);
                    writer.bytes([text.as_slice(), b"..."].concat());
                }
            }
            Self::StopActivity(_) | Self::Result { .. } if !protocol.since(20) => {}
            Self::StartActivity { id, level, kind, text, fields, parent } => {
                writer.u64(START_ACTIVITY);
                writer.u64(*id);
                writer.u64(level.to_wire(protocol));
                writer.u64(kind.code());
                writer.bytes(text);
                write_fields(fields, writer);
                writer.u64(*parent);
            }
            Self::StopActivity(id) => {
                writer.u64(STOP_ACTIVITY);
                writer.u64(*id);
            }
            Self::Result { id, kind, fields } => {
                writer.u64(RESULT);
                writer.u64(*id);
                writer.u64(kind.code());
                write_fields(fields, writer);
            }
        }
    }

    /// Takes the next message of a server.
    pub fn decode(reader: &mut Reader<'_>, protocol: &Protocol) -> Result<Self, ReadError> {
        Ok(match reader.u64()? {
            NEXT => Self::Next(reader.bytes(MAX_TEXT)?.to_vec()),
            READ => Self::Read(reader.u64()?),
            WRITE => Self::Write(reader.bytes(MAX_TEXT)?.to_vec()),
            LAST => Self::Last,
            ERROR => Self::Error(ErrorMessage::decode(reader, protocol)?),
            START_ACTIVITY => Self::StartActivity {
                id: reader.u64()?,
                level: Verbosity::from_wire(reader.u32()?, protocol),
                kind: ActivityKind::from_code(u64::from(reader.u32()?)).unwrap_or(ActivityKind::Unknown),
                text: reader.bytes(MAX_TEXT)?.to_vec(),
                fields: read_fields(reader)?,
                parent: reader.u64()?,
            },
            STOP_ACTIVITY => Self::StopActivity(reader.u64()?),
            RESULT => {
                let id = reader.u64()?;
                let value = u64::from(reader.u32()?);
                let kind = ResultKind::from_code(value).ok_or(Invalid::UnknownTag { what: "result type", value })?;
                Self::Result { id, kind, fields: read_fields(reader)? }
            }
            value => return Err(Invalid::UnknownTag { what: "message type", value }.into()),
        })
    }
}

fn write_fields(fields: &[Field], writer: &mut Writer) {
    writer.list(fields, |writer, field| match field {
        Field::Int(value) => {
            writer.u64(0);
            writer.u64(*value);
        }
        Field::Text(text) => {
            writer.u64(1);
            writer.bytes(text);
        }
    });
}

fn read_fields(reader: &mut Reader<'_>) -> Result<Vec<Field>, ReadError> {
    reader.list(2, |reader| {
        Ok(match reader.u64()? {
            0 => Field::Int(reader.u64()?),
            1 => Field::Text(reader.bytes(MAX_TEXT)?.to_vec()),
            value => return Err(Invalid::UnknownTag { what: "field type", value }.into()),
        })
    })
}
