//! Getting space back: after paths have been deleted, the objects only they used are removed in the background.
//!
//! One thread does it, started with the store; deletions wake it. What it marks as alive are the trees of all
//! valid paths; what imports under way are using is the castore's business (its collection waits for them).

use std::ops::ControlFlow;
use std::sync::{Arc, Weak};
use std::time::Duration;

use castore::Node;
use castore::collect::{CollectError, Swept};
use parking_lot::{Condvar, Mutex};

use crate::error::{Error, Result};
use crate::store::Store;

/// How long a sweep waits for imports that began before it.
const PATIENCE: Duration = Duration::from_secs(60);
/// When a sweep found no opportunity, the next attempt comes after this.
const RETRY: Duration = Duration::from_secs(120);
/// How often the thread looks whether its store is still there.
const TICK: Duration = Duration::from_secs(5);

/// Wakes the sweeping thread.
#[derive(Debug, Default, Clone)]
pub(crate) struct Sweeper {
    wanted: Arc<(Mutex<bool>, Condvar)>,
}

impl Sweeper {
    /// Starts the thread. It ends when the store is dropped.
    pub(crate) fn start(store: &Arc<Store>) -> Result<()> {
        let sweeper = store.sweeper.clone();
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
                Err(SweepError::Collect(CollectError::Busy { .. })) => {
                    drop(store);
                    let mut wanted = self.wanted.0.lock();
                    self.wanted.1.wait_for(&mut wanted, RETRY);
                    *wanted = true;
                }
                Err(error) => tracing::error!(%error, "cannot sweep the castore; its space stays in use"),
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

impl Store {
    /// Removes the objects that no valid path uses.
    pub(crate) fn sweep(&self) -> Result<Swept, SweepError> {
        let mut garbage = self.engine.begin_collection(PATIENCE)?;
        // Only now: what imports from before have registered must be seen.
        let mut roots: Vec<Node> = Vec::new();
        self.for_each(&mut |entry| {
            roots.push(entry.node);
            ControlFlow::Continue(())
        })?;
        for root in &roots {
            garbage.mark(root).map_err(Error::from)?;
        }
        Ok(garbage.sweep(&mut |_| ControlFlow::Continue(()))?)
    }
}
