//! Which paths damaged objects are part of.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::ControlFlow;

use castore::objects::{ObjectKey, ObjectKind};
use castore::{BlobService, Digest, DirectoryService, Node};
use nix_compat::store_path::StorePath;

use super::{PathDamage, Report};
use crate::error::{Result, causes};
use crate::records::{key_of_path, key_of_realisation};
use crate::store::Store;

/// Looks for damaged objects in trees. Every directory and blob is looked into once.
pub(super) struct Users<'a> {
    store: &'a Store,
    damaged: HashSet<ObjectKey>,
    /// What is damaged below a directory, or of a blob, if anything is.
    directories: HashMap<Digest, Option<ObjectKey>>,
    blobs: HashMap<Digest, Option<ObjectKey>>,
    /// What of the damaged was come across.
    used: HashSet<ObjectKey>,
}

impl<'a> Users<'a> {
    pub(super) fn new(store: &'a Store, damaged: HashSet<ObjectKey>) -> Self {
        Self { store, damaged, directories: HashMap::new(), blobs: HashMap::new(), used: HashSet::new() }
    }

    /// A damaged object of the tree.
    pub(super) fn damage_of(&mut self, root: &Node) -> Option<ObjectKey> {
        match root {
            Node::Symlink { .. } => None,
            Node::File { digest, .. } => self.of_blob(digest),
            Node::Directory { digest, .. } => self.of_directory(digest),
        }
    }

    fn of_directory(&mut self, root: &Digest) -> Option<ObjectKey> {
        // Depth first on a stack of our own; a directory is decided when all below it is.
        let mut stack = vec![(*root, false)];
        while let Some((digest, seen_below)) = stack.pop() {
            if self.directories.contains_key(&digest) {
                continue;
            }
            let key = ObjectKey { kind: ObjectKind::Directory, digest };
            let directory = match self.store.engine.get(&digest) {
                Ok(Some(directory)) if !self.damaged.contains(&key) => directory,
                _ => {
                    self.used.insert(key);
                    self.directories.insert(digest, Some(key));
                    continue;
                }
            };
            if !seen_below {
                stack.push((digest, true));
                let below = directory.entries().filter_map(|(_, node)| match node {
                    Node::Directory { digest, .. } => Some((*digest, false)),
                    _ => None,
                });
                stack.extend(below);
                continue;
            }
            let mut damage = None;
            for (_, node) in directory.entries() {
                // All of them are looked at, so that everything that is used is known.
                let found = match node {
                    Node::Directory { digest, .. } => self.directories.get(digest).copied().flatten(),
                    Node::File { digest, .. } => self.of_blob(digest),
                    Node::Symlink { .. } => None,
                };
                damage = damage.or(found);
            }
            self.directories.insert(digest, damage);
        }
        self.directories.get(root).copied().flatten()
    }

    fn of_blob(&mut self, digest: &Digest) -> Option<ObjectKey> {
        if let Some(known) = self.blobs.get(digest) {
            return *known;
        }
        let key = |kind, digest: &Digest| ObjectKey { kind, digest: *digest };
        let whole = key(ObjectKind::Chunk, digest);
        let list = key(ObjectKind::ChunkList, digest);
        let damage = if self.damaged.contains(&whole) {
            Some(whole)
        } else if self.damaged.contains(&list) {
            Some(list)
        } else {
            match self.store.engine.stat(digest) {
                Ok(Some(stat)) => {
                    let chunks = stat.chunks.iter().map(|(digest, _)| key(ObjectKind::Chunk, digest));
                    let damaged: Vec<ObjectKey> = chunks.filter(|chunk| self.damaged.contains(chunk)).collect();
                    self.used.extend(&damaged);
                    damaged.first().copied()
                }
                // What is only expected is not damaged.
                Ok(None) if matches!(self.store.engine.promised(digest), Ok(Some(_))) => None,
                Ok(None) => Some(whole),
                Err(_) => Some(list),
            }
        };
        self.used.extend(damage);
        self.blobs.insert(*digest, damage);
        damage
    }
}

impl Store {
    /// The paths of which an object is damaged, each with one such object; and those objects that are used at all. The
    /// others are garbage.
    pub(crate) fn users_of(
        &self,
        damaged: HashSet<ObjectKey>,
    ) -> Result<(BTreeMap<StorePath, ObjectKey>, HashSet<ObjectKey>)> {
        let mut users = BTreeMap::new();
        if damaged.is_empty() {
            return Ok((users, damaged));
        }
        let mut trees = Users::new(self, damaged);
        self.for_each_readable(&mut |entry| {
            if let Some(key) = trees.damage_of(&entry.node) {
                users.insert(entry.info.path, key);
            }
            ControlFlow::Continue(())
        })?;
        let Users { mut used, damaged, .. } = trees;
        self.each_row(&mut |key, row| {
            let record = key.map_or_else(|| key_of_path(row), |key| key_of_realisation(key, row));
            if damaged.contains(&record) {
                used.insert(record);
            }
            Ok(())
        })?;
        Ok((users, used))
    }

    /// Names all paths that damaged objects are part of.
    pub(super) fn find_users_of_damage(&self, report: &mut Report) -> Result<()> {
        let reasons: HashMap<ObjectKey, String> =
            report.damaged.iter().map(|object| (object.key, causes(&object.damage))).collect();
        let (users, used) = self.users_of(reasons.keys().copied().collect())?;
        report.damaged.retain(|object| used.contains(&object.key));
        for (path, key) in users {
            let reason = reasons.get(&key).map_or("it is missing", String::as_str);
            let message = format!("path '{}' is damaged: {key}: {reason}", self.store_dir().display(&path));
            report.affected.entry(path).or_insert(PathDamage { message, other_contents: false, missing: None });
        }
        Ok(())
    }
}
