//! What the tests of the store have in common.

// Not every test file uses everything.
#![allow(dead_code)]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix_compat::hash::{NarHash, sha256};
use nix_compat::nar::NarWriter;
use nix_compat::path_info::PathInfo;
use nix_compat::store_path::{StoreDir, StorePath};
use store::{Config, Error, GcAction, GcOptions, GcScope, Store};

/// A store in a directory of its own.
pub(crate) struct Fixture {
    pub(crate) dir: tempfile::TempDir,
    store: Option<Arc<Store>>,
}

impl Fixture {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Some(Store::open(Config::new(StoreDir::default(), dir.path())).unwrap());
        Self { dir, store }
    }

    pub(crate) fn store(&self) -> &Arc<Store> {
        self.store.as_ref().unwrap()
    }

    pub(crate) fn reopen(&mut self) {
        self.store = None;
        self.store = Some(open(self.dir.path()));
    }

    /// Lets go of the store, waiting until whoever else uses it has.
    pub(crate) fn closed(mut self) -> Self {
        self.reopen();
        self.store = None;
        drop(open(self.dir.path()));
        self
    }

    /// The store that lies in a directory.
    pub(crate) fn over(dir: tempfile::TempDir) -> Self {
        let store = Some(open(dir.path()));
        Self { dir, store }
    }
}

fn open(dir: &std::path::Path) -> Arc<Store> {
    let began = Instant::now();
    loop {
        match Store::open(Config::new(StoreDir::default(), dir)) {
            // A sweep may still be letting go of it.
            Err(Error::InUse { .. }) if began.elapsed().as_secs() < 30 => {
                std::thread::sleep(Duration::from_millis(10));
            }
            opened => return opened.unwrap(),
        }
    }
}

/// A directory with an executable, a link, and `size` bytes of data.
pub(crate) fn nar(seed: &str, size: usize) -> Vec<u8> {
    let mut nar = NarWriter::new(Vec::new());
    nar.enter_directory().unwrap();
    nar.entry(b"bin").unwrap();
    nar.enter_directory().unwrap();
    nar.entry(b"run").unwrap();
    nar.regular_header(true, seed.len() as u64).unwrap();
    nar.contents(seed.as_bytes()).unwrap();
    nar.end_regular().unwrap();
    nar.leave_directory().unwrap();
    nar.entry(b"data").unwrap();
    let data: Vec<u8> = (0..size).map(|i| (i * i / 7 + seed.len()) as u8).collect();
    nar.regular_header(false, size as u64).unwrap();
    nar.contents(&data).unwrap();
    nar.end_regular().unwrap();
    nar.entry(b"link").unwrap();
    nar.symlink(b"bin/run").unwrap();
    nar.leave_directory().unwrap();
    nar.finish().unwrap()
}

/// What is claimed of `nar`, under a path that follows from the name.
pub(crate) fn info(name: &str, nar: &[u8], references: &[&StorePath]) -> PathInfo {
    PathInfo {
        path: StorePath::from_parts(sha256(name.as_bytes())[..20].try_into().unwrap(), name).unwrap(),
        deriver: None,
        nar_hash: NarHash::from(sha256(nar)),
        references: references.iter().map(|r| (*r).clone()).collect(),
        registration_time: 0,
        nar_size: nar.len() as u64,
        ultimate: false,
        signatures: BTreeSet::new(),
        ca: None,
    }
}

/// Adds a path of some size.
pub(crate) fn add(store: &Store, name: &str, references: &[&StorePath]) -> StorePath {
    let nar = nar(name, 100_000);
    let info = info(name, &nar, references);
    let path = info.path.clone();
    store.add_with_info(info, &mut &nar[..]).unwrap();
    path
}

/// The options of stock's defaults.
pub(crate) fn gc(action: GcAction) -> GcOptions {
    let scope = GcScope::WholeStore;
    GcOptions { action, scope, max_freed: u64::MAX, keep_derivations: true, keep_outputs: false }
}

/// A collection that looks at some paths.
pub(crate) fn gc_of<const N: usize>(action: GcAction, paths: [&StorePath; N], with_referrers: bool) -> GcOptions {
    let paths = paths.into_iter().cloned().collect();
    GcOptions { scope: GcScope::Paths { paths, with_referrers }, ..gc(action) }
}
