//! What happens between the walk and the deletion: each test has its own idea of that.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::sync::Arc;

use castore::Node;
use nix_compat::hash::{NarHash, sha256};
use nix_compat::path_info::PathInfo;
use nix_compat::store_path::{StoreDir, StorePath};

use super::{CHUNK, Deletion, Start};
use crate::error::{Error, Result};
use crate::gc::graph::Graph;
use crate::gc::{GcOutcome, GcStep, GcWatch};
use crate::register::NewPath;
use crate::store::{Config, Store};

fn open() -> (tempfile::TempDir, Arc<Store>) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(Config::new(StoreDir::default(), dir.path())).unwrap();
    (dir, store)
}

fn path(name: &str) -> StorePath {
    StorePath::from_parts(sha256(name.as_bytes())[..20].try_into().unwrap(), name).unwrap()
}

fn register(store: &Store, name: &str, references: &[&str]) -> StorePath {
    let info = PathInfo {
        path: path(name),
        deriver: None,
        nar_hash: NarHash::from([1; 32]),
        references: references.iter().map(|name| path(name)).collect(),
        registration_time: 0,
        nar_size: 1000,
        ultimate: false,
        signatures: BTreeSet::new(),
        ca: None,
    };
    let node = Node::Symlink { target: "somewhere".as_bytes().to_vec().try_into().unwrap() };
    store.register(vec![NewPath { info, node, pin: None }]).unwrap();
    path(name)
}

/// What a walk found, at a time when everything was dead.
struct Walked {
    start: Start,
    graph: Graph,
}

fn walked(store: &Store) -> Walked {
    let start = Start::now(store);
    Walked { start, graph: Graph::read(store, &|| true).unwrap() }
}

impl Walked {
    fn delete(&self, store: &Store, max_freed: u64) -> Result<GcOutcome> {
        Deletion::new(store, &self.graph, self.start, self.graph.paths(), &()).delete(max_freed)
    }

    fn delete_all(&self, store: &Store, named: &[&StorePath]) -> Result<GcOutcome> {
        let named = named.iter().map(|path| self.graph.find(path).unwrap());
        Deletion::new(store, &self.graph, self.start, named, &()).delete_all()
    }
}

fn is_whole(store: &Store) -> bool {
    store.verify(false, &mut |_| std::ops::ControlFlow::Continue(())).unwrap().is_empty()
}

#[test]
fn more_than_a_chunk_goes_and_never_before_its_referrers() {
    let (_dir, store) = open();
    let count = 2 * CHUNK + 10;
    let names: Vec<String> = (0..count).map(|i| format!("path-{i}")).collect();
    register(&store, &names[0], &[]);
    for pair in names.windows(2) {
        register(&store, &pair[1], &[&pair[0]]);
    }
    let dead = walked(&store);
    // Stops in the middle: what is left must be whole.
    let freed = dead.delete(&store, 1000 * (CHUNK as u64 + 5)).unwrap();
    assert_eq!(freed.paths.len(), CHUNK + 5);
    assert!(is_whole(&store));
    assert_eq!(dead.delete(&store, u64::MAX).unwrap().paths.len(), count - CHUNK - 5);
    assert!(store.all_valid_paths().unwrap().is_empty());
    assert!(store.referrers(&path("path-0")).unwrap().is_empty());
}

#[test]
fn what_was_rooted_since_the_walk_stays_with_what_it_needs() {
    let (_dir, store) = open();
    let a = register(&store, "a", &[]);
    let b = register(&store, "b", &["a"]);
    let c = register(&store, "c", &["b"]);
    let dead = walked(&store);
    let roots = store.new_temp_roots();
    roots.add(&b);
    assert!(matches!(dead.delete_all(&store, &[&a, &b, &c]), Err(Error::Alive(_))));
    assert_eq!(dead.delete(&store, u64::MAX).unwrap().paths, BTreeSet::from([c]));
    assert_eq!(store.all_valid_paths().unwrap(), BTreeSet::from([a, b]));
}

#[test]
fn what_was_rooted_and_let_go_since_the_collection_began_stays() {
    let (_dir, store) = open();
    let a = register(&store, "a", &[]);
    let collecting = store.temp_roots.begin_collection();
    let dead = walked(&store);
    // Handed over to a root that was made behind the back of the search for roots.
    let link = store.state_dir().join("result");
    std::os::unix::fs::symlink(store.store_dir().display(&a), &link).unwrap();
    store.add_indirect_root(&link).unwrap();
    assert!(dead.delete(&store, u64::MAX).unwrap().paths.is_empty());
    drop(collecting);
    // Whoever deletes without having looked for roots finds nothing that keeps it.
    assert_eq!(dead.delete(&store, u64::MAX).unwrap().paths, BTreeSet::from([a]));
}

#[test]
fn what_was_referred_to_or_registered_anew_since_the_walk_stays() {
    let (_dir, store) = open();
    let a = register(&store, "a", &[]);
    let b = register(&store, "b", &[]);
    let dead = walked(&store);
    let c = register(&store, "c", &["a"]);
    dead.delete_all(&store, &[&b]).unwrap();
    register(&store, "b", &[]);
    assert!(dead.delete(&store, u64::MAX).unwrap().paths.is_empty());
    assert_eq!(store.all_valid_paths().unwrap(), BTreeSet::from([a, b, c]));
}

/// Registers paths that may refer to each other, of `size` bytes each.
fn register_together(store: &Store, size: u64, paths: &[(String, Vec<String>)]) {
    let new = |(name, references): &(String, Vec<String>)| NewPath {
        info: PathInfo {
            path: path(name),
            deriver: None,
            nar_hash: NarHash::from([1; 32]),
            references: references.iter().map(|name| path(name)).collect(),
            registration_time: 0,
            nar_size: size,
            ultimate: false,
            signatures: BTreeSet::new(),
            ca: None,
        },
        node: Node::Symlink { target: "x".as_bytes().to_vec().try_into().unwrap() },
        pin: None,
    };
    store.register(paths.iter().map(new).collect()).unwrap();
}

#[test]
fn a_circle_is_deleted_as_a_whole_however_large_or_not_at_all() {
    let (_dir, store) = open();
    let name = |n: usize| format!("circle-{n}");
    let count = CHUNK + 100;
    let circle: Vec<_> = (0..count).map(|n| (name(n), vec![name((n + 1) % count)])).collect();
    register_together(&store, 1, &circle);
    register(&store, "user", &["circle-7"]);
    let dead = walked(&store);
    let roots = store.new_temp_roots();
    roots.add(&path("circle-3"));
    assert_eq!(dead.delete(&store, u64::MAX).unwrap().paths, BTreeSet::from([path("user")]));
    drop(roots);
    assert_eq!(dead.delete(&store, 5).unwrap().paths.len(), count, "no circle is cut in two");
    assert!(store.all_valid_paths().unwrap().is_empty());
}

#[test]
fn only_what_is_named_goes_and_nothing_that_something_else_needs() {
    let (_dir, store) = open();
    let [a, b, c] =
        [("a", vec![]), ("b", vec!["a"]), ("c", vec!["a"])].map(|(name, refs)| register(&store, name, &refs));
    let dead = walked(&store);
    assert!(matches!(dead.delete_all(&store, &[&a, &b]), Err(Error::Alive(_))), "c needs a");
    assert_eq!(dead.delete_all(&store, &[&b]).unwrap().paths, BTreeSet::from([b]));
    assert_eq!(walked(&store).delete_all(&store, &[&a, &c]).unwrap().paths, BTreeSet::from([a, c]));
}

/// Does something when the first path has been deleted.
struct Between<F> {
    act: RefCell<Option<F>>,
    go_on: Cell<bool>,
}

impl<F: FnOnce()> GcWatch for Between<F> {
    fn step(&self, step: GcStep<'_>) {
        if matches!(step, GcStep::Deleted(_))
            && let Some(act) = self.act.take()
        {
            act();
        }
    }

    fn go_on(&self) -> bool {
        self.go_on.get()
    }
}

#[test]
fn what_happens_between_two_chunks_is_seen_by_the_second() {
    let (_dir, store) = open();
    // Referrers first: the last of the chain are in the first chunk.
    let names: Vec<String> = (0..2 * CHUNK).map(|i| format!("path-{i}")).collect();
    register(&store, &names[0], &[]);
    for pair in names.windows(2) {
        register(&store, &pair[1], &[&pair[0]]);
    }
    let dead = walked(&store);
    let watch = Between {
        act: RefCell::new(Some(|| {
            register(&store, "new", &["path-10"]);
        })),
        go_on: Cell::new(true),
    };
    let outcome = Deletion::new(&store, &dead.graph, dead.start, dead.graph.paths(), &watch).delete(u64::MAX).unwrap();
    assert_eq!(outcome.paths.len(), 2 * CHUNK - 11);
    assert!(is_whole(&store));
    assert_eq!(store.all_valid_paths().unwrap().len(), 12);
}

#[test]
fn who_has_enough_of_it_gets_a_store_that_is_whole() {
    let (_dir, store) = open();
    let names: Vec<String> = (0..3 * CHUNK).map(|i| format!("path-{i}")).collect();
    register(&store, &names[0], &[]);
    for pair in names.windows(2) {
        register(&store, &pair[1], &[&pair[0]]);
    }
    let dead = walked(&store);
    let watch = Between { act: RefCell::new(None::<fn()>), go_on: Cell::new(false) };
    let cancelled = Deletion::new(&store, &dead.graph, dead.start, dead.graph.paths(), &watch).delete(u64::MAX);
    assert!(matches!(cancelled, Err(Error::Cancelled)));
    assert_eq!(store.all_valid_paths().unwrap().len(), names.len());
    let go_on = Cell::new(true);
    struct Once<'a>(&'a Cell<bool>);
    impl GcWatch for Once<'_> {
        fn step(&self, _: GcStep<'_>) {
            self.0.set(false);
        }
        fn go_on(&self) -> bool {
            self.0.get()
        }
    }
    let cancelled = Deletion::new(&store, &dead.graph, dead.start, dead.graph.paths(), &Once(&go_on)).delete(u64::MAX);
    assert!(matches!(cancelled, Err(Error::Cancelled)));
    assert_eq!(store.all_valid_paths().unwrap().len(), 2 * CHUNK);
    assert!(is_whole(&store));
}
