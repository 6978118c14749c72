//! What can go wrong in the harness itself; a test's own findings are assertions.

use std::io;
use std::path::Path;
use std::time::Duration;

/// An error of the harness: what was tried, on what, and why it failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call or file operation failed.
    #[error("{action}: {source}")]
    Io {
        /// What was tried, as a lowercase fragment ("reading /etc/passwd").
        action: String,
        /// The system's answer.
        source: io::Error,
    },
    /// A command ended with a status that the caller did not accept.
    #[error("`{command}` ended with {status}\n{output}")]
    Command {
        /// The command line as shown to the reader.
        command: String,
        /// Exit code or signal.
        status: String,
        /// Standard output and standard error, joined.
        output: String,
    },
    /// A command or condition did not come to an end in time.
    #[error("{what} took longer than {limit:?}\n{output}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// How long.
        limit: Duration,
        /// What it had printed until then.
        output: String,
    },
    /// The machine's apt configuration names no Debian mirror.
    #[error("finding a debian mirror: no `deb` entry with component main in {0}")]
    NoMirror(String),
    /// The daemon ended, or did not begin to answer.
    #[error("{what}; its log:\n{log}")]
    Daemon {
        /// What happened.
        what: String,
        /// The daemon's log so far.
        log: String,
    },
    /// The peer sent something that the protocol does not allow.
    #[error("worker protocol: {0}")]
    Protocol(String),
    /// The daemon answered a request with an error (STDERR_ERROR).
    #[error("the daemon refused: {0}")]
    Refused(String),
    /// A gRPC service or method is not what was expected, or a call failed.
    #[error("grpc: {0}")]
    Grpc(String),
    /// A result is not the right one.
    #[error("{0}")]
    Wrong(String),
}

/// The harness's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Attaches to a system error what was being done.
pub trait Context<T> {
    /// `action` is a lowercase fragment; `on` is the object.
    fn doing(self, action: &str, on: impl AsRef<Path>) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn doing(self, action: &str, on: impl AsRef<Path>) -> Result<T> {
        self.map_err(|e| Error::Io { action: format!("{action} {}", on.as_ref().display()), source: e.into() })
    }
}
