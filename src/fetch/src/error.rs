//! Why a download failed, in stock Nix's words where it has some.

use std::path::PathBuf;
use std::time::Duration;
use std::{fmt, io};

use crate::network::NetworkError;

/// A failed download.
#[derive(Debug, thiserror::Error)]
#[error("unable to download '{url}': {cause}")]
pub struct DownloadError {
    /// Without its password.
    pub url: String,
    /// What is wrong.
    pub cause: Trouble,
}

/// A failed upload.
#[derive(Debug, thiserror::Error)]
#[error("unable to upload to '{url}': {cause}")]
pub struct UploadError {
    /// Without its password.
    pub url: String,
    /// What is wrong.
    pub cause: Trouble,
}

/// What is wrong with a transfer.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    /// Not a URL.
    #[error("this is no URL: {0}")]
    Url(url::ParseError),
    /// Of a request.
    #[error("'{0}' cannot stand in a header")]
    Header(String),
    /// Neither of those that are known.
    #[error("Protocol \"{0}\" not supported")]
    Scheme(String),
    /// Of another machine.
    #[error("a file URL must have the path of a file on this machine")]
    FileUrl,
    /// A file on this machine.
    #[error("Could not open file {}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The server refuses.
    #[error("HTTP error {status}{}", Told(body))]
    Status {
        /// Its number.
        status: u16,
        /// What it says of it, if that is short.
        body: Option<String>,
        /// When it wants to be asked again, if it says so.
        retry_after: Option<Duration>,
    },
    /// From one place to the next.
    #[error("more than {0} redirections")]
    TooManyRedirects(usize),
    /// No connection, or a broken one.
    #[error("{0}")]
    Network(#[from] NetworkError),
    /// What is to be sent.
    #[error("cannot read what is to be sent: {0}")]
    Source(io::Error),
    /// The sink.
    #[error("cannot write what was received: {0}")]
    Disk(io::Error),
}

impl Trouble {
    /// Whether it may go better another time: as stock has it, but for certificates, which do not get better in seconds.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Status { status, .. } => {
                let for_good = (400..500).contains(status) && !matches!(status, 408 | 429);
                !for_good && !matches!(status, 501 | 505 | 511)
            }
            Self::Network(error) => error.is_transient(),
            _ => false,
        }
    }

    /// Whether no server could be reached at all.
    pub fn is_unreachable(&self) -> bool {
        matches!(self, Self::Network(error) if error.is_unreachable())
    }

    /// Whether the server has no such file, or says so by not letting anybody see it, as some do.
    pub fn is_missing(&self) -> bool {
        match self {
            Self::Status { status, .. } => matches!(status, 401 | 403 | 404 | 407 | 410),
            Self::File { source, .. } => source.kind() == io::ErrorKind::NotFound,
            _ => false,
        }
    }
}

/// A response's body, below the error that it belongs to.
struct Told<'a>(&'a Option<String>);

impl fmt::Display for Told<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(body) => write!(f, "\n\nresponse body:\n\n{body}"),
            None => Ok(()),
        }
    }
}
