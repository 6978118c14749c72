//! Deleting paths that a walk found dead, if they still are.
//!
//! Registrations wait while paths are deleted, so this goes in chunks: referrers before what they refer to, so that the
//! store is consistent after each. Between the walk and a chunk anything may have happened. So with registrations
//! locked out, a chunk's paths are compared with their present records and referrers; and it is committed with temporary
//! roots locked out, unless one of its paths has become one.

use std::collections::{BTreeMap, BTreeSet};

use castore::index::Batch;
use nix_compat::store_path::StorePath;

use super::GcOutcome;
use crate::derivations::output_paths;
use crate::error::{Error, Result};
use crate::record::Entry;
use crate::store::Store;
use crate::sweep;
use crate::view::StoreEvent;

/// Paths deleted while registrations wait.
const CHUNK: usize = 256;

/// A path to be deleted, and what has to be read of it before registrations are locked out.
struct Doomed {
    entry: Entry,
    /// If it is a derivation: the keys of its outputs in the table of derivers.
    deriver_keys: Vec<Vec<u8>>,
}

impl Store {
    /// Deletes what is still dead of `dead`, until about `max_freed` bytes are reached.
    pub(super) fn delete_dead(&self, dead: &BTreeMap<StorePath, Entry>, max_freed: u64) -> Result<GcOutcome> {
        let mut outcome = GcOutcome::default();
        let mut order = referrers_first(dead).into_iter().filter_map(|path| dead.get(&path)).peekable();
        while order.peek().is_some() && outcome.bytes_freed < max_freed {
            let mut chunk = BTreeMap::new();
            let mut bytes = outcome.bytes_freed;
            while chunk.len() < CHUNK
                && bytes < max_freed
                && let Some(entry) = order.next()
            {
                bytes = bytes.saturating_add(entry.info.nar_size);
                chunk.insert(entry.info.path.clone(), self.doom(entry.clone()));
            }
            // Members of a circle that do not share a chunk keep each other until the next collection.
            self.delete_chunk(chunk, false, &mut outcome)?;
        }
        Ok(outcome)
    }

    /// Deletes `named`, all of them or none.
    pub(super) fn delete_all_or_none(&self, named: BTreeMap<StorePath, Entry>) -> Result<GcOutcome> {
        let mut outcome = GcOutcome::default();
        let named = named.into_iter().map(|(path, entry)| (path, self.doom(entry))).collect();
        self.delete_chunk(named, true, &mut outcome)?;
        Ok(outcome)
    }

    fn doom(&self, entry: Entry) -> Doomed {
        let path = &entry.info.path;
        let mut deriver_keys = Vec::new();
        if path.is_derivation() {
            match self.derivation(path) {
                Ok(derivation) => deriver_keys.extend(
                    output_paths(&derivation.basic).values().map(|output| [output.digest(), path.digest()].concat()),
                ),
                // Its outputs' rows stay behind; they count for nothing without a valid derivation.
                Err(error) => tracing::warn!(%path, %error, "cannot read a derivation that is being deleted"),
            }
        }
        Doomed { entry, deriver_keys }
    }

    fn delete_chunk(
        &self,
        mut chunk: BTreeMap<StorePath, Doomed>,
        all_or_none: bool,
        outcome: &mut GcOutcome,
    ) -> Result<()> {
        {
            let _changing = self.changing.lock();
            let mut used = self.used_again(&mut chunk)?;
            loop {
                if let Some(alive) = used.first().filter(|_| all_or_none) {
                    return Err(Error::Alive(self.store_dir().display(alive)));
                }
                spare(&mut chunk, used);
                let batch = self.removal(&chunk)?;
                match self.temp_roots.unless_held(chunk.keys(), || self.index().commit(batch)) {
                    Ok(committed) => break committed?,
                    Err(held) => used = held,
                }
            }
            chunk.keys().for_each(|path| self.derivations.forget(path));
        }
        let mut events = Vec::with_capacity(chunk.len());
        for (path, Doomed { entry, .. }) in chunk {
            outcome.bytes_freed = outcome.bytes_freed.saturating_add(entry.info.nar_size);
            events.push(StoreEvent::Removed { name: path.to_string(), number: entry.number });
            outcome.paths.insert(path);
        }
        self.publish(&events);
        Ok(())
    }

    /// Takes from `chunk` what is gone, and tells what is in use: temporary roots, what was registered anew, what
    /// something outside of the chunk refers to. The caller holds the lock.
    fn used_again(&self, chunk: &mut BTreeMap<StorePath, Doomed>) -> Result<Vec<StorePath>> {
        let mut used = self.temp_roots.held_among(chunk.keys());
        let mut gone = Vec::new();
        for (path, doomed) in &*chunk {
            match self.entry(path)? {
                None => gone.push(path.clone()),
                Some(entry) if entry.number != doomed.entry.number => used.push(path.clone()),
                Some(_) => {
                    if self.referrers(path)?.iter().any(|referrer| !chunk.contains_key(referrer)) {
                        used.push(path.clone());
                    }
                }
            }
        }
        gone.iter().for_each(|path| drop(chunk.remove(path)));
        Ok(used)
    }

    /// What removes the paths of `chunk` from the index.
    fn removal(&self, chunk: &BTreeMap<StorePath, Doomed>) -> Result<Batch> {
        let mut batch = Batch::default();
        for (path, Doomed { entry, deriver_keys }) in chunk {
            let digest = path.digest();
            batch.delete(self.tables.paths, &digest);
            batch.delete(self.tables.numbers, &entry.number.to_be_bytes());
            self.quarantine.release(&digest, &self.tables, &mut batch);
            for reference in &entry.info.references {
                batch.delete(self.tables.referrers, &[reference.digest(), digest].concat());
            }
            for key in deriver_keys {
                batch.delete(self.tables.derivers, key);
            }
            self.remove_realisations(path, &mut batch)?;
        }
        if !batch.is_empty() {
            sweep::want(self, &mut batch)?;
        }
        Ok(batch)
    }
}

/// Takes `used`, and what they refer to, from `chunk`.
fn spare(chunk: &mut BTreeMap<StorePath, Doomed>, mut used: Vec<StorePath>) {
    while let Some(path) = used.pop() {
        if let Some(doomed) = chunk.remove(&path) {
            used.extend(doomed.entry.info.references);
        }
    }
}

/// An order in which no path comes before one that refers to it.
fn referrers_first(doomed: &BTreeMap<StorePath, Entry>) -> Vec<StorePath> {
    let mut order = Vec::with_capacity(doomed.len());
    let mut seen = BTreeSet::new();
    // Post-order over the references puts what is referred to first; the reverse is what is wanted.
    for path in doomed.keys() {
        let mut stack = vec![(path, false)];
        while let Some((path, left)) = stack.pop() {
            if left {
                order.push(path.clone());
            } else if seen.insert(path) {
                stack.push((path, true));
                if let Some(entry) = doomed.get(path) {
                    stack.extend(entry.info.references.iter().filter(|r| doomed.contains_key(*r)).map(|r| (r, false)));
                }
            }
        }
    }
    order.reverse();
    order
}

#[cfg(test)]
mod tests;
