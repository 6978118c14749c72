//! The thread that moves generations from the overlay to the disk, and those who wait for it.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use fjall::PersistMode;
use parking_lot::{Condvar, Mutex};

use super::overlay::Generation;
use super::{DataFiles, FLUSH_INTERVAL, IndexError, Inner, Table, database, storage};

/// After a failure nobody waited for, the time until the next try.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// A flush that takes longer makes commits durable later than is promised.
const SLOW: Duration = Duration::from_millis(75);

/// How long the flusher waits for readers to be done before it opens the database again.
const REOPEN_PATIENCE: Duration = Duration::from_secs(1);

/// No descriptor is left, in the process and in the system.
const EMFILE: i32 = 24;
const ENFILE: i32 = 23;

/// What the flusher and its customers tell each other.
///
/// Flushes are numbered from 1. A commit that is visible before flush n starts is durable when n has succeeded, so
/// whoever asks while flush n runs waits for n + 1.
#[derive(Default)]
pub(super) struct Flushing {
    state: Mutex<State>,
    /// Wakes the flusher.
    work: Condvar,
    /// Wakes those who wait for a flush to finish.
    finished: Condvar,
    /// Whether `state.error` is set: lets a commit look without the lock.
    failing: AtomicBool,
}

#[derive(Default)]
struct State {
    /// The number of the last flush that started.
    started: u64,
    /// The number of the last flush that finished, well or not.
    finished: u64,
    /// The number of the last flush that succeeded.
    durable: u64,
    /// Somebody waits for this flush.
    wanted: u64,
    /// When the first of the commits came that no flush has; a flush that fails leaves its own to the next.
    dirty: Option<Instant>,
    stop: bool,
    /// Why the last flush failed.
    error: Option<Arc<IndexError>>,
    /// The error is one that trying again cannot cure.
    broken: bool,
}

impl State {
    /// Until when commits may gather.
    fn deadline(&self, now: Instant) -> Instant {
        match self.error {
            Some(_) => now + RETRY_INTERVAL,
            None => self.dirty.unwrap_or(now) + FLUSH_INTERVAL,
        }
    }
}

impl Flushing {
    /// The error of the last flush.
    pub(super) fn check(&self) -> Result<(), IndexError> {
        if !self.failing.load(Ordering::Acquire) {
            return Ok(());
        }
        match &self.state.lock().error {
            Some(error) => Err(IndexError::Flush(Arc::clone(error))),
            None => Ok(()),
        }
    }

    /// The overlay is no longer empty.
    pub(super) fn something_to_do(&self) {
        self.state.lock().dirty.get_or_insert_with(Instant::now);
        self.work.notify_one();
    }

    /// Waits for a flush that starts after this call.
    pub(super) fn flush_and_wait(&self) -> Result<(), IndexError> {
        let mut state = self.state.lock();
        let mine = state.started + 1;
        state.wanted = state.wanted.max(mine);
        self.work.notify_one();
        while state.finished < mine && !state.broken {
            self.finished.wait(&mut state);
        }
        match &state.error {
            Some(error) if state.durable < mine => Err(IndexError::Flush(Arc::clone(error))),
            _ => Ok(()),
        }
    }

    /// Asks the flusher to write what there is and to end.
    pub(super) fn stop(&self) {
        self.state.lock().stop = true;
        self.work.notify_one();
    }

    /// Waits for something to do; false when it is time to end.
    fn next(&self) -> bool {
        let mut state = self.state.lock();
        while !(state.stop || state.dirty.is_some() || state.wanted > state.started) {
            self.work.wait(&mut state);
        }
        // Let commits gather, unless somebody waits, or they have while the last flush ran.
        let deadline = state.deadline(Instant::now());
        while !state.stop && state.wanted <= state.started {
            if self.work.wait_until(&mut state, deadline).timed_out() {
                break;
            }
        }
        if state.stop && state.dirty.is_none() && state.wanted <= state.started {
            return false;
        }
        state.started += 1;
        state.dirty = None;
        true
    }

    /// Records how the flush went; false when the flusher must end.
    fn finish(&self, result: Result<(), IndexError>) -> bool {
        let mut state = self.state.lock();
        state.finished = state.started;
        match result {
            Ok(()) => {
                state.durable = state.started;
                state.error = None;
            }
            Err(error) => {
                tracing::error!(error = &error as &dyn std::error::Error, "writing the index to disk failed");
                state.broken = !may_pass(&error);
                state.error = Some(Arc::new(error));
                state.dirty.get_or_insert_with(Instant::now);
            }
        }
        self.failing.store(state.error.is_some(), Ordering::Release);
        self.finished.notify_all();
        !(state.broken || state.stop && state.error.is_some())
    }
}

/// What the data files want recorded and the database does not have yet, the last word for each key. It outlives a
/// failed write: the files will not report it again.
type Rows = HashMap<(usize, Bytes), Bytes>;

/// The flusher thread.
pub(super) fn run(inner: &Inner, data: &dyn DataFiles) {
    let mut rows = Rows::new();
    while inner.flushing.next() {
        // Everybody waits for this thread, so a bug below it must become their error, not their wait without end. What
        // the panic left half done is not looked at again: the index is broken from then on.
        let result = catch_unwind(AssertUnwindSafe(|| flush(inner, data, &mut rows)));
        if !inner.flushing.finish(result.unwrap_or(Err(IndexError::Panicked))) {
            return;
        }
    }
}

fn flush(inner: &Inner, data: &dyn DataFiles, rows: &mut Rows) -> Result<(), IndexError> {
    if let Some(leftover) = inner.overlay.leftover() {
        // The last write failed, for lack of space as a rule, and the database accepts no other until it is opened again.
        storage::has_space(&inner.dir).map_err(|error| IndexError::Database {
            doing: "looking for space for the journal",
            source: fjall::Error::Io(error),
        })?;
        let mut storage = inner.storage.try_write_for(REOPEN_PATIENCE).ok_or(IndexError::Closed)?;
        storage.reopen(&inner.dir, &inner.options)?;
        drop(storage);
        write(inner, data, rows, &leftover)?;
        inner.overlay.done();
    }
    let generation = inner.overlay.swap();
    write(inner, data, rows, &generation)?;
    inner.overlay.done();
    Ok(())
}

/// Whether opening the database again may cure the failure.
///
/// A lack of space, of descriptors or of memory may go away, and the write itself failed, not an fsync after it, so nothing
/// is in doubt. A
/// *poisoned* database refused the write because one of its own threads failed before, e.g. had no space to write out a
/// table. All that thread works on is in the synced journal, from which opening starts anew. (A commit whose own fsync
/// fails is told so with that error, not with this one.)
fn may_pass(error: &IndexError) -> bool {
    let short = |error: &std::io::Error| {
        use std::io::ErrorKind::{OutOfMemory, QuotaExceeded, StorageFull};
        let descriptors = matches!(error.raw_os_error(), Some(EMFILE | ENFILE));
        descriptors || matches!(error.kind(), StorageFull | QuotaExceeded | OutOfMemory)
    };
    match error {
        IndexError::Closed | IndexError::Database { source: fjall::Error::Poisoned, .. } => true,
        IndexError::Database { source: fjall::Error::Io(error), .. } => short(error),
        IndexError::Database { source: fjall::Error::Storage(fjall::LsmError::Io(error)), .. } => short(error),
        _ => false,
    }
}

fn write(inner: &Inner, data: &dyn DataFiles, rows: &mut Rows, generation: &Generation) -> Result<(), IndexError> {
    let began = Instant::now();
    let fresh = data.make_durable().map_err(IndexError::Data)?;
    let data_took = began.elapsed();
    rows.extend(fresh.into_iter().map(|row| ((row.table.0, row.key), row.value)));
    if generation.is_empty() && rows.is_empty() {
        return Ok(());
    }
    let storage = inner.storage.read_recursive();
    let mut batch = storage.database()?.batch().durability(Some(PersistMode::SyncAll));
    for (table, key, value) in generation.iter() {
        let keyspace = storage.keyspace(table)?;
        match value {
            Some(value) => batch.insert(keyspace, &key[..], &value[..]),
            None => batch.remove(keyspace, &key[..]),
        }
    }
    for ((table, key), value) in rows.iter() {
        batch.insert(storage.keyspace(Table(*table))?, &key[..], &value[..]);
    }
    batch.commit().map_err(database("committing a generation"))?;
    rows.clear();
    data.recorded();
    let took = began.elapsed();
    if took > SLOW {
        tracing::debug!(?took, ?data_took, "writing to disk took long");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commits_gather_once() {
        let now = Instant::now();
        let ago = |time| State { dirty: now.checked_sub(time), ..State::default() };
        assert_eq!(State::default().deadline(now), now + FLUSH_INTERVAL);
        assert_eq!(ago(Duration::from_millis(5)).deadline(now), now + FLUSH_INTERVAL - Duration::from_millis(5));
        assert!(ago(2 * FLUSH_INTERVAL).deadline(now) < now, "they waited for a flush already");
        let failed = State { error: Some(Arc::new(IndexError::Closed)), ..ago(2 * RETRY_INTERVAL) };
        assert_eq!(failed.deadline(now), now + RETRY_INTERVAL);
    }
}
