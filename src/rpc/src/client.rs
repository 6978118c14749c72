//! Another store's castore as if it were local: [`BlobService`] and [`DirectoryService`] over gRPC.
//!
//! The traits are synchronous, so a call here blocks its thread while the runtime it was given does the talking; it
//! must not be made from an async task of that runtime. What arrives is checked against the digest that was asked for.

mod blobs;
mod directories;

use std::future::Future;

use castore::Error;
use tokio::runtime::Handle;
use tokio_stream::StreamExt as _;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};

pub use blobs::RemoteBlobs;
pub use directories::RemoteDirectories;

use crate::limits::{CONNECTION_WINDOW_BYTES, STREAM_WINDOW_BYTES};

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
    /// The peer sent a directory that is not one.
    #[error("the peer sent a malformed directory: {0}")]
    Directory(#[from] castore::DecodeError),
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
    let endpoint = Endpoint::from_shared(uri)?
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES);
    Ok(endpoint.connect_lazy())
}

/// The runtime that talks while a caller waits.
#[derive(Clone, Debug)]
struct Runtime(Handle);

impl Runtime {
    /// Waits for a call. `None` when the peer does not have what was asked for.
    fn call<T>(
        &self,
        action: &'static str,
        call: impl Future<Output = Result<T, Status>>,
    ) -> Result<Option<T>, ClientError> {
        match self.0.block_on(call) {
            Ok(answer) => Ok(Some(answer)),
            Err(status) if status.code() == tonic::Code::NotFound => Ok(None),
            Err(status) => Err(ClientError::Call { action, status: Box::new(status) }),
        }
    }

    /// Waits for the next message of an answer.
    fn next<T>(&self, action: &'static str, stream: &mut Streaming<T>) -> Result<Option<T>, ClientError> {
        let status = |status| ClientError::Call { action, status: Box::new(status) };
        self.0.block_on(stream.next()).transpose().map_err(status)
    }
}
