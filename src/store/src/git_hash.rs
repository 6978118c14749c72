//! Git's hash of a tree (experimental in stock Nix): that of git's own objects for the same files.
//!
//! A file is `blob <size>\0<contents>`; a directory `tree <size>\0` and for each entry its mode, a space, its name, a zero
//! byte and its hash, sorted as if the names of directories ended in a slash.

use std::sync::Arc;

use castore::{Directory, DirectoryService, Node};
use nix_compat::hash::{Algorithm, Hash, Hasher};

use crate::error::Result;
use crate::store::Store;

/// A directory on the way.
struct Level {
    directory: Arc<Directory>,
    /// The entry to come next.
    at: usize,
    entries: Vec<Entry>,
}

/// An entry whose hash is known.
struct Entry {
    name: Vec<u8>,
    mode: &'static str,
    hash: Hash,
}

impl Entry {
    /// What it is sorted by.
    fn key(&self) -> Vec<u8> {
        let mut key = self.name.clone();
        if self.mode == DIRECTORY {
            key.push(b'/');
        }
        key
    }
}

const DIRECTORY: &str = "40000";

fn mode(node: &Node) -> &'static str {
    match node {
        Node::Directory { .. } => DIRECTORY,
        Node::Symlink { .. } => "120000",
        Node::File { executable: true, .. } => "100755",
        Node::File { executable: false, .. } => "100644",
    }
}

fn tree(mut entries: Vec<Entry>, algorithm: Algorithm) -> Hash {
    entries.sort_by_key(Entry::key);
    let mut body = Vec::new();
    for entry in &entries {
        body.extend_from_slice(format!("{} ", entry.mode).as_bytes());
        body.extend_from_slice(&entry.name);
        body.push(0);
        body.extend_from_slice(entry.hash.as_bytes());
    }
    let mut hasher = Hasher::new(algorithm);
    hasher.update(format!("tree {}\0", body.len()).as_bytes());
    hasher.update(&body);
    hasher.finalize()
}

impl Store {
    /// Git's hash of any tree in the castore. Whether a file that is the whole tree is executable does not count.
    ///
    /// # Errors
    /// Failures of the castore.
    pub fn git_hash(&self, node: &Node, algorithm: Algorithm) -> Result<Hash> {
        let mut levels: Vec<Level> = Vec::new();
        let mut next = node.clone();
        loop {
            let mut hash = match &next {
                Node::Directory { digest, .. } => {
                    let directory =
                        self.engine.get(digest)?.ok_or_else(|| castore::Error::DirectoryNotFound(*digest))?;
                    levels.push(Level { directory, at: 0, entries: Vec::new() });
                    None
                }
                leaf => Some(self.git_blob(leaf, algorithm)?),
            };
            // Up, for as long as directories are complete.
            loop {
                let Some(level) = levels.last_mut() else {
                    // Only a leaf gets here without a directory around it.
                    return Ok(hash.unwrap_or_else(|| tree(Vec::new(), algorithm)));
                };
                if let Some(hash) = hash.take()
                    && let Some((name, node)) = level.directory.entry(level.at)
                {
                    level.entries.push(Entry { name: name.as_bytes().to_vec(), mode: mode(node), hash });
                    level.at += 1;
                }
                if let Some((_, node)) = level.directory.entry(level.at) {
                    next = node.clone();
                    break;
                }
                let done = std::mem::take(&mut level.entries);
                levels.pop();
                hash = Some(tree(done, algorithm));
            }
        }
    }

    fn git_blob(&self, leaf: &Node, algorithm: Algorithm) -> Result<Hash> {
        let mut hasher = Hasher::new(algorithm);
        match leaf {
            Node::File { digest, size, .. } => {
                hasher.update(format!("blob {size}\0").as_bytes());
                self.for_each_piece(digest, *size, &mut |piece| {
                    hasher.update(piece);
                    Ok(())
                })?;
            }
            Node::Symlink { target } => {
                hasher.update(format!("blob {}\0", target.as_bytes().len()).as_bytes());
                hasher.update(target.as_bytes());
            }
            Node::Directory { .. } => {}
        }
        Ok(hasher.finalize())
    }
}

#[cfg(test)]
mod tests {
    use nix_compat::nar::NarWriter;
    use nix_compat::store_path::StoreDir;

    use super::*;
    use crate::nar_digest::NarDigest;
    use crate::store::Config;

    type Nar = NarWriter<Vec<u8>>;

    fn file(nar: &mut Nar, executable: bool, text: &str) {
        nar.regular_header(executable, text.len() as u64).unwrap();
        nar.contents(text.as_bytes()).unwrap();
        nar.end_regular().unwrap();
    }

    fn hash(write: impl FnOnce(&mut Nar)) -> String {
        let mut nar = NarWriter::new(Vec::new());
        write(&mut nar);
        let bytes = nar.finish().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(Config::new(StoreDir::default(), dir.path())).unwrap();
        let node = store.import_nar(&mut &bytes[..], NarDigest::new(None, None)).unwrap().node;
        store.git_hash(&node, Algorithm::Sha1).unwrap().to_base16()
    }

    #[test]
    fn the_same_as_git() {
        // `git hash-object`, and `git rev-parse HEAD:dir` after adding these.
        assert_eq!(hash(|nar| file(nar, false, "Hello World\n")), "557db03de997c86a4a028e1ebd3a1ceb225be238");
        let tree = hash(|nar| {
            nar.enter_directory().unwrap();
            nar.entry(b"executable").unwrap();
            file(nar, true, "Run Hello World\n");
            nar.entry(b"hello").unwrap();
            file(nar, false, "Hello World\n");
            nar.leave_directory().unwrap();
        });
        assert_eq!(tree, "e5c0a11a556801a5c9dcf330ca9d7e2c572697f4");
        let empty = hash(|nar| {
            nar.enter_directory().unwrap();
            nar.leave_directory().unwrap();
        });
        assert_eq!(empty, "4b825dc642cb6eb9a060e54bf8d69288fbee4904");
    }

    #[test]
    fn directories_are_sorted_as_git_sorts_them() {
        // `git mktree`: a directory "a" comes after a file "a.b", for its key is "a/".
        let nested = hash(|nar| {
            nar.enter_directory().unwrap();
            nar.entry(b"a").unwrap();
            nar.enter_directory().unwrap();
            nar.entry(b"x").unwrap();
            nar.symlink(b"../a.b").unwrap();
            nar.leave_directory().unwrap();
            nar.entry(b"a.b").unwrap();
            file(nar, false, "Hello World\n");
            nar.leave_directory().unwrap();
        });
        assert_eq!(nested, "e5b817488239ba6ff403915a9e7c3e3a32bfe366");
    }
}
