//! Decoded blocks in memory, some of them only up to what was wanted.

use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use quick_cache::Weighter;
use quick_cache::sync::Cache;

use crate::pack::{PackError, Packs, Place};

/// What a cached block costs beside its bytes.
const ENTRY_OVERHEAD: u64 = 128;
/// Blocks are about this long: used to size the cache's tables.
const TYPICAL_BLOCK: u64 = 128 << 10;

/// What is known of a block.
#[derive(Clone)]
enum Decoded {
    /// All of it, verified.
    Whole(Bytes),
    /// So many bytes from its beginning, of which nothing is verified but what readers compare with their digests.
    Start(Bytes),
}

type Key = (u32, u64);

#[derive(Clone)]
struct ByLength;

impl Weighter<Key, Decoded> for ByLength {
    fn weight(&self, _: &Key, decoded: &Decoded) -> u64 {
        let (Decoded::Whole(bytes) | Decoded::Start(bytes)) = decoded;
        bytes.len() as u64 + ENTRY_OVERHEAD
    }
}

/// Decoded blocks, bounded by their bytes. Pack numbers are not used twice while a store is open, so an entry never
/// goes stale; it only becomes useless.
pub(crate) struct BlockCache {
    blocks: Cache<Key, Decoded, ByLength>,
    hits: AtomicU64,
    misses: AtomicU64,
}

impl BlockCache {
    pub(crate) fn new(bytes: u64) -> Self {
        let items = (bytes / TYPICAL_BLOCK).max(16) as usize;
        let blocks = Cache::with_weighter(items, bytes, ByLength);
        Self { blocks, hits: AtomicU64::new(0), misses: AtomicU64::new(0) }
    }

    /// The block at `place`. Of several threads that miss the same block one reads it.
    pub(crate) fn get(&self, packs: &Packs, place: Place) -> Result<Bytes, PackError> {
        let mut missed = false;
        let key = (place.pack, place.offset);
        let known = self.blocks.get_or_insert_with(&key, || {
            missed = true;
            packs.read(place).map(Decoded::Whole)
        })?;
        let block = match known {
            Decoded::Whole(block) => Ok(block),
            Decoded::Start(_) => {
                missed = true;
                packs.read(place).inspect(|block| self.blocks.insert(key, Decoded::Whole(block.clone())))
            }
        };
        let counter = if missed { &self.misses } else { &self.hits };
        counter.fetch_add(1, Ordering::Relaxed);
        block
    }

    /// At least the first `end` bytes of the block at `place`, if they are here or can be had for less than the whole:
    /// `is_right` then says whether they are what the reader wants, for perhaps nothing else was verified of them.
    pub(crate) fn get_start(
        &self,
        packs: &Packs,
        place: Place,
        end: usize,
        is_right: impl Fn(&Bytes) -> bool,
    ) -> Option<Bytes> {
        let key = (place.pack, place.offset);
        let (counter, start) = match self.blocks.get(&key) {
            Some(Decoded::Whole(block)) => (&self.hits, block),
            Some(Decoded::Start(start)) => {
                (&self.hits, Some(start).filter(|start| start.len() >= end && is_right(start))?)
            }
            None => {
                let start = packs.read_start(place, end).filter(|start| is_right(start))?;
                self.blocks.insert(key, Decoded::Start(start.clone()));
                (&self.misses, start)
            }
        };
        counter.fetch_add(1, Ordering::Relaxed);
        Some(start)
    }

    /// Sees to it that the block at `place` is here, for somebody who will want it. That counts as neither found nor not
    /// found.
    pub(crate) fn load(&self, packs: &Packs, place: Place) -> Result<(), PackError> {
        self.blocks.get_or_insert_with(&(place.pack, place.offset), || packs.read(place).map(Decoded::Whole)).map(drop)
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

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::Digest;
    use crate::index::{Index, IndexOptions};
    use crate::objects::{ObjectKey, ObjectKind};
    use crate::pack::{BlockBuilder, Form};

    #[test]
    fn a_block_known_in_part_is_read_whole_by_who_wants_more() {
        let dir = tempfile::tempdir().unwrap();
        let table = Index::open(&dir.path().join("index"), &IndexOptions::default()).unwrap().table("lengths").unwrap();
        let (packs, _) =
            Packs::open(dir.path().join("packs"), 1 << 20, table, &HashMap::new(), &HashMap::new()).unwrap();
        let contents: Vec<u8> = (0..30_000_u32).flat_map(|n| n.to_string().into_bytes()).take(120 << 10).collect();
        let mut block = BlockBuilder::default();
        block.push(ObjectKey { kind: ObjectKind::Chunk, digest: Digest::of(&contents) }, &contents);
        let place = packs.append(block.encode(Form::Quick).unwrap()).unwrap().place;

        let cache = BlockCache::new(1 << 20);
        let start = |end: usize| cache.get_start(&packs, place, end, |start| start[..end] == contents[..end]);
        assert_eq!(start(5_000).unwrap(), contents[..5_000]);
        assert_eq!(start(4_000).unwrap(), contents[..5_000], "what is known is enough");
        assert_eq!(cache.hits_and_misses(), (1, 1));
        assert_eq!(start(6_000), None, "a second time it is to be read whole");
        assert_eq!(cache.get(&packs, place).unwrap(), contents);
        assert_eq!(start(contents.len()).unwrap(), contents);
        assert_eq!(cache.hits_and_misses(), (2, 2));
        assert_eq!(cache.bytes(), contents.len() as u64 + ENTRY_OVERHEAD);

        let cache = BlockCache::new(1 << 20);
        assert_eq!(cache.get_start(&packs, place, 5_000, |_| false), None, "what is wrong is not kept");
        assert_eq!(cache.bytes(), 0);
    }
}
