//! castored's own sockets in the state directory: the daemon's side opens them, commands ask for news over them.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::ops::ControlFlow;
use std::os::unix::net::UnixStream;
use std::path::Path;

use remote::ClientError;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixListener;

use crate::failure::Failure;

/// Opens one of them. The state directory is locked by now: what is there is a dead daemon's.
pub(crate) fn listen(path: &Path) -> Result<UnixListener, Failure> {
    let _ = fs::remove_file(path);
    UnixListener::bind(path).map_err(Failure::file("listen on", path))
}

/// Connects to one of them.
///
/// # Errors
/// [`ClientError::NoDaemon`] when nobody listens, [`Failure::NotYours`] when it is somebody else's.
pub(crate) fn connect(path: &Path) -> Result<UnixStream, Failure> {
    UnixStream::connect(path).map_err(|source| match source.kind() {
        io::ErrorKind::PermissionDenied => Failure::NotYours(path.to_owned()),
        _ => ClientError::NoDaemon { path: path.to_owned(), source }.into(),
    })
}

/// Sends one of them a request, a line of JSON, and gives its news, each a line of at most `longest` bytes, to `each` until
/// that has what it waits for. `unfinished` says what it means that they end before.
///
/// # Errors
/// Those of [`connect`] and of `each`; [`ClientError::Protocol`] for what is no news.
pub(crate) fn converse<N: DeserializeOwned, T>(
    path: &Path,
    request: &impl Serialize,
    longest: u64,
    unfinished: &str,
    mut each: impl FnMut(N) -> ControlFlow<Result<T, Failure>>,
) -> Result<T, Failure> {
    let mut stream = connect(path)?;
    let protocol = |text: String| Failure::from(ClientError::Protocol(text));
    let mut line = serde_json::to_vec(request).map_err(|e| protocol(e.to_string()))?;
    line.push(b'\n');
    stream.write_all(&line).map_err(Failure::file("write to", path))?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        (&mut reader).take(longest).read_line(&mut line).map_err(Failure::file("read from", path))?;
        if line.is_empty() {
            return Err(protocol(unfinished.to_owned()));
        }
        let news = serde_json::from_str(&line).map_err(|e| protocol(format!("its news cannot be read: {e}")))?;
        if let ControlFlow::Break(answer) = each(news) {
            return answer;
        }
    }
}
