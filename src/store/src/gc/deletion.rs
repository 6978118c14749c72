//! Deleting paths that a walk found dead, if they still are.
//!
//! Registrations wait while paths are deleted, so this goes in chunks: referrers before what they refer to ([`Order`]),
//! so that the store is consistent after each. All that takes time is done before the lock is taken: reading the records,
//! and waiting for room in the index's overlay.
//!
//! Between the walk and a chunk anything may have happened. What can make a dead path be used again is one of three, and
//! each spares it with all that it needs ([`Deletion::spare`]):
//!
//! * A valid path refers to it. One that the graph has not is one that was registered since; it has a number above all
//!   that had been given when the graph was read, so the few of these are found under the lock, without a look at each
//!   path that is deleted.
//! * It was registered anew (by somebody who found it gone). That is the same.
//! * It is a temporary root. The chunk is committed with temporary roots locked out.

use std::ops::ControlFlow;
use std::sync::Arc;

use castore::index::Batch;
use nix_compat::store_path::StorePath;

use super::graph::{Graph, Id};
use super::order::Order;
use super::{GcOutcome, GcStep, GcWatch};
use crate::derivations::output_paths;
use crate::error::{Error, Result};
use crate::record::Entry;
use crate::register::Numbers;
use crate::store::Store;
use crate::sweep;
use crate::view::StoreEvent;

/// Paths deleted while registrations wait.
const CHUNK: usize = 256;

/// The moment before the graph is read.
#[derive(Clone, Copy)]
pub(super) struct Start {
    /// No path has this number yet, nor a greater one.
    next_number: u32,
}

impl Start {
    pub(super) fn now(store: &Store) -> Self {
        Self { next_number: store.changing.lock().next() }
    }
}

/// A path to be deleted, and what has to be read of it before registrations are locked out.
struct Victim {
    id: Id,
    entry: Arc<Entry>,
    /// If it is a derivation: the keys of its outputs in the table of derivers.
    deriver_keys: Vec<Vec<u8>>,
    /// The keys of its realisations.
    realised: Vec<Vec<u8>>,
}

/// The deletion of some paths of a graph.
pub(super) struct Deletion<'a> {
    store: &'a Store,
    graph: &'a Graph,
    watch: &'a dyn GcWatch,
    /// What is to be deleted, a mark for each path.
    doomed: Vec<bool>,
    /// Paths with smaller numbers are in the graph, or have been looked at.
    seen: u32,
    /// How many realisations had been registered when those of the victims were read.
    realisations: u64,
    outcome: GcOutcome,
}

impl<'a> Deletion<'a> {
    pub(super) fn new(
        store: &'a Store,
        graph: &'a Graph,
        start: Start,
        doomed: impl Iterator<Item = Id>,
        watch: &'a dyn GcWatch,
    ) -> Self {
        let mut marks = vec![false; graph.len()];
        doomed.for_each(|id| marks[id.index()] = true);
        let (seen, outcome) = (start.next_number, GcOutcome::default());
        Self { store, graph, watch, doomed: marks, seen, realisations: 0, outcome }
    }

    /// Deletes what is still dead, until about `max_freed` bytes are reached.
    pub(super) fn delete(mut self, max_freed: u64) -> Result<GcOutcome> {
        self.spare_referred();
        self.run(max_freed, false)
    }

    /// Deletes everything, or nothing if some of it is in use. More than a chunk is looked at first and then deleted
    /// chunk by chunk; what is in use only then ends it in the middle.
    pub(super) fn delete_all(mut self) -> Result<GcOutcome> {
        match self.spare_referred() {
            Some(used) => Err(self.alive(used)),
            None => self.run(u64::MAX, true),
        }
    }

    fn run(mut self, max_freed: u64, all: bool) -> Result<GcOutcome> {
        let mut order = Order::new(self.graph, &self.doomed);
        while self.outcome.bytes_freed < max_freed {
            if !self.watch.go_on() {
                return Err(Error::Cancelled);
            }
            // Before the victims are read: one that comes after that is noticed when they are deleted.
            self.realisations = self.store.changing.lock().realisations();
            let realised = self.store.has_realisations()?;
            let mut victims = Vec::new();
            let mut bytes = self.outcome.bytes_freed;
            let mut at_end = false;
            while victims.len() < CHUNK && bytes < max_freed {
                let Some(group) = order.next_group() else {
                    at_end = true;
                    break;
                };
                // Of a circle, all or none are spared.
                if !all && group.iter().any(|id| !self.doomed[id.index()]) {
                    continue;
                }
                for &id in group {
                    if let Some(victim) = self.victim(id, realised)? {
                        bytes = bytes.saturating_add(victim.entry.info.nar_size);
                        victims.push(victim);
                    }
                }
            }
            if !victims.is_empty() {
                self.delete_chunk(victims, all)?;
            }
            if at_end {
                return Ok(self.outcome);
            }
        }
        if max_freed > 0 {
            self.watch.step(GcStep::Enough);
        }
        Ok(self.outcome)
    }

    fn alive(&self, id: Id) -> Error {
        match self.graph.path(id) {
            Ok(path) => Error::Alive(self.store.store_dir().display(&path)),
            Err(error) => error,
        }
    }

    /// Spares what paths that stay refer to; answers one of these.
    fn spare_referred(&mut self) -> Option<Id> {
        let mut used = None;
        for path in self.graph.paths() {
            if !self.doomed[path.index()] {
                for reference in self.graph.references(path) {
                    if self.doomed[reference.index()] {
                        used.get_or_insert(*reference);
                        self.spare(*reference);
                    }
                }
            }
        }
        used
    }

    /// Takes `id`, and what it refers to, from what is to be deleted.
    fn spare(&mut self, id: Id) {
        let mut todo = vec![id];
        while let Some(id) = todo.pop() {
            if std::mem::replace(&mut self.doomed[id.index()], false) {
                todo.extend(self.graph.references(id));
            }
        }
    }

    /// Reads what is to be known of a path to delete it, with its realisations if there are any `realised` paths; nothing
    /// if it is gone.
    fn victim(&self, id: Id, realised: bool) -> Result<Option<Victim>> {
        // One that has another number now is found when the chunk is deleted.
        let Some(entry) = self.store.entry_by_digest(self.graph.digest(id))? else { return Ok(None) };
        let deriver_keys = self.store.deriver_keys(&entry.info.path);
        let realised = if realised { self.store.realisation_keys(&entry.info.path)? } else { Vec::new() };
        Ok(Some(Victim { id, entry, deriver_keys, realised }))
    }

    /// Deletes the victims, but for those that are in use again; if `all`, that is an error.
    fn delete_chunk(&mut self, mut victims: Vec<Victim>, all: bool) -> Result<()> {
        let store = self.store;
        store.index().wait_for_room()?;
        {
            let changing = store.changing.lock();
            self.spare_registered(&changing)?;
            if changing.realisations() != self.realisations {
                for victim in &mut victims {
                    victim.realised = store.realisation_keys(&victim.entry.info.path)?;
                }
            }
            loop {
                if let Some(used) = victims.iter().find(|victim| all && !self.doomed[victim.id.index()]) {
                    return Err(self.alive(used.id));
                }
                victims.retain(|victim| self.doomed[victim.id.index()]);
                let batch = store.removal(&victims)?;
                store.forewarn(victims.iter().map(|victim| victim.entry.info.path.to_string()));
                let paths = victims.iter().map(|victim| &victim.entry.info.path);
                match store.temp_roots.unless_held(paths, || store.commit(batch)) {
                    Ok(committed) => break committed?,
                    Err(held) => {
                        let held = held.iter().filter_map(|path| self.graph.find_digest(&path.digest()));
                        held.collect::<Vec<_>>().into_iter().for_each(|id| self.spare(id));
                    }
                }
            }
            victims.iter().for_each(|victim| store.derivations.forget(&victim.entry.info.path));
        }
        let mut events = Vec::with_capacity(victims.len());
        for Victim { entry, .. } in victims {
            let path = entry.info.path.clone();
            self.outcome.bytes_freed = self.outcome.bytes_freed.saturating_add(entry.info.nar_size);
            events.push(StoreEvent::Removed { name: path.to_string(), number: entry.number });
            self.watch.step(GcStep::Deleted(&path));
            self.outcome.paths.insert(path);
        }
        store.publish(&events);
        Ok(())
    }

    /// Spares what was registered since the last look, and what that refers to. The caller holds the lock.
    fn spare_registered(&mut self, changing: &Numbers) -> Result<()> {
        let store = self.store;
        if self.seen == changing.next() {
            return Ok(());
        }
        let mut fresh: Vec<[u8; 20]> = Vec::new();
        store.index().scan_from(&store.tables.numbers, &self.seen.to_be_bytes(), &mut |_, digest| {
            fresh.extend(<[u8; 20]>::try_from(digest).ok());
            ControlFlow::Continue(())
        })?;
        for digest in fresh {
            let Some(entry) = store.entry_by_digest(&digest)? else { continue };
            let known = self.graph.find_digest(&digest);
            if known.is_some_and(|id| self.graph.number(id) == entry.number) {
                // Registered while the graph was read, and in it.
                continue;
            }
            known.into_iter().for_each(|id| self.spare(id));
            for reference in &entry.info.references {
                self.graph.find_digest(&reference.digest()).into_iter().for_each(|id| self.spare(id));
            }
        }
        self.seen = changing.next();
        Ok(())
    }
}

impl Store {
    /// The keys under which a derivation's outputs stand in the table of derivers; none for other paths.
    fn deriver_keys(&self, path: &StorePath) -> Vec<Vec<u8>> {
        if !path.is_derivation() {
            return Vec::new();
        }
        match self.derivation(path) {
            Ok(derivation) => output_paths(&derivation.basic)
                .values()
                .map(|output| [output.digest(), path.digest()].concat())
                .collect(),
            // Its outputs' rows stay behind; they count for nothing without a valid derivation.
            Err(error) => {
                tracing::warn!(%path, %error, "cannot read a derivation that is being deleted");
                Vec::new()
            }
        }
    }

    /// What removes the victims from the index. The caller holds the lock.
    fn removal(&self, victims: &[Victim]) -> Result<Batch> {
        let mut batch = Batch::default();
        for Victim { entry, deriver_keys, realised, .. } in victims {
            let digest = entry.info.path.digest();
            batch.delete(self.tables.paths, &digest);
            batch.delete(self.tables.numbers, &entry.number.to_be_bytes());
            self.quarantine.release(&digest, &self.tables, &mut batch);
            batch.delete(self.tables.lazy, &digest);
            for reference in &entry.info.references {
                batch.delete(self.tables.referrers, &[reference.digest(), digest].concat());
            }
            for key in deriver_keys {
                batch.delete(self.tables.derivers, key);
            }
            self.remove_realisations(realised, &mut batch);
        }
        if !batch.is_empty() {
            sweep::want(self, &mut batch)?;
        }
        Ok(batch)
    }
}

#[cfg(test)]
mod tests;
