//! Why a conversation failed.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// A conversation with another store failed.
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
    Broken(io::Error),
    /// Nothing came, or nothing was taken, for as long as is waited.
    #[error("the daemon did nothing for {} seconds", .0.as_secs())]
    Silent(Duration),
    /// It is later than it may be.
    #[error("the daemon took longer than it may")]
    Late,
    /// What the daemon says is not the protocol.
    #[error("the daemon does not speak the protocol: {0}")]
    Protocol(String),
    /// The daemon says no.
    #[error("the daemon answers: {0}")]
    Refused(String),
    /// Something on this side went wrong while a request's data was sent.
    #[error("cannot send the data of a request: {0}")]
    Payload(io::Error),
    /// The URI names no store that can be reached from here.
    #[error("cannot reach the store '{uri}': {reason}")]
    Uri {
        /// The URI.
        uri: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The command that reaches the other machine cannot be started.
    #[error("cannot run '{command}': {source}")]
    Spawn {
        /// The program.
        command: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The command that reaches the other machine has something to say about why the conversation failed.
    #[error("{error}: {said}")]
    Process {
        /// How it failed.
        error: Box<ClientError>,
        /// The end of its standard error.
        said: String,
    },
}

impl ClientError {
    /// Whether there is no connection any more, for whatever reason.
    pub fn is_broken(&self) -> bool {
        match self {
            Self::Broken(_) => true,
            Self::Process { error, .. } => error.is_broken(),
            _ => false,
        }
    }

    /// Whether the other end took too long, for as long as it may be silent or in all.
    pub fn is_too_late(&self) -> bool {
        match self {
            Self::Silent(_) | Self::Late => true,
            Self::Process { error, .. } => error.is_too_late(),
            _ => false,
        }
    }
}

/// An error of a stream; one that has a limit of time is told apart by [`crate::wire`].
impl From<io::Error> for ClientError {
    fn from(error: io::Error) -> Self {
        Self::Broken(error)
    }
}

pub(crate) type Result<T> = std::result::Result<T, ClientError>;
