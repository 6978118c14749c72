//! Through a tree in the order of its NAR, with the directories that are not here asked for before they are needed.

use std::collections::VecDeque;
use std::sync::Arc;

use castore::engine::Engine;
use castore::{Digest, Directory, DirectoryService as _, Node, NodeName, SymlinkTarget};
use rpc_client::{Ahead, ClientError, Coming};

/// Directories asked for in advance within one directory.
const AHEAD: usize = 16;

/// What comes next.
#[derive(Debug)]
pub(super) enum Step {
    /// A directory begins.
    Enter,
    /// The name of what comes next in it.
    Entry(NodeName),
    /// A file, whose contents are to follow.
    File {
        digest: Digest,
        size: u64,
        executable: bool,
    },
    Symlink(SymlinkTarget),
    /// A directory ends.
    Leave,
}

/// A walk. It blocks where a directory is not there in time.
pub(super) struct Walk<'a> {
    here: &'a Engine,
    ahead: &'a Ahead,
    wanted: &'a dyn Fn() -> bool,
    levels: Vec<Level>,
    /// What comes after a name, and first of all.
    node: Option<Node>,
}

/// A directory, and how far the walk is in it.
struct Level {
    directory: Arc<Directory>,
    at: usize,
    /// Entries that were looked at in advance.
    looked: usize,
    coming: VecDeque<(Digest, Coming<Directory>)>,
}

impl<'a> Walk<'a> {
    pub(super) fn new(root: Node, here: &'a Engine, ahead: &'a Ahead, wanted: &'a dyn Fn() -> bool) -> Self {
        Self { here, ahead, wanted, levels: Vec::new(), node: Some(root) }
    }

    /// The next step, or none at the end.
    pub(super) fn next(&mut self) -> Result<Option<Step>, ClientError> {
        let step = match self.node.take() {
            Some(Node::File { digest, size, executable }) => Step::File { digest, size, executable },
            Some(Node::Symlink { target }) => Step::Symlink(target),
            Some(Node::Directory { digest, .. }) => {
                let directory = self.directory(digest)?;
                self.levels.push(Level { directory, at: 0, looked: 0, coming: VecDeque::new() });
                self.look_ahead();
                Step::Enter
            }
            None => {
                let Some(level) = self.levels.last_mut() else { return Ok(None) };
                match level.directory.entry(level.at) {
                    Some((name, node)) => {
                        level.at += 1;
                        self.node = Some(node.clone());
                        Step::Entry(name.clone())
                    }
                    None => {
                        self.levels.pop();
                        Step::Leave
                    }
                }
            }
        };
        Ok(Some(step))
    }

    /// A directory that is here, or is on its way, or is asked for now.
    fn directory(&mut self, digest: Digest) -> Result<Arc<Directory>, ClientError> {
        let on_its_way = self.levels.last_mut().and_then(|level| {
            let is_next = level.coming.front().is_some_and(|(next, _)| *next == digest);
            is_next.then(|| level.coming.pop_front()).flatten()
        });
        if let Some((_, coming)) = on_its_way {
            self.look_ahead();
            return coming.wait(self.wanted).map(Arc::new);
        }
        match self.local(&digest) {
            Some(directory) => Ok(directory),
            None => self.ahead.directory(digest).wait(self.wanted).map(Arc::new),
        }
    }

    /// One that is damaged counts as absent.
    fn local(&self, digest: &Digest) -> Option<Arc<Directory>> {
        self.here.get(digest).ok().flatten()
    }

    fn look_ahead(&mut self) {
        let (here, ahead) = (self.here, self.ahead);
        let Some(level) = self.levels.last_mut() else { return };
        while level.coming.len() < AHEAD
            && let Some((_, node)) = level.directory.entry(level.looked)
        {
            level.looked += 1;
            if let Node::Directory { digest, .. } = node
                && !matches!(here.get(digest), Ok(Some(_)))
            {
                level.coming.push_back((*digest, ahead.directory(*digest)));
            }
        }
    }
}
