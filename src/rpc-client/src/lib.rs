//! gRPC's messages of castores and stores, and another store as if it were local: [`BlobService`](castore::BlobService),
//! [`DirectoryService`](castore::DirectoryService) and [`StoreView`](store::view::StoreView) over gRPC.
//!
//! The traits are synchronous, so a call here blocks its thread while the runtime it was given does the talking; it
//! must not be made from an async task of that runtime. What arrives is checked against the digest that was asked for.

mod ahead;
mod blobs;
mod directories;
pub mod limits;
pub mod path_info;
mod paths;
pub mod proto;
mod url;
mod view;

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use castore::Error;
use nix_compat::store_path::StorePath;
use tokio::runtime::Handle;
use tokio_stream::StreamExt as _;
pub use tonic::transport::Channel;
use tonic::transport::Endpoint;
use tonic::{Code, Status, Streaming};

pub use ahead::{Ahead, Coming, MAX_PIECE};
pub use blobs::RemoteBlobs;
pub use directories::RemoteDirectories;
pub use paths::RemotePaths;
pub use url::{UrlError, open, open_within};
pub use view::RemoteView;

/// How long a peer may take to answer, and between one piece of an answer and the next.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a peer did that it should not.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The call failed.
    #[error("cannot {action}: {} ({:?})", .status.message(), .status.code())]
    Call {
        /// What was tried.
        action: &'static str,
        /// What came back.
        status: Box<Status>,
    },
    /// The peer answered with something else than what was asked for.
    #[error("cannot {action}: the peer's answer does not have the digest {wanted}")]
    WrongDigest {
        /// What was tried.
        action: &'static str,
        /// The digest that was asked for, or that was computed on the way out.
        wanted: castore::Digest,
    },
    /// The peer says of a blob what cannot be.
    #[error("the peer's chunks of blob {0} make no sense")]
    Chunks(castore::Digest),
    /// The peer names something that it does not have.
    #[error("the peer lacks {what} {digest}, which belongs to what it has")]
    Lacks {
        /// A blob or a directory.
        what: &'static str,
        /// Its digest.
        digest: castore::Digest,
    },
    /// Whoever asked does not wait any more.
    #[error("nobody waits for the peer's answer any more")]
    Unwanted,
    /// The peer says nothing.
    #[error("cannot {action}: no answer within {} seconds", PATIENCE.as_secs())]
    Silent {
        /// What was tried.
        action: &'static str,
    },
    /// The peer's description of a store path makes no sense.
    #[error("the peer sent a malformed path info: {0}")]
    Path(String),
    /// The peer answered with another path than the one asked for.
    #[error("the peer answered with path '{0}', which was not asked for")]
    OtherPath(StorePath),
    /// The peer has more than can be kept track of.
    #[error("the peer has more than {0} store paths")]
    TooManyPaths(usize),
    /// The peer sent a directory that is not one.
    #[error("the peer sent a malformed directory: {0}")]
    Directory(#[from] castore::DecodeError),
}

impl ClientError {
    /// Whether the peer is away or the connection broke, so that asking again may help.
    pub fn is_outage(&self) -> bool {
        match self {
            ClientError::Silent { .. } => true,
            // What has a cause was not said by the peer: it is this end's, of the connection.
            ClientError::Call { status, .. } => {
                let away = [Code::Unavailable, Code::Unknown, Code::Cancelled, Code::DeadlineExceeded];
                away.contains(&status.code()) || std::error::Error::source(&**status).is_some()
            }
            _ => false,
        }
    }

    /// Whether a connection that had been made broke, so that asking again at once helps.
    pub fn is_broken(&self) -> bool {
        match self {
            ClientError::Call { status, .. } => {
                status.code() != Code::Unavailable && std::error::Error::source(&**status).is_some()
            }
            _ => false,
        }
    }
}

impl From<ClientError> for Error {
    fn from(error: ClientError) -> Error {
        Error::Backend(Box::new(error))
    }
}

/// Opens a channel to `uri` (`http://127.0.0.1:8000`, or `unix:///path`), which connects when it is first used.
///
/// # Errors
/// When the URI is malformed.
pub fn channel(uri: String) -> Result<Channel, tonic::transport::Error> {
    Ok(url::tuned(Endpoint::from_shared(uri)?).connect_lazy())
}

/// The runtime that talks while a caller waits.
#[derive(Clone, Debug)]
struct Runtime(Handle);

impl Runtime {
    /// [`call`] for who is not in a runtime.
    fn call<T>(
        &self,
        action: &'static str,
        started: impl Future<Output = Result<T, Status>>,
    ) -> Result<Option<T>, ClientError> {
        self.0.block_on(call(action, started))
    }

    /// [`next`] for who is not in a runtime.
    fn next<T>(&self, action: &'static str, stream: &mut Streaming<T>) -> Result<Option<T>, ClientError> {
        self.0.block_on(next(action, stream))
    }
}

/// Waits for a call. `None` when the peer does not have what was asked for.
async fn call<T>(
    action: &'static str,
    started: impl Future<Output = Result<T, Status>>,
) -> Result<Option<T>, ClientError> {
    match tokio::time::timeout(PATIENCE, started).await {
        Ok(Ok(answer)) => Ok(Some(answer)),
        Ok(Err(status)) if status.code() == Code::NotFound => Ok(None),
        Ok(Err(status)) => Err(ClientError::Call { action, status: Box::new(status) }),
        Err(_) => Err(ClientError::Silent { action }),
    }
}

/// Waits for the next message of an answer.
async fn next<T>(action: &'static str, stream: &mut Streaming<T>) -> Result<Option<T>, ClientError> {
    let message = tokio::time::timeout(PATIENCE, stream.next()).await;
    let message = message.map_err(|_| ClientError::Silent { action })?;
    message.transpose().map_err(|status| ClientError::Call { action, status: Box::new(status) })
}

/// Pieces in one; a single one is not copied.
fn joined(mut pieces: Vec<Bytes>) -> Bytes {
    if pieces.len() == 1 { pieces.remove(0) } else { pieces.concat().into() }
}
