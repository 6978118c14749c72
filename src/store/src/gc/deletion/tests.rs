//! What happens between the walk and the deletion: each test has its own idea of that.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use castore::Node;
use nix_compat::hash::{NarHash, sha256};
use nix_compat::path_info::PathInfo;
use nix_compat::store_path::{StoreDir, StorePath};

use super::CHUNK;
use crate::error::Error;
use crate::record::Entry;
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

fn walked(store: &Store) -> BTreeMap<StorePath, Entry> {
    store.graph().unwrap().entries
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
    let freed = store.delete_dead(&dead, 1000 * (CHUNK as u64 + 5)).unwrap();
    assert_eq!(freed.paths.len(), CHUNK + 5);
    assert!(store.verify(false, &mut |_| std::ops::ControlFlow::Continue(())).unwrap().is_empty());
    assert_eq!(store.delete_dead(&dead, u64::MAX).unwrap().paths.len(), count - CHUNK - 5);
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
    assert!(matches!(store.delete_all_or_none(dead.clone()), Err(Error::Alive(_))));
    assert_eq!(store.delete_dead(&dead, u64::MAX).unwrap().paths, BTreeSet::from([c]));
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
    assert!(store.delete_dead(&dead, u64::MAX).unwrap().paths.is_empty());
    drop(collecting);
    // Whoever deletes without having looked for roots finds nothing that keeps it.
    assert_eq!(store.delete_dead(&dead, u64::MAX).unwrap().paths, BTreeSet::from([a]));
}

#[test]
fn what_was_referred_to_or_registered_anew_since_the_walk_stays() {
    let (_dir, store) = open();
    let a = register(&store, "a", &[]);
    let b = register(&store, "b", &[]);
    let dead = walked(&store);
    let c = register(&store, "c", &["a"]);
    store.delete_all_or_none(BTreeMap::from([(b.clone(), dead[&b].clone())])).unwrap();
    register(&store, "b", &[]);
    assert!(store.delete_dead(&dead, u64::MAX).unwrap().paths.is_empty());
    assert_eq!(store.all_valid_paths().unwrap(), BTreeSet::from([a, b, c]));
}

#[test]
fn a_circle_is_deleted_as_a_whole() {
    let (_dir, store) = open();
    let new = |name: &str, reference: &str| {
        let mut entry = NewPath {
            info: PathInfo {
                path: path(name),
                deriver: None,
                nar_hash: NarHash::from([1; 32]),
                references: BTreeSet::new(),
                registration_time: 0,
                nar_size: 1,
                ultimate: false,
                signatures: BTreeSet::new(),
                ca: None,
            },
            node: Node::Symlink { target: "x".as_bytes().to_vec().try_into().unwrap() },
            pin: None,
        };
        entry.info.references.insert(path(reference));
        entry
    };
    store.register(vec![new("a", "b"), new("b", "a")]).unwrap();
    assert_eq!(store.delete_dead(&walked(&store), u64::MAX).unwrap().paths.len(), 2);
}
