//! Paths that are damaged and could not be repaired.
//!
//! Stock leaves such a path valid and says so, and so does this: what refers to it stays whole, and what of it is intact
//! can be read. What a damaged object says is never served (reading it is an error), but a path whose objects are all
//! whole and do not make the NAR that was registered would be served: such a path is *withheld*, which makes every read
//! of it an error. A path leaves the quarantine when it is repaired or deleted.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use castore::index::{Batch, Index};
use nix_compat::store_path::StorePath;
use parking_lot::RwLock;

use crate::error::{Error, Result};
use crate::store::{Store, Tables};

/// First byte of a row: nothing of the path is served.
const WITHHELD: u8 = b'w';
/// First byte of a row: parts of it cannot be read.
const DAMAGED: u8 = b'd';

/// A path in quarantine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quarantined {
    /// Which.
    pub path: StorePath,
    /// What is wrong, as a sentence for the user.
    pub reason: String,
    /// Whether nothing of it can be read.
    pub withheld: bool,
}

/// The withheld paths by their digests, in memory since every read of a path looks here.
#[derive(Debug, Default)]
pub(crate) struct Quarantine(RwLock<BTreeMap<[u8; 20], String>>);

impl Quarantine {
    pub(crate) fn read(index: &Index, tables: &Tables) -> Result<Self> {
        let mut withheld = BTreeMap::new();
        index.scan_prefix(&tables.quarantine, &[], &mut |key, row| {
            if let (Ok(digest), Some((&WITHHELD, reason))) = (key.try_into(), row.split_first()) {
                withheld.insert(digest, String::from_utf8_lossy(reason).into_owned());
            }
            ControlFlow::Continue(())
        })?;
        Ok(Self(RwLock::new(withheld)))
    }

    /// Adds to `batch` what takes the path out.
    pub(crate) fn release(&self, digest: &[u8; 20], tables: &Tables, batch: &mut Batch) {
        batch.delete(tables.quarantine, digest);
        self.0.write().remove(digest);
    }
}

impl Store {
    /// Checks that a path is not one of which nothing may be read.
    ///
    /// # Errors
    /// [`Error::Quarantined`].
    pub fn check_readable(&self, path: &StorePath) -> Result<()> {
        let withheld = self.quarantine.0.read();
        if withheld.is_empty() {
            return Ok(());
        }
        match withheld.get(&path.digest()) {
            None => Ok(()),
            Some(reason) => Err(Error::Quarantined { path: self.store_dir().display(path), reason: reason.clone() }),
        }
    }

    /// The paths in quarantine.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn quarantined(&self) -> Result<Vec<Quarantined>> {
        let mut rows = Vec::new();
        self.index().scan_prefix(&self.tables.quarantine, &[], &mut |key, row| {
            if let (Ok(digest), Some((&kind, reason))) = (<[u8; 20]>::try_from(key), row.split_first()) {
                rows.push((digest, kind == WITHHELD, String::from_utf8_lossy(reason).into_owned()));
            }
            ControlFlow::Continue(())
        })?;
        let mut quarantined = Vec::new();
        for (digest, withheld, reason) in rows {
            if let Some(path) = self.path_from_hash_part(&digest)? {
                quarantined.push(Quarantined { path, reason, withheld });
            }
        }
        Ok(quarantined)
    }

    /// Puts a valid path into quarantine.
    ///
    /// # Errors
    /// When the index cannot be written.
    pub(crate) fn quarantine(&self, path: &StorePath, reason: &str, withhold: bool) -> Result<()> {
        let _changing = self.changing.lock();
        if !self.is_valid(path)? {
            return Ok(());
        }
        let kind = if withhold { WITHHELD } else { DAMAGED };
        let mut batch = Batch::default();
        batch.put(self.tables.quarantine, &path.digest(), [&[kind], reason.as_bytes()].concat());
        self.commit(batch)?;
        let mut withheld = self.quarantine.0.write();
        match withhold {
            true => drop(withheld.insert(path.digest(), reason.to_owned())),
            false => drop(withheld.remove(&path.digest())),
        }
        Ok(())
    }

    /// Takes a path out of quarantine, if it is in it.
    pub(crate) fn release(&self, path: &StorePath) -> Result<()> {
        let digest = path.digest();
        if self.index().get(&self.tables.quarantine, &digest)?.is_none() {
            return Ok(());
        }
        let mut batch = Batch::default();
        self.quarantine.release(&digest, &self.tables, &mut batch);
        self.commit(batch)
    }
}
