//! Which writers a collection has to wait for.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// Which writers began when.
#[derive(Default)]
pub(crate) struct Epochs {
    state: Mutex<EpochState>,
    left: Condvar,
    collecting: AtomicBool,
}

#[derive(Default)]
struct EpochState {
    current: u64,
    writers: BTreeMap<u64, usize>,
}

impl Epochs {
    /// Whether no collection was under way until now, when one is.
    pub(crate) fn begin_collecting(&self) -> bool {
        !self.collecting.swap(true, Ordering::AcqRel)
    }

    pub(crate) fn end_collecting(&self) {
        self.collecting.store(false, Ordering::Release);
    }

    /// Counts a writer in the current epoch, which is returned.
    pub(crate) fn enter(&self) -> u64 {
        let mut state = self.state.lock();
        let epoch = state.current;
        *state.writers.entry(epoch).or_default() += 1;
        epoch
    }

    pub(crate) fn leave(&self, epoch: u64) {
        let mut state = self.state.lock();
        if let Some(count) = state.writers.get_mut(&epoch) {
            *count -= 1;
            if *count == 0 {
                state.writers.remove(&epoch);
            }
        }
        self.left.notify_all();
    }

    /// How many writers there are.
    pub(crate) fn writers(&self) -> usize {
        self.state.lock().writers.values().sum()
    }

    /// Starts a new epoch and waits until no writer of an earlier one is left; else says how many are.
    pub(crate) fn turn(&self, patience: Duration) -> Result<(), usize> {
        let deadline = Instant::now() + patience;
        let mut state = self.state.lock();
        state.current += 1;
        let current = state.current;
        loop {
            let earlier = state.writers.range(..current).map(|(_, count)| count).sum();
            if earlier == 0 {
                return Ok(());
            }
            if self.left.wait_until(&mut state, deadline).timed_out() {
                return Err(earlier);
            }
        }
    }
}
