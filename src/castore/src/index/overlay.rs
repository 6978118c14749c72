//! What was committed and is not yet in the database.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::RwLock;

use super::{Batch, Table};

/// What an entry is taken to cost beside its key and value: tree node, two reference counts.
const ENTRY_OVERHEAD: usize = 128;

/// Commits that reach the disk together. A value of None is a deletion.
#[derive(Default)]
pub(super) struct Generation {
    tables: Vec<BTreeMap<Bytes, Option<Bytes>>>,
    bytes: usize,
}

impl Generation {
    pub(super) fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Every change, with its table.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Table, &Bytes, &Option<Bytes>)> {
        let tables = self.tables.iter().enumerate();
        tables.flat_map(|(number, table)| table.iter().map(move |(key, value)| (Table(number), key, value)))
    }

    fn get(&self, table: Table, key: &[u8]) -> Option<&Option<Bytes>> {
        self.tables.get(table.0)?.get(key)
    }

    fn range<'a>(
        &'a self,
        table: Table,
        start: &'a [u8],
        prefix: &'a [u8],
    ) -> impl Iterator<Item = (&'a Bytes, &'a Option<Bytes>)> {
        use std::ops::Bound::{Included, Unbounded};
        let entries = self.tables.get(table.0).into_iter();
        entries
            .flat_map(move |entries| entries.range::<[u8], _>((Included(start), Unbounded)))
            .take_while(move |(key, _)| key.starts_with(prefix))
    }

    fn apply(&mut self, batch: Batch) {
        for operation in batch.operations {
            if self.tables.len() <= operation.table.0 {
                self.tables.resize_with(operation.table.0 + 1, BTreeMap::new);
            }
            let size = operation.key.len() + operation.value.as_ref().map_or(0, Bytes::len) + ENTRY_OVERHEAD;
            let key_length = operation.key.len();
            self.bytes += size;
            if let Some(old) = self.tables[operation.table.0].insert(operation.key, operation.value) {
                self.bytes -= key_length + old.map_or(0, |old| old.len()) + ENTRY_OVERHEAD;
            }
        }
    }
}

#[derive(Default)]
struct Generations {
    active: Generation,
    /// On its way to the database, or there already and about to be dropped.
    flushing: Option<Arc<Generation>>,
}

/// The generations in memory. Its lock is held for memory operations only.
pub(super) struct Overlay {
    generations: RwLock<Generations>,
    bound: usize,
}

impl Overlay {
    pub(super) fn new(bound: usize) -> Self {
        Self { generations: RwLock::default(), bound }
    }

    /// Some(value or deletion) when the overlay knows about `key`.
    pub(super) fn get(&self, table: Table, key: &[u8]) -> Option<Option<Bytes>> {
        let generations = self.generations.read();
        generations
            .active
            .get(table, key)
            .or_else(|| generations.flushing.as_ref().and_then(|flushing| flushing.get(table, key)))
            .cloned()
    }

    /// The changes from `start` on that begin with `prefix`, and the answer of `meanwhile`, which is called while no
    /// change can happen to the overlay.
    pub(super) fn range<T>(
        &self,
        table: Table,
        start: &[u8],
        prefix: &[u8],
        meanwhile: impl FnOnce() -> T,
    ) -> (BTreeMap<Bytes, Option<Bytes>>, T) {
        let generations = self.generations.read();
        let mut merged = BTreeMap::new();
        if let Some(flushing) = &generations.flushing {
            merged.extend(flushing.range(table, start, prefix).map(|(key, value)| (key.clone(), value.clone())));
        }
        let active = generations.active.range(table, start, prefix);
        merged.extend(active.map(|(key, value)| (key.clone(), value.clone())));
        let meanwhile = meanwhile();
        (merged, meanwhile)
    }

    /// Applies `batch` to the active generation; Ok(true) when it was empty before. Gives the batch back when the
    /// generation is full. A batch larger than the bound is taken when the generation is empty.
    pub(super) fn apply(&self, batch: Batch) -> Result<bool, Batch> {
        let mut generations = self.generations.write();
        if generations.active.bytes >= self.bound {
            return Err(batch);
        }
        let first = generations.active.is_empty();
        generations.active.apply(batch);
        Ok(first)
    }

    /// Bytes that all generations hold.
    pub(super) fn bytes(&self) -> usize {
        let generations = self.generations.read();
        generations.active.bytes + generations.flushing.as_ref().map_or(0, |flushing| flushing.bytes)
    }

    /// Whether the active generation holds more than half of what it may.
    pub(super) fn is_half_full(&self) -> bool {
        self.generations.read().active.bytes > self.bound / 2
    }

    /// The generation whose write failed before, if there is one.
    pub(super) fn leftover(&self) -> Option<Arc<Generation>> {
        self.generations.read().flushing.clone()
    }

    /// Starts a fresh generation and returns the one that was active. The flushing one must be done.
    pub(super) fn swap(&self) -> Arc<Generation> {
        let mut generations = self.generations.write();
        let active = Arc::new(std::mem::take(&mut generations.active));
        generations.flushing = Some(Arc::clone(&active));
        active
    }

    /// Forgets the flushing generation: the database has it.
    pub(super) fn done(&self) {
        let done = self.generations.write().flushing.take();
        // A large tree is freed outside the lock.
        drop(done);
    }
}
