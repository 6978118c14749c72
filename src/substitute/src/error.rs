//! Why a source could not be used, or a path not be fetched from it.

use std::io;
use std::path::PathBuf;

use fetch::Trouble;
use nix_compat::{narinfo, realisation};

/// What is wrong, on which source.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The URL of a substituter is none that is understood.
    #[error("don't know how to open Nix store '{0}'")]
    UnknownStore(String),
    /// A parameter of such a URL.
    #[error("'{value}' is no value for the parameter '{name}' of the substituter '{url}'")]
    Parameter {
        /// The URL.
        url: String,
        /// The parameter.
        name: String,
        /// What it has.
        value: String,
    },
    /// A bucket of S3.
    #[error("cannot use the substituter '{url}': {source}")]
    Bucket {
        /// Its URL.
        url: String,
        /// What is wrong with it.
        source: fetch::S3Error,
    },
    /// It is for another store directory.
    #[error("binary cache '{uri}' is for Nix stores with prefix '{theirs}', not '{wanted}'")]
    StoreDir {
        /// The cache.
        uri: String,
        /// What it says of itself.
        theirs: String,
        /// What was expected.
        wanted: String,
    },
    /// There is no `nix-cache-info`.
    #[error("'{0}' does not appear to be a binary cache")]
    NoCache(String),
    /// It has not answered and is left alone for a while.
    #[error("substituter '{0}' is disabled")]
    Disabled(String),
    /// The transfer of a file.
    #[error(transparent)]
    Download(#[from] fetch::DownloadError),
    /// The same in the other direction.
    #[error(transparent)]
    Upload(#[from] fetch::UploadError),
    /// A file of a cache in a directory, or one that is to be sent.
    #[error("cannot write {}: {source}", file.display())]
    Write {
        /// Which.
        file: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A NAR that is to be sent.
    #[error("cannot compress '{path}': {source}")]
    Compress {
        /// The store path.
        path: String,
        /// Why not.
        source: io::Error,
    },
    /// A store that speaks a protocol of Nix's.
    #[error("cannot {action} the store '{uri}': {source}")]
    Peer {
        /// What was tried.
        action: &'static str,
        /// The store.
        uri: String,
        /// How it failed.
        source: remote::ClientError,
    },
    /// Another castore.
    #[error("cannot {action} the castore '{uri}': {source}")]
    Castore {
        /// What was tried.
        action: &'static str,
        /// Its URL.
        uri: String,
        /// How it failed.
        source: rpc_client::ClientError,
    },
    /// Its URL.
    #[error(transparent)]
    CastoreUrl(#[from] rpc_client::UrlError),
    /// It had a path a moment ago.
    #[error("'{uri}' does not have '{path}' any more")]
    Vanished {
        /// Its URL.
        uri: String,
        /// The path's name.
        path: String,
    },
    /// A tree of a castore with more in it than its path was said to have.
    #[error("the tree that '{uri}' has for '{path}' is larger than the {limit} bytes that were said")]
    TreeTooLarge {
        /// The castore.
        uri: String,
        /// The path's name.
        path: String,
        /// The size of its NAR as it was said.
        limit: u64,
    },
    /// A tree of a castore of which no NAR can be made.
    #[error("the tree that '{uri}' has for '{path}' makes no archive: {source}")]
    Tree {
        /// The castore.
        uri: String,
        /// The path's name.
        path: String,
        /// Why not.
        source: nix_compat::nar::WriteError,
    },
    /// A file that names itself by something that is no place in a cache.
    #[error("binary cache '{uri}' has a file at '{url}', where it cannot be")]
    FileUrl {
        /// The cache.
        uri: String,
        /// What was named.
        url: String,
    },
    /// A description that does not parse.
    #[error("NAR info file '{file}' is corrupt: {source}")]
    NarInfo {
        /// Its URL.
        file: String,
        /// Why.
        source: narinfo::Error,
    },
    /// A realisation that does not parse.
    #[error("realisation '{file}' is corrupt: {source}")]
    Realisation {
        /// Its URL.
        file: String,
        /// Why.
        source: realisation::RealisationError,
    },
    /// Text that is none.
    #[error("'{0}' is not UTF-8")]
    NotText(String),
    /// A realisation of another output.
    #[error("asked '{uri}' for the realisation '{wanted}' but got '{got}'")]
    OtherRealisation {
        /// The cache.
        uri: String,
        /// What was asked for.
        wanted: String,
        /// What came.
        got: String,
    },
    /// The compression of a NAR.
    #[error("cannot decompress '{file}': compression '{compression}' is not supported")]
    Compression {
        /// Its URL.
        file: String,
        /// Its name.
        compression: narinfo::Compression,
    },
    /// A file is not what its narinfo says.
    #[error("file '{file}' of binary cache '{uri}' has the {what} {got}, not {specified}")]
    File {
        /// The cache.
        uri: String,
        /// The file.
        file: String,
        /// Hash or size.
        what: &'static str,
        /// What the narinfo says.
        specified: String,
        /// What it is.
        got: String,
    },
    /// The store refuses it.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// Contents were promised, but no path says by whom any more.
    #[error("no source is known that has them")]
    NoLazySource,
    /// A path came whole by now, and is not what was signed. A sentence for the user.
    #[error("{0}")]
    NotSigned(String),
    /// Nobody waits for it any more.
    #[error("the transfer was cancelled")]
    Cancelled,
    /// A thread of the daemon.
    #[error("a worker thread failed: {0}")]
    Thread(String),
}

impl Error {
    /// Whether the source did not answer, now or lately.
    pub(crate) fn means_silence(&self) -> bool {
        match self {
            Self::Disabled(_) => true,
            Self::Download(_) | Self::Peer { .. } | Self::Castore { .. } => self.is_outage(),
            _ => false,
        }
    }

    /// Whether the source itself is in trouble, and not a single file of it.
    pub fn is_outage(&self) -> bool {
        match self {
            // Whoever is not let in for one path is not for the next.
            Self::Upload(fetch::UploadError {
                cause: Trouble::Status { status: 401 | 403 | 405 | 407, .. }, ..
            }) => true,
            Self::Upload(error) => error.cause.is_transient() || error.cause.is_unreachable(),
            Self::Write { .. } => true,
            Self::Download(error) => error.cause.is_transient() || error.cause.is_unreachable(),
            // Whoever refuses is there.
            Self::Peer { source, .. } => !matches!(source, remote::ClientError::Refused(_)),
            Self::Castore { source, .. } => source.is_outage(),
            Self::NoCache(_) | Self::StoreDir { .. } => true,
            _ => false,
        }
    }
}
