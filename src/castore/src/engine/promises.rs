//! Contents that are expected from elsewhere.
//!
//! A tree can be of use before all of it is here. What is missing is *promised*: the table `promised` has a row for each such
//! blob, with its size and a note by whoever promised it, who knows from where it will come.
//!
//! **A promise is no object.** Who stores contents does not find them here and so stores them, which keeps the promise; a
//! collection sees the blob's mark and leaves the row alone; a check has nothing to read. Only who *reads* a promised blob
//! waits for it, by way of the [`Filler`] ([`Engine::read_at`](crate::BlobService::read_at)), unless it cannot wait
//! ([`Engine::read_here`]).
//!
//! A row may outlive its need: the blob came in another way, or the tree is gone. So whether a blob is still elsewhere is
//! always decided by looking for the blob first, and [a collection](crate::engine::Garbage) drops rows that tell nothing.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};

use super::{Engine, Hold};
use crate::blob::{chunk, chunk_list};
use crate::index::{Batch, IndexError};
use crate::objects::{Core, ObjectError, ObjectKey};
use crate::{Digest, Error, Node};

/// The longest note, in bytes.
pub const MAX_NOTE: usize = 256;
/// Rows written, or deleted, in one batch.
const ROWS: usize = 1024;
/// Readers that may wait for a filler before there is one.
const MAX_EARLY: usize = 4096;
/// How long they do: opening the sources may itself take something that has not come.
const EARLY_PATIENCE: Duration = Duration::from_secs(60);

/// What is known of a blob before it is here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Promise {
    /// Its length in bytes.
    pub size: u64,
    /// What whoever promised it has to remember: at most [`MAX_NOTE`] bytes.
    pub note: Bytes,
}

impl Promise {
    fn encode(&self) -> Vec<u8> {
        [&self.size.to_le_bytes(), &self.note[..]].concat()
    }

    fn decode(row: &[u8]) -> Option<Promise> {
        let (size, note) = row.split_first_chunk::<8>()?;
        Some(Promise { size: u64::from_le_bytes(*size), note: Bytes::copy_from_slice(note) })
    }
}

/// What is done when a promised blob has come, or could not be had.
pub type Then = Box<dyn FnOnce(Result<(), Error>) + Send>;

/// Gets what was promised.
pub trait Filler: Send + Sync {
    /// Sees to it that the blob is here, then calls `then`, on a thread that may read and write the castore. Returns at once;
    /// `then` may be called before that only to say that there is no room. Asked for one blob several times, it gets it
    /// once. A `then` that is dropped without being called says that the process ends.
    fn fill(&self, digest: Digest, promise: Promise, then: Then);
}

/// Who fills, if anybody does yet, and who waits for that.
#[derive(Default)]
pub(crate) struct Fillers {
    filler: RwLock<Option<Arc<dyn Filler>>>,
    early: Mutex<Vec<(Digest, Promise, Then)>>,
}

impl Fillers {
    /// Keeps a reader until there is a filler; gives it back where it cannot.
    fn wait(self: &Arc<Self>, digest: Digest, promise: Promise, then: Then) -> Result<(), Then> {
        let mut early = self.early.lock();
        if early.len() >= MAX_EARLY {
            return Err(then);
        }
        if early.is_empty() {
            let fillers = Arc::clone(self);
            let give_up = move || {
                std::thread::sleep(EARLY_PATIENCE);
                let late: Vec<_> = fillers.early.lock().drain(..).collect();
                late.into_iter().for_each(|(digest, _, then)| then(Err(Error::Elsewhere(digest))));
            };
            if std::thread::Builder::new().name("lazy-early".into()).spawn(give_up).is_err() {
                return Err(then);
            }
        }
        early.push((digest, promise, then));
        Ok(())
    }
}

/// What is not here of a tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Elsewhere {
    /// Distinct blobs that were promised.
    pub blobs: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Engine {
    /// Takes a tree whose directories are here and whose files need not be: those that are not are promised, with `note`.
    /// Nothing of it is collected until the answer is dropped.
    ///
    /// Memory: 32 bytes and the set's overhead for each different directory and blob of the tree.
    ///
    /// # Errors
    /// [`Error::DirectoryNotFound`], [`Error::ChildSize`] and [`Error::BlobSize`] name the first thing that is not as it
    /// should be; [`Error::LongNote`].
    pub fn promise(&self, root: &Node, note: &[u8]) -> Result<(Hold, Elsewhere), Error> {
        if note.len() > MAX_NOTE {
            return Err(Error::LongNote { limit: MAX_NOTE });
        }
        let note = Bytes::copy_from_slice(note);
        let (mut elsewhere, mut rows) = (Elsewhere::default(), Vec::new());
        let hold = self.hold_or(root, &mut |digest, size| {
            elsewhere.blobs += 1;
            elsewhere.bytes = elsewhere.bytes.saturating_add(size);
            rows.push((digest, Promise { size, note: note.clone() }));
            if rows.len() == ROWS {
                self.objects.core.promise(&std::mem::take(&mut rows))?;
            }
            Ok(())
        })?;
        self.objects.core.promise(&rows)?;
        Ok((hold, elsewhere))
    }

    /// What is promised of a blob that is not here; `None` when it is here, or nobody knows of it.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn promised(&self, digest: &Digest) -> Result<Option<Promise>, Error> {
        if self.is_here(digest)? {
            return Ok(None);
        }
        Ok(self.objects.core.promised(digest)?)
    }

    /// Calls `each` for the promised blobs of a tree, in the tree's order and each once, until it breaks.
    ///
    /// Memory: 32 bytes and the set's overhead for each different directory and blob of the tree.
    ///
    /// # Errors
    /// When a directory is missing or the index cannot be read.
    pub fn elsewhere(
        &self,
        root: &Node,
        each: &mut dyn FnMut(Digest, Promise) -> ControlFlow<()>,
    ) -> Result<(), Error> {
        let mut seen = HashSet::new();
        let mut waiting = vec![root.clone()];
        while let Some(node) = waiting.pop() {
            match node {
                Node::Directory { digest, .. } if seen.insert(digest) => {
                    let directory = self.directories.read(&digest)?.ok_or(Error::DirectoryNotFound(digest))?;
                    let first = waiting.len();
                    waiting.extend(directory.entries().map(|(_, node)| node.clone()));
                    waiting[first..].reverse();
                }
                Node::File { digest, .. } if seen.insert(digest) => {
                    if let Some(promise) = self.promised(&digest)?
                        && each(digest, promise).is_break()
                    {
                        return Ok(());
                    }
                }
                Node::Directory { .. } | Node::File { .. } | Node::Symlink { .. } => {}
            }
        }
        Ok(())
    }

    /// Whether anything of a tree is promised and not here.
    ///
    /// # Errors
    /// As for [`Engine::elsewhere`].
    pub fn is_elsewhere(&self, root: &Node) -> Result<bool, Error> {
        let mut found = false;
        self.elsewhere(root, &mut |_, _| {
            found = true;
            ControlFlow::Break(())
        })?;
        Ok(found)
    }

    /// All that is promised and not here.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn all_elsewhere(&self) -> Result<Elsewhere, Error> {
        let mut elsewhere = Elsewhere::default();
        let mut add = |digest: Digest, promise: Promise| -> Result<(), Error> {
            if !self.is_here(&digest)? {
                elsewhere.blobs += 1;
                elsewhere.bytes = elsewhere.bytes.saturating_add(promise.size);
            }
            Ok(())
        };
        self.objects.core.each_promised(&mut add)?;
        Ok(elsewhere)
    }

    /// Notes that a blob is here, so that nothing has to be promised of it.
    ///
    /// # Errors
    /// When the index cannot be written.
    pub fn promise_kept(&self, digests: &[Digest]) -> Result<(), Error> {
        let core = &self.objects.core;
        let mut batch = Batch::new();
        for digest in digests {
            batch.delete(core.tables.promised, digest.as_bytes());
        }
        Ok(core.index.commit(batch)?)
    }

    /// From now on this one gets what was promised. Who has asked before is served now.
    pub fn set_filler(&self, filler: Arc<dyn Filler>) {
        let mut current = self.fillers.filler.write();
        for (digest, promise, then) in self.fillers.early.lock().drain(..) {
            filler.fill(digest, promise, then);
        }
        *current = Some(filler);
    }

    /// As [`read_at`](crate::BlobService::read_at), for who cannot wait for a network.
    ///
    /// # Errors
    /// [`Error::Elsewhere`] when the blob is promised and not here; [`Engine::bring`] gets it.
    pub fn read_here(&self, digest: &Digest, offset: u64, len: usize) -> Result<Bytes, Error> {
        match self.blobs.read_at(digest, offset, len) {
            // One that came in between is found at the second look.
            Err(Error::BlobNotFound(_)) if self.promised(digest)?.is_some() => Err(Error::Elsewhere(*digest)),
            Err(Error::BlobNotFound(_)) => self.blobs.read_at(digest, offset, len),
            read => read,
        }
    }

    /// Has a promised blob fetched; `then` is called when it is here or cannot be had, on another thread, or at once when it
    /// is here already. Where nobody can fetch yet, it waits for who will: a store that has just been opened has its readers
    /// before it has its sources.
    pub fn bring(&self, digest: &Digest, then: Then) {
        let promise = match self.promised(digest) {
            Ok(Some(promise)) => promise,
            Ok(None) => return then(Ok(())),
            Err(error) => return then(Err(error)),
        };
        let filler = self.fillers.filler.read();
        if let Some(filler) = &*filler {
            return filler.fill(*digest, promise, then);
        }
        if let Err(then) = self.fillers.wait(*digest, promise, then) {
            then(Err(Error::Elsewhere(*digest)));
        }
    }

    /// Waits for a promised blob. Blocks.
    pub(crate) fn wait_for(&self, digest: &Digest) -> Result<(), Error> {
        if self.fillers.filler.read().is_none() {
            return Err(Error::Elsewhere(*digest));
        }
        let (done, answer) = crossbeam_channel::bounded(1);
        // Whoever asked is here until it is answered.
        self.bring(digest, Box::new(move |result| drop(done.send(result))));
        answer.recv().unwrap_or(Err(Error::Elsewhere(*digest)))
    }

    /// Whether a blob can be read from this castore.
    fn is_here(&self, digest: &Digest) -> Result<bool, Error> {
        Ok(*digest == Digest::EMPTY || self.objects.core.has_blob(digest)?)
    }
}

impl Core {
    fn has_blob(&self, digest: &Digest) -> Result<bool, ObjectError> {
        Ok(self.entry(&chunk(digest))?.is_some() || self.entry(&chunk_list(digest))?.is_some())
    }

    fn promised(&self, digest: &Digest) -> Result<Option<Promise>, ObjectError> {
        let row = self.index.get(&self.tables.promised, digest.as_bytes())?;
        Ok(row.and_then(|row| Promise::decode(&row)))
    }

    /// Writes rows; a collection that runs takes the blobs for used. The first promise of a blob counts.
    fn promise(&self, rows: &[(Digest, Promise)]) -> Result<(), ObjectError> {
        if rows.is_empty() {
            return Ok(());
        }
        // Together with the mark, so that no collection comes in between.
        let mut state = self.catalog.lock();
        let mut batch = Batch::new();
        for (digest, promise) in rows {
            if let Some(touched) = &mut state.touched {
                touched.insert(&chunk(digest));
            }
            if self.promised(digest)?.is_none() {
                batch.put(self.tables.promised, digest.as_bytes(), promise.encode());
            }
        }
        Ok(self.index.commit(batch)?)
    }

    /// Calls `each` for every row until it fails.
    fn each_promised<E: From<IndexError>>(
        &self,
        each: &mut dyn FnMut(Digest, Promise) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut failed = None;
        self.index.scan_prefix(&self.tables.promised, &[], &mut |key, row| {
            let (Ok(digest), Some(promise)) = (Digest::try_from(key), Promise::decode(row)) else {
                return ControlFlow::Continue(());
            };
            match each(digest, promise) {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    failed = Some(error);
                    ControlFlow::Break(())
                }
            }
        })?;
        failed.map_or(Ok(()), Err)
    }

    /// Drops the rows that tell nothing: of blobs that nobody marked or has touched since, and of those that are here.
    pub(crate) fn sweep_promises(&self, is_live: &dyn Fn(&ObjectKey) -> bool) -> Result<(), ObjectError> {
        let drop_rows = |useless: &mut Vec<Digest>| -> Result<(), ObjectError> {
            let state = self.catalog.lock();
            let mut batch = Batch::new();
            for digest in useless.drain(..) {
                let touched = state.touched.as_ref().is_none_or(|touched| touched.contains(&chunk(&digest)));
                // What is here needs no row: before it is collected, all that names it is gone.
                if !touched || self.has_blob(&digest)? {
                    batch.delete(self.tables.promised, digest.as_bytes());
                }
            }
            Ok(self.index.commit(batch)?)
        };
        let mut useless = Vec::new();
        self.each_promised(&mut |digest, _| -> Result<(), ObjectError> {
            if !is_live(&chunk(&digest)) || self.has_blob(&digest)? {
                useless.push(digest);
            }
            if useless.len() < ROWS { Ok(()) } else { drop_rows(&mut useless) }
        })?;
        drop_rows(&mut useless)
    }
}

#[cfg(test)]
mod tests;
