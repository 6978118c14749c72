//! Getting space back: after paths have been deleted, the objects only they used are removed in the background, and
//! packs of which little is alive then are rewritten.
//!
//! One thread does it, started with the store; deletions wake it. What it marks as alive are the trees of all
//! valid paths; what imports under way are using is the castore's business (its collection waits for them).
//!
//! A sweep can fail, and the daemon can end before or during it. So each deletion commits a note that a sweep is wanted,
//! and a sweep that succeeds takes it back; as long as it is there, a sweep is tried again, also after a restart.

mod unread;

use std::ops::ControlFlow;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use castore::collect::CollectError;
use castore::index::Batch;
use castore::objects::ObjectKey;
use castore::repack::{Progress, Repacked, SPARSE, SPARSE_WHEN_SHORT};
use parking_lot::{Condvar, Mutex};

use crate::error::{Error, Result};
use crate::store::{META_LAST_SWEEP, META_SWEEP, Store};

/// How long a sweep waits for imports that began before it.
const PATIENCE: Duration = Duration::from_secs(60);
/// When a sweep found no opportunity or failed, the next attempt comes after this.
const RETRY: Duration = Duration::from_secs(120);
/// How often the thread looks whether its store is still there.
const TICK: Duration = Duration::from_secs(5);

/// Wakes the sweeping thread, and tells what it has done.
#[derive(Debug, Default, Clone)]
pub(crate) struct Sweeper {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    wanted: Condvar,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct State {
    wanted: bool,
    /// Somebody wants space rather than order: packs are rewritten that otherwise would not be.
    for_space: bool,
    /// Sweeps that began and that ended, well or not.
    begun: u64,
    ended: u64,
}

impl Sweeper {
    /// Starts the thread, with a sweep if one is due from earlier. It ends when the store is dropped.
    pub(crate) fn start(store: &Arc<Store>) -> Result<()> {
        let sweeper = store.sweeper.clone();
        if noted(store)?.is_some() || !store.has_records()? || store.engine.objects().has_dead_packs() {
            sweeper.wake();
        }
        let store = Arc::downgrade(store);
        std::thread::Builder::new()
            .name("sweep".into())
            .spawn(move || sweeper.run(&store))
            .map(drop)
            .map_err(|source| Error::Stream { action: "start", what: "the sweeping thread".into(), source })
    }

    /// Asks for a sweep.
    pub(crate) fn wake(&self) {
        self.shared.state.lock().wanted = true;
        self.shared.wanted.notify_one();
    }

    /// Asks for a sweep that gives back what it can, and waits until one that began after the call has ended, well or
    /// not; at most for `patience`.
    pub(crate) fn sweep_for_space(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        let mut state = self.shared.state.lock();
        (state.wanted, state.for_space) = (true, true);
        self.shared.wanted.notify_one();
        let mine = state.begun + 1;
        while state.ended < mine && !self.shared.ended.wait_until(&mut state, deadline).timed_out() {}
    }

    fn run(&self, store: &Weak<Store>) {
        loop {
            let for_space = {
                let mut state = self.shared.state.lock();
                if !state.wanted {
                    self.shared.wanted.wait_for(&mut state, TICK);
                }
                if !state.wanted {
                    if store.strong_count() == 0 {
                        return;
                    }
                    continue;
                }
                state.wanted = false;
                state.begun += 1;
                std::mem::take(&mut state.for_space)
            };
            let Some(store) = store.upgrade() else { return };
            let swept = store.sweep(for_space, &|| Arc::strong_count(&store) == 1);
            let failed = match &swept {
                Ok(sweep) => {
                    tracing::info!(
                        objects = sweep.removed_objects,
                        freed_bytes = sweep.freed_bytes,
                        rewritten_bytes = sweep.rewritten_bytes,
                        packs = sweep.deleted_packs,
                        "swept the castore"
                    );
                    false
                }
                Err(SweepError::Abandoned) => return,
                Err(error) => {
                    tracing::error!(%error, retry_after = RETRY.as_secs(), "cannot sweep the castore yet");
                    true
                }
            };
            drop(store);
            let mut state = self.shared.state.lock();
            state.ended = state.begun;
            self.shared.ended.notify_all();
            if failed {
                // Whoever wants one now gets it now.
                if !state.wanted {
                    self.shared.wanted.wait_for(&mut state, RETRY);
                }
                state.wanted = true;
            }
        }
    }
}

/// What the last sweep gave back. Kept in the index, so that it is known after a restart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LastSweep {
    /// When it ended, in seconds since 1970.
    pub at: u64,
    /// Objects it removed.
    pub removed_objects: u64,
    /// Packs it deleted.
    pub deleted_packs: u64,
    /// Their bytes.
    pub freed_bytes: u64,
    /// Bytes of what was alive in them and was written to others.
    pub rewritten_bytes: u64,
}

impl LastSweep {
    fn encode(&self) -> String {
        let Self { at, removed_objects, deleted_packs, freed_bytes, rewritten_bytes } = self;
        format!("{at} {removed_objects} {deleted_packs} {freed_bytes} {rewritten_bytes}")
    }

    fn decode(text: &str) -> Option<Self> {
        let mut numbers = text.split(' ').map(|word| word.parse().ok());
        let mut next = || numbers.next().flatten();
        Some(Self {
            at: next()?,
            removed_objects: next()?,
            deleted_packs: next()?,
            freed_bytes: next()?,
            rewritten_bytes: next()?,
        })
    }

    /// Bytes the filesystem got back.
    #[must_use]
    pub fn given_back(&self) -> u64 {
        self.freed_bytes.saturating_sub(self.rewritten_bytes)
    }
}

/// A sweep failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SweepError {
    #[error(transparent)]
    Castore(#[from] castore::Error),
    #[error(transparent)]
    Collect(#[from] CollectError),
    #[error(transparent)]
    Store(#[from] Error),
    /// A path needs what cannot be read now and may be readable later.
    #[error(
        "path '{path}' needs {key}, which cannot be read now; unless it is put back, `castored fsck --repair '{path}'` \
         decides what becomes of the path"
    )]
    Undecided { path: String, key: ObjectKey },
    #[error("the store was closed")]
    Abandoned,
}

/// The number of the deletion that a sweep is due for.
fn noted(store: &Store) -> Result<Option<u64>> {
    let value = store.index().get(&store.tables.meta, META_SWEEP)?;
    Ok(value.map(|value| String::from_utf8_lossy(&value).parse().unwrap_or(0)))
}

/// Adds to `batch`, which deletes paths, the note that a sweep is wanted. The caller holds [`Store::changing`].
pub(crate) fn want(store: &Store, batch: &mut Batch) -> Result<()> {
    let next = noted(store)?.map_or(1, |number| number.wrapping_add(1));
    batch.put(store.tables.meta, META_SWEEP, next.to_string());
    Ok(())
}

impl Store {
    /// Whether paths were deleted whose space has not come back yet.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn is_sweep_due(&self) -> Result<bool> {
        Ok(noted(self)?.is_some())
    }

    /// What the last sweep gave back, if there was one.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn last_sweep(&self) -> Result<Option<LastSweep>> {
        let value = self.index().get(&self.tables.meta, META_LAST_SWEEP)?;
        Ok(value.and_then(|value| LastSweep::decode(&String::from_utf8_lossy(&value))))
    }

    /// Removes the objects that no valid path uses, and rewrites packs of which little is alive.
    ///
    /// When `abandoned` says that nobody is interested any more it ends early; the next sweep does the rest.
    ///
    /// Memory: the castore's fingerprints, and one node (about 60 bytes) for each valid path.
    pub(crate) fn sweep(&self, for_space: bool, abandoned: &dyn Fn() -> bool) -> Result<LastSweep, SweepError> {
        let flow = || if abandoned() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
        // The reserve is for what people want deleted. What an import left that did not fit is not worth it.
        if for_space || noted(self)?.is_some() {
            self.prepare_to_collect();
        }
        self.write_missing_records()?;
        let mut garbage = self.engine.begin_collection(PATIENCE)?;
        let due = noted(self)?;
        // Only now: what imports from before have registered must be seen.
        let roots = self.mark_records(&mut garbage, due.is_some())?;
        for root in &roots {
            if abandoned() {
                return Err(SweepError::Abandoned);
            }
            garbage.mark(root).map_err(Error::from)?;
        }
        drop(roots);
        self.settle_unread(&mut garbage)?;
        let swept = garbage.sweep(&mut |_| flow())?;
        if abandoned() {
            return Err(SweepError::Abandoned);
        }
        let below = if for_space { SPARSE_WHEN_SHORT } else { SPARSE };
        // What was removed is removed: space to rewrite with may be missing, and the next sweep comes to it.
        let objects = self.engine.objects();
        let repacked = objects.repack_sparse(below, &|| self.room(), &mut |_| flow()).unwrap_or_else(|error| {
            tracing::warn!(error = &error as &dyn std::error::Error, "cannot rewrite packs of which little is alive");
            Repacked::default()
        });
        let sweep = LastSweep {
            at: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs()),
            removed_objects: swept.removed_objects,
            deleted_packs: swept.deleted_packs + repacked.deleted_packs,
            freed_bytes: swept.freed_bytes + repacked.freed_bytes,
            rewritten_bytes: repacked.written_bytes,
        };
        self.make_reserves();
        let _changing = self.changing.lock();
        let mut batch = Batch::default();
        batch.put(self.tables.meta, META_LAST_SWEEP, sweep.encode());
        // Unless more has been deleted meanwhile.
        if due.is_some() && noted(self)? == due {
            batch.delete(self.tables.meta, META_SWEEP);
        }
        self.commit(batch)?;
        Ok(sweep)
    }

    /// Packs contents more densely than imports do, where that saves space (OptimiseStore).
    ///
    /// # Errors
    /// When the index or the disk refuses. What was done by then stays.
    pub fn optimise(&self, progress: Progress<'_>) -> Result<Repacked> {
        Ok(self.engine.objects().optimise(&|| self.room(), progress)?)
    }

    /// What rewriting may write before it gives back: the index needs space as well.
    fn room(&self) -> u64 {
        self.space().map_or(0, |space| space.usable / 4 * 3)
    }

    /// Makes what is missing of the reserves for a full disk, if there is space.
    pub(crate) fn make_reserves(&self) {
        self.for_opening.make_if_missing();
        self.reserve.make_if_missing();
    }

    /// Sees to it that a collection can write on a full disk.
    pub(crate) fn prepare_to_collect(&self) {
        if self.reserve.give_up_if_short()
            && let Err(error) = self.sync()
        {
            // Commits are refused while the disk was full; this was to find out that it is not any more.
            tracing::warn!(%error, "the index cannot be written although the reserve was given up");
        }
    }
}

#[cfg(test)]
mod tests {
    use nix_compat::store_path::StoreDir;

    use super::*;
    use crate::store::Config;

    /// Opens the store; the sweeping thread of the one before may still be letting go of it.
    fn open(dir: &std::path::Path) -> Arc<Store> {
        let began = Instant::now();
        loop {
            match Store::open(Config::new(StoreDir::default(), dir)) {
                Err(Error::InUse { .. }) if began.elapsed() < Duration::from_secs(30) => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                opened => return opened.unwrap(),
            }
        }
    }

    #[test]
    fn a_sweep_that_was_due_when_the_store_was_closed_comes_when_it_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let mut session = store.engine.session();
        session.put_blob(&mut &b"used by nobody"[..]).unwrap();
        drop(session.finish().unwrap());
        let mut batch = Batch::default();
        want(&store, &mut batch).unwrap();
        store.commit(batch).unwrap();
        drop(store);

        let store = open(dir.path());
        let began = Instant::now();
        while noted(&store).unwrap().is_some() {
            assert!(began.elapsed() < Duration::from_secs(30), "nobody sweeps");
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(store.engine.stats().objects, 1, "what is left says which paths there are");
    }
}
