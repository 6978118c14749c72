//! Temporary roots: what a client is working with and has not rooted yet.
//!
//! Each connection has its own set, which goes with the connection. Only this process collects garbage here
//! (stock's collector cannot open our index), so the sets live in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use nix_compat::store_path::StorePath;
use parking_lot::Mutex;

/// All temporary roots of the daemon, counted: several connections may hold one path.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    counts: Mutex<BTreeMap<StorePath, usize>>,
}

impl Registry {
    pub(crate) fn snapshot(&self) -> BTreeSet<StorePath> {
        self.counts.lock().keys().cloned().collect()
    }

    pub(crate) fn contains(&self, path: &StorePath) -> bool {
        self.counts.lock().contains_key(path)
    }
}

/// The temporary roots of one connection or build. Dropping it drops the roots.
#[derive(Debug)]
pub struct TempRoots {
    registry: Arc<Registry>,
    own: Mutex<BTreeSet<StorePath>>,
}

impl TempRoots {
    pub(crate) fn new(registry: Arc<Registry>) -> Self {
        Self { registry, own: Mutex::default() }
    }

    /// Keeps `path`, valid or not, from being collected. Once this returns, no collection that has not
    /// already deleted the path will.
    pub fn add(&self, path: &StorePath) {
        let mut own = self.own.lock();
        if own.insert(path.clone()) {
            *self.registry.counts.lock().entry(path.clone()).or_default() += 1;
        }
    }
}

impl Drop for TempRoots {
    fn drop(&mut self) {
        let mut counts = self.registry.counts.lock();
        for path in self.own.get_mut().iter() {
            if let Some(count) = counts.get_mut(path) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(path);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_lasts_as_long_as_its_last_holder() {
        let registry = Arc::new(Registry::default());
        let path = StorePath::from_parts([1; 20], "a").unwrap();
        let (one, two) = (TempRoots::new(registry.clone()), TempRoots::new(registry.clone()));
        one.add(&path);
        one.add(&path);
        two.add(&path);
        drop(one);
        assert!(registry.contains(&path));
        drop(two);
        assert!(registry.snapshot().is_empty());
    }
}
