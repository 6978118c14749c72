//! What a request can fail with, and what that means for its connection.

use nix_compat::worker::stderr::{ErrorMessage, GENERAL_FAILURE};

use crate::connection::ConnectionError;

/// How the system says that a disk is full, wherever a message comes from.
const NO_SPACE: &str = "No space left on device";

/// A request failed.
#[derive(Debug, thiserror::Error)]
pub enum OpError {
    /// The client is told and may go on.
    #[error("{message}")]
    Refused {
        /// The text.
        message: String,
        /// The exit status that clients below 1.26 are given.
        status: u64,
        /// Whether the work may have ended in the middle of a payload. Where only the payload itself tells its end,
        /// that is fatal.
        in_payload: bool,
    },
    /// The client is told, and the connection ends: where its next request begins cannot be known.
    #[error("{0}")]
    Fatal(String),
    /// Nobody is there to be told.
    #[error(transparent)]
    Connection(ConnectionError),
}

impl OpError {
    /// A refusal with the general exit status.
    pub fn new(message: impl Into<String>) -> Self {
        Self::Refused { message: message.into(), status: GENERAL_FAILURE, in_payload: false }
    }

    /// A failure after which the stream is out of step.
    pub fn fatal(message: impl Into<String>) -> Self {
        Self::Fatal(message.into())
    }

    /// Something that must not happen did.
    pub fn internal(message: impl Into<String>) -> Self {
        let message = message.into();
        tracing::error!(message, "internal error");
        Self::new(format!("internal error of castored: {message}"))
    }

    /// The same with what can be done about a full disk, if that is the reason.
    pub(crate) fn with_advice(self, store: &store::Store) -> Self {
        match self {
            Self::Refused { message, status, in_payload } if message.contains(NO_SPACE) => {
                Self::Refused { message: store.advise(message), status, in_payload }
            }
            Self::Fatal(message) if message.contains(NO_SPACE) => Self::Fatal(store.advise(message)),
            other => other,
        }
    }

    /// The same, where the end of the payload cannot be found any more.
    pub(crate) fn out_of_step(self) -> Self {
        match self {
            Self::Refused { message, in_payload: true, .. } => Self::Fatal(message),
            other => other,
        }
    }

    /// What the client is told.
    pub fn message(&self) -> ErrorMessage {
        let mut message = ErrorMessage::new(self.to_string());
        if let Self::Refused { status, .. } = self {
            message.status = *status;
        }
        message
    }

    /// Whether the connection ends with it.
    pub fn is_fatal(&self) -> bool {
        !matches!(self, Self::Refused { .. })
    }
}

impl From<ConnectionError> for OpError {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::Invalid(_) | ConnectionError::TooLarge => Self::Fatal(error.to_string()),
            ConnectionError::Disconnected | ConnectionError::Io { .. } => Self::Connection(error),
        }
    }
}

impl From<build::GateError> for OpError {
    fn from(error: build::GateError) -> Self {
        Self::new(error.to_string())
    }
}

impl From<store::Error> for OpError {
    fn from(error: store::Error) -> Self {
        use store::Error as E;
        // These can come up while a payload is read; the others when it has been read to its end.
        let in_payload =
            matches!(error, E::Nar(_) | E::Castore(_) | E::Index(_) | E::Tree(_) | E::Stream { .. } | E::TrailingBytes);
        let mut message = error.to_string();
        if error.is_disk_full() && !message.contains(NO_SPACE) {
            message = format!("{message}: {NO_SPACE}");
        }
        Self::Refused { message, status: GENERAL_FAILURE, in_payload }
    }
}
