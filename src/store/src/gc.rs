//! Garbage collection of paths, and deletion by name.
//!
//! Deciding what is dead takes a walk over the reference graph; dropping it is one commit of the index, after
//! which the paths are gone for everybody. Their space comes back in the background ([`crate::sweep`]).

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

use castore::index::Batch;
use nix_compat::store_path::StorePath;

use crate::derivations::output_paths;
use crate::error::{Error, Result};
use crate::record::Entry;
use crate::store::Store;
use crate::view::StoreEvent;

/// What a collection is to do (worker protocol, CollectGarbage).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GcAction {
    /// Tell what is alive.
    ReturnLive,
    /// Tell what is dead.
    ReturnDead,
    /// Delete what is dead.
    DeleteDead,
    /// Delete these paths, or none if one of them is alive.
    DeleteSpecific(BTreeSet<StorePath>),
}

/// The settings that a collection obeys.
#[derive(Clone, Debug)]
pub struct GcOptions {
    /// What to do.
    pub action: GcAction,
    /// Stop after about so many bytes.
    pub max_freed: u64,
    /// `keep-derivations`: a live output keeps its derivation.
    pub keep_derivations: bool,
    /// `keep-outputs`: a live derivation keeps its outputs.
    pub keep_outputs: bool,
}

/// What a collection found or did.
#[derive(Clone, Debug, Default)]
pub struct GcOutcome {
    /// Live, dead or deleted paths, as asked.
    pub paths: BTreeSet<StorePath>,
    /// Bytes of content (NAR sizes) of what was deleted.
    pub bytes_freed: u64,
}

/// The reference graph, held in memory for one collection.
struct Graph {
    entries: BTreeMap<StorePath, Entry>,
}

impl Store {
    /// Collects garbage.
    ///
    /// # Errors
    /// [`Error::Alive`] for a path that was named and is not dead; failures of the index or of the search for
    /// roots. Nothing is deleted then.
    pub fn collect_garbage(&self, options: &GcOptions) -> Result<GcOutcome> {
        let graph = self.graph()?;
        let roots: BTreeSet<StorePath> = self.find_roots()?.into_iter().map(|root| root.path).collect();
        // Somebody who names a path wants it gone even if it is what another live path was built from.
        let options = match &options.action {
            GcAction::DeleteSpecific(_) => {
                &GcOptions { keep_derivations: false, keep_outputs: false, ..options.clone() }
            }
            _ => options,
        };
        let live = graph.live(self, &roots, options)?;
        match &options.action {
            GcAction::ReturnLive => Ok(GcOutcome { paths: live, bytes_freed: 0 }),
            GcAction::ReturnDead => {
                let dead = graph.entries.into_keys().filter(|path| !live.contains(path)).collect();
                Ok(GcOutcome { paths: dead, bytes_freed: 0 })
            }
            GcAction::DeleteDead => {
                let dead = graph.entries.into_values().filter(|e| !live.contains(&e.info.path)).collect();
                self.delete(dead, options.max_freed, false)
            }
            GcAction::DeleteSpecific(paths) => {
                if let Some(alive) = paths.iter().find(|path| live.contains(*path)) {
                    return Err(Error::Alive(self.store_dir().display(alive)));
                }
                let entries = paths.iter().filter_map(|path| graph.entries.get(path).cloned()).collect();
                let mut outcome = self.delete(entries, options.max_freed, true)?;
                // A path that does not exist counts as deleted, with stock as well.
                outcome.paths.extend(paths.iter().cloned());
                Ok(outcome)
            }
        }
    }

    fn graph(&self) -> Result<Graph> {
        let mut entries = BTreeMap::new();
        self.for_each(&mut |entry| {
            entries.insert(entry.info.path.clone(), entry);
            ControlFlow::Continue(())
        })?;
        Ok(Graph { entries })
    }

    /// Deletes what is still dead of `dead`, referrers before what they refer to.
    fn delete(&self, dead: Vec<Entry>, max_freed: u64, all_or_none: bool) -> Result<GcOutcome> {
        let mut outcome = GcOutcome::default();
        let mut events = Vec::new();
        {
            let _changing = self.changing.lock();
            let mut doomed: BTreeMap<StorePath, Entry> = dead.into_iter().map(|e| (e.info.path.clone(), e)).collect();
            self.spare_what_is_used_again(&mut doomed, all_or_none)?;
            let mut batch = Batch::default();
            for path in referrers_first(&doomed) {
                if outcome.bytes_freed >= max_freed {
                    break;
                }
                let Some(entry) = doomed.get(&path) else { continue };
                self.remove_in_batch(entry, &mut batch)?;
                outcome.bytes_freed += entry.info.nar_size;
                events.push(StoreEvent::Removed { name: path.to_string(), number: entry.number });
                outcome.paths.insert(path);
            }
            self.index().commit(batch)?;
        }
        self.publish(&events);
        if !outcome.paths.is_empty() {
            self.sweeper.wake();
        }
        Ok(outcome)
    }

    /// Between the walk and this moment a client may have taken a temporary root on a dead path, or
    /// registered something that refers to one. With the lock held nothing changes any more.
    fn spare_what_is_used_again(&self, doomed: &mut BTreeMap<StorePath, Entry>, all_or_none: bool) -> Result<()> {
        let mut spared: Vec<StorePath> = doomed.keys().filter(|path| self.temp_roots.contains(path)).cloned().collect();
        for path in doomed.keys() {
            if self.referrers(path)?.iter().any(|referrer| !doomed.contains_key(referrer)) {
                spared.push(path.clone());
            }
        }
        if let Some(alive) = spared.first().filter(|_| all_or_none) {
            return Err(Error::Alive(self.store_dir().display(alive)));
        }
        while let Some(path) = spared.pop() {
            if let Some(entry) = doomed.remove(&path) {
                spared.extend(entry.info.references);
            }
        }
        Ok(())
    }
}

impl Graph {
    /// What the roots reach.
    fn live(&self, store: &Store, roots: &BTreeSet<StorePath>, options: &GcOptions) -> Result<BTreeSet<StorePath>> {
        let mut live = BTreeSet::new();
        let mut todo: Vec<StorePath> = roots.iter().cloned().collect();
        while let Some(path) = todo.pop() {
            let Some(entry) = self.entries.get(&path) else { continue };
            if !live.insert(path.clone()) {
                continue;
            }
            todo.extend(entry.info.references.iter().cloned());
            if options.keep_derivations {
                todo.extend(entry.info.deriver.iter().cloned());
                todo.extend(store.valid_derivers(&path)?.into_keys());
            }
            if options.keep_outputs && path.is_derivation() {
                let derivation = store.derivation(&path)?;
                todo.extend(output_paths(&derivation.basic).into_values());
            }
        }
        Ok(live)
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
