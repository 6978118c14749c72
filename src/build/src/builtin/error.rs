//! Why a builtin builder failed, in stock Nix's words where it has some.

use std::io;
use std::path::{Path, PathBuf};

use fetch::DownloadError;
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
