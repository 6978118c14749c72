use std::collections::HashSet;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::{CollectError, Swept};
use crate::objects::numbered::{contents, key};
use crate::objects::{ObjectKey, ObjectKind, ObjectStore, Options};

const PATIENCE: Duration = Duration::from_secs(20);

fn open(dir: &std::path::Path) -> Arc<ObjectStore> {
    // Small packs, so that there are many.
    ObjectStore::open(dir, Options { seal_at: 64 << 10, ..Options::default() }).unwrap()
}

fn put(store: &Arc<ObjectStore>, numbers: impl IntoIterator<Item = u64>) {
    let mut writer = store.writer();
    for number in numbers {
        writer.put(key(number), &contents(number)).unwrap();
    }
    writer.flush().unwrap();
}

/// Collects all but `live`.
fn collect(store: &Arc<ObjectStore>, live: impl IntoIterator<Item = u64>) -> Swept {
    let mut collection = store.begin_collection(PATIENCE).unwrap();
    for number in live {
        collection.mark(&key(number));
    }
    collection.sweep(&mut |_| ControlFlow::Continue(())).unwrap()
}

fn pack_bytes(dir: &std::path::Path) -> u64 {
    std::fs::read_dir(dir.join("packs")).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
}

#[test]
fn the_dead_go_and_their_space_returns() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    put(&store, 0..2000);
    // One writer's objects share a pack, more or less: these packs die as a whole.
    put(&store, 2000..3000);
    store.sync().unwrap();
    let before = pack_bytes(dir.path());

    let swept = collect(&store, 2000..3000);
    assert_eq!((swept.examined, swept.removed_objects, swept.removed_bytes), (3000, 2000, 2000 * 500));
    assert!(swept.deleted_packs > 5);
    assert_eq!(before - pack_bytes(dir.path()), swept.freed_bytes);
    assert!(swept.freed_bytes > 900_000, "{swept:?}");
    assert_eq!((store.stats().objects, store.stats().raw_bytes), (1000, 1000 * 500));
    assert_eq!(store.stats().stored_bytes, pack_bytes(dir.path()));

    drop(store);
    let store = open(dir.path());
    assert_eq!(store.stats().objects, 1000);
    for number in 0..3000 {
        let found = store.get(&key(number)).unwrap();
        assert_eq!(found.is_some(), number >= 2000);
        assert!(found.is_none_or(|found| found == contents(number)));
    }
    let swept = collect(&store, []);
    assert_eq!(swept.removed_objects, 1000);
    assert_eq!((pack_bytes(dir.path()), store.stats().packs), (0, 0), "an open pack goes as well");
    put(&store, 0..10);
    assert_eq!(store.get(&key(3)).unwrap().unwrap(), contents(3));
}

#[test]
fn a_mark_tells_whether_it_is_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut collection = store.begin_collection(PATIENCE).unwrap();
    assert!(collection.mark(&key(1)));
    assert!(!collection.mark(&key(1)));
    assert!(collection.mark(&ObjectKey { kind: ObjectKind::Directory, ..key(1) }));
}

#[test]
fn objects_put_or_found_during_a_collection_stay() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    put(&store, 0..100);
    let collection = store.begin_collection(PATIENCE).unwrap();
    let mut writer = store.writer();
    assert!(!writer.put(key(5), &contents(5)).unwrap(), "found");
    assert!(writer.touch(&key(6)).unwrap());
    assert!(writer.put(key(200), &contents(200)).unwrap());
    writer.flush().unwrap();
    assert!(writer.put(key(201), &contents(201)).unwrap());
    let swept = collection.sweep(&mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(swept.removed_objects, 98);
    // What was gathered but not flushed comes into a store that has moved on.
    writer.flush().unwrap();
    for number in [5, 6, 200, 201] {
        assert_eq!(store.get(&key(number)).unwrap().unwrap(), contents(number));
    }
    drop(writer);
    assert_eq!(collect(&store, []).removed_objects, 4, "the next collection takes them");
}

#[test]
fn importers_of_before_are_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    put(&store, 0..10);
    let mut writer = store.writer();
    assert!(!writer.put(key(1), &contents(1)).unwrap());
    let refused = store.begin_collection(Duration::from_millis(20));
    assert!(matches!(refused, Err(CollectError::Busy { writers: 1, .. })));
    assert!(store.contains(&key(2)).unwrap());

    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(50));
            ended.store(true, Ordering::Release);
            drop(writer);
        });
        let collection = store.begin_collection(PATIENCE).unwrap();
        assert!(ended.load(Ordering::Acquire));
        assert!(matches!(store.begin_collection(PATIENCE), Err(CollectError::Running)));
        drop(collection);
    });
    store.begin_collection(PATIENCE).unwrap();
}

#[test]
fn a_sweep_can_be_ended() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    put(&store, 0..5000);
    let collection = store.begin_collection(PATIENCE).unwrap();
    let swept = collection.sweep(&mut |_| ControlFlow::Break(())).unwrap();
    assert!(swept.removed_objects > 0 && swept.removed_objects < 5000);
    assert_eq!(store.stats().objects, 5000 - swept.removed_objects);
    let rest = collect(&store, []);
    assert_eq!(rest.removed_objects, 5000 - swept.removed_objects);
}

/// Importers keep putting the same objects, which is to say they keep reviving what collections are about to remove,
/// and register what they rely on before they let go of their writer, as a store does.
#[test]
fn nothing_that_somebody_relies_on_is_ever_collected() {
    const OBJECTS: u64 = 600;
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let registered = parking_lot::Mutex::new(HashSet::new());
    let stop = AtomicBool::new(false);
    let removed = AtomicUsize::new(0);
    let mut imports = 0;
    std::thread::scope(|scope| {
        let importer = |thread: u64| {
            let (store, registered, stop) = (&store, &registered, &stop);
            move || {
                let mut round = 0_u64;
                while !stop.load(Ordering::Acquire) {
                    round += 1;
                    let first = (thread * 251 + round * 37) % OBJECTS;
                    let mine: Vec<u64> = (first..first + 60).map(|number| number % OBJECTS).collect();
                    let mut writer = store.writer();
                    for &number in &mine {
                        writer.put(key(number), &contents(number)).unwrap();
                    }
                    writer.flush().unwrap();
                    registered.lock().extend(mine.iter().map(|&number| (thread, number)));
                    drop(writer);
                    for &number in &mine {
                        let found = store.get(&key(number)).unwrap().expect("registered, so there");
                        assert_eq!(found, contents(number));
                    }
                    registered.lock().retain(|(owner, _)| *owner != thread);
                }
                round
            }
        };
        let importers: Vec<_> = (0..3).map(|thread| scope.spawn(importer(thread))).collect();
        let began = Instant::now();
        let mut rounds = 0;
        // At least so many, and until importers had time to let go of something.
        while rounds < 40 || (removed.load(Ordering::Acquire) <= 100 && began.elapsed() < PATIENCE) {
            rounds += 1;
            let mut collection = store.begin_collection(PATIENCE).unwrap();
            let live: Vec<u64> = registered.lock().iter().map(|(_, number)| *number).collect();
            for number in live {
                collection.mark(&key(number));
            }
            let swept = collection.sweep(&mut |_| ControlFlow::Continue(())).unwrap();
            removed.fetch_add(swept.removed_objects as usize, Ordering::AcqRel);
        }
        stop.store(true, Ordering::Release);
        imports = importers.into_iter().map(|importer| importer.join().unwrap()).sum();
    });
    assert!(removed.load(Ordering::Acquire) > 100, "collections found something to do");
    assert!(imports > 40, "and so did importers");
    let live: u64 = (0..OBJECTS).filter(|&number| store.contains(&key(number)).unwrap()).count() as u64;
    assert_eq!(store.stats().objects, live, "the books are right");
    assert_eq!(store.stats().raw_bytes, live * 500);
}
