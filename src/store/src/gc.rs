//! Garbage collection of paths, and deletion by name.
//!
//! Deciding what is dead takes a walk over the reference graph, beside everything else that goes on. What was decided
//! is held against the present when it is deleted ([`deletion`]). The space comes back in the background
//! ([`crate::sweep`]).

mod deletion;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

use nix_compat::store_path::StorePath;

use crate::error::{Error, Result};
use crate::record::Entry;
use crate::store::Store;

/// What a collection is to do (worker protocol, CollectGarbage).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GcAction {
    /// Tell what is alive.
    ReturnLive,
    /// Tell what is dead.
    ReturnDead,
    /// Delete what is dead.
    DeleteDead,
    /// Delete everything in the scope, or nothing if some of it is alive.
    DeleteSpecific,
}

/// What a collection looks at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GcScope {
    /// All valid paths.
    WholeStore,
    /// Some paths.
    Paths {
        /// These.
        paths: BTreeSet<StorePath>,
        /// And all that refer to them, directly or not.
        with_referrers: bool,
    },
}

/// The settings that a collection obeys.
#[derive(Clone, Debug)]
pub struct GcOptions {
    /// What to do.
    pub action: GcAction,
    /// With which paths.
    pub scope: GcScope,
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
    /// Collects garbage. Collections take turns.
    ///
    /// # Errors
    /// [`Error::Alive`] for a path that was named and is not dead; failures of the index or of the search for
    /// roots. Of named paths none is deleted then; of dead ones some may have been.
    pub fn collect_garbage(&self, options: &GcOptions) -> Result<GcOutcome> {
        let _turn = self.collecting.lock();
        let _roots_stay = self.temp_roots.begin_collection();
        if matches!(options.action, GcAction::DeleteDead | GcAction::DeleteSpecific) {
            self.prepare_to_collect();
        }
        let graph = self.graph()?;
        let roots: BTreeSet<StorePath> = self.find_roots()?.into_iter().map(|root| root.path).collect();
        let mut options = options.clone();
        if options.action == GcAction::DeleteSpecific {
            // Somebody who names a path wants it gone even if it is what another live path was built from.
            (options.keep_derivations, options.keep_outputs) = (false, false);
        }
        let live = graph.live(self, &roots, &options)?;
        let named = match options.scope {
            GcScope::WholeStore => None,
            GcScope::Paths { paths, with_referrers: false } => Some(paths),
            GcScope::Paths { paths, with_referrers: true } => Some(graph.with_referrers(paths)),
        };
        let in_scope = |path: &StorePath| named.as_ref().is_none_or(|named| named.contains(path));
        match options.action {
            GcAction::ReturnLive => {
                Ok(GcOutcome { paths: live.into_iter().filter(in_scope).collect(), bytes_freed: 0 })
            }
            GcAction::ReturnDead => {
                let dead = graph.entries.into_keys().filter(|path| in_scope(path) && !live.contains(path));
                Ok(GcOutcome { paths: dead.collect(), bytes_freed: 0 })
            }
            GcAction::DeleteDead => {
                let mut dead = graph.entries;
                dead.retain(|path, _| in_scope(path) && !live.contains(path));
                let outcome = self.delete_dead(&dead, options.max_freed);
                // Whatever came of it: objects of an earlier collection, or of broken imports, may be left as well.
                self.sweeper.wake();
                outcome
            }
            GcAction::DeleteSpecific => {
                let mut doomed = graph.entries;
                doomed.retain(|path, _| in_scope(path));
                if let Some(alive) = doomed.keys().find(|path| live.contains(*path)) {
                    return Err(Error::Alive(self.store_dir().display(alive)));
                }
                let mut outcome = self.delete_all_or_none(doomed)?;
                self.sweeper.wake();
                // A path that does not exist counts as deleted, with stock as well.
                outcome.paths.extend(named.into_iter().flatten());
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
}

impl Graph {
    /// The paths and all that refer to them, directly or not.
    fn with_referrers(&self, paths: BTreeSet<StorePath>) -> BTreeSet<StorePath> {
        let mut referrers: BTreeMap<&StorePath, Vec<&StorePath>> = BTreeMap::new();
        for (path, entry) in &self.entries {
            for reference in &entry.info.references {
                referrers.entry(reference).or_default().push(path);
            }
        }
        let mut all = BTreeSet::new();
        let mut todo: Vec<StorePath> = paths.into_iter().collect();
        while let Some(path) = todo.pop() {
            if all.insert(path.clone()) {
                todo.extend(referrers.get(&path).into_iter().flatten().map(|path| (*path).clone()));
            }
        }
        all
    }

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
                // As stock: the one it was built from, not every one that would give it.
                todo.extend(entry.info.deriver.iter().cloned());
            }
            if options.keep_outputs && path.is_derivation() {
                match store.output_map(&path) {
                    Ok(outputs) => todo.extend(outputs.into_values().flatten()),
                    // Deleted since the graph was read.
                    Err(_) if !store.is_valid(&path)? => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(live)
    }
}
