//! What goes wrong, as the gRPC status that a client can act on.

use std::fmt::Display;

use castore::{Digest, Error, is_disk_full};
use store::Error as StoreError;
use tonic::Status;

use crate::paths::PathsError;

/// The digest in a request.
pub(crate) fn digest(bytes: &[u8]) -> Result<Digest, Status> {
    Digest::try_from(bytes).map_err(invalid)
}

/// The request asks for something that makes no sense, whoever asks.
pub(crate) fn invalid(error: impl Display) -> Status {
    Status::invalid_argument(error.to_string())
}

/// Something is wrong on this side.
pub(crate) fn internal(error: impl Display) -> Status {
    tracing::error!(%error, "a grpc call failed");
    Status::internal(error.to_string())
}

/// The status for what a castore service answers.
pub(crate) fn castore(error: Error) -> Status {
    match error {
        Error::BlobNotFound(_) | Error::DirectoryNotFound(_) => Status::not_found(error.to_string()),
        Error::Elsewhere(_) | Error::NotFilled { .. } => Status::unavailable(error.to_string()),
        Error::NoDirectory
        | Error::ChildNotFound { .. }
        | Error::ChildSize { .. }
        | Error::BlobSize { .. }
        | Error::BlobTooLarge { .. } => invalid(error),
        // The input of a service is the client's stream, and what broke it is reported by whoever read that.
        Error::Input(_) => Status::aborted(error.to_string()),
        error if is_disk_full(&error) => full(error),
        error => internal(error),
    }
}

/// There is no space. Whoever runs the store can do something about it.
fn full(error: impl Display) -> Status {
    tracing::error!(%error, "a grpc call failed because the disk is full");
    Status::resource_exhausted(format!("{error}: the store's disk is full; collect garbage there (nix-store --gc)"))
}

/// The status for what a store answers about its paths.
pub(crate) fn paths(error: PathsError) -> Status {
    match error {
        PathsError::Store(StoreError::Castore(error)) => castore(error),
        PathsError::Store(StoreError::NotValid(_)) => Status::not_found(error.to_string()),
        PathsError::Store(StoreError::Untrusted(_)) => Status::permission_denied(error.to_string()),
        PathsError::Store(
            StoreError::InvalidReference { .. }
            | StoreError::HashMismatch { .. }
            | StoreError::SizeMismatch { .. }
            | StoreError::ContentAddressMismatch { .. }
            | StoreError::NotAFile(_)
            | StoreError::Derivation { .. }
            | StoreError::Path { .. }
            | StoreError::Nar(_)
            | StoreError::Tree(_),
        ) => invalid(error),
        PathsError::Store(error) if error.is_disk_full() => full(error),
        PathsError::Store(_) | PathsError::View(_) => internal(error),
    }
}
