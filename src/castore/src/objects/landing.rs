//! From a gathered block to entries in the index: compress, append, enter. Done by a few shared threads.

use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, TrySendError};
use parking_lot::{Condvar, Mutex};

use super::{Core, ObjectError};
use crate::index::Batch;
use crate::pack::{BlockBuilder, Form};

/// Blocks that may wait for a thread, per thread.
const QUEUE_PER_WORKER: usize = 2;

impl Core {
    /// Compresses `block`, appends it to a pack and enters its objects into the index, together with what `with` changes.
    pub(super) fn land(&self, block: &BlockBuilder, with: Batch) -> Result<(), ObjectError> {
        let landing = self.packs.append(block.encode(Form::Quick)?)?;
        self.enter(block, landing, with)
    }
}

/// The blocks of one writer that threads have not landed yet.
#[derive(Default)]
pub(super) struct Outstanding {
    state: Mutex<OutstandingState>,
    changed: Condvar,
}

#[derive(Default)]
struct OutstandingState {
    blocks: usize,
    error: Option<ObjectError>,
}

impl Outstanding {
    /// Counts one more block, after waiting until there are fewer than `limit`. Fails with the error of an earlier
    /// block.
    fn begin(&self, limit: usize) -> Result<(), ObjectError> {
        let mut state = self.state.lock();
        while state.blocks >= limit && state.error.is_none() {
            self.changed.wait(&mut state);
        }
        if let Some(error) = state.error.take() {
            return Err(error);
        }
        state.blocks += 1;
        Ok(())
    }

    fn end(&self, result: Result<(), ObjectError>) {
        let mut state = self.state.lock();
        state.blocks -= 1;
        if let Err(error) = result {
            state.error.get_or_insert(error);
        }
        self.changed.notify_all();
    }

    /// Waits for all blocks; the first error, if there was one.
    pub(super) fn wait(&self) -> Result<(), ObjectError> {
        let mut state = self.state.lock();
        while state.blocks > 0 {
            self.changed.wait(&mut state);
        }
        state.error.take().map_or(Ok(()), Err)
    }

    pub(super) fn is_idle(&self) -> bool {
        self.state.lock().blocks == 0
    }
}

/// Ends a block's count also when the thread that lands it panics.
struct Job {
    block: BlockBuilder,
    outstanding: Arc<Outstanding>,
    done: bool,
}

impl Job {
    fn run(mut self, core: &Core) {
        let result = core.land(&self.block, Batch::new());
        self.done = true;
        self.outstanding.end(result);
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if !self.done {
            self.outstanding.end(Err(ObjectError::Stopped));
        }
    }
}

/// The threads.
pub(super) struct Workers {
    queue: Option<Sender<Job>>,
    threads: Vec<JoinHandle<()>>,
    core: Weak<Core>,
}

impl Workers {
    pub(super) fn start(core: &Arc<Core>, count: usize) -> Result<Self, ObjectError> {
        let (sender, receiver) = crossbeam_channel::bounded(count * QUEUE_PER_WORKER);
        let mut workers = Self { queue: Some(sender), threads: Vec::new(), core: Arc::downgrade(core) };
        for number in 0..count {
            let core = Arc::clone(core);
            let receiver: Receiver<Job> = receiver.clone();
            let thread = std::thread::Builder::new()
                .name(format!("compress-{number}"))
                .spawn(move || receiver.iter().for_each(|job| job.run(&core)))
                .map_err(ObjectError::Spawn)?;
            workers.threads.push(thread);
        }
        Ok(workers)
    }

    /// Hands `block` to a thread. When all are busy and the queue is full the caller does the work itself, which both
    /// bounds what is under way and uses the time.
    pub(super) fn land(
        &self,
        block: BlockBuilder,
        outstanding: &Arc<Outstanding>,
        limit: usize,
    ) -> Result<(), ObjectError> {
        outstanding.begin(limit)?;
        let job = Job { block, outstanding: Arc::clone(outstanding), done: false };
        let Some(queue) = &self.queue else { return Err(ObjectError::Stopped) };
        match queue.try_send(job) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(job)) => {
                let core = self.core.upgrade().ok_or(ObjectError::Stopped)?;
                job.run(&core);
                Ok(())
            }
            Err(TrySendError::Disconnected(_)) => Err(ObjectError::Stopped),
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        // The threads end when the queue is closed and empty.
        self.queue = None;
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a compression thread panicked");
            }
        }
    }
}
