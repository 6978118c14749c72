//! From a gathered block to entries in the index: compress, append, enter. Done by a few shared threads.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, TrySendError};
use parking_lot::{Condvar, Mutex};

use super::{Core, ObjectError};
use crate::index::Batch;
use crate::pack::{BlockBuilder, EncodedBlock, Form};

/// Blocks that may wait for a thread, per thread.
const QUEUE_PER_WORKER: usize = 2;
/// Blocks of one writer that may be under way: bounds its memory to about this many times a block.
const MAX_OUTSTANDING: u64 = 8;

impl Core {
    /// Compresses `block`, appends it to a pack and enters its objects into the index, together with what `with` changes.
    pub(super) fn land(&self, block: &BlockBuilder, with: Batch) -> Result<(), ObjectError> {
        let landing = self.packs.append(block.encode(Form::Quick)?)?;
        self.enter(block, landing, with)
    }
}

/// The blocks of one writer that threads have not landed yet.
///
/// They are compressed in any order, and appended in the order in which they were gathered: who reads a tree later takes
/// its blocks one after the other, and can be kept ahead of.
#[derive(Default)]
pub(super) struct Outstanding {
    state: Mutex<OutstandingState>,
    changed: Condvar,
}

#[derive(Default)]
struct OutstandingState {
    /// So many blocks were begun; each has the number of those before it.
    begun: u64,
    /// The number of the block that is appended next, or is being appended.
    next: u64,
    /// Blocks that are compressed and wait for their turn, or have failed.
    ready: BTreeMap<u64, Result<Compressed, ObjectError>>,
    /// A thread appends those whose turn it is.
    appending: bool,
    /// That thread panicked: nobody will append what waits.
    broken: bool,
    error: Option<ObjectError>,
}

/// A block, and what it comes to in a pack.
struct Compressed {
    block: BlockBuilder,
    encoded: EncodedBlock,
}

impl OutstandingState {
    fn blocks(&self) -> u64 {
        self.begun - self.next
    }

    fn take_error(&mut self) -> Result<(), ObjectError> {
        if self.broken {
            return Err(ObjectError::Stopped);
        }
        self.error.take().map_or(Ok(()), Err)
    }
}

impl Outstanding {
    /// Begins one more block, after waiting until fewer than `limit` are under way; its number. Fails with the error of
    /// an earlier block.
    fn begin(&self, limit: u64) -> Result<u64, ObjectError> {
        let mut state = self.state.lock();
        while state.blocks() >= limit && state.error.is_none() && !state.broken {
            self.changed.wait(&mut state);
        }
        state.take_error()?;
        state.begun += 1;
        Ok(state.begun - 1)
    }

    /// Lands the block of this number if it is its turn, and those that have waited for it; else it waits for its turn.
    fn land(&self, core: &Core, number: u64, compressed: Result<Compressed, ObjectError>) {
        let mut state = self.state.lock();
        state.ready.insert(number, compressed);
        if std::mem::replace(&mut state.appending, true) {
            return;
        }
        let mut appending = Appending { outstanding: self, whole: false };
        loop {
            let next = state.next;
            let Some(compressed) = state.ready.remove(&next) else { break };
            drop(state);
            let landed = compressed.and_then(|Compressed { block, encoded }| {
                let landing = core.packs.append(encoded)?;
                core.enter(&block, landing, Batch::new())
            });
            state = self.state.lock();
            state.next += 1;
            if let Err(error) = landed {
                state.error.get_or_insert(error);
            }
            self.changed.notify_all();
        }
        state.appending = false;
        appending.whole = true;
    }

    /// Waits for all blocks; the first error, if there was one.
    pub(super) fn wait(&self) -> Result<(), ObjectError> {
        let mut state = self.state.lock();
        while state.blocks() > 0 && !state.broken {
            self.changed.wait(&mut state);
        }
        state.take_error()
    }

    pub(super) fn is_idle(&self) -> bool {
        self.state.lock().blocks() == 0
    }
}

/// Has nobody wait for ever when the thread that appends panics.
struct Appending<'a> {
    outstanding: &'a Outstanding,
    whole: bool,
}

impl Drop for Appending<'_> {
    fn drop(&mut self) {
        if !self.whole {
            self.outstanding.state.lock().broken = true;
            self.outstanding.changed.notify_all();
        }
    }
}

/// Ends a block's turn also when the thread that compresses it panics.
struct Job {
    block: BlockBuilder,
    number: u64,
    outstanding: Arc<Outstanding>,
    core: Weak<Core>,
    done: bool,
}

impl Job {
    fn run(mut self, core: &Core) {
        let block = std::mem::take(&mut self.block);
        let compressed = match block.encode(Form::Quick) {
            Ok(encoded) => Ok(Compressed { block, encoded }),
            Err(error) => Err(error.into()),
        };
        self.done = true;
        self.outstanding.land(core, self.number, compressed);
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        match self.core.upgrade() {
            Some(core) => self.outstanding.land(&core, self.number, Err(ObjectError::Stopped)),
            None => drop(Appending { outstanding: &self.outstanding, whole: false }),
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
    pub(super) fn land(&self, block: BlockBuilder, outstanding: &Arc<Outstanding>) -> Result<(), ObjectError> {
        let job = self.job(block, outstanding)?;
        let Some(queue) = &self.queue else { return Err(ObjectError::Stopped) };
        match queue.try_send(job) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(job)) => self.run(job),
            Err(TrySendError::Disconnected(_)) => Err(ObjectError::Stopped),
        }
    }

    /// Does the work on `block` on this thread.
    pub(super) fn land_here(&self, block: BlockBuilder, outstanding: &Arc<Outstanding>) -> Result<(), ObjectError> {
        self.run(self.job(block, outstanding)?)
    }

    fn job(&self, block: BlockBuilder, outstanding: &Arc<Outstanding>) -> Result<Job, ObjectError> {
        let (number, outstanding) = (outstanding.begin(MAX_OUTSTANDING)?, Arc::clone(outstanding));
        Ok(Job { block, number, outstanding, core: Weak::clone(&self.core), done: false })
    }

    fn run(&self, job: Job) -> Result<(), ObjectError> {
        let core = self.core.upgrade().ok_or(ObjectError::Stopped)?;
        job.run(&core);
        Ok(())
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
