use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::check::Checked;
use crate::objects::numbered::{contents, key};
use crate::objects::{ObjectError, ObjectKey, ObjectStore, Options};
use crate::pack::PackError;

/// Objects in a store that has several packs of them.
const OBJECTS: u64 = 1000;
/// One of the packs that are sealed.
const SEALED: u32 = 3;

fn open(dir: &Path) -> Arc<ObjectStore> {
    // Small packs, and nothing is answered from memory.
    ObjectStore::open(dir, Options { seal_at: 64 << 10, cache_bytes: 0, ..Options::default() }).unwrap()
}

/// Puts objects a few at a time, as the imports of small paths do.
fn put(store: &Arc<ObjectStore>, numbers: impl IntoIterator<Item = u64>) {
    let mut writer = store.writer();
    for number in numbers {
        writer.put(key(number), &contents(number)).unwrap();
        if number % 20 == 19 {
            writer.flush().unwrap();
        }
    }
    writer.flush().unwrap();
}

fn filled(dir: &Path) -> Arc<ObjectStore> {
    let store = open(dir);
    put(&store, 0..OBJECTS);
    store.sync().unwrap();
    assert!(store.stats().packs > u64::from(SEALED) + 2);
    store
}

fn file(dir: &Path, pack: u32) -> PathBuf {
    dir.join(format!("packs/{pack:08x}.pack"))
}

fn in_pack(store: &ObjectStore, pack: u32) -> HashSet<u64> {
    (0..OBJECTS).filter(|number| store.core.entry(&key(*number)).unwrap().unwrap().place.pack == pack).collect()
}

/// Those objects that cannot be read. What can be is right.
fn unreadable(store: &ObjectStore) -> HashSet<u64> {
    let is_lost = |number: &u64| match store.get(&key(*number)) {
        Ok(found) => {
            assert_eq!(found.unwrap(), contents(*number), "object {number}");
            false
        }
        Err(ObjectError::Unreadable { .. }) => true,
        Err(error) => panic!("{error}"),
    };
    (0..OBJECTS).filter(is_lost).collect()
}

fn check(store: &ObjectStore) -> Checked {
    store.check(&|_| ControlFlow::Continue(())).unwrap()
}

fn damaged(checked: &Checked) -> HashSet<ObjectKey> {
    checked.damaged.iter().map(|object| object.key).collect()
}

#[test]
fn a_deleted_pack_that_is_appended_to_is_put_back_before_the_index_names_what_is_new() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    put(&store, 0..10);
    store.sync().unwrap();
    fs::remove_file(file(dir.path(), 0)).unwrap();
    assert_eq!(store.get(&key(3)).unwrap().unwrap(), contents(3), "the descriptor has it");
    assert!(matches!(check(&store).files[..], [PackError::Deleted(_)]));
    put(&store, 10..20);
    store.sync().unwrap();
    assert!(check(&store).files.is_empty());
    put(&store, 20..30);
    drop(store);
    let store = open(dir.path());
    (0..30).for_each(|number| assert_eq!(store.get(&key(number)).unwrap().unwrap(), contents(number)));
}

#[test]
fn a_deleted_pack_that_a_reader_has_open_can_be_read_and_is_put_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = filled(dir.path());
    let first = *in_pack(&store, SEALED).iter().min().unwrap();
    store.get(&key(first)).unwrap().unwrap();
    fs::remove_file(file(dir.path(), SEALED)).unwrap();
    assert!(unreadable(&store).is_empty());
    let checked = check(&store);
    assert!(matches!(checked.files[..], [PackError::Deleted(_)]) && checked.damaged.is_empty());
    assert_eq!(store.restore_files().unwrap(), 1);
    assert!(check(&store).files.is_empty());
    drop(store);
    assert!(unreadable(&open(dir.path())).is_empty());
}

/// What the file has lost is an error, and only that; it is found, put again where somebody has it, and forgotten where
/// nobody has.
#[test]
fn what_a_file_has_lost_is_found_put_again_or_forgotten() {
    // All of it, all from its first block on, and its second half.
    for from in [None, Some(0), Some(1)] {
        let dir = tempfile::tempdir().unwrap();
        let store = filled(dir.path());
        let file = file(dir.path(), SEALED);
        let length = fs::metadata(&file).unwrap().len();
        let places = (0..OBJECTS).map(|number| store.core.entry(&key(number)).unwrap().unwrap().place);
        let blocks: BTreeSet<u64> = places.filter(|place| place.pack == SEALED).map(|place| place.offset).collect();
        match from {
            None => fs::remove_file(&file).unwrap(),
            Some(half) => {
                let end = *blocks.iter().nth(half * blocks.len() / 2).unwrap();
                fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(end).unwrap();
            }
        }
        let lost = unreadable(&store);
        let all = in_pack(&store, SEALED);
        let some_left = from == Some(1);
        assert!(!lost.is_empty() && lost.is_subset(&all) && (lost.len() < all.len()) == some_left);
        let checked = check(&store);
        assert!(matches!(
            (&checked.files[..], from),
            ([PackError::Deleted(_)], None) | ([PackError::Cut { .. }], Some(_))
        ));
        assert_eq!(damaged(&checked), lost.iter().map(|number| key(*number)).collect());

        assert_eq!(store.restore_files().unwrap(), 1);
        assert_eq!(fs::metadata(&file).unwrap().len(), length);
        assert_eq!(unreadable(&store), lost);
        // Somebody has half of it, and what is there is not put again.
        let (again, gone): (HashSet<u64>, HashSet<u64>) = lost.iter().partition(|number| **number % 2 == 0);
        let objects = store.stats().objects;
        put(&store, all.iter().copied().filter(|number| !gone.contains(number)));
        assert_eq!(store.stats().objects, objects);
        assert_eq!(unreadable(&store), gone);
        assert_eq!(store.forget_lost(&lost.iter().map(|number| key(*number)).collect()).unwrap(), gone.len() as u64);
        store.sync().unwrap();
        drop(store);

        let store = open(dir.path());
        for number in 0..OBJECTS {
            let found = store.get(&key(number)).unwrap();
            assert_eq!(found.map(|found| found.to_vec()), (!gone.contains(&number)).then(|| contents(number)));
        }
        assert!(again.iter().all(|number| store.core.entry(&key(*number)).unwrap().unwrap().place.pack > SEALED));
        let checked = check(&store);
        assert!(checked.damaged.is_empty() && checked.files.is_empty() && checked.miscounted.is_empty());
        put(&store, 0..OBJECTS);
        assert!(unreadable(&store).is_empty(), "it is known that they are not here");
    }
}

/// Nobody has read any of it yet, but for one object.
#[test]
fn nothing_is_deduplicated_against_what_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let store = filled(dir.path());
    let lost = in_pack(&store, SEALED);
    fs::remove_file(file(dir.path(), SEALED)).unwrap();
    assert!(store.get(&key(*lost.iter().next().unwrap())).is_err());
    put(&store, 0..OBJECTS);
    assert!(unreadable(&store).is_empty());
    assert!(check(&store).damaged.is_empty());
    store.restore_files().unwrap();
    drop(store);
    assert!(unreadable(&open(dir.path())).is_empty());
}

#[test]
fn a_deleted_pack_in_which_nothing_is_alive_is_no_hindrance() {
    let dir = tempfile::tempdir().unwrap();
    let store = filled(dir.path());
    let dead = in_pack(&store, SEALED);
    fs::remove_file(file(dir.path(), SEALED)).unwrap();
    let mut collection = store.begin_collection(std::time::Duration::from_secs(20)).unwrap();
    for number in (0..OBJECTS).filter(|number| !dead.contains(number)) {
        collection.mark(&key(number));
    }
    collection.sweep(&mut |_| ControlFlow::Continue(())).unwrap();
    assert!(check(&store).files.is_empty());
    drop(store);
    let store = open(dir.path());
    assert!((0..OBJECTS).all(|number| store.get(&key(number)).unwrap().is_some() != dead.contains(&number)));
}
