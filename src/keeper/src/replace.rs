//! Having another program take the server's place.
//!
//! A connection to the keeper's socket brings one byte and the program, as a descriptor, and gets one line when the
//! program's server is ready, or why it is not.

use std::io::{self, BufRead, BufReader};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::channel::send;

/// The answer when the new server is ready.
pub(crate) const DONE: &str = "ready";

/// Why a server was not replaced.
#[derive(Debug, thiserror::Error)]
pub enum ReplaceError {
    /// No keeper listens there.
    #[error("cannot reach the daemon's keeper on '{}': {source}", path.display())]
    NoKeeper {
        /// The socket.
        path: std::path::PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The conversation broke off.
    #[error("the daemon's keeper did not answer: {0}")]
    NoAnswer(#[source] io::Error),
    /// The keeper has another server running.
    #[error("{0}")]
    Refused(String),
}

/// Asks the keeper that listens on `path` to have `program` serve from now on, and waits until it does.
///
/// # Errors
/// [`ReplaceError`]; the old server, or another start of the old program, serves on.
pub fn ask(path: &Path, program: BorrowedFd<'_>) -> Result<(), ReplaceError> {
    let stream =
        UnixStream::connect(path).map_err(|source| ReplaceError::NoKeeper { path: path.to_owned(), source })?;
    send(stream.as_fd(), "R", Some(program)).map_err(ReplaceError::NoAnswer)?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).map_err(ReplaceError::NoAnswer)?;
    match answer.trim() {
        DONE => Ok(()),
        "" => Err(ReplaceError::NoAnswer(io::ErrorKind::UnexpectedEof.into())),
        other => Err(ReplaceError::Refused(other.to_owned())),
    }
}
