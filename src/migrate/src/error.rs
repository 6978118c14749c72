//! Why a move cannot go on. What is wrong with single paths is no error: the outcome of a move names them.

use std::path::PathBuf;

/// A move stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// castored's own store failed.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// A database could not be used.
    #[error("cannot {action} the database '{}': {source}", path.display())]
    Database {
        /// What was tried, as an infinitive.
        action: &'static str,
        /// On which database.
        path: PathBuf,
        /// Why it failed.
        source: rusqlite::Error,
    },
    /// A file or directory could not be used.
    #[error("cannot {action} '{}': {source}", path.display())]
    File {
        /// What was tried, as an infinitive.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// There is no stock store.
    #[error("there is no stock Nix store to adopt: '{}' does not exist", .0.display())]
    NoStockStore(PathBuf),
    /// castored has taken over here already.
    #[error("'{}' is castored's: there is no stock Nix store to adopt (any more)", .0.display())]
    Ours(PathBuf),
    /// The database has a layout this castored does not know.
    #[error("'{}' says that the stock store has schema {found}; castored knows schema 10, which Nix has had since 2.0", path.display())]
    Schema {
        /// The file that tells.
        path: PathBuf,
        /// What it says.
        found: String,
    },
    /// The stock store's paths do not begin with castored's store directory, so they cannot be the same paths.
    #[error(
        "the stock store has the path '{path}', but castored's store directory is '{store_dir}': paths cannot move to \
         another store directory (set NIX_STORE_DIR, and leave out --root)"
    )]
    OtherStoreDir {
        /// One of its paths.
        path: String,
        /// castored's.
        store_dir: String,
    },
    /// Stock Nix has the store open.
    #[error(
        "stock Nix is using the store (it holds a lock on '{}'): stop nix-daemon and all clients of it, then try again",
        .0.display()
    )]
    StockRuns(PathBuf),
    /// An export needs an empty directory.
    #[error("'{}' is not empty; a store is exported into an empty or a new directory", .0.display())]
    NotEmpty(PathBuf),
    /// The directory has the beginning of another export.
    #[error(
        "'{}' has the beginning of an export of other paths or options, which only the same command can finish: repeat \
         that, or remove the directory",
        .0.display()
    )]
    OtherExport(PathBuf),
    /// A path to be exported has no valid info, or its contents are not what they should be.
    #[error("cannot export '{path}': {reason}")]
    Export {
        /// The path (full path).
        path: String,
        /// Why.
        reason: String,
    },
    /// Old files can be removed only when castored has taken over.
    #[error("'{}' does not say that a stock store was adopted to the end: run `castored adopt --finish` first", .0.display())]
    NotFinished(PathBuf),
    /// The note of a move cannot be read.
    #[error("cannot understand '{}': {reason}", path.display())]
    Note {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A thread of the move ended by a bug.
    #[error("a worker thread panicked")]
    Panicked,
}

/// The result of a move.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { action, path, source }
    }

    pub(crate) fn database(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(rusqlite::Error) -> Self {
        let path = path.into();
        move |source| Self::Database { action, path, source }
    }
}
