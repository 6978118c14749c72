//! What goes wrong here.

use std::io;

/// Why a request cannot be answered, or a body not be made to its end: nothing that the client could help.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error(transparent)]
    View(#[from] store::view::ViewError),
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Nar(#[from] nix_compat::nar::WriteError),
    #[error("a thread ended early: {0}")]
    Thread(String),
}
