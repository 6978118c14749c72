//! Paths that are valid before all of their contents are here.
//!
//! A path of a *lazy* source has its directories here and its files' contents [promised](castore::engine::Promise): they
//! come when they are read, each compared with its digest. Which source a path came from stands in the table `lazy`, and in
//! a record in the packs, so that a lost index does not take the path, and what refers to it, along.
//!
//! What was signed is the hash of the whole NAR, and that cannot be compared before everything is here. **So until then the
//! tree is the source's word**: whoever makes a source lazy trusts it. When nothing is missing any more the path is
//! *settled*: its NAR is hashed, and where it is another than was registered the path is [withheld](crate::quarantine).

use std::ops::ControlFlow;

use castore::Node;
use castore::engine::Elsewhere;
use castore::index::Batch;
use nix_compat::path_info::PathInfo;
use nix_compat::store_path::StorePath;

use crate::error::Result;
use crate::nar_in::Pin;
use crate::records::{RecordWriter, key_of_lazy};
use crate::register::NewPath;
use crate::store::Store;

/// A path of which contents may be elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LazyPath {
    /// Which.
    pub path: StorePath,
    /// The URL of the source it came from, without parameters.
    pub source: String,
}

/// How a path stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settled {
    /// All of it is here and what was registered; or it is not valid any more.
    Whole,
    /// Some of it is still elsewhere.
    Partly,
    /// All of it is here, but it is not what was signed: it is withheld now. A sentence for the user.
    Refused(String),
}

impl Store {
    /// Takes a path of `source` whose directories are here; the files' contents that are not are promised. It is to be
    /// registered like any other.
    ///
    /// # Errors
    /// When the tree is not consistent, or, where nothing was missing, is not what `info` says.
    pub fn expect(&self, info: PathInfo, node: Node, source: &str) -> Result<NewPath> {
        let digest = info.path.digest();
        let (hold, elsewhere) = self.engine.promise(&node, &digest)?;
        let pin = Pin::from(hold);
        if elsewhere.blobs == 0 {
            let facts = self.nar_facts(&node, crate::claims::nar_algorithm(&info))?;
            self.check_claims(&info, &node, &facts)?;
        } else {
            // Before the registration: a row without a path is nothing, a path without its row would never be settled.
            let mut records = RecordWriter::new(self);
            records.lazy(&digest, source)?;
            let mut batch = Batch::default();
            batch.put(self.tables.lazy, &digest, source.to_owned());
            records.commit(self, batch)?;
        }
        Ok(NewPath { info, node, pin: Some(pin) })
    }

    /// The source of a path of which contents may be elsewhere, by the digest of its hash part.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn lazy_source(&self, digest: &[u8; 20]) -> Result<Option<String>> {
        let row = self.index().get(&self.tables.lazy, digest)?;
        Ok(row.map(|row| String::from_utf8_lossy(&row).into_owned()))
    }

    /// The valid paths of which contents may be elsewhere.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn lazy_paths(&self) -> Result<Vec<LazyPath>> {
        let mut lazy = Vec::new();
        for (digest, source) in self.lazy_rows()? {
            if let Some(path) = self.path_from_hash_part(&digest)? {
                lazy.push(LazyPath { path, source });
            }
        }
        Ok(lazy)
    }

    pub(crate) fn lazy_rows(&self) -> Result<Vec<([u8; 20], String)>> {
        let mut rows = Vec::new();
        self.index().scan_prefix(&self.tables.lazy, &[], &mut |key, row| {
            if let Ok(digest) = key.try_into() {
                rows.push((digest, String::from_utf8_lossy(row).into_owned()));
            }
            ControlFlow::Continue(())
        })?;
        Ok(rows)
    }

    /// What is elsewhere of all paths together.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn elsewhere(&self) -> Result<Elsewhere> {
        Ok(self.engine.all_elsewhere()?)
    }

    /// Whether contents of a path are elsewhere.
    pub(crate) fn is_partly_here(&self, path: &StorePath, node: &Node) -> Result<bool> {
        Ok(self.lazy_source(&path.digest())?.is_some() && self.engine.is_elsewhere(node)?)
    }

    /// Looks whether all of a path is here by now, and if so whether it is what was registered. Reads all of it then.
    ///
    /// # Errors
    /// When the index cannot be read or written.
    pub fn settle(&self, path: &StorePath) -> Result<Settled> {
        let Some(entry) = self.entry(path)? else { return Ok(Settled::Whole) };
        if self.lazy_source(&path.digest())?.is_none() {
            return Ok(Settled::Whole);
        }
        if self.engine.is_elsewhere(&entry.node)? {
            return Ok(Settled::Partly);
        }
        let damage = self.verify_contents(path)?;
        if let Some(damage) = &damage {
            self.quarantine(path, &damage.message, damage.other_contents)?;
        }
        let mut batch = Batch::default();
        batch.delete(self.tables.lazy, &path.digest());
        self.commit(batch)?;
        Ok(damage.map_or(Settled::Whole, |damage| Settled::Refused(damage.message)))
    }

    /// Drops the rows of paths that are not valid: a crash came between them and the registration.
    pub(crate) fn drop_stray_lazy_rows(&self) -> Result<()> {
        let mut batch = Batch::default();
        for (digest, _) in self.lazy_rows()? {
            if self.index().get(&self.tables.paths, &digest)?.is_none() {
                batch.delete(self.tables.lazy, &digest);
            }
        }
        if batch.is_empty() { Ok(()) } else { self.commit(batch) }
    }

    /// Marks the records of lazy paths as alive.
    pub(crate) fn mark_lazy_records(&self, garbage: &mut castore::engine::Garbage) -> Result<()> {
        for (digest, source) in self.lazy_rows()? {
            garbage.mark_record(&key_of_lazy(&digest, &source).digest);
        }
        Ok(())
    }
}
