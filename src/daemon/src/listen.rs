//! The sockets clients connect to.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;

/// No socket could be had.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Something about the socket's file.
    #[error("cannot {action} '{}': {source}", path.display())]
    Socket {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Another daemon answers there.
    #[error("another daemon listens on '{}'; stop it first, or set NIX_DAEMON_SOCKET_PATH", .0.display())]
    Busy(PathBuf),
    /// Whoever started the daemon handed over something that is no listening Unix socket.
    #[error("the socket that was handed over cannot be used: {0}")]
    Passed(#[source] io::Error),
}

/// Binds the socket, open to every user: who may do what is decided when they have connected.
///
/// A file left by a dead daemon is replaced; one that answers is not.
///
/// # Errors
/// [`ListenError`].
pub fn bind(path: &Path) -> Result<UnixListener, ListenError> {
    let failed = |action| move |source| ListenError::Socket { action, path: path.to_owned(), source };
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(failed("create the directory of"))?;
    }
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(ListenError::Busy(path.to_owned()));
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed("replace")(e)),
        _ => {}
    }
    let listener = StdListener::bind(path).map_err(failed("listen on"))?;
    // Whatever the umask says.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666)).map_err(failed("open to all users"))?;
    listener.set_nonblocking(true).map_err(failed("listen on"))?;
    UnixListener::from_std(listener).map_err(failed("listen on"))
}

/// A listening socket that was handed over: by systemd (`LISTEN_FDS`), or by an earlier daemon.
///
/// # Errors
/// [`ListenError::Passed`].
pub fn adopt(socket: OwnedFd) -> Result<UnixListener, ListenError> {
    let listener = StdListener::from(socket);
    listener.local_addr().and_then(|_| listener.set_nonblocking(true)).map_err(ListenError::Passed)?;
    UnixListener::from_std(listener).map_err(ListenError::Passed)
}
