//! What all kinds of sources can do. Everything here blocks.

use fetch::Sink;
use nix_compat::narinfo::NarInfo;
use nix_compat::path_info::PathInfo;
use nix_compat::realisation::{DrvOutput, Realisation};
use nix_compat::store_path::{StoreDir, StorePath};
use store::{NewPath, Store};

use crate::error::Error;

/// Where paths come from: a binary cache, or another store.
pub(crate) trait Origin: Send + Sync {
    /// Whether a look at it costs no more than a look at an index.
    fn is_local(&self) -> bool;

    /// What it says of itself; it must be for the store directory `wanted`.
    fn info(&self, wanted: &StoreDir) -> Result<SourceInfo, Error>;

    /// The description of a path, if it has it.
    fn narinfo(&self, dir: &StoreDir, path: &StorePath) -> Result<Option<NarInfo>, Error>;

    /// What an output turned out to be, if it knows.
    fn realisation(&self, id: &DrvOutput) -> Result<Option<Realisation>, Error>;

    /// Gives the file with the NAR to `sink`.
    fn copy(&self, narinfo: &NarInfo, sink: &mut dyn Sink) -> Result<(), Error>;

    /// Makes a path of which contents are still there: only what they are called is fetched, see [`store::Store::expect`].
    /// `None` where a source can only be copied from.
    fn promise(&self, _: &Store, _: &PathInfo) -> Result<Option<NewPath>, Error> {
        Ok(None)
    }

    /// The URL of that file, for messages.
    fn file(&self, name: &str) -> String;
}

/// What a source says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SourceInfo {
    /// Smaller ones are asked first.
    pub(crate) priority: u64,
    /// Whether it wants to be asked for many paths at once.
    pub(crate) want_mass_query: bool,
}
