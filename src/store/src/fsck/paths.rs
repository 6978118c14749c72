//! One path, from the disk up.

use std::collections::{BTreeSet, HashSet};
use std::ops::ControlFlow;

use castore::objects::{ObjectKey, ObjectKind};
use castore::{BlobService, DirectoryService, Node};
use nix_compat::store_path::StorePath;

use super::PathDamage;
use crate::error::{Result, causes};
use crate::store::Store;

impl Store {
    /// Checks one path: its references, its objects as they are on disk, its NAR. What is damaged is known to be so
    /// afterwards, so that contents that are put again take its place.
    ///
    /// Memory: 33 bytes, and what a set costs, for each object of the path.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub(crate) fn check_path(&self, path: &StorePath) -> Result<Option<PathDamage>> {
        let Some(entry) = self.entry(path)? else { return Ok(None) };
        let objects = self.engine.objects();
        let damaged = objects.check_some(&self.objects_of(&entry.node)).map_err(castore::Error::from)?;
        objects.mark_damaged(damaged.iter().map(|object| object.key));
        if let Some(first) = damaged.first()
            && self.is_valid(path)?
        {
            let reason = causes(&first.damage);
            let message = format!("path '{}' is damaged: {}: {reason}", self.store_dir().display(path), first.key);
            return Ok(Some(PathDamage { message, other_contents: false, missing: None }));
        }
        self.verify_damage(path, true)
    }

    /// As a check, but saves what is intact in damaged blocks first. Tells what is wrong still.
    ///
    /// # Errors
    /// When the index or the packs cannot be read or written.
    pub fn heal_path(&self, path: &StorePath) -> Result<Option<String>> {
        let Some(damage) = self.check_path(path)? else { return Ok(None) };
        let Some(entry) = self.entry(path)? else { return Ok(Some(damage.message)) };
        let objects = self.engine.objects();
        objects.restore_files().map_err(castore::Error::from)?;
        objects.restore_damaged_headers().map_err(castore::Error::from)?;
        let damaged = objects.check_some(&self.objects_of(&entry.node)).map_err(castore::Error::from)?;
        if !damaged.is_empty() {
            objects.salvage(damaged).map_err(castore::Error::from)?;
        }
        Ok(self.check_path(path)?.map(|damage| damage.message))
    }

    /// The objects of a tree, as far as it can be read.
    fn objects_of(&self, root: &Node) -> BTreeSet<ObjectKey> {
        let mut keys = BTreeSet::new();
        let mut seen = HashSet::new();
        let mut stack = vec![root.clone()];
        while let Some(node) = stack.pop() {
            match node {
                Node::Symlink { .. } => {}
                Node::Directory { digest, .. } => {
                    let key = ObjectKey { kind: ObjectKind::Directory, digest };
                    if keys.insert(key)
                        && let Ok(Some(directory)) = self.engine.get(&digest)
                    {
                        stack.extend(directory.entries().map(|(_, node)| node.clone()));
                    }
                }
                Node::File { digest, .. } => {
                    if seen.insert(digest) {
                        keys.insert(ObjectKey { kind: ObjectKind::ChunkList, digest });
                        keys.insert(ObjectKey { kind: ObjectKind::Chunk, digest });
                        let stat = self.engine.stat(&digest).ok().flatten();
                        let chunks = stat.into_iter().flat_map(|stat| stat.chunks);
                        keys.extend(chunks.map(|(digest, _)| ObjectKey { kind: ObjectKind::Chunk, digest }));
                    }
                }
            }
        }
        keys
    }

    /// Checks some paths only.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn fsck_paths(&self, paths: &BTreeSet<StorePath>, watch: &dyn super::Watch) -> Result<super::Report> {
        let mut report = super::Report::default();
        watch.stage(super::Stage::Paths, paths.len() as u64);
        for path in paths {
            report.paths += 1;
            watch.path(path);
            if let Some(damage) = self.check_path(path)? {
                report.affected.insert(path.clone(), damage);
            }
            if watch.advance(1).is_break() {
                report.ended = true;
                break;
            }
        }
        Ok(report)
    }

    /// Checks of every path only that what it refers to is valid.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn fsck_references(&self, watch: &dyn super::Watch) -> Result<super::Report> {
        let mut report = super::Report::default();
        let mut paths = Vec::new();
        self.for_each(&mut |entry| {
            paths.push(entry.info.path);
            ControlFlow::Continue(())
        })?;
        watch.stage(super::Stage::Paths, paths.len() as u64);
        for path in paths {
            report.paths += 1;
            if let Some(damage) = self.verify_damage(&path, false)? {
                report.affected.insert(path, damage);
            }
            if watch.advance(1).is_break() {
                report.ended = true;
                break;
            }
        }
        Ok(report)
    }
}
