//! What is still to be sent to other stores.
//!
//! A path that a build is about to make valid is queued for each destination *before* it is registered, so there is no
//! moment at which a crash leaves a path that was built and is not queued. A row without a valid path is harmless: whoever
//! sends drops it. Rows lie in the index and not in files of their own, because a build is answered after a durable point of
//! the index anyway: the queue costs no sync of its own, and is on disk whenever the path is. They are no roots: what is
//! collected before it was sent is not sent. A lost index loses them.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use castore::index::Batch;
use nix_compat::hash::sha256;
use nix_compat::store_path::StorePath;
use parking_lot::{Condvar, Mutex};

use crate::error::Result;
use crate::store::Store;

/// Paths that wait for one destination, about 100 bytes each. What is built when there are so many is not queued.
pub const MAX_QUEUED: usize = 100_000;
/// Bytes that tell a destination from others in keys.
const TARGET_LEN: usize = 8;

/// A destination, by the name under which paths are queued for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct UploadTarget([u8; TARGET_LEN]);

impl UploadTarget {
    /// The destination of this name, for example its URL.
    pub fn new(name: &str) -> Self {
        let mut target = [0; TARGET_LEN];
        target.copy_from_slice(&sha256(name.as_bytes())[..TARGET_LEN]);
        Self(target)
    }

    fn key(self, path: &StorePath) -> Vec<u8> {
        [&self.0[..], &path.digest()].concat()
    }
}

/// The queue as far as it is in memory.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    state: Mutex<State>,
    news: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The destinations there are, and how many paths wait for each.
    targets: BTreeMap<UploadTarget, usize>,
    /// Paths that are queued and about to become valid, with the number of builds that make them so.
    coming: BTreeMap<StorePath, usize>,
    /// Changes whenever there may be something new to send.
    generation: u64,
    /// What the generation was when paths were last queued that were queued already: whoever was sending one by then may
    /// have missed what is new about it.
    renewed: u64,
}

/// Paths that are queued and about to become valid. When it goes, they are, or never will be.
#[derive(Debug)]
pub struct Coming<'a> {
    store: &'a Store,
    paths: Vec<StorePath>,
    /// Whether some were queued already.
    again: bool,
}

impl Drop for Coming<'_> {
    fn drop(&mut self) {
        if self.paths.is_empty() {
            return;
        }
        let mut state = self.store.uploads.state.lock();
        for path in &self.paths {
            match state.coming.get_mut(path) {
                Some(count) if *count > 1 => *count -= 1,
                _ => drop(state.coming.remove(path)),
            }
        }
        state.generation += 1;
        if self.again {
            state.renewed = state.generation;
        }
        self.store.uploads.news.notify_all();
    }
}

impl Store {
    /// From here on, what is built is queued for these destinations. What was queued for others is forgotten; gives how
    /// many paths that are.
    ///
    /// # Errors
    /// When the index cannot be read or written.
    pub fn set_upload_targets(&self, targets: &[UploadTarget]) -> Result<usize> {
        let mut state = self.uploads.state.lock();
        state.targets = targets.iter().map(|target| (*target, 0)).collect();
        let (mut batch, mut forgotten) = (Batch::default(), 0);
        self.index().scan_prefix(&self.tables.uploads, &[], &mut |key, _| {
            let target = key.first_chunk().map(|target| UploadTarget(*target));
            match target.and_then(|target| state.targets.get_mut(&target)) {
                Some(count) => *count += 1,
                None => {
                    batch.delete(self.tables.uploads, key);
                    forgotten += 1;
                }
            }
            ControlFlow::Continue(())
        })?;
        if forgotten > 0 {
            self.commit(batch)?;
        }
        Ok(forgotten)
    }

    /// Queues paths that are about to be registered, or to be realisations of outputs, for all destinations. They are sent
    /// once the result is gone.
    ///
    /// # Errors
    /// When the index cannot be written.
    pub fn queue_uploads<'a>(&self, paths: impl IntoIterator<Item = &'a StorePath>) -> Result<Coming<'_>> {
        let mut coming = Coming { store: self, paths: Vec::new(), again: false };
        let mut state = self.uploads.state.lock();
        if state.targets.is_empty() {
            return Ok(coming);
        }
        let mut batch = Batch::default();
        let (mut full, mut queued) = (0, 0);
        let paths: Vec<StorePath> = paths.into_iter().cloned().collect();
        for path in &paths {
            for (target, count) in &mut state.targets {
                let key = target.key(path);
                if self.index().get(&self.tables.uploads, &key)?.is_some() {
                    coming.again = true;
                    continue;
                }
                if *count >= MAX_QUEUED {
                    full += 1;
                    continue;
                }
                batch.put(self.tables.uploads, &key, path.base_name().to_owned());
                *count += 1;
                queued += 1;
            }
        }
        if full > 0 {
            tracing::warn!(paths = full, "too many paths wait to be uploaded; these are not");
        }
        for path in &paths {
            *state.coming.entry(path.clone()).or_default() += 1;
        }
        coming.paths = paths;
        // Dropping `coming` takes the same lock.
        drop(state);
        if queued > 0 {
            self.commit(batch)?;
        }
        Ok(coming)
    }

    /// Up to `limit` paths that wait for a destination, in the order of their digests, from the one after `after` on. They
    /// need not be valid (any more).
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn queued_uploads(
        &self,
        target: UploadTarget,
        after: Option<&StorePath>,
        limit: usize,
    ) -> Result<Vec<StorePath>> {
        let state = self.uploads.state.lock();
        let start = after.map_or_else(|| target.0.to_vec(), |path| target.key(path));
        let after = after.map(StorePath::digest);
        let mut paths = Vec::new();
        self.index().scan_from(&self.tables.uploads, &start, &mut |key, name| {
            let Some((found, digest)) = key.split_first_chunk::<TARGET_LEN>() else { return ControlFlow::Continue(()) };
            if *found != target.0 || paths.len() >= limit {
                return ControlFlow::Break(());
            }
            let path = std::str::from_utf8(name).ok().and_then(|name| StorePath::from_base_name(name).ok());
            if let Some(path) = path.filter(|path| path.digest() == *digest && Some(path.digest()) != after)
                && !state.coming.contains_key(&path)
            {
                paths.push(path);
            }
            ControlFlow::Continue(())
        })?;
        Ok(paths)
    }

    /// Takes a path out of a destination's queue, when it has been sent as it was at the generation `since`: what was queued
    /// again after that stays, since there is something new about it.
    ///
    /// # Errors
    /// When the index cannot be written.
    pub fn unqueue_upload(&self, target: UploadTarget, path: &StorePath, since: u64) -> Result<()> {
        let mut state = self.uploads.state.lock();
        let key = target.key(path);
        if since < state.renewed {
            return Ok(());
        }
        // Whoever makes it valid just now has queued it anew.
        if state.coming.contains_key(path) || self.index().get(&self.tables.uploads, &key)?.is_none() {
            return Ok(());
        }
        let mut batch = Batch::default();
        batch.delete(self.tables.uploads, &key);
        self.commit(batch)?;
        if let Some(count) = state.targets.get_mut(&target) {
            *count = count.saturating_sub(1);
        }
        Ok(())
    }

    /// How many paths wait for a destination.
    pub fn upload_count(&self, target: UploadTarget) -> usize {
        self.uploads.state.lock().targets.get(&target).copied().unwrap_or_default()
    }

    /// Changes whenever there may be something new to send.
    pub fn upload_generation(&self) -> u64 {
        self.uploads.state.lock().generation
    }

    /// Waits until the generation is another than `seen`, for so long at most.
    pub fn wait_for_uploads(&self, seen: u64, limit: Duration) {
        let deadline = Instant::now() + limit;
        let mut state = self.uploads.state.lock();
        while state.generation == seen && !self.uploads.news.wait_until(&mut state, deadline).timed_out() {}
    }

    /// Has all that wait look again, for example whether they are to end.
    pub fn wake_uploads(&self) {
        self.uploads.state.lock().generation += 1;
        self.uploads.news.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use nix_compat::store_path::StoreDir;

    use super::*;
    use crate::store::Config;

    fn path(name: &str) -> StorePath {
        StorePath::from_parts(sha256(name.as_bytes())[..20].try_into().unwrap(), name).unwrap()
    }

    #[test]
    fn what_is_queued_waits_for_each_destination_also_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let config = || Config::new(StoreDir::default(), dir.path());
        let [one, two, three] = ["one", "two", "three"].map(UploadTarget::new);
        let paths: Vec<StorePath> = (0..10).map(|number| path(&format!("p{number}"))).collect();
        let store = Store::open(config()).unwrap();
        drop(store.queue_uploads(&paths[..1]).unwrap());
        assert_eq!(store.upload_count(one), 0, "there is no destination");
        assert_eq!(store.set_upload_targets(&[one, two]).unwrap(), 0);
        let seen = store.upload_generation();
        let coming = store.queue_uploads(&paths).unwrap();
        assert!(store.queued_uploads(one, None, 100).unwrap().is_empty(), "they are not valid yet");
        store.unqueue_upload(one, &paths[0], store.upload_generation()).unwrap();
        drop(coming);
        assert_ne!(store.upload_generation(), seen);
        let mut sorted = paths.clone();
        sorted.sort_by_key(StorePath::digest);
        assert_eq!(store.queued_uploads(one, None, 100).unwrap(), sorted);
        assert_eq!(store.queued_uploads(one, None, 3).unwrap(), sorted[..3]);
        assert_eq!(store.queued_uploads(one, Some(&sorted[2]), 3).unwrap(), sorted[3..6]);
        store.unqueue_upload(one, &sorted[0], store.upload_generation()).unwrap();
        store.unqueue_upload(one, &sorted[0], store.upload_generation()).unwrap();
        drop(store.queue_uploads(&sorted[1..2]).unwrap());
        assert_eq!((store.upload_count(one), store.upload_count(two)), (9, 10));
        store.sync().unwrap();
        drop(store);
        let store = Store::open(config()).unwrap();
        assert_eq!(store.set_upload_targets(&[one, three]).unwrap(), 10);
        assert_eq!(store.queued_uploads(one, None, 100).unwrap(), sorted[1..]);
        assert_eq!([one, two, three].map(|target| store.upload_count(target)), [9, 0, 0]);
        assert!(store.queued_uploads(two, None, 100).unwrap().is_empty());
    }

    #[test]
    fn what_is_queued_again_while_it_is_sent_is_sent_again() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(Config::new(StoreDir::default(), dir.path())).unwrap();
        let (target, paths) = (UploadTarget::new("one"), [path("one")]);
        store.set_upload_targets(&[target]).unwrap();
        drop(store.queue_uploads(&paths).unwrap());
        let sending = store.upload_generation();
        // Something that goes with it is registered now.
        drop(store.queue_uploads(&paths).unwrap());
        store.unqueue_upload(target, &paths[0], sending).unwrap();
        assert_eq!(store.queued_uploads(target, None, 10).unwrap(), paths);
        store.unqueue_upload(target, &paths[0], store.upload_generation()).unwrap();
        assert_eq!(store.upload_count(target), 0);
    }

    #[test]
    fn a_queue_that_is_full_takes_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(Config::new(StoreDir::default(), dir.path())).unwrap();
        let target = UploadTarget::new("one");
        store.set_upload_targets(&[target]).unwrap();
        let paths: Vec<StorePath> = (0..MAX_QUEUED + 1).map(|number| path(&format!("p{number}"))).collect();
        drop(store.queue_uploads(&paths).unwrap());
        assert_eq!(store.upload_count(target), MAX_QUEUED);
        store.unqueue_upload(target, &paths[0], store.upload_generation()).unwrap();
        drop(store.queue_uploads(&paths[MAX_QUEUED..]).unwrap());
        assert_eq!(store.upload_count(target), MAX_QUEUED);
    }
}
