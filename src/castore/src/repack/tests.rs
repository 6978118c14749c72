use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::{Repacked, SPARSE, Share};
use crate::Digest;
use crate::objects::{ObjectKey, ObjectKind, ObjectStore, Options};

const PATIENCE: Duration = Duration::from_secs(20);

fn open_with(dir: &Path, cache_bytes: u64) -> Arc<ObjectStore> {
    // Small packs, so that there are many.
    ObjectStore::open(dir, Options { seal_at: 64 << 10, cache_bytes, ..Options::default() }).unwrap()
}

fn open(dir: &Path) -> Arc<ObjectStore> {
    open_with(dir, 1 << 20)
}

/// Kinds and lengths differ; half is noise, half can be compressed.
fn contents(number: u64) -> Vec<u8> {
    let mut contents = vec![0; 300 + (number * 37 % 900) as usize];
    blake3::Hasher::new().update(&number.to_le_bytes()).finalize_xof().fill(&mut contents);
    let half = contents.len() / 2;
    contents[half..].fill(b'x');
    contents
}

fn key(number: u64) -> ObjectKey {
    let kind = if number.is_multiple_of(5) { ObjectKind::Directory } else { ObjectKind::Chunk };
    ObjectKey { kind, digest: Digest::of(&contents(number)) }
}

fn put(store: &Arc<ObjectStore>, numbers: impl IntoIterator<Item = u64>) {
    let mut writer = store.writer();
    for number in numbers {
        writer.put(key(number), &contents(number)).unwrap();
    }
    writer.flush().unwrap();
}

fn collect(store: &Arc<ObjectStore>, live: impl IntoIterator<Item = u64>) {
    let mut collection = store.begin_collection(PATIENCE).unwrap();
    for number in live {
        collection.mark(&key(number));
    }
    collection.sweep(&mut |_| ControlFlow::Continue(())).unwrap();
}

fn repack(store: &ObjectStore) -> Repacked {
    store.repack_sparse(SPARSE, &|| u64::MAX, &mut |_| ControlFlow::Continue(())).unwrap()
}

fn optimise(store: &ObjectStore) -> Repacked {
    store.optimise(&|| u64::MAX, &mut |_| ControlFlow::Continue(())).unwrap()
}

fn pack_bytes(dir: &Path) -> u64 {
    std::fs::read_dir(dir.join("packs")).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
}

fn names(dir: &Path) -> HashSet<OsString> {
    std::fs::read_dir(dir.join("packs")).unwrap().map(|entry| entry.unwrap().file_name()).collect()
}

fn check(store: &ObjectStore, there: impl Fn(u64) -> bool, all: u64) {
    for number in 0..all {
        let found = store.get(&key(number)).unwrap();
        assert_eq!(found.is_some(), there(number), "object {number}");
        assert!(found.is_none_or(|found| found == contents(number)), "object {number}");
    }
}

#[test]
fn packs_with_little_alive_are_rewritten() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    put(&store, 0..3000);
    let alive = |number: u64| number.is_multiple_of(4) || number < 500;
    collect(&store, (0..3000).filter(|&number| alive(number)));
    let (before, packs) = (pack_bytes(dir.path()), names(dir.path()));
    let done = repack(&store);
    assert!(done.deleted_packs > 10, "{done:?}");
    assert_eq!((done.done_packs, done.damaged_packs), (done.expected_packs, 0));
    assert_eq!(before - pack_bytes(dir.path()), done.saved_bytes() - headers(&done, before, dir.path()));
    assert!(pack_bytes(dir.path()) < before / 2, "{done:?}");
    check(&store, alive, 3000);
    let left = names(dir.path()).intersection(&packs).count();
    assert!(left >= 2, "{left} packs are alive and were left alone");
    let stats = store.stats();
    assert_eq!(stats.stored_bytes, pack_bytes(dir.path()));
    assert!(Share::of(stats.raw_bytes, stats.held_bytes) > SPARSE, "{stats:?}");
    assert_eq!(repack(&store).moved_objects, 0, "once is enough");

    drop(store);
    let store = open(dir.path());
    check(&store, alive, 3000);
    assert_eq!(
        store.stats(),
        crate::engine::Stats {
            cache_hits: store.stats().cache_hits,
            cache_misses: store.stats().cache_misses,
            ..stats
        }
    );
    // The numbers of deleted packs may be used again by now.
    put(&store, 3000..4000);
    check(&store, |number| alive(number) || number >= 3000, 4000);
    collect(&store, []);
    assert_eq!(pack_bytes(dir.path()), 0);
}

/// Headers of packs that were begun for what was written.
fn headers(done: &Repacked, before: u64, dir: &Path) -> u64 {
    let begun = pack_bytes(dir) + done.freed_bytes - before - done.written_bytes;
    assert_eq!(begun % 32, 0);
    begun
}

#[test]
fn optimising_saves_space_once_and_what_comes_later_the_next_time() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    // Each import by itself: small blocks that share nothing.
    let text = |number: u64| format!("import {number} of many says what all the others say as well").repeat(3);
    let key = |number| ObjectKey { kind: ObjectKind::Chunk, digest: Digest::of(text(number).as_bytes()) };
    for number in 0..2000 {
        let mut writer = store.writer();
        writer.put(key(number), text(number).as_bytes()).unwrap();
        writer.flush().unwrap();
    }
    let before = pack_bytes(dir.path());
    let done = optimise(&store);
    assert!(pack_bytes(dir.path()) < before / 2, "{done:?}");
    assert_eq!(done.moved_objects, 2000);
    assert_eq!(optimise(&store).moved_objects, 0, "once is enough");
    let all = |store: &ObjectStore| {
        for number in 0..2000 {
            assert_eq!(store.get(&key(number)).unwrap().unwrap(), text(number).as_bytes());
        }
    };
    all(&store);
    drop(store);
    let store = open(dir.path());
    all(&store);
    assert_eq!(optimise(&store).moved_objects, 0, "also after a restart");
    put(&store, 0..10);
    let packs = store.stats().packs;
    assert!(packs >= 2, "imports do not go into dense packs");
    // What is rewritten because little is alive stays dense.
    let mut collection = store.begin_collection(PATIENCE).unwrap();
    for number in (0..2000).step_by(10) {
        collection.mark(&key(number));
    }
    collection.sweep(&mut |_| ControlFlow::Continue(())).unwrap();
    let done = store.repack_sparse(SPARSE, &|| u64::MAX, &mut |_| ControlFlow::Continue(())).unwrap();
    if done.deleted_packs > 0 {
        assert_eq!(optimise(&store).moved_objects, 0);
    }
}

#[test]
fn what_does_not_get_smaller_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let noise = |number: u64| {
        let mut noise = vec![0; 50_000];
        blake3::Hasher::new().update(&number.to_le_bytes()).finalize_xof().fill(&mut noise);
        noise
    };
    let mut writer = store.writer();
    for number in 0..20 {
        writer.put(ObjectKey { kind: ObjectKind::Chunk, digest: Digest::of(&noise(number)) }, &noise(number)).unwrap();
    }
    writer.flush().unwrap();
    let before = pack_bytes(dir.path());
    let done = optimise(&store);
    assert_eq!((done.moved_objects, done.deleted_packs, pack_bytes(dir.path())), (0, 0, before));
}

#[test]
fn a_rewriting_can_be_ended_and_goes_on_later() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    put(&store, 0..3000);
    let alive = |number: u64| number.is_multiple_of(4);
    collect(&store, (0..3000).filter(|&number| alive(number)));
    let (mut rounds, mut moved) = (0, 0);
    loop {
        let mut steps = 0;
        let done = store
            .repack_sparse(SPARSE, &|| u64::MAX, &mut |_| {
                steps += 1;
                if steps < 3 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            })
            .unwrap();
        check(&store, alive, 3000);
        moved += done.moved_objects;
        rounds += 1;
        if done.done_packs == done.expected_packs {
            break;
        }
    }
    assert!(rounds > 5 && moved >= 700, "{rounds} rounds, {moved} objects");
    let stats = store.stats();
    drop(store);
    let store = open(dir.path());
    check(&store, alive, 3000);
    assert_eq!(store.stats().objects, stats.objects);
}

#[test]
fn a_pack_is_passed_over_when_what_is_alive_in_it_does_not_fit() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    put(&store, 0..3000);
    let alive = |number: u64| number.is_multiple_of(4);
    collect(&store, (0..3000).filter(|&number| alive(number)));
    let done = store.repack_sparse(SPARSE, &|| 0, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!((done.moved_objects, done.deleted_packs, done.done_packs), (0, 0, done.expected_packs));
    assert!(done.expected_packs > 10);
    check(&store, alive, 3000);
}

/// A damaged block keeps its pack, and the others go on.
#[test]
fn damage_is_neither_copied_nor_in_the_way() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_with(dir.path(), 0);
    put(&store, 0..3000);
    let alive = |number: u64| number.is_multiple_of(4);
    collect(&store, (0..3000).filter(|&number| alive(number)));
    store.sync().unwrap();
    let damaged = dir.path().join("packs/00000003.pack");
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&damaged).unwrap();
    let mut byte = [0];
    let at = file.metadata().unwrap().len() - 10;
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    let done = repack(&store);
    assert_eq!(done.damaged_packs, 1, "{done:?}");
    assert!(done.deleted_packs > 10);
    assert!(damaged.exists());
    let mut lost = 0;
    for number in (0..3000).filter(|&number| alive(number)) {
        match store.get(&key(number)) {
            Ok(found) => assert_eq!(found.unwrap(), contents(number)),
            Err(_) => lost += 1,
        }
    }
    assert!(lost > 0 && lost < 100, "{lost} objects of the block are unreadable, and no others");
}

/// Importers, readers, collections, rewriting and optimising, all at once: every byte that is read is right, and what is
/// registered is there.
#[test]
fn everything_at_once() {
    const OBJECTS: u64 = 4000;
    let seconds = std::env::var("CASTORE_STRESS_SECONDS").map_or(4, |text| text.parse().unwrap());
    let dir = tempfile::tempdir().unwrap();
    // No cache to speak of, so that reads go to the packs.
    let store = open_with(dir.path(), 0);
    // Objects are registered in groups of 50, with a count of who holds them.
    let registered: parking_lot::Mutex<HashMap<u64, usize>> = parking_lot::Mutex::default();
    let stop = AtomicBool::new(false);
    let (moved, deleted, read, imports) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let (store, registered, stop) = (&store, &registered, &stop);
        let (moved, deleted, read, imports) = (&moved, &deleted, &read, &imports);
        for thread in 0..2_u64 {
            scope.spawn(move || {
                let mut held: std::collections::VecDeque<u64> = std::collections::VecDeque::new();
                let mut round = thread * 13;
                while !stop.load(Ordering::Acquire) {
                    round += 1;
                    let group = round * 7 % (OBJECTS / 50);
                    let mut writer = store.writer();
                    for number in group * 50..(group + 1) * 50 {
                        writer.put(key(number), &contents(number)).unwrap();
                    }
                    writer.flush().unwrap();
                    *registered.lock().entry(group).or_default() += 1;
                    drop(writer);
                    imports.fetch_add(1, Ordering::Relaxed);
                    held.push_back(group);
                    for &group in &held {
                        let number = group * 50 + round % 50;
                        let found = store.get(&key(number)).unwrap().expect("it is registered, so it is there");
                        assert_eq!(found, contents(number));
                    }
                    if held.len() > 15 {
                        let group = held.pop_front().unwrap();
                        let mut registered = registered.lock();
                        let count = registered.get_mut(&group).unwrap();
                        *count -= 1;
                        if *count == 0 {
                            registered.remove(&group);
                        }
                    }
                }
            });
        }
        scope.spawn(move || {
            let mut number = 1;
            while !stop.load(Ordering::Acquire) {
                number = (number * 31 + 7) % OBJECTS;
                if let Some(found) = store.get(&key(number)).unwrap() {
                    assert_eq!(found, contents(number));
                    read.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        scope.spawn(move || {
            while !stop.load(Ordering::Acquire) {
                let mut collection = store.begin_collection(PATIENCE).unwrap();
                let live: Vec<u64> = registered.lock().keys().copied().collect();
                for number in live.iter().flat_map(|group| group * 50..(group + 1) * 50) {
                    collection.mark(&key(number));
                }
                let swept = collection.sweep(&mut |_| ControlFlow::Continue(())).unwrap();
                deleted.fetch_add(swept.deleted_packs, Ordering::Relaxed);
                let done = store.repack_sparse(Share(700), &|| u64::MAX, &mut |_| ControlFlow::Continue(())).unwrap();
                assert_eq!(done.damaged_packs, 0);
                moved.fetch_add(done.moved_objects, Ordering::Relaxed);
                deleted.fetch_add(done.deleted_packs, Ordering::Relaxed);
            }
        });
        scope.spawn(move || {
            while !stop.load(Ordering::Acquire) {
                let done = optimise(store);
                assert_eq!(done.damaged_packs, 0);
                moved.fetch_add(done.moved_objects, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        std::thread::sleep(Duration::from_secs(seconds));
        stop.store(true, Ordering::Release);
    });
    let counts = [&imports, &read, &moved, &deleted].map(|count| count.load(Ordering::Acquire));
    println!("imports, reads, objects moved, packs deleted: {counts:?}");
    assert!(counts.iter().all(|count| *count > 20), "{counts:?}");
    let live: u64 = (0..OBJECTS).filter(|&number| store.contains(&key(number)).unwrap()).count() as u64;
    assert_eq!(store.stats().objects, live, "the books are right");
    let stats = store.stats();
    drop(store);
    let store = open(dir.path());
    assert_eq!(store.stats().objects, live);
    assert_eq!((store.stats().raw_bytes, store.stats().stored_bytes), (stats.raw_bytes, pack_bytes(dir.path())));
    for number in 0..OBJECTS {
        assert!(store.get(&key(number)).unwrap().is_none_or(|found| found == contents(number)));
    }
}
