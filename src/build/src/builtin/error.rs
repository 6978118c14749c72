//! Why a builtin builder failed, in stock Nix's words where it has some.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use nix_compat::nar::NarError;

/// A failure of a builtin builder: what its log ends with.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("attribute '{0}' missing")]
    NoAttribute(&'static str),
    #[error("attribute '{0}' is not UTF-8")]
    NotText(&'static str),
    #[error("this builder requires an '{0}' output")]
    NoOutput(&'static str),
    #[error("cannot {attempt} \"{}\": {source}", path.display())]
    File { attempt: &'static str, path: PathBuf, source: io::Error },

    #[error("attribute 'derivations' has '{word}' where {expected} should be")]
    Packages { word: String, expected: &'static str },
    #[error(
        "Unable to build profile. There is a conflict for the following files:\n\n  \"{}\"\n  \"{}\"",
        first.display(), second.display()
    )]
    Conflict { first: PathBuf, second: PathBuf },
    #[error("collision between \"{}\" and non-directory \"{}\"", directory.display(), other.display())]
    DirectoryOverFile { directory: PathBuf, other: PathBuf },
    #[error("collision between non-directory '{}' and directory '{}'", other.display(), directory.display())]
    FileOverDirectory { other: PathBuf, directory: PathBuf },
    #[error("\"{}\" is longer than {limit} bytes", path.display())]
    TooLong { path: PathBuf, limit: u64 },

    #[error("'builtin:fetchurl' requires an 'out' output")]
    FetchurlOutput,
    #[error("'builtin:fetchurl' must be a fixed-output or impure derivation")]
    NotFixed,
    #[error("the daemon did not say how to download")]
    NoSettings,
    #[error(transparent)]
    Download(#[from] DownloadError),
    #[error("cannot unpack the download: {}", chain(.0))]
    Nar(#[from] NarError),

    #[error("channelName is not allowed to contain filesystem separators, got {0}")]
    ChannelName(String),
    #[error("channel tarball '{}' contains more than one file", .0.display())]
    SeveralFiles(PathBuf),
    #[error("channel tarball '{}' is empty", .0.display())]
    EmptyChannel(PathBuf),
    #[error("failed to rename \"{}\" to \"{}\": {source}", from.display(), to.display())]
    Rename { from: PathBuf, to: PathBuf, source: io::Error },
    #[error("cannot read the tarball: {0}")]
    Tar(io::Error),
    #[error("\"{}\" in the tarball would lie outside of it or behind a symlink", .0.display())]
    TarName(PathBuf),
    #[error("the link \"{}\" in the tarball points nowhere", .0.display())]
    TarLink(PathBuf),
    #[error("\"{}\" in the tarball is neither file, directory nor link", .0.display())]
    TarKind(PathBuf),
}

/// A failed download.
#[derive(Debug, thiserror::Error)]
#[error("unable to download '{url}': {cause}")]
pub(super) struct DownloadError {
    pub(super) url: String,
    pub(super) cause: Trouble,
}

/// What is wrong with a download.
#[derive(Debug, thiserror::Error)]
pub(super) enum Trouble {
    #[error("this is no URL: {0}")]
    Url(url::ParseError),
    #[error("Protocol \"{0}\" not supported")]
    Scheme(String),
    #[error("a file URL must have the path of a file on this machine")]
    FileUrl,
    #[error("Could not open file {}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("HTTP error {status}{}", Told(body))]
    Status { status: u16, body: Option<String> },
    #[error("more than {0} redirections")]
    TooManyRedirects(usize),
    #[error("{0}")]
    Network(#[from] ureq::Error),
    #[error("cannot write what was received: {0}")]
    Disk(io::Error),
}

impl Trouble {
    /// Whether it may go better another time: as stock has it, but for certificates, which do not get better in seconds.
    pub(super) fn is_transient(&self) -> bool {
        match self {
            Self::Status { status, .. } => {
                let for_good = (400..500).contains(status) && !matches!(status, 408 | 429);
                !for_good && !matches!(status, 501 | 505 | 511)
            }
            Self::Network(ureq::Error::Io(e)) => {
                !matches!(e.get_ref().and_then(|e| e.downcast_ref()), Some(rustls::Error::InvalidCertificate(_)))
            }
            Self::Network(error) => matches!(
                error,
                ureq::Error::Timeout(_)
                    | ureq::Error::HostNotFound
                    | ureq::Error::ConnectionFailed
                    | ureq::Error::ConnectProxyFailed(_)
                    | ureq::Error::Protocol(_)
            ),
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

/// An error with all its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// Names what was tried on which file.
pub(super) trait On<T> {
    fn on(self, attempt: &'static str, path: &Path) -> Result<T, Error>;
}

impl<T> On<T> for io::Result<T> {
    fn on(self, attempt: &'static str, path: &Path) -> Result<T, Error> {
        self.map_err(|source| Error::File { attempt, path: path.to_owned(), source })
    }
}
