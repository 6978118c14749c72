//! Reads of contents that are still elsewhere.
//!
//! A thread that serves the mount never waits for another machine: it hands such a read on to whoever fetches, and goes on
//! with the next request. When the contents are here the read is answered from the thread that brought them; when they
//! cannot be had it is an I/O error for that read alone, and the next one tries again.

use std::sync::Arc;

use castore::Digest;
use fuser::{Errno, INodeNo, ReplyData};
use store::view::ViewError;

use crate::{NodeId, Tree};

/// A read that waits.
pub(crate) struct Waiting {
    tree: Arc<Tree>,
    ino: INodeNo,
    offset: u64,
    size: u32,
    reply: Reply,
}

/// An answer that is still owed. Nobody gives it when the server ends first: what is unanswered then is asked again of the
/// next server, so letting go of it must not be an error for whoever reads, as it usually is.
struct Reply(Option<ReplyData>);

impl Drop for Reply {
    fn drop(&mut self) {
        std::mem::forget(self.0.take());
    }
}

impl Waiting {
    pub(crate) fn new(tree: &Arc<Tree>, ino: INodeNo, offset: u64, size: u32, reply: ReplyData) -> Waiting {
        Waiting { tree: Arc::clone(tree), ino, offset, size, reply: Reply(Some(reply)) }
    }

    /// Answers when the blob is here. Of several servers in a row that die of such a read this is not told ([`crate::resent`]):
    /// the request is out of their hands when it waits.
    pub(crate) fn for_blob(self, digest: &Digest) {
        let (tree, digest) = (Arc::clone(&self.tree), *digest);
        tree.bring(
            &digest,
            Box::new(move |brought| match brought {
                Ok(()) => self.answer(),
                Err(error) => self.refuse(&digest, &error),
            }),
        );
    }

    fn answer(mut self) {
        let Some(reply) = self.reply.0.take() else { return };
        match self.tree.read(NodeId::from(self.ino.0), self.offset, self.size as usize) {
            Ok(bytes) => reply.data(&bytes),
            Err(error) => {
                tracing::error!(path = self.path(), error = &error as &dyn std::error::Error, "cannot answer a read");
                reply.error(Errno::EIO);
            }
        }
    }

    fn refuse(mut self, digest: &Digest, error: &ViewError) {
        let error = error as &dyn std::error::Error;
        tracing::error!(path = self.path(), %digest, error, "contents that are elsewhere cannot be had");
        if let Some(reply) = self.reply.0.take() {
            reply.error(Errno::EIO);
        }
    }

    fn path(&self) -> String {
        self.tree.describe(NodeId::from(self.ino.0))
    }
}
