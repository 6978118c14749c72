//! The object store: chunks, chunk lists and directories in packs, found through the index.
//!
//! An object is immutable and known by its kind and the BLAKE3 digest of its contents. Objects are put through an
//! [`ObjectWriter`], which gathers them into blocks; a block is compressed, appended to a pack and its objects entered
//! into the index by one of a few shared threads, or by the writer itself. They are durable after
//! [`ObjectStore::sync`], together with everything else the index has been told.
//!
//! On disk: `<dir>/index` is the database, `<dir>/packs` the packs. `FORMAT.md` tells the bytes of both.

mod catalog;
mod damaged;
mod entry;
mod epochs;
mod fingerprints;
mod key;
mod landing;
#[cfg(test)]
pub(crate) mod numbered;
mod writer;

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;

use crate::cache::BlockCache;
use crate::check::verifies;
use crate::index::{Each, Index, IndexError, IndexOptions, RecoveredIndex, Table};
use crate::pack::{Form, PackError, Packs, SEAL_AT};
use crate::prefetch::Prefetcher;
pub(crate) use catalog::{Catalog, Usage};
use damaged::DamagedObjects;
pub(crate) use entry::Entry;
use epochs::Epochs;
pub(crate) use fingerprints::Fingerprints;
pub use key::{ObjectKey, ObjectKind};
pub(crate) use key::{key_bytes, key_of};
use landing::Workers;
pub use writer::ObjectWriter;

/// The version of the tables this code keeps in the index.
pub const INDEX_VERSION: u32 = 1;
/// The longest object there may be.
pub const MAX_OBJECT: usize = crate::pack::MAX_RAW;
/// Threads that compress, at most; one per core when there are fewer.
const MAX_WORKERS: usize = 4;

/// Why an operation on objects failed.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    /// The index could not do it.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// The packs could not do it.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// An object that exists cannot be read.
    #[error("reading {key}")]
    Unreadable {
        /// The object.
        key: ObjectKey,
        /// Why.
        source: PackError,
    },
    /// The index says something about an object that cannot be.
    #[error("the index entry of {0} is damaged")]
    Entry(ObjectKey),
    /// The index says something about packs that cannot be.
    #[error("the index's record of pack {0:02x?} is damaged")]
    PackRow(Vec<u8>),
    /// There are packs, but no index, or an empty one. To go on with it would delete them all.
    #[error(
        "the index {0} is gone or has forgotten everything, but its packs are there; `castored fsck --rebuild-index` \
         makes a new one from them"
    )]
    IndexLost(std::path::PathBuf),
    /// The index was written by another version.
    #[error("the index has tables of version {found}, this castored knows version {INDEX_VERSION}")]
    Version {
        /// The version of the tables.
        found: u32,
    },
    /// The object is longer than [`MAX_OBJECT`].
    #[error("{key} has {length} bytes, more than the limit of {MAX_OBJECT}")]
    TooLong {
        /// The object.
        key: ObjectKey,
        /// Its length.
        length: usize,
    },
    /// A thread that compresses could not be started.
    #[error("starting a compression thread")]
    Spawn(#[source] std::io::Error),
    /// The threads that compress are gone.
    #[error("the compression threads have stopped")]
    Stopped,
    /// The writer failed before and takes nothing more.
    #[error("an earlier block of this writer could not be written")]
    Failed,
}

/// What can be chosen when a store is opened.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes of decoded blocks kept in memory.
    pub cache_bytes: u64,
    /// The index's share of memory.
    pub index: IndexOptions,
    /// A pack is sealed before it grows beyond this many bytes.
    pub seal_at: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { cache_bytes: 64 << 20, index: IndexOptions::default(), seal_at: SEAL_AT }
    }
}

/// What a store holds and how it fares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Objects in the index.
    pub objects: u64,
    /// Their contents' bytes.
    pub raw_bytes: u64,
    /// The contents' bytes of all objects that packs hold, dead ones and second copies included.
    pub held_bytes: u64,
    /// Bytes of all packs, dead objects included.
    pub stored_bytes: u64,
    /// How many packs there are.
    pub packs: u64,
    /// Reads answered from decoded blocks since the store was opened.
    pub cache_hits: u64,
    /// Reads that had to fetch and decode their block.
    pub cache_misses: u64,
}

/// The tables of the index that belong to the object store.
#[derive(Clone, Copy)]
pub(crate) struct Tables {
    /// Kind and digest of an object: where it is.
    pub(crate) objects: Table,
    /// Number of a pack: what in it is alive.
    pub(crate) usage: Table,
    /// Number of a pack: in which form its blocks are, if not the quick one.
    pub(crate) forms: Table,
    /// Digest of a blob that is expected from elsewhere: its size and a note, see `engine::promises`.
    pub(crate) promised: Table,
}

/// A store of objects in one directory, owned by one process at a time.
pub struct ObjectStore {
    // In this order: the workers stop before the catalog goes, the index flushes what is left while packs are there.
    workers: Workers,
    pub(crate) core: Arc<Core>,
}

/// What the store's threads share.
pub(crate) struct Core {
    pub(crate) index: Arc<Index>,
    pub(crate) packs: Arc<Packs>,
    pub(crate) catalog: Catalog,
    pub(crate) tables: Tables,
    pub(crate) epochs: Epochs,
    /// Held while a pack is rewritten.
    pub(crate) repacking: Mutex<()>,
    pub(crate) damaged: DamagedObjects,
    cache: Arc<BlockCache>,
    prefetcher: Prefetcher,
}

impl ObjectStore {
    /// Opens the store in `dir`, creating an empty one when there is none. What a crash left beyond the last durable
    /// state is removed.
    pub fn open(dir: &Path, options: Options) -> Result<Arc<Self>, ObjectError> {
        let index_dir = dir.join("index");
        if !index_dir.exists() && Packs::any(&dir.join("packs"))? {
            return Err(ObjectError::IndexLost(index_dir));
        }
        let index = RecoveredIndex::open(&index_dir, &options.index)?;
        let meta = index.table("meta")?;
        let lengths = index.table("pack-lengths")?;
        let tables = Tables {
            objects: index.table("objects")?,
            usage: index.table("pack-usage")?,
            forms: index.table("pack-forms")?,
            promised: index.table("promised")?,
        };

        let fresh = match index.get(&meta, b"version")? {
            None => true,
            Some(version) => {
                let found = <[u8; 4]>::try_from(&version[..]).map_or(0, u32::from_le_bytes);
                if found != INDEX_VERSION {
                    return Err(ObjectError::Version { found });
                }
                false
            }
        };
        let mut committed = HashMap::new();
        read_rows(
            |each| index.scan_prefix(&lengths, &[], each),
            |number, value| {
                committed.insert(number, u64::from_le_bytes(value.try_into().ok()?));
                Some(())
            },
        )?;
        if fresh && Packs::were_durable(&dir.join("packs")) {
            return Err(ObjectError::IndexLost(index_dir));
        }
        let mut forms = HashMap::new();
        read_rows(
            |each| index.scan_prefix(&tables.forms, &[], each),
            |number, value| {
                forms.insert(number, Form::decode(value)?);
                Some(())
            },
        )?;
        let (packs, recovery) = Packs::open(dir.join("packs"), options.seal_at, lengths, &committed, &forms)?;
        if recovery != Default::default() {
            tracing::info!(
                truncated = recovery.truncated,
                deleted = recovery.deleted,
                "removed pack data that an unclean stop had left beyond the last durable state"
            );
        }
        let mut usage = HashMap::new();
        read_rows(
            |each| index.scan_prefix(&tables.usage, &[], each),
            |number, value| {
                usage.insert(number, catalog::Usage::decode(value)?);
                Some(())
            },
        )?;

        if let Err(error) = packs.note_durable(&packs.written()) {
            // On a full disk, for one, a store still opens.
            tracing::warn!(error = &error as &dyn std::error::Error, "no note of the packs' lengths was left");
        }
        let packs = Arc::new(packs);
        let index = Arc::new(index.start(packs.clone())?);
        if fresh {
            let mut batch = crate::index::Batch::new();
            batch.put(meta, b"version", INDEX_VERSION.to_le_bytes().to_vec());
            index.commit(batch)?;
        }
        let catalog = Catalog::new(usage);
        let cache = Arc::new(BlockCache::new(options.cache_bytes));
        let prefetcher = Prefetcher::start(&packs, &cache);
        let core = Arc::new(Core {
            index,
            packs,
            catalog,
            tables,
            epochs: Epochs::default(),
            repacking: Mutex::default(),
            damaged: DamagedObjects::default(),
            cache,
            prefetcher,
        });
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_WORKERS);
        Ok(Arc::new(Self { workers: Workers::start(&core, threads)?, core }))
    }

    /// The index, in which others keep their tables, so that what they commit is durable together with objects.
    #[must_use]
    pub fn index(&self) -> &Arc<Index> {
        &self.core.index
    }

    /// The contents of an object. The answer shares the memory of the block it stands in (about 128 KiB), which stays
    /// in memory as long as the answer does.
    pub fn get(&self, key: &ObjectKey) -> Result<Option<Bytes>, ObjectError> {
        self.core.get(key)
    }

    /// Whether the object is there.
    pub fn contains(&self, key: &ObjectKey) -> Result<bool, ObjectError> {
        Ok(self.core.entry(key)?.is_some())
    }

    /// The object's length in bytes.
    pub fn length(&self, key: &ObjectKey) -> Result<Option<u32>, ObjectError> {
        Ok(self.core.entry(key)?.map(|entry| entry.length))
    }

    /// Calls `each` with every object of a kind until it breaks.
    pub fn keys_of(
        &self,
        kind: ObjectKind,
        each: &mut dyn FnMut(ObjectKey) -> ControlFlow<()>,
    ) -> Result<(), ObjectError> {
        let mut each = |key: &[u8], _: &[u8]| key_of(key).map_or(ControlFlow::Continue(()), &mut *each);
        Ok(self.core.index.scan_prefix(&self.core.tables.objects, &[kind as u8], &mut each)?)
    }

    /// A writer for one import.
    #[must_use]
    pub fn writer(self: &Arc<Self>) -> ObjectWriter {
        ObjectWriter::new(Arc::clone(self))
    }

    /// Makes everything durable that was visible before the call: flushed objects and commits to the index.
    pub fn sync(&self) -> Result<(), ObjectError> {
        Ok(self.core.index.sync()?)
    }

    /// Bytes of decoded blocks in memory.
    pub(crate) fn cached_bytes(&self) -> u64 {
        self.core.cache.bytes()
    }

    /// What the store holds. Cheap: nothing is counted for it.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let (packs, stored_bytes) = self.core.packs.size();
        let (cache_hits, cache_misses) = self.core.cache.hits_and_misses();
        let Usage { live_objects: objects, live_bytes: raw_bytes, raw_bytes: held_bytes } = self.core.catalog.totals();
        Stats { objects, raw_bytes, held_bytes, stored_bytes, packs: packs as u64, cache_hits, cache_misses }
    }
}

impl Drop for ObjectStore {
    /// Leaves a note of what was durable at the end; what comes after it only adds to that.
    fn drop(&mut self) {
        let lengths = self.core.packs.written();
        let noted = self.core.index.sync().map_err(ObjectError::from);
        if let Err(error) = noted.and_then(|()| Ok(self.core.packs.note_durable(&lengths)?)) {
            tracing::debug!(error = &error as &dyn std::error::Error, "no note of the packs' lengths was left");
        }
    }
}

impl Core {
    pub(crate) fn entry(&self, key: &ObjectKey) -> Result<Option<Entry>, ObjectError> {
        match self.index.get(&self.tables.objects, &key_bytes(key))? {
            None => Ok(None),
            Some(value) => Entry::decode(&value).map(Some).ok_or(ObjectError::Entry(*key)),
        }
    }

    fn get(&self, key: &ObjectKey) -> Result<Option<Bytes>, ObjectError> {
        let mut before = None;
        loop {
            let Some(entry) = self.entry(key)? else { return Ok(None) };
            // Who walks through directories has no use for the files that stand between them, and a list of chunks stands
            // behind the chunks that will be read after it.
            let in_order = key.kind != ObjectKind::Chunk || self.prefetcher.note(entry.place);
            if !in_order && let Some(contents) = self.get_alone(key, &entry) {
                return Ok(Some(contents));
            }
            match self.cache.get(&self.packs, entry.place) {
                Ok(block) => return entry.contents_in(&block).map(Some).ok_or(ObjectError::Entry(*key)),
                // Collected between the two steps: the index knows better by now, if all is well.
                Err(PackError::Gone(_)) if before != Some(entry) => before = Some(entry),
                Err(source) => {
                    if source.is_damage() || matches!(source, PackError::Gone(_)) {
                        // Whoever puts these contents again heals it.
                        self.damaged.add([*key]);
                    }
                    return Err(ObjectError::Unreadable { key: *key, source });
                }
            }
        }
    }

    /// The object without the rest of its block, if that is possible: it has to be what its digest says.
    fn get_alone(&self, key: &ObjectKey, entry: &Entry) -> Option<Bytes> {
        // The digest of a list of chunks is that of its blob.
        if key.kind != ObjectKind::Chunk {
            return None;
        }
        let is_right = |block: &Bytes| entry.contents_in(block).is_some_and(|contents| verifies(key, &contents));
        let block = self.cache.get_start(&self.packs, entry.place, entry.end(), is_right)?;
        entry.contents_in(&block)
    }
}

/// Reads a table whose keys are pack numbers.
fn read_rows(
    scan: impl FnOnce(Each<'_>) -> Result<(), IndexError>,
    mut row: impl FnMut(u32, &[u8]) -> Option<()>,
) -> Result<(), ObjectError> {
    let mut damaged = None;
    scan(&mut |key, value| match <[u8; 4]>::try_from(key).ok().and_then(|key| row(u32::from_be_bytes(key), value)) {
        Some(()) => ControlFlow::Continue(()),
        None => {
            damaged = Some(key.to_vec());
            ControlFlow::Break(())
        }
    })?;
    damaged.map_or(Ok(()), |key| Err(ObjectError::PackRow(key)))
}

#[cfg(test)]
mod tests;
