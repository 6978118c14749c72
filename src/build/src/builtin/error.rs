//! Why a builtin builder failed, in stock Nix's words where it has some.

use std::io;
use std::path::{Path, PathBuf};

/// A failure of a builtin builder: what its log ends with.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("attribute '{0}' missing")]
    NoAttribute(&'static str),
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
