//! Garbage collection of paths, and deletion by name.
//!
//! Deciding what is dead takes a walk over the reference graph ([`graph`]), beside everything else that goes on. What
//! was decided is held against the present when it is deleted ([`deletion`]). The space comes back in the background
//! ([`crate::sweep`]).

mod deletion;
mod graph;
mod order;

use std::collections::BTreeSet;

use nix_compat::store_path::StorePath;

use deletion::{Deletion, Start};
use graph::{Graph, Id};

use crate::error::{Error, Result};
use crate::roots::RootNote;
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

/// Where a collection has got to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GcStep<'a> {
    /// Another collection runs, and is waited for.
    Waiting,
    /// It looks for roots.
    FindingRoots,
    /// It came across this.
    Noted(&'a RootNote),
    /// It finds out what the roots reach, to tell it.
    Determining,
    /// It begins to delete.
    Deleting,
    /// This path is gone.
    Deleted(&'a StorePath),
    /// As many bytes as were asked for are free.
    Enough,
}

/// Who wants to know how a collection goes on. Called on the thread that collects, with no lock held that others wait
/// for but other collections.
pub trait GcWatch {
    /// It has come to this.
    fn step(&self, step: GcStep<'_>);

    /// Whether it is to go on. When not, it ends at the next point at which the store is as it is to be.
    fn go_on(&self) -> bool;
}

/// Nobody.
impl GcWatch for () {
    fn step(&self, _: GcStep<'_>) {}

    fn go_on(&self) -> bool {
        true
    }
}

impl Store {
    /// Collects garbage, with nobody watching.
    ///
    /// # Errors
    /// Those of [`Store::collect_garbage_watched`].
    pub fn collect_garbage(&self, options: &GcOptions) -> Result<GcOutcome> {
        self.collect_garbage_watched(options, &())
    }

    /// Collects garbage. Collections take turns.
    ///
    /// # Errors
    /// [`Error::Alive`] for a path that was named and is not dead; none is deleted then, unless that came out only while
    /// very many were being deleted. [`Error::Cancelled`] when `watch` says so, and failures of the index or of the
    /// search for roots: of dead paths some may have been deleted.
    pub fn collect_garbage_watched(&self, options: &GcOptions, watch: &dyn GcWatch) -> Result<GcOutcome> {
        let _turn = self.collecting.try_lock().unwrap_or_else(|| {
            watch.step(GcStep::Waiting);
            self.collecting.lock()
        });
        let _roots_stay = self.temp_roots.begin_collection();
        let deletes = matches!(options.action, GcAction::DeleteDead | GcAction::DeleteSpecific);
        if deletes {
            self.prepare_to_collect();
            self.check_room_to_collect()?;
        }
        watch.step(GcStep::FindingRoots);
        let start = Start::now(self);
        let graph = Graph::read(self, &|| watch.go_on())?;
        let roots: BTreeSet<StorePath> = self
            .find_roots_noting(&mut |note| watch.step(GcStep::Noted(&note)))?
            .into_iter()
            .map(|root| root.path)
            .collect();
        tracing::debug!(paths = graph.len(), bytes = graph.bytes(), roots = roots.len(), "read the reference graph");
        match options.scope {
            GcScope::WholeStore => watch.step(if deletes { GcStep::Deleting } else { GcStep::Determining }),
            GcScope::Paths { .. } => {}
        }
        let live = self.live(&graph, roots.iter().filter_map(|root| graph.find(root)), options, watch)?;
        let named = match &options.scope {
            GcScope::WholeStore => None,
            GcScope::Paths { paths, with_referrers } => Some(graph.named(paths, *with_referrers)),
        };
        let in_scope = |id: &Id| named.as_ref().is_none_or(|named| named[id.index()]);
        match options.action {
            GcAction::ReturnLive | GcAction::ReturnDead => {
                let wanted = options.action == GcAction::ReturnLive;
                let found = graph.paths().filter(|id| in_scope(id) && live[id.index()] == wanted);
                Ok(GcOutcome { paths: found.map(|id| graph.path(id)).collect::<Result<_>>()?, bytes_freed: 0 })
            }
            GcAction::DeleteDead => {
                let dead = graph.paths().filter(|id| in_scope(id) && !live[id.index()]);
                let outcome = Deletion::new(self, &graph, start, dead, watch).delete(options.max_freed);
                // Whatever came of it: objects of an earlier collection, or of broken imports, may be left as well.
                self.sweeper.wake();
                outcome
            }
            GcAction::DeleteSpecific => {
                let alive = graph.paths().find(|id| in_scope(id) && live[id.index()]);
                if let Some(alive) = alive.map_or_else(|| self.kept(&graph, options, &in_scope), |id| Ok(Some(id)))? {
                    return Err(Error::Alive(self.store_dir().display(&graph.path(alive)?)));
                }
                let outcome = Deletion::new(self, &graph, start, graph.paths().filter(in_scope), watch).delete_all();
                self.sweeper.wake();
                let mut outcome = outcome?;
                // A path that does not exist counts as deleted, with stock as well.
                if let GcScope::Paths { paths, .. } = &options.scope {
                    outcome.paths.extend(paths.iter().cloned());
                }
                Ok(outcome)
            }
        }
    }

    /// What the roots reach: a mark for each path.
    fn live(
        &self,
        graph: &Graph,
        roots: impl Iterator<Item = Id>,
        options: &GcOptions,
        watch: &dyn GcWatch,
    ) -> Result<Vec<bool>> {
        let mut live = vec![false; graph.len()];
        let mut todo: Vec<Id> = roots.collect();
        while let Some(id) = todo.pop() {
            if graph.number(id) == 0 || std::mem::replace(&mut live[id.index()], true) {
                continue;
            }
            todo.extend(graph.references(id));
            if options.keep_derivations {
                // As stock: the one it was built from, not every one that would give it.
                todo.extend(graph.deriver(id));
            }
            if options.keep_outputs && graph.is_derivation(id) {
                // This reads a file: by far the slowest step of the walk.
                if !watch.go_on() {
                    return Err(Error::Cancelled);
                }
                let path = graph.path(id)?;
                match self.output_map(&path) {
                    Ok(outputs) => todo.extend(outputs.values().flatten().filter_map(|output| graph.find(output))),
                    // Deleted since the graph was read.
                    Err(_) if !self.is_valid(&path)? => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(live)
    }

    /// One of the named paths that a path which is not named keeps, dead as that may be, by the settings: as stock, a
    /// derivation is not deleted by name as long as there is something that was built from it.
    fn kept(&self, graph: &Graph, options: &GcOptions, named: &dyn Fn(&Id) -> bool) -> Result<Option<Id>> {
        if options.keep_derivations {
            let others = graph.paths().filter(|id| !named(id));
            if let Some(kept) = others.filter_map(|id| graph.deriver(id)).find(|id| graph.number(*id) != 0 && named(id))
            {
                return Ok(Some(kept));
            }
        }
        if options.keep_outputs {
            for id in graph.paths().filter(named) {
                let derivers = self.valid_derivers(&graph.path(id)?)?;
                if derivers.keys().any(|deriver| graph.find(deriver).is_none_or(|deriver| !named(&deriver))) {
                    return Ok(Some(id));
                }
            }
        }
        Ok(None)
    }
}

impl Graph {
    /// A mark for each of the paths, and for all that refer to them if that is asked for.
    fn named(&self, paths: &BTreeSet<StorePath>, with_referrers: bool) -> Vec<bool> {
        let ids = paths.iter().filter_map(|path| self.find(path));
        if with_referrers {
            return self.with_referrers(ids);
        }
        let mut marks = vec![false; self.len()];
        ids.for_each(|id| marks[id.index()] = true);
        marks
    }
}
