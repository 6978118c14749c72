//! Going through a tree.

use super::Engine;
use crate::{Digest, Error, Node};

impl Engine {
    /// Calls `each` with the root and with what is in each directory for which it answers true. What is not there any more
    /// is logged and passed over.
    ///
    /// # Errors
    /// Those of `each`, and when a directory that is there cannot be read.
    pub(super) fn walk<E: From<Error>>(
        &self,
        root: &Node,
        each: &mut dyn FnMut(&Node) -> Result<bool, E>,
    ) -> Result<(), E> {
        self.walk_past(root, each, &mut |_, error| Err(error.into()))
    }

    /// The same, and a directory that is there and cannot be read is `unreadable`'s to judge.
    ///
    /// # Errors
    /// Those of `each` and `unreadable`.
    pub(super) fn walk_past<E>(
        &self,
        root: &Node,
        each: &mut dyn FnMut(&Node) -> Result<bool, E>,
        unreadable: &mut dyn FnMut(Digest, Error) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut waiting = Vec::new();
        let mut look = |node: &Node, waiting: &mut Vec<_>| -> Result<(), E> {
            if let (true, Node::Directory { digest, .. }) = (each(node)?, node) {
                waiting.push(*digest);
            }
            Ok(())
        };
        look(root, &mut waiting)?;
        while let Some(digest) = waiting.pop() {
            let directory = match self.directories.read(&digest) {
                Ok(Some(directory)) => directory,
                Ok(None) => {
                    tracing::warn!(%digest, "a directory that is in use is missing from the castore");
                    continue;
                }
                Err(error) => {
                    unreadable(digest, error)?;
                    continue;
                }
            };
            for (_, node) in directory.entries() {
                look(node, &mut waiting)?;
            }
        }
        Ok(())
    }
}
