//! Collecting what no tree names: the walk over what is alive. What is swept and how is [`crate::collect`].

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use super::Engine;
use crate::blob::{chunk, chunk_list, directory as directory_key};
use crate::collect::{CollectError, Collection, Swept};
use crate::objects::{ObjectKey, ObjectKind};
use crate::{Digest, Error, Node};

/// A collection under way: first everything alive is marked, then the rest is swept. To drop it is to abandon it.
pub struct Garbage {
    engine: Arc<Engine>,
    collection: Collection,
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
        Ok(Garbage { engine: Arc::clone(self), collection })
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
    /// When something that is there cannot be read. The collection must be given up then, since what is below is not
    /// marked.
    pub fn mark(&mut self, root: &Node) -> Result<(), Error> {
        let engine = Arc::clone(&self.engine);
        engine.walk(root, &mut |node| self.mark_node(node))
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
        if let Some(list) = self.engine.blobs.list(digest)? {
            self.collection.mark(&chunk_list(digest));
            for (piece, _) in list.chunks() {
                self.collection.mark(&chunk(&piece));
            }
        }
        Ok(())
    }

    /// Removes what is neither marked nor used by a session since the collection began. Durable on return.
    ///
    /// `progress` is called now and then; when it breaks, the sweep ends early, with nothing wrong.
    pub fn sweep(self, progress: &mut dyn FnMut(&Swept) -> ControlFlow<()>) -> Result<Swept, CollectError> {
        let swept = self.collection.sweep(progress);
        // Whatever was removed must not live on in memory: a read would find a part of it and miss the rest.
        self.engine.directories.forget();
        self.engine.blobs.forget();
        swept
    }
}
