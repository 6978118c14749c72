//! The socket clients connect to.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};

use listenfd::ListenFd;
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
    /// systemd passed something that is no listening Unix socket.
    #[error("the socket passed by systemd cannot be used: {0}")]
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

/// The socket that systemd passed (`LISTEN_FDS`), if it did.
///
/// # Errors
/// [`ListenError::Passed`].
pub fn passed_by_systemd() -> Result<Option<UnixListener>, ListenError> {
    let Some(listener) = ListenFd::from_env().take_unix_listener(0).map_err(ListenError::Passed)? else {
        return Ok(None);
    };
    listener.set_nonblocking(true).map_err(ListenError::Passed)?;
    UnixListener::from_std(listener).map(Some).map_err(ListenError::Passed)
}
