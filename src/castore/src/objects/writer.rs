//! Putting objects.

use std::collections::HashSet;
use std::sync::Arc;

use super::landing::Outstanding;
use super::{MAX_OBJECT, ObjectError, ObjectKey, ObjectKind, ObjectStore};
use crate::index::Batch;
use crate::pack::{BlockBuilder, Form};

/// Keys a writer remembers of what it put lately. Forgetting one costs a second copy at worst.
const MAX_RECENT: usize = 1 << 14;

/// Puts the objects of one import.
///
/// An object becomes visible some time after [`put`](Self::put), and at the latest when [`flush`](Self::flush) returns.
/// A writer that is dropped abandons what it has not flushed; what became visible by then is garbage that the next
/// collection removes, unless something names it.
///
/// **A collection takes an object for alive when it was put, or found to be there, through a writer that began after
/// the collection did; and it waits for writers that began before.** So an importer puts or [touches](Self::touch)
/// *every* object it relies on, not only the topmost, and keeps its writer until what names them is committed.
pub struct ObjectWriter {
    store: Arc<ObjectStore>,
    contents: BlockBuilder,
    /// Directories have blocks of their own: who walks through a tree reads those and none of the files between them.
    directories: BlockBuilder,
    /// What is gathered or under way, so not in the index yet.
    recent: HashSet<ObjectKey>,
    outstanding: Arc<Outstanding>,
    /// The epoch this writer began in.
    epoch: u64,
    failed: bool,
}

impl ObjectWriter {
    pub(super) fn new(store: Arc<ObjectStore>) -> Self {
        let epoch = store.core.epochs.enter();
        Self {
            store,
            contents: BlockBuilder::default(),
            directories: BlockBuilder::default(),
            recent: HashSet::new(),
            outstanding: Arc::default(),
            epoch,
            failed: false,
        }
    }

    /// Puts an object, unless it is there; whether it was new. The caller vouches for the digest.
    pub fn put(&mut self, key: ObjectKey, contents: &[u8]) -> Result<bool, ObjectError> {
        if self.failed {
            return Err(ObjectError::Failed);
        }
        if self.touch(&key)? {
            return Ok(false);
        }
        self.put_new(key, contents)?;
        Ok(true)
    }

    /// Puts an object without looking whether it is there, which costs a second copy if it is.
    pub fn put_new(&mut self, key: ObjectKey, contents: &[u8]) -> Result<(), ObjectError> {
        if self.failed {
            return Err(ObjectError::Failed);
        }
        if contents.len() > MAX_OBJECT {
            return Err(ObjectError::TooLong { key, length: contents.len() });
        }
        // A large object does not drag a half-full block's neighbours into a huge one.
        if contents.len() >= Form::Quick.block() && !self.block_for(key.kind).is_empty() {
            self.close_block(key.kind)?;
        }
        self.recent.insert(key);
        let block = self.block_for(key.kind);
        block.push(key, contents);
        if block.is_full(Form::Quick) {
            self.close_block(key.kind)?;
        }
        Ok(())
    }

    fn block_for(&mut self, kind: ObjectKind) -> &mut BlockBuilder {
        if kind == ObjectKind::Directory { &mut self.directories } else { &mut self.contents }
    }

    /// Whether the object is there or was put by this writer; if so, no collection removes it while this writer lives.
    pub fn touch(&mut self, key: &ObjectKey) -> Result<bool, ObjectError> {
        Ok(self.recent.contains(key) || self.store.core.touch(key)?)
    }

    /// Sees to it that everything put so far becomes visible, without waiting for it.
    pub fn start_flush(&mut self) -> Result<(), ObjectError> {
        let last = self.last_block()?;
        if last.is_empty() { Ok(()) } else { self.land(last) }
    }

    /// Makes everything put so far visible.
    pub fn flush(&mut self) -> Result<(), ObjectError> {
        if self.failed {
            return Err(ObjectError::Failed);
        }
        // Nothing else is left to do for this thread, so it compresses the last block itself. An import of one small
        // object thus costs no change of threads.
        let landed = self.last_block().and_then(|last| match last.is_empty() {
            true => Ok(()),
            false => self.store.workers.land_here(last, &self.outstanding),
        });
        self.flushed(landed)
    }

    /// Makes everything put so far visible, and what `batch` changes in one step with the last of it: whoever sees the
    /// changes sees the objects, and after a crash neither is there without the other.
    pub fn flush_with(&mut self, batch: Batch) -> Result<(), ObjectError> {
        if self.failed {
            return Err(ObjectError::Failed);
        }
        let before = self.last_block().and_then(|last| self.outstanding.wait().map(|()| last));
        let landed = before.and_then(|last| match last.is_empty() {
            true => self.store.core.index.commit(batch).map_err(ObjectError::from),
            false => self.store.core.land(&last, batch),
        });
        self.flushed(landed)
    }

    fn flushed(&mut self, landed: Result<(), ObjectError>) -> Result<(), ObjectError> {
        let result = self.outstanding.wait().and(landed);
        self.failed = result.is_err();
        self.recent.clear();
        result
    }

    /// An error, that of a full disk, when what is free should be left for the index.
    pub fn check_room(&self) -> Result<(), ObjectError> {
        Ok(self.store.core.packs.check_room()?)
    }

    /// What is gathered and has no block yet. Directories stand with the contents where all of it is one block, as in most
    /// paths.
    fn last_block(&mut self) -> Result<BlockBuilder, ObjectError> {
        let mut last = std::mem::take(&mut self.contents);
        if let Err(directories) = last.absorb(std::mem::take(&mut self.directories), Form::Quick) {
            self.land(directories)?;
        }
        Ok(last)
    }

    fn close_block(&mut self, kind: ObjectKind) -> Result<(), ObjectError> {
        let block = std::mem::take(self.block_for(kind));
        if self.recent.len() >= MAX_RECENT || self.outstanding.is_idle() {
            self.recent.clear();
            let gathered = [&block, &self.contents, &self.directories];
            self.recent.extend(gathered.into_iter().flat_map(|block| block.objects().map(|(key, ..)| key)));
        }
        self.land(block)
    }

    fn land(&mut self, block: BlockBuilder) -> Result<(), ObjectError> {
        let result = self.store.workers.land(block, &self.outstanding);
        self.failed = result.is_err();
        result
    }
}

impl Drop for ObjectWriter {
    fn drop(&mut self) {
        // Blocks under way still enter objects that a later epoch would have to know of.
        if let Err(error) = self.outstanding.wait()
            && !self.failed
        {
            tracing::debug!(error = &error as &dyn std::error::Error, "a block of an abandoned import failed");
        }
        self.store.core.epochs.leave(self.epoch);
    }
}
