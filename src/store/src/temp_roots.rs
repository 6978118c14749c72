//! Temporary roots: what a client is working with and has not rooted yet.
//!
//! Each connection has its own set, which goes with the connection. Only this process collects garbage here
//! (stock's collector cannot open our index), so the sets that count live in memory. Each is written to a file as well,
//! where stock tools look ([`file`]).
//!
//! A client hands a path over by making a permanent root and going away. A collection that looked at the permanent
//! roots before the first and looks at the temporary ones after the second would see neither, so while one runs,
//! temporary roots that are dropped *linger* until it ends.

mod file;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix_compat::store_path::{StoreDir, StorePath};
use parking_lot::Mutex;

use file::RootsFile;

pub(crate) use file::others;

/// The directory of the files, below the state directory.
pub(crate) const TEMP_ROOTS: &str = "temproots";

/// All temporary roots of the daemon.
#[derive(Debug)]
pub(crate) struct Registry {
    /// Where the files are.
    dir: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Counted: several connections may hold one path.
    counts: BTreeMap<StorePath, usize>,
    /// Collections that are running.
    collections: usize,
    /// What was dropped since the first of them began. Each path was named in a request, and it lasts no longer than
    /// the collection.
    lingering: BTreeSet<StorePath>,
}

impl State {
    fn holds(&self, path: &StorePath) -> bool {
        self.counts.contains_key(path) || self.lingering.contains(path)
    }
}

impl Registry {
    pub(crate) fn new(dir: PathBuf) -> Self {
        Self { dir, state: Mutex::default() }
    }

    /// Where the files are.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn snapshot(&self) -> BTreeSet<StorePath> {
        let state = self.state.lock();
        state.counts.keys().chain(&state.lingering).cloned().collect()
    }

    /// From now on until the guard is dropped, no temporary root goes away. To be called before roots are looked for.
    pub(crate) fn begin_collection(self: &Arc<Self>) -> Collecting {
        self.state.lock().collections += 1;
        Collecting(Arc::clone(self))
    }

    /// Calls `act` unless one of `paths` is a temporary root; else says which are. None can become one in between.
    pub(crate) fn unless_held<'a, T>(
        &self,
        paths: impl Iterator<Item = &'a StorePath>,
        act: impl FnOnce() -> T,
    ) -> Result<T, Vec<StorePath>> {
        let state = self.state.lock();
        let held: Vec<StorePath> = paths.filter(|path| state.holds(path)).cloned().collect();
        if held.is_empty() { Ok(act()) } else { Err(held) }
    }
}

/// A collection is running.
#[derive(Debug)]
pub(crate) struct Collecting(Arc<Registry>);

impl Drop for Collecting {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.collections -= 1;
        if state.collections == 0 {
            state.lingering.clear();
        }
    }
}

/// The temporary roots of one connection or build. Dropping it drops the roots.
#[derive(Debug)]
pub struct TempRoots {
    registry: Arc<Registry>,
    own: Mutex<Own>,
    store_dir: StoreDir,
}

#[derive(Debug, Default)]
struct Own {
    paths: BTreeSet<StorePath>,
    file: RootsFile,
}

impl TempRoots {
    pub(crate) fn new(registry: Arc<Registry>, store_dir: StoreDir) -> Self {
        Self { registry, own: Mutex::default(), store_dir }
    }

    /// Keeps `path`, valid or not, from being collected. Once this returns, no collection that has not
    /// already deleted the path will.
    pub fn add(&self, path: &StorePath) {
        let mut own = self.own.lock();
        if own.paths.insert(path.clone()) {
            *self.registry.state.lock().counts.entry(path.clone()).or_default() += 1;
            own.file.append(self.registry.dir(), &self.store_dir.display(path));
        }
    }
}

impl Drop for TempRoots {
    fn drop(&mut self) {
        let mut state = self.registry.state.lock();
        for path in std::mem::take(&mut self.own.get_mut().paths) {
            if let Some(count) = state.counts.get_mut(&path) {
                *count -= 1;
                if *count == 0 {
                    state.counts.remove(&path);
                }
            }
            if state.collections > 0 {
                state.lingering.insert(path);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registry() -> (tempfile::TempDir, Arc<Registry>) {
        let dir = tempfile::tempdir().unwrap();
        let registry = Arc::new(Registry::new(dir.path().to_owned()));
        (dir, registry)
    }

    fn roots(registry: &Arc<Registry>) -> TempRoots {
        TempRoots::new(registry.clone(), StoreDir::default())
    }

    fn path(name: &str) -> StorePath {
        StorePath::from_parts([1; 20], name).unwrap()
    }

    #[test]
    fn a_root_lasts_as_long_as_its_last_holder() {
        let (_dir, registry) = registry();
        let path = path("a");
        let (one, two) = (roots(&registry), roots(&registry));
        one.add(&path);
        one.add(&path);
        two.add(&path);
        drop(one);
        assert_eq!(registry.snapshot(), BTreeSet::from([path.clone()]));
        drop(two);
        assert!(registry.snapshot().is_empty());
    }

    #[test]
    fn a_root_that_is_dropped_while_a_collection_runs_lasts_until_the_last_one_ends() {
        let (_dir, registry) = registry();
        let path = path("a");
        let roots = roots(&registry);
        roots.add(&path);
        let (first, second) = (registry.begin_collection(), registry.begin_collection());
        drop(roots);
        drop(first);
        assert_eq!(registry.snapshot(), BTreeSet::from([path.clone()]));
        assert_eq!(registry.unless_held([&path].into_iter(), || ()), Err(vec![path]));
        drop(second);
        assert!(registry.snapshot().is_empty());
    }

    #[test]
    fn nobody_takes_a_root_while_something_is_done_to_it() {
        let (_dir, registry) = registry();
        let path = path("a");
        let roots = roots(&registry);
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            registry
                .unless_held([&path].into_iter(), || {
                    scope.spawn(|| {
                        roots.add(&path);
                        sender.send(()).unwrap();
                    });
                    let waited = receiver.recv_timeout(std::time::Duration::from_millis(100));
                    assert!(waited.is_err(), "the root was acknowledged in the middle");
                })
                .unwrap();
            receiver.recv().unwrap();
        });
    }

    #[test]
    fn stock_tools_see_the_roots_of_a_connection_while_it_lasts() {
        let (dir, registry) = registry();
        let roots = roots(&registry);
        let files = || std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
        assert!(files().is_empty());
        for name in ["a", "b", "a"] {
            roots.add(&path(name));
        }
        let file = files().pop().unwrap();
        let [a, b] = ["a", "b"].map(|name| StoreDir::default().display(&path(name)));
        assert_eq!(std::fs::read_to_string(&file).unwrap(), format!("{a}\0{b}\0"));
        // A collector that can lock the file may take it for that of a dead process.
        let second = std::fs::File::open(&file).unwrap();
        assert!(second.try_lock().is_err());
        assert!(
            others(dir.path(), &StoreDir::default(), &mut |_| {}).unwrap().is_empty(),
            "the daemon's own are in memory"
        );
        drop(roots);
        assert!(files().is_empty());
    }

    #[test]
    fn files_of_others_count_while_their_process_lives() {
        let (dir, registry) = registry();
        drop(registry);
        let text = format!("{}\0not a path\0", StoreDir::default().display(&path("a")));
        let (alive, dead) = (dir.path().join("4711"), dir.path().join("4712"));
        std::fs::write(&alive, &text).unwrap();
        std::fs::write(&dead, &text).unwrap();
        let process = std::fs::File::open(&alive).unwrap();
        process.lock().unwrap();
        let mut removed = Vec::new();
        let found = others(dir.path(), &StoreDir::default(), &mut |file| removed.push(file)).unwrap();
        assert_eq!(removed, std::slice::from_ref(&dead));
        assert_eq!(found, [("4711".to_owned(), path("a"))]);
        assert!(alive.exists() && !dead.exists());
    }
}
