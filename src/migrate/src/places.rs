//! Where a stock store lies.

use std::path::{Path, PathBuf};

/// The directories of a stock store on this machine's disk. What its paths begin with is another matter: for a store
/// below another root they begin with `/nix/store` all the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StockPlaces {
    /// The store directory, with the files.
    pub store: PathBuf,
    /// The state directory, with `db`, `gcroots` and `profiles`.
    pub state: PathBuf,
    /// The log directory, with `drvs`.
    pub log: PathBuf,
}

impl StockPlaces {
    /// Where the store's database is.
    pub(crate) fn database_dir(&self) -> PathBuf {
        self.state.join("db")
    }

    /// Where [`crate::switch`] puts it.
    pub(crate) fn retired_database_dir(&self) -> PathBuf {
        self.state.join("db.stock")
    }
}

/// Whether both are one directory.
pub(crate) fn same(a: &Path, b: &Path) -> bool {
    match (a.canonicalize(), b.canonicalize()) {
        (Ok(a), Ok(b)) => a == b,
        _ => a == b,
    }
}
