//! Collecting what no tree names: the walk over what is alive. What is swept and how is [`crate::collect`].

use std::collections::{BTreeSet, HashSet};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use super::Engine;
use crate::blob::{chunk, chunk_list, directory as directory_key};
use crate::collect::{CollectError, Collection, Swept};
use crate::objects::{ObjectError, ObjectKey, ObjectKind};
use crate::{Digest, Error, Node};

/// Objects that could not be read, of which a collection keeps the keys; it is given up when there are more. 33 bytes each.
const MAX_UNREAD: usize = 1 << 20;

/// A collection under way: first everything alive is marked, then the rest is swept. To drop it is to abandon it.
///
/// A directory or list of chunks that cannot be read is alive itself, but what it names is not marked. It is noted as
/// [`unread`](Garbage::unread), and nothing is swept before its owner has made it readable
/// ([`mark_unread`](Garbage::mark_unread)) or decided to do without what it names ([`pass_over`](Garbage::pass_over)).
pub struct Garbage {
    engine: Arc<Engine>,
    collection: Collection,
    unread: BTreeSet<ObjectKey>,
}

impl Engine {
    /// Begins a collection; waits at most `patience` for sessions and holds from before.
    ///
    /// Only *after* this does the caller look up which trees are alive, so that it sees what those sessions committed.
    ///
    /// # Errors
    /// [`CollectError::Running`] and [`CollectError::Busy`].
    pub fn begin_collection(self: &Arc<Self>, patience: Duration) -> Result<Garbage, CollectError> {
        let collection = self.objects.begin_collection(patience)?;
        Ok(Garbage { engine: Arc::clone(self), collection, unread: BTreeSet::new() })
    }

    /// Forgets of these objects, which are damaged, those whose pack's file is lost: they are no longer there.
    ///
    /// # Errors
    /// When the index cannot be read or written.
    pub fn forget_lost(&self, keys: &HashSet<ObjectKey>) -> Result<u64, Error> {
        let forgotten = self.objects.forget_lost(keys)?;
        if forgotten > 0 {
            self.directories.forget();
            self.blobs.forget();
        }
        Ok(forgotten)
    }
}

impl Garbage {
    /// Marks everything below `root` as alive. What is not there any more is logged and passed over: that tree is
    /// broken already, and the space is needed all the same.
    ///
    /// # Errors
    /// When the index cannot be read, or too much else cannot. The collection must be given up then.
    pub fn mark(&mut self, root: &Node) -> Result<(), Error> {
        if self.mark_node(root)?
            && let Node::Directory { digest, .. } = root
        {
            self.mark_below(digest)?;
        }
        Ok(())
    }

    /// Marks what a directory names, and all below that.
    fn mark_below(&mut self, digest: &Digest) -> Result<(), Error> {
        let engine = Arc::clone(&self.engine);
        let mut is_root = true;
        // Both closures mark, one at a time.
        let marks = std::cell::RefCell::new(self);
        let root = Node::Directory { digest: *digest, size: 0 };
        engine.walk_past(
            &root,
            &mut |node| match std::mem::take(&mut is_root) {
                true => Ok(true),
                false => marks.borrow_mut().mark_node(node),
            },
            &mut |digest, error| marks.borrow_mut().note_unread(directory_key(&digest), error),
        )
    }

    /// Objects in use that could not be read, so that what they name is not marked.
    #[must_use]
    pub fn unread(&self) -> &BTreeSet<ObjectKey> {
        &self.unread
    }

    /// Tries again to mark what the [`unread`](Self::unread) objects name.
    ///
    /// # Errors
    /// As for [`mark`](Self::mark).
    pub fn mark_unread(&mut self) -> Result<(), Error> {
        for key in std::mem::take(&mut self.unread) {
            match key.kind {
                ObjectKind::Directory => self.mark_below(&key.digest)?,
                _ => self.mark_chunks(&key.digest)?,
            }
        }
        Ok(())
    }

    /// Does without what these objects name: it goes, unless something else names it.
    pub fn pass_over(&mut self, keys: &BTreeSet<ObjectKey>) {
        self.unread.retain(|key| !keys.contains(key));
    }

    fn note_unread(&mut self, key: ObjectKey, error: Error) -> Result<(), Error> {
        match error {
            Error::Objects(ObjectError::Unreadable { .. } | ObjectError::Entry(_))
            | Error::DamagedDirectory { .. }
            | Error::DamagedBlob { .. }
                if self.unread.len() < MAX_UNREAD =>
            {
                self.unread.insert(key);
                Ok(())
            }
            error => Err(error),
        }
    }

    /// Marks the record of this digest as alive.
    pub fn mark_record(&mut self, digest: &Digest) {
        self.collection.mark(&ObjectKey { kind: ObjectKind::Record, digest: *digest });
    }

    /// Marks a node itself; whether it is a directory not seen before.
    fn mark_node(&mut self, node: &Node) -> Result<bool, Error> {
        match node {
            Node::Directory { digest, .. } => return Ok(self.collection.mark(&directory_key(digest))),
            Node::File { digest, .. } => {
                // A chunked blob has no chunk of its digest; the mark says that it was seen. When the chunk is there,
                // it is the whole blob, so it does not matter whether it was first seen as a chunk of another.
                if self.collection.mark(&chunk(digest)) {
                    self.mark_chunks(digest)?;
                }
            }
            Node::Symlink { .. } => {}
        }
        Ok(false)
    }

    fn mark_chunks(&mut self, digest: &Digest) -> Result<(), Error> {
        let list = match self.engine.blobs.list(digest) {
            Ok(None) => return Ok(()),
            Ok(Some(list)) => Some(list),
            Err(error) => {
                self.note_unread(chunk_list(digest), error)?;
                None
            }
        };
        self.collection.mark(&chunk_list(digest));
        for (piece, _) in list.iter().flat_map(|list| list.chunks()) {
            self.collection.mark(&chunk(&piece));
        }
        Ok(())
    }

    /// Removes what is neither marked nor used by a session since the collection began. Durable on return.
    ///
    /// `progress` is called now and then; when it breaks, the sweep ends early, with nothing wrong.
    ///
    /// # Errors
    /// [`CollectError::Unread`], with nothing removed, and what [`Collection::sweep`] says.
    pub fn sweep(self, progress: &mut dyn FnMut(&Swept) -> ControlFlow<()>) -> Result<Swept, CollectError> {
        if let Some(first) = self.unread.first() {
            return Err(CollectError::Unread { objects: self.unread.len(), first: *first });
        }
        let swept = self.collection.sweep(progress);
        // Whatever was removed must not live on in memory: a read would find a part of it and miss the rest.
        self.engine.directories.forget();
        self.engine.blobs.forget();
        swept
    }
}
