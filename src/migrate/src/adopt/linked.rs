//! Files that have several names in the stock store, as its optimising makes them: each is read once. Under its other names
//! its contents come from castored's store, where they are once the path it was read in is registered (so within one path
//! it is read under each of its names).

use std::collections::HashMap;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use build::dump::{Inode, KnownFiles};
use bytes::{Buf, Bytes};
use castore::{BlobService, Digest, DirectoryService, Node};
use parking_lot::Mutex;
use store::Store;

/// Files that are known at a time, some 100 bytes each. Of more, some are read again.
const MAX_KNOWN: usize = 1 << 20;
/// Contents are read in pieces of so many bytes.
const PIECE: u64 = 1 << 20;

/// What was read, and is known by its inode.
pub(super) struct Linked {
    files: Mutex<HashMap<Key, Known>>,
    /// A file with no more names than these has none in another path: one is its own, one may be stock's in `.links`.
    own_names: u64,
    /// Whether a number can be another file's soon, so that it takes the time of the last change to know a file.
    changing: bool,
}

/// What a file is known by.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    number: u64,
    changed: (i64, i64),
    size: u64,
}

#[derive(Clone, Copy)]
struct Known {
    digest: Digest,
    /// Names it may still be met under.
    left: u64,
}

impl Linked {
    /// For the stock store in this directory. Nobody else changes it if it is `ours`.
    pub(super) fn new(store_dir: &Path, ours: bool) -> Self {
        let links = std::fs::read_dir(store_dir.join(".links")).is_ok_and(|mut links| links.next().is_some());
        Self { files: Mutex::default(), own_names: if links { 2 } else { 1 }, changing: !ours }
    }

    /// Somebody for the dump of one path, who knows what is known here.
    pub(super) fn of_a_path<'a>(&'a self, store: &'a Store) -> Dumping<'a> {
        Dumping { linked: self, store, fresh: HashMap::new(), known: 0 }
    }

    fn key(&self, file: Inode) -> Key {
        // Those who remove names (adopting in place does) change the time of the file.
        let changed = if self.changing { file.changed } else { (0, 0) };
        Key { number: file.number, changed, size: file.size }
    }

    fn take(&self, key: Key) -> Option<Digest> {
        let mut files = self.files.lock();
        let known = files.get_mut(&key)?;
        let digest = known.digest;
        known.left -= 1;
        if known.left == 0 {
            files.remove(&key);
        }
        Some(digest)
    }
}

/// What is found out in the dump of one path.
pub(super) struct Dumping<'a> {
    linked: &'a Linked,
    store: &'a Store,
    /// Files that were read: where they are in the path, and how often they may be met again.
    fresh: HashMap<PathBuf, (Key, u64)>,
    known: u64,
}

impl Dumping<'_> {
    /// The path is registered, and so its contents stay. Answers how many of its files were not read.
    pub(super) fn registered(self, root: &Node) -> Result<u64, castore::Error> {
        if !self.fresh.is_empty() {
            let mut waiting = vec![(PathBuf::new(), root.clone())];
            while let Some((path, node)) = waiting.pop() {
                match node {
                    Node::File { digest, .. } => {
                        if let Some((key, left)) = self.fresh.get(&path) {
                            let mut files = self.linked.files.lock();
                            if files.len() < MAX_KNOWN {
                                files.insert(*key, Known { digest, left: *left });
                            }
                        }
                    }
                    Node::Symlink { .. } => {}
                    Node::Directory { digest, .. } => {
                        let directory = self.store.engine().get(&digest)?;
                        let directory = directory.ok_or(castore::Error::DirectoryNotFound(digest))?;
                        waiting.extend(directory.entries().map(|(name, node)| {
                            use std::os::unix::ffi::OsStrExt;
                            (path.join(std::ffi::OsStr::from_bytes(name.as_bytes())), node.clone())
                        }));
                    }
                }
            }
        }
        Ok(self.known)
    }
}

impl KnownFiles for Dumping<'_> {
    fn contents(&mut self, path: &Path, file: Inode) -> Option<Box<dyn Read + '_>> {
        if file.names <= self.linked.own_names {
            return None;
        }
        let key = self.linked.key(file);
        match self.linked.take(key) {
            Some(digest) => {
                self.known += 1;
                Some(Box::new(Contents { store: self.store, digest, size: file.size, offset: 0, piece: Bytes::new() }))
            }
            None => {
                // Two names in one path are both read; the last one counts.
                self.fresh.insert(path.to_owned(), (key, file.names - self.linked.own_names));
                None
            }
        }
    }
}

/// Reads a blob of castored's.
struct Contents<'a> {
    store: &'a Store,
    digest: Digest,
    size: u64,
    offset: u64,
    piece: Bytes,
}

impl Read for Contents<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.piece.is_empty() && self.offset < self.size {
            let length = usize::try_from((self.size - self.offset).min(PIECE)).map_err(io::Error::other)?;
            self.piece = self.store.engine().read_at(&self.digest, self.offset, length).map_err(io::Error::other)?;
            self.offset += self.piece.len() as u64;
        }
        let length = buf.len().min(self.piece.len());
        self.piece.copy_to_slice(&mut buf[..length]);
        Ok(length)
    }
}
