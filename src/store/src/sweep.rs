//! Getting space back: after paths have been deleted, the objects only they used are removed in the background.
//!
//! One thread does it, started with the store; deletions wake it. What it marks as alive are the trees of all
//! valid paths; what imports under way are using is the castore's business (its collection waits for them).
//!
//! A sweep can fail, and the daemon can end before or during it. So each deletion commits a note that a sweep is wanted,
//! and a sweep that succeeds takes it back; as long as it is there, a sweep is tried again, also after a restart.

use std::ops::ControlFlow;
use std::sync::{Arc, Weak};
use std::time::Duration;

use castore::collect::{CollectError, Swept};
use castore::index::Batch;
use parking_lot::{Condvar, Mutex};

use crate::error::{Error, Result};
use crate::store::{META_SWEEP, Store};

/// How long a sweep waits for imports that began before it.
const PATIENCE: Duration = Duration::from_secs(60);
/// When a sweep found no opportunity or failed, the next attempt comes after this.
const RETRY: Duration = Duration::from_secs(120);
/// How often the thread looks whether its store is still there.
const TICK: Duration = Duration::from_secs(5);

/// Wakes the sweeping thread.
#[derive(Debug, Default, Clone)]
pub(crate) struct Sweeper {
    wanted: Arc<(Mutex<bool>, Condvar)>,
}

impl Sweeper {
    /// Starts the thread, with a sweep if one is due from earlier. It ends when the store is dropped.
    pub(crate) fn start(store: &Arc<Store>) -> Result<()> {
        let sweeper = store.sweeper.clone();
        if noted(store)?.is_some() || !store.has_records()? {
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
        *self.wanted.0.lock() = true;
        self.wanted.1.notify_one();
    }

    fn run(&self, store: &Weak<Store>) {
        loop {
            {
                let mut wanted = self.wanted.0.lock();
                if !*wanted {
                    self.wanted.1.wait_for(&mut wanted, TICK);
                }
                if !std::mem::take(&mut *wanted) {
                    if store.strong_count() == 0 {
                        return;
                    }
                    continue;
                }
            }
            let Some(store) = store.upgrade() else { return };
            match store.sweep() {
                Ok(swept) => tracing::info!(
                    objects = swept.removed_objects,
                    bytes = swept.freed_bytes,
                    packs = swept.deleted_packs,
                    "swept the castore"
                ),
                Err(error) => {
                    tracing::error!(%error, retry_after = RETRY.as_secs(), "cannot sweep the castore yet");
                    drop(store);
                    let mut wanted = self.wanted.0.lock();
                    self.wanted.1.wait_for(&mut wanted, RETRY);
                    *wanted = true;
                }
            }
        }
    }
}

/// A sweep failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SweepError {
    #[error(transparent)]
    Collect(#[from] CollectError),
    #[error(transparent)]
    Store(#[from] Error),
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

    /// Removes the objects that no valid path uses.
    pub(crate) fn sweep(&self) -> Result<Swept, SweepError> {
        self.write_missing_records()?;
        let mut garbage = self.engine.begin_collection(PATIENCE)?;
        let due = noted(self)?;
        // Only now: what imports from before have registered must be seen.
        let roots = self.mark_records(&mut garbage, due.is_some())?;
        for root in &roots {
            garbage.mark(root).map_err(Error::from)?;
        }
        let swept = garbage.sweep(&mut |_| ControlFlow::Continue(()))?;
        if due.is_some() {
            let _changing = self.changing.lock();
            // Unless more has been deleted meanwhile.
            if noted(self)? == due {
                let mut batch = Batch::default();
                batch.delete(self.tables.meta, META_SWEEP);
                self.index().commit(batch).map_err(Error::from)?;
            }
        }
        Ok(swept)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

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
        store.index().commit(batch).unwrap();
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
