//! The index: ordered tables of bytes in one embedded database, behind an overlay in memory.
//!
//! A [`commit`](Index::commit) changes memory only: it is atomic, visible at once to every reader, and cheap. A flusher
//! thread moves what has gathered to disk every [`FLUSH_INTERVAL`], or at once when somebody calls
//! [`sync`](Index::sync), in three steps that make "data before index" true by construction:
//!
//! 1. the active generation of the overlay becomes the flushing one, and commits go to a fresh generation;
//! 2. [`DataFiles::make_durable`] puts everything on disk that entries of that generation may name;
//! 3. one database batch with the whole generation, and what step 2 reports, is written and fsynced.
//!
//! So a crash costs at most the last generations, and always whole ones: the index is at an earlier state that really
//! existed. All callers of `sync` that wait share the next flush (group commit).
//!
//! Readers look into the active generation, the flushing one, then the database. No lock is held during I/O.

mod flusher;
mod journal;
mod overlay;
mod storage;
mod tables;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use fjall::Readable;
use parking_lot::RwLock;

use flusher::Flushing;
use overlay::Overlay;
use storage::Storage;

/// How long commits gather before they are written to disk. Short of the 100 ms within which a commit is promised to be
/// durable, by what writing and syncing may take.
pub const FLUSH_INTERVAL: Duration = Duration::from_millis(25);

/// Why an operation on the index failed.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// Another process has the database open.
    #[error("the index at {0} is in use by another process")]
    Locked(PathBuf),
    /// The database could not do it.
    #[error("{doing} of the index")]
    Database {
        /// What was tried.
        doing: &'static str,
        /// What the database says.
        source: fjall::Error,
    },
    /// The files the index points into could not be made durable. What they hold since the last good flush is in doubt
    /// (a second fdatasync after a failed one proves nothing), so the index takes no more commits until it is reopened.
    #[error("making pack data durable")]
    Data(#[source] std::io::Error),
    /// Writing to disk in the background failed. What was committed is still visible. A full disk, and what that has
    /// done to the database, is tried again every second and at each [`Index::sync`]; any other failure stays until the
    /// index is opened anew.
    #[error("writing the index to disk")]
    Flush(#[source] Arc<IndexError>),
    /// The journal is damaged before its end: what follows the damage was durable, and must not be thrown away with it.
    #[error(
        "the index's journal {path} is damaged at {offset}; `castored fsck --rebuild-index` makes a new index from the packs"
    )]
    Journal {
        /// The journal.
        path: PathBuf,
        /// Where the batch begins that cannot be read.
        offset: u64,
    },
    /// A file of the database says of itself what cannot be.
    #[error("the index's file {path} is damaged; `castored fsck --rebuild-index` makes a new index from the packs")]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// The disk was full, and the database could not be opened again yet.
    #[error("the index is closed until there is space on the disk")]
    Closed,
    /// The flusher thread panicked. The index takes no more commits until it is opened anew.
    #[error("the thread that writes the index to disk panicked")]
    Panicked,
    /// The flusher thread could not be started.
    #[error("starting the index's flusher thread")]
    Spawn(#[source] std::io::Error),
    /// The name of a table is empty or longer than 255 bytes.
    #[error("{0:?} cannot name a table of the index")]
    TableName(&'static str),
}

fn database(doing: &'static str) -> impl FnOnce(fjall::Error) -> IndexError {
    move |source| IndexError::Database { doing, source }
}

/// What can be chosen when an index is opened.
#[derive(Clone, Debug)]
pub struct IndexOptions {
    /// Bytes of database blocks kept in memory.
    pub cache_bytes: u64,
    /// Bytes a generation of the overlay may hold before commits wait for a flush. Two generations and the batch that
    /// is being written can exist at a time, so up to three times this is in use.
    pub overlay_bytes: usize,
    /// Bytes of one table that the database gathers in memory before it writes a sorted file. A table keeps what it was
    /// created with.
    pub memtable_bytes: u64,
}

impl Default for IndexOptions {
    fn default() -> Self {
        Self { cache_bytes: 32 << 20, overlay_bytes: 16 << 20, memtable_bytes: 8 << 20 }
    }
}

/// A table of the index: an ordered map from bytes to bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table(usize);

/// What a scan calls with each key and its value, until it breaks.
pub type Each<'a> = &'a mut dyn FnMut(&[u8], &[u8]) -> ControlFlow<()>;

/// Changes that happen together or not at all.
#[derive(Debug, Default)]
pub struct Batch {
    operations: Vec<Operation>,
}

#[derive(Debug)]
struct Operation {
    table: Table,
    key: Bytes,
    /// None deletes.
    value: Option<Bytes>,
}

impl Batch {
    /// An empty batch.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets `key` to `value`. Of several changes to one key the last counts.
    pub fn put(&mut self, table: Table, key: &[u8], value: impl Into<Bytes>) {
        self.operations.push(Operation { table, key: Bytes::copy_from_slice(key), value: Some(value.into()) });
    }

    /// Removes `key`, if it is there.
    pub fn delete(&mut self, table: Table, key: &[u8]) {
        self.operations.push(Operation { table, key: Bytes::copy_from_slice(key), value: None });
    }

    /// The keys that change in `table`, in the order of the changes.
    pub fn keys(&self, table: Table) -> impl Iterator<Item = &[u8]> {
        self.operations.iter().filter(move |operation| operation.table == table).map(|operation| &operation.key[..])
    }

    /// Adds the changes of `other`, which come after those of this one.
    pub fn append(&mut self, mut other: Batch) {
        self.operations.append(&mut other.operations);
    }

    /// How many changes the batch holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.operations.len()
    }

    /// Whether the batch changes nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.operations.is_empty()
    }
}

/// A row that a [`DataFiles`] wants committed with the generation it made durable.
#[derive(Debug)]
pub struct DataRow {
    /// The table it belongs to.
    pub table: Table,
    /// Its key.
    pub key: Bytes,
    /// Its value.
    pub value: Bytes,
}

/// The files that index entries point into.
pub trait DataFiles: Send + Sync {
    /// Makes everything durable that was written before the call, and returns what the index should record about it.
    ///
    /// Called by the flusher thread only. It must not commit to the index.
    fn make_durable(&self) -> std::io::Result<Vec<DataRow>>;

    /// What the calls of [`make_durable`](Self::make_durable) have returned is durable in the index now.
    ///
    /// Called by the flusher thread only. It must not commit to the index.
    fn recorded(&self) {}
}

/// The index's parts, shared by its owner and the flusher.
struct Inner {
    dir: PathBuf,
    options: IndexOptions,
    /// Readers hold the lock while they read, also inside one another. It is taken for writing only to open a table and
    /// to open the database again.
    storage: RwLock<Storage>,
    overlay: Overlay,
    flushing: Flushing,
}

impl Inner {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, IndexError> {
        if let Some(value) = self.overlay.get(table, key) {
            return Ok(value);
        }
        let storage = self.storage.read_recursive();
        let value = storage.keyspace(table)?.get(key).map_err(database("reading a key"))?;
        Ok(value.map(|value| Bytes::copy_from_slice(&value)))
    }

    /// Walks the keys from `start` while they begin with `prefix`.
    fn scan(&self, table: Table, start: &[u8], prefix: &[u8], each: Each<'_>) -> Result<(), IndexError> {
        let storage = self.storage.read_recursive();
        let (keyspace, database) = (storage.keyspace(table)?, storage.database()?);
        // The snapshot is taken while the overlay cannot change: what is on its way from one to the other is in at
        // least one of the two.
        let (recent, snapshot) = self.overlay.range(table, start, prefix, || database.snapshot());
        let mut recent = recent.into_iter().peekable();
        for guard in snapshot.range(keyspace, start..) {
            let (key, value) = guard.into_inner().map_err(self::database("scanning a table"))?;
            if !key.starts_with(prefix) {
                break;
            }
            while let Some((newer, value)) = recent.next_if(|(newer, _)| newer[..] < key[..]) {
                if let Some(value) = value
                    && each(&newer, &value).is_break()
                {
                    return Ok(());
                }
            }
            let flow = match recent.next_if(|(newer, _)| newer[..] == key[..]) {
                Some((_, Some(value))) => each(&key, &value),
                Some((_, None)) => ControlFlow::Continue(()),
                None => each(&key, &value),
            };
            if flow.is_break() {
                return Ok(());
            }
        }
        for (key, value) in recent {
            if let Some(value) = value
                && each(&key, &value).is_break()
            {
                break;
            }
        }
        Ok(())
    }
}

/// An index that is open for reading while the files it points into are brought in line with it; no commits yet.
pub struct RecoveredIndex {
    inner: Inner,
}

impl RecoveredIndex {
    /// Opens the database in `dir`, creating it when there is none.
    pub fn open(dir: &Path, options: &IndexOptions) -> Result<Self, IndexError> {
        let inner = Inner {
            dir: dir.to_owned(),
            options: options.clone(),
            storage: RwLock::new(Storage::open(dir, options)?),
            overlay: Overlay::new(options.overlay_bytes),
            flushing: Flushing::default(),
        };
        Ok(Self { inner })
    }

    /// Opens a table, creating it when there is none.
    pub fn table(&self, name: &'static str) -> Result<Table, IndexError> {
        self.inner.storage.write().table(name, &self.inner.options)
    }

    /// The value of `key`.
    pub fn get(&self, table: &Table, key: &[u8]) -> Result<Option<Bytes>, IndexError> {
        self.inner.get(*table, key)
    }

    /// Calls `each` with every key and value of `table` whose key begins with `prefix`, in key order.
    pub fn scan_prefix(&self, table: &Table, prefix: &[u8], each: Each<'_>) -> Result<(), IndexError> {
        self.inner.scan(*table, prefix, prefix, each)
    }

    /// Starts the flusher, which will make `data` durable before each write of the index.
    pub fn start(self, data: Arc<dyn DataFiles>) -> Result<Index, IndexError> {
        let inner = Arc::new(self.inner);
        let for_thread = Arc::clone(&inner);
        let flusher = std::thread::Builder::new()
            .name("index-flush".into())
            .spawn(move || flusher::run(&for_thread, &*data))
            .map_err(IndexError::Spawn)?;
        Ok(Index { inner, flusher: Some(flusher) })
    }
}

/// The index, open for reading and writing.
pub struct Index {
    inner: Arc<Inner>,
    flusher: Option<JoinHandle<()>>,
}

impl Index {
    /// Opens an index that stands alone: its entries point into no files.
    pub fn open(dir: &Path, options: &IndexOptions) -> Result<Self, IndexError> {
        struct Nothing;
        impl DataFiles for Nothing {
            fn make_durable(&self) -> std::io::Result<Vec<DataRow>> {
                Ok(Vec::new())
            }
        }
        RecoveredIndex::open(dir, options)?.start(Arc::new(Nothing))
    }

    /// Bytes of what was committed and is not in the database yet.
    pub fn pending_bytes(&self) -> u64 {
        self.inner.overlay.bytes() as u64
    }

    /// Opens a table, creating it when there is none. Ask once and keep the answer: this waits for
    /// scans to end (so it must not be called inside one), and a creation is written to disk.
    pub fn table(&self, name: &'static str) -> Result<Table, IndexError> {
        self.inner.storage.write().table(name, &self.inner.options)
    }

    /// The value of `key`.
    pub fn get(&self, table: &Table, key: &[u8]) -> Result<Option<Bytes>, IndexError> {
        self.inner.get(*table, key)
    }

    /// Calls `each` with every key and value of `table` whose key begins with `prefix`, in key order, as they were at
    /// the time of the call, until it breaks. `each` may use the index, commits included.
    pub fn scan_prefix(&self, table: &Table, prefix: &[u8], each: Each<'_>) -> Result<(), IndexError> {
        self.inner.scan(*table, prefix, prefix, each)
    }

    /// As [`scan_prefix`](Self::scan_prefix), but for all keys from `start` on.
    pub fn scan_from(&self, table: &Table, start: &[u8], each: Each<'_>) -> Result<(), IndexError> {
        self.inner.scan(*table, start, &[], each)
    }

    /// Applies `batch`: atomic, visible at once, durable within 100 ms (as long as the disk can sync in that time) or at the next
    /// [`sync`](Self::sync). Waits when the overlay is full. Fails, changing nothing, while writing to disk fails.
    pub fn commit(&self, batch: Batch) -> Result<(), IndexError> {
        if batch.is_empty() {
            return Ok(());
        }
        let mut batch = batch;
        loop {
            self.inner.flushing.check()?;
            match self.inner.overlay.apply(batch) {
                Ok(first) => {
                    if first {
                        self.inner.flushing.something_to_do();
                    }
                    return Ok(());
                }
                Err(refused) => batch = refused,
            }
            self.inner.flushing.flush_and_wait()?;
        }
    }

    /// Waits until the overlay is half empty at least. Who calls this before it takes a lock and commits under it does not
    /// hold up everybody for a flush, unless others fill the overlay in between.
    pub fn wait_for_room(&self) -> Result<(), IndexError> {
        if self.inner.overlay.is_half_full() { self.inner.flushing.flush_and_wait() } else { Ok(()) }
    }

    /// Makes everything durable that was visible before the call.
    pub fn sync(&self) -> Result<(), IndexError> {
        self.inner.flushing.flush_and_wait()
    }
}

impl Drop for Index {
    /// Writes what is left to disk, then stops the flusher.
    fn drop(&mut self) {
        self.inner.flushing.stop();
        if let Some(flusher) = self.flusher.take()
            && flusher.join().is_err()
        {
            tracing::error!("the index's flusher thread panicked");
        }
    }
}

#[cfg(test)]
mod tests;
