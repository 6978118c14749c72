//! castored's own sockets in the state directory: the daemon's side opens them, commands ask for news over them.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::ops::ControlFlow;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

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

/// The request that a client makes of the daemon over one of them: a line of at most `longest` bytes, for which, as for
/// reading each answer, it has so much time. From then on the socket blocks.
pub(crate) fn request<Q: DeserializeOwned>(
    stream: tokio::net::UnixStream,
    longest: u64,
    patience: Duration,
) -> io::Result<(UnixStream, Q)> {
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    let mut line = String::new();
    BufReader::new((&stream).take(longest)).read_line(&mut line)?;
    let request = serde_json::from_str(&line)?;
    Ok((stream, request))
}

/// Writes a line of JSON.
pub(crate) fn write_line(stream: &mut UnixStream, value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// Connects to one of them and sends a request, a line of JSON.
///
/// # Errors
/// Those of [`connect`], and when it does not take the request.
pub(crate) fn send(path: &Path, request: &impl Serialize) -> Result<UnixStream, Failure> {
    let mut stream = connect(path)?;
    write_line(&mut stream, request).map_err(Failure::file("write to", path))?;
    Ok(stream)
}

/// Sends one of them a request and gives its news, each a line of at most `longest` bytes, to `each` until
/// that has what it waits for. `unfinished` says what it means that they end before.
///
/// # Errors
/// Those of [`send`] and of `each`; [`ClientError::Protocol`] for what is no news.
pub(crate) fn converse<N: DeserializeOwned, T>(
    path: &Path,
    request: &impl Serialize,
    longest: u64,
    unfinished: &str,
    mut each: impl FnMut(N) -> ControlFlow<Result<T, Failure>>,
) -> Result<T, Failure> {
    let protocol = |text: String| Failure::from(ClientError::Protocol(text));
    let mut reader = BufReader::new(send(path, request)?);
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
