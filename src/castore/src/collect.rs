//! Removing objects nothing refers to, and getting their space back.
//!
//! What is alive only the owner of the store knows, so a collection has two phases that it drives:
//!
//! 1. [`ObjectStore::begin_collection`] starts a new *epoch*: from now on every object that is put or found to be
//!    there through an [`ObjectWriter`](crate::objects::ObjectWriter) is recorded as touched. It then waits until all
//!    writers of earlier epochs are gone, since what they found before the recording is known to nobody. What those
//!    importers committed is therefore there to be seen when the owner now calls [`Collection::mark`] for everything it
//!    can reach.
//! 2. [`Collection::sweep`] removes the entries of objects neither marked nor touched. Check and removal are one step
//!    for everybody else. When the removals are durable, packs in which nothing is alive are deleted.
//!
//! Readers need not care: they have an object's bytes, or get None as if they had come later.
//!
//! Memory: a 16-byte fingerprint in a hash set for each marked or touched object: 17 to 39 bytes, up to 39 MB per
//! million, and half as much again for the moment in which the set grows.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use crate::index::{Batch, IndexError};
use crate::objects::{Core, Fingerprints, ObjectError, ObjectKey, ObjectStore, key_bytes, key_of};
use crate::pack::{PackError, Packs};

/// Entries removed in one step, during which nobody else can enter objects.
const STEP: usize = 1024;

/// Why a collection could not be done.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// There is one collection at a time.
    #[error("another collection is running")]
    Running,
    /// Imports that began before the collection did not end in the time given. Nothing was removed.
    #[error("{writers} imports were still running after {} seconds", waited.as_secs())]
    Busy {
        /// How many.
        writers: usize,
        /// For how long they were waited for.
        waited: Duration,
    },
    /// Objects that are in use cannot be read, so that what they name is unknown. Nothing was removed.
    #[error("{objects} objects in use cannot be read, {first} among them; what they name could not be marked")]
    Unread {
        /// How many.
        objects: usize,
        /// One of them.
        first: ObjectKey,
    },
    /// The store could not do it. What was removed by then stays removed, and the rest stays.
    #[error(transparent)]
    Objects(#[from] ObjectError),
}

impl From<IndexError> for CollectError {
    fn from(error: IndexError) -> Self {
        Self::Objects(error.into())
    }
}

impl From<PackError> for CollectError {
    fn from(error: PackError) -> Self {
        Self::Objects(error.into())
    }
}

/// What a sweep did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Objects looked at.
    pub examined: u64,
    /// Objects removed.
    pub removed_objects: u64,
    /// Their contents' bytes.
    pub removed_bytes: u64,
    /// Packs deleted.
    pub deleted_packs: u64,
    /// Bytes of the deleted packs: what the filesystem got back.
    pub freed_bytes: u64,
}

impl ObjectStore {
    /// Begins a collection; waits at most `patience` for imports that are under way.
    ///
    /// Whoever computes what is alive does so *after* this, from what is committed then.
    pub fn begin_collection(self: &Arc<Self>, patience: Duration) -> Result<Collection, CollectError> {
        let core = &self.core;
        if !core.epochs.begin_collecting() {
            return Err(CollectError::Running);
        }
        // From here on its end is that of the recording.
        let collection = Collection { core: Arc::clone(core), live: Fingerprints::new(), swept: Swept::default() };
        core.catalog.record(Some(Fingerprints::new()));
        match core.epochs.turn(patience) {
            Ok(()) => Ok(collection),
            Err(writers) => Err(CollectError::Busy { writers, waited: patience }),
        }
    }
}

/// A collection under way. To drop it is to abandon it.
pub struct Collection {
    core: Arc<Core>,
    live: Fingerprints,
    swept: Swept,
}

impl Collection {
    /// Marks an object as alive; whether it was not marked before, which is when a walk has to go on below it.
    pub fn mark(&mut self, key: &ObjectKey) -> bool {
        self.live.insert(key)
    }

    /// Removes what is neither marked nor touched, and deletes packs in which nothing is alive. Durable on return.
    ///
    /// `progress` is called now and then; when it breaks, the sweep ends early, with nothing wrong: a later collection
    /// does the rest.
    pub fn sweep(mut self, progress: &mut dyn FnMut(&Swept) -> ControlFlow<()>) -> Result<Swept, CollectError> {
        let core = Arc::clone(&self.core);
        let mut dying = Vec::with_capacity(STEP);
        let mut failed = None;
        let mut ended = false;
        core.index.scan_prefix(&core.tables.objects, &[], &mut |key, _| {
            let Some(key) = key_of(key) else {
                tracing::warn!(?key, "a key of the objects table names no object; left alone");
                return ControlFlow::Continue(());
            };
            self.swept.examined += 1;
            if !self.live.contains(&key) {
                dying.push(key);
            }
            if dying.len() == STEP {
                if let Err(error) = self.remove(&mut dying) {
                    failed = Some(error);
                    return ControlFlow::Break(());
                }
                ended = progress(&self.swept).is_break();
                if ended {
                    return ControlFlow::Break(());
                }
            }
            ControlFlow::Continue(())
        })?;
        if let Some(error) = failed {
            return Err(error.into());
        }
        self.remove(&mut dying)?;
        if !ended {
            core.sweep_promises(&|key| self.live.contains(key))?;
        }
        if ended {
            core.index.sync()?;
        } else {
            self.delete_packs()?;
        }
        Ok(self.swept)
    }

    /// Removes the entries of those of `dying` that nobody touched.
    fn remove(&mut self, dying: &mut Vec<ObjectKey>) -> Result<(), ObjectError> {
        let core = &self.core;
        let mut state = core.catalog.lock();
        let mut batch = Batch::new();
        let mut changed = BTreeMap::new();
        let mut swept = self.swept;
        for key in dying.drain(..) {
            if state.touched.as_ref().is_none_or(|touched| touched.contains(&key)) {
                continue;
            }
            let entry = match core.entry(&key) {
                Ok(Some(entry)) => entry,
                Ok(None) => continue,
                // A check tells of it. One row must not keep the space of all others.
                Err(ObjectError::Entry(_)) => {
                    tracing::warn!(%key, "the index entry of an object that is not in use is damaged; left alone");
                    continue;
                }
                Err(error) => return Err(error),
            };
            let pack = entry.place.pack;
            let usage = state.usage_in(&mut changed, pack);
            usage.live_objects = usage.live_objects.saturating_sub(1);
            usage.live_bytes = usage.live_bytes.saturating_sub(u64::from(entry.length));
            swept.removed_objects += 1;
            swept.removed_bytes += u64::from(entry.length);
            batch.delete(core.tables.objects, &key_bytes(&key));
        }
        for (&pack, usage) in &changed {
            batch.put(core.tables.usage, &Packs::key(pack), usage.encode());
        }
        core.index.commit(batch)?;
        state.usage.extend(changed);
        self.swept = swept;
        Ok(())
    }

    /// Deletes the packs in which nothing is alive.
    fn delete_packs(&mut self) -> Result<(), CollectError> {
        let core = &self.core;
        let dead = core.dead_packs();
        // No index that a crash could bring back may point into what is deleted.
        core.index.sync()?;
        let (packs, bytes) = core.delete_packs(&dead)?;
        self.swept.deleted_packs += packs;
        self.swept.freed_bytes += bytes;
        Ok(())
    }
}

impl Core {
    /// Seals the packs in which nothing is alive. Those that wait for entries of blocks count as alive.
    pub(crate) fn dead_packs(&self) -> Vec<u32> {
        let state = self.catalog.lock();
        let alive = |pack: u32| state.usage.get(&pack).is_some_and(|usage| usage.live_objects > 0);
        self.packs.numbers().into_iter().filter(|&pack| !alive(pack) && self.packs.seal(pack)).collect()
    }

    /// Deletes sealed packs in which nothing is alive. The caller has synced the index since the last of their objects
    /// was removed and since they were sealed: a sync writes the last word about their length, which this takes back.
    /// Returns how many there were, and their bytes.
    pub(crate) fn delete_packs(&self, dead: &[u32]) -> Result<(u64, u64), CollectError> {
        if dead.is_empty() {
            return Ok((0, 0));
        }
        let mut batch = Batch::new();
        {
            let mut state = self.catalog.lock();
            for pack in dead {
                state.usage.remove(pack);
                batch.delete(self.tables.usage, &Packs::key(*pack));
                batch.delete(self.tables.forms, &Packs::key(*pack));
                batch.delete(self.packs.lengths(), &Packs::key(*pack));
            }
        }
        self.packs.forget(dead)?;
        self.index.commit(batch)?;
        self.index.sync()?;
        let (mut packs, mut bytes) = (0, 0);
        for pack in dead {
            if let Some(length) = self.packs.unlink(*pack)? {
                packs += 1;
                bytes += length;
            }
        }
        Ok((packs, bytes))
    }
}

impl Drop for Collection {
    fn drop(&mut self) {
        self.core.catalog.record(None);
        self.core.epochs.end_collecting();
    }
}

#[cfg(test)]
mod tests;
