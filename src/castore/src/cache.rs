//! Decoded blocks in memory.

use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use quick_cache::Weighter;
use quick_cache::sync::Cache;

use crate::pack::{PackError, Packs, Place};

/// What a cached block costs beside its bytes.
const ENTRY_OVERHEAD: u64 = 128;
/// Blocks are about this long: used to size the cache's tables.
const TYPICAL_BLOCK: u64 = 128 << 10;

type Key = (u32, u64);

#[derive(Clone)]
struct ByLength;

impl Weighter<Key, Bytes> for ByLength {
    fn weight(&self, _: &Key, block: &Bytes) -> u64 {
        block.len() as u64 + ENTRY_OVERHEAD
    }
}

/// Decoded blocks, bounded by their bytes. Pack numbers are not used twice while a store is open, so an entry never
/// goes stale; it only becomes useless.
pub(crate) struct BlockCache {
    blocks: Cache<Key, Bytes, ByLength>,
    hits: AtomicU64,
    misses: AtomicU64,
}

impl BlockCache {
    pub(crate) fn new(bytes: u64) -> Self {
        let items = (bytes / TYPICAL_BLOCK).max(16) as usize;
        let blocks = Cache::with_weighter(items, bytes, ByLength);
        Self { blocks, hits: AtomicU64::new(0), misses: AtomicU64::new(0) }
    }

    /// The decoded block at `place`. Of several threads that miss the same block one reads it.
    pub(crate) fn get(&self, packs: &Packs, place: Place) -> Result<Bytes, PackError> {
        let mut missed = false;
        let block = self.get_or_read(packs, place, &mut missed);
        let counter = if missed { &self.misses } else { &self.hits };
        counter.fetch_add(1, Ordering::Relaxed);
        block
    }

    /// Sees to it that the block at `place` is here, for somebody who will want it. That counts as neither found nor not
    /// found.
    pub(crate) fn load(&self, packs: &Packs, place: Place) -> Result<(), PackError> {
        self.get_or_read(packs, place, &mut false).map(drop)
    }

    fn get_or_read(&self, packs: &Packs, place: Place, missed: &mut bool) -> Result<Bytes, PackError> {
        self.blocks.get_or_insert_with(&(place.pack, place.offset), || {
            *missed = true;
            packs.read(place)
        })
    }

    /// Bytes of the blocks that are here.
    pub(crate) fn bytes(&self) -> u64 {
        self.blocks.weight()
    }

    /// How many blocks were found and not found.
    pub(crate) fn hits_and_misses(&self) -> (u64, u64) {
        (self.hits.load(Ordering::Relaxed), self.misses.load(Ordering::Relaxed))
    }
}
