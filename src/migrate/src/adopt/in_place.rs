//! Freeing old files while paths are adopted, for those who have no room for two copies.
//!
//! **A path's old files are removed only after castored's are on disk and its NAR has been read back from there with the
//! hash that stock recorded.** What the running system uses is kept to the end ([`super::in_use`]).

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use nix_compat::store_path::StorePath;
use parking_lot::Mutex;
use store::Store;

use super::in_use::InUse;
use crate::error::{Error, Result};
use crate::places::StockPlaces;
use crate::progress::Progress;

/// Paths that are made durable together.
const BATCH: usize = 256;

/// Removes old files of paths that castored has.
pub(super) struct Freeing<'a> {
    store: &'a Arc<Store>,
    from: &'a StockPlaces,
    progress: &'a dyn Progress,
    in_use: InUse,
    waiting: Mutex<Vec<StorePath>>,
    counts: Mutex<(u64, u64)>,
}

impl<'a> Freeing<'a> {
    pub(super) fn new(store: &'a Arc<Store>, from: &'a StockPlaces, progress: &'a dyn Progress) -> Result<Self> {
        let in_use = InUse::new(store, from)?;
        Ok(Self { store, from, progress, in_use, waiting: Mutex::default(), counts: Mutex::default() })
    }

    /// castored has this path now.
    pub(super) fn adopted(&self, path: &StorePath) -> Result<()> {
        let batch = {
            let mut waiting = self.waiting.lock();
            waiting.push(path.clone());
            if waiting.len() < BATCH {
                return Ok(());
            }
            std::mem::take(&mut *waiting)
        };
        self.free(batch)
    }

    fn free(&self, batch: Vec<StorePath>) -> Result<()> {
        self.store.sync()?;
        let in_use = self.in_use.find(self.store)?;
        for path in batch {
            let old = self.from.store.join(path.base_name());
            if fs::symlink_metadata(&old).is_err_and(|e| e.kind() == io::ErrorKind::NotFound) {
                continue;
            }
            if in_use.contains(&path) {
                self.counts.lock().1 += 1;
                continue;
            }
            if let Some(wrong) = self.store.verify_path(&path, true)? {
                self.progress.note(&format!("keeping the old files: {wrong}"));
                self.counts.lock().1 += 1;
                continue;
            }
            remove_tree(&old)?;
            self.counts.lock().0 += 1;
        }
        Ok(())
    }

    /// Frees the rest. Answers how many old paths were removed and how many kept.
    pub(super) fn finish(self) -> Result<(u64, u64)> {
        let rest = std::mem::take(&mut *self.waiting.lock());
        self.free(rest)?;
        Ok(*self.counts.lock())
    }
}

/// Removes a path's files. Directories in a store may not be written to, also by their owner.
pub(crate) fn remove_tree(path: &Path) -> Result<()> {
    let is_directory = |path: &Path| fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir());
    let mut directories = Vec::new();
    if is_directory(path) {
        directories.push(path.to_owned());
    }
    while let Some(dir) = directories.pop() {
        fs::set_permissions(&dir, Permissions::from_mode(0o755)).map_err(Error::file("open to ourselves", &dir))?;
        for entry in fs::read_dir(&dir).map_err(Error::file("read", &dir))? {
            let entry = entry.map_err(Error::file("read", &dir))?;
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                directories.push(entry.path());
            }
        }
    }
    let removed = if is_directory(path) { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::file("remove", path)(e)),
        _ => Ok(()),
    }
}
