use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;
use proptest::prelude::*;

use super::{Batch, DataFiles, DataRow, Index, IndexError, IndexOptions, RecoveredIndex, Table};

const NAMES: [&str; 2] = ["one", "two"];

type Model = [BTreeMap<Vec<u8>, Vec<u8>>; 2];
type Change = (usize, Vec<u8>, Option<Vec<u8>>);

#[derive(Clone, Debug)]
enum Step {
    Commit(Vec<Change>),
    Sync,
    Reopen,
    Scan(usize, Vec<u8>),
    ScanFrom(usize, Vec<u8>),
}

/// Few enough keys that they meet, with bytes at the ends of the order.
fn key() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(prop::sample::select(vec![0_u8, b'a', b'b', 0xff]), 1..4)
}

fn step() -> impl Strategy<Value = Step> {
    let value = prop::option::weighted(0.7, prop::collection::vec(any::<u8>(), 0..40));
    let changes = prop::collection::vec((0..2_usize, key(), value), 1..12);
    prop_oneof![
        8 => changes.prop_map(Step::Commit),
        2 => Just(Step::Sync),
        1 => Just(Step::Reopen),
        3 => (0..2_usize, key()).prop_map(|(table, prefix)| Step::Scan(table, prefix)),
        1 => (0..2_usize, key()).prop_map(|(table, start)| Step::ScanFrom(table, start)),
    ]
}

fn open(dir: &std::path::Path) -> (Index, [Table; 2]) {
    // A small bound, so that commits also wait for flushes.
    let options = IndexOptions { overlay_bytes: 2000, ..IndexOptions::default() };
    let index = Index::open(&dir.join("index"), &options).unwrap();
    let tables = NAMES.map(|name| index.table(name).unwrap());
    (index, tables)
}

fn pairs(scan: impl FnOnce(super::Each<'_>) -> Result<(), IndexError>) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut found = Vec::new();
    scan(&mut |key, value| {
        found.push((key.to_vec(), value.to_vec()));
        ControlFlow::Continue(())
    })
    .unwrap();
    found
}

fn check(index: &Index, tables: &[Table; 2], model: &Model, step: &Step) {
    let owned = |(key, value): (&Vec<u8>, &Vec<u8>)| (key.clone(), value.clone());
    match step {
        Step::Scan(table, prefix) => {
            let expected: Vec<_> = model[*table].iter().filter(|(key, _)| key.starts_with(prefix)).map(owned).collect();
            assert_eq!(pairs(|each| index.scan_prefix(&tables[*table], prefix, each)), expected);
        }
        Step::ScanFrom(table, start) => {
            let expected: Vec<_> = model[*table].range(start.clone()..).map(owned).collect();
            assert_eq!(pairs(|each| index.scan_from(&tables[*table], start, each)), expected);
        }
        _ => {
            for (table, entries) in tables.iter().zip(model) {
                let expected: Vec<_> = entries.iter().map(owned).collect();
                assert_eq!(pairs(|each| index.scan_prefix(table, &[], each)), expected);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn behaves_as_ordered_maps_do(steps in prop::collection::vec(step(), 1..60)) {
        let dir = tempfile::tempdir().unwrap();
        let (mut index, mut tables) = open(dir.path());
        let mut model = Model::default();
        for step in &steps {
            match step {
                Step::Commit(changes) => {
                    let mut batch = Batch::new();
                    for (table, key, value) in changes {
                        match value {
                            Some(value) => batch.put(tables[*table], key, value.clone()),
                            None => batch.delete(tables[*table], key),
                        }
                        match value {
                            Some(value) => model[*table].insert(key.clone(), value.clone()),
                            None => model[*table].remove(key),
                        };
                    }
                    index.commit(batch).unwrap();
                    for (table, key, _) in changes {
                        let found = index.get(&tables[*table], key).unwrap();
                        prop_assert_eq!(found.as_deref(), model[*table].get(key).map(Vec::as_slice));
                    }
                }
                Step::Sync => index.sync().unwrap(),
                Step::Reopen => {
                    drop(index);
                    (index, tables) = open(dir.path());
                    check(&index, &tables, &model, step);
                }
                Step::Scan(..) | Step::ScanFrom(..) => check(&index, &tables, &model, step),
            }
        }
        drop(index);
        let (index, tables) = open(dir.path());
        check(&index, &tables, &model, &Step::Reopen);
    }
}

#[test]
fn readers_see_whole_batches_while_generations_change() {
    let dir = tempfile::tempdir().unwrap();
    let (index, [table, _]) = open(dir.path());
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut last = 0;
                while !done.load(Ordering::Acquire) {
                    let found = pairs(|each| index.scan_prefix(&table, b"k", each));
                    let Some((_, first)) = found.first() else { continue };
                    assert_eq!(found.len(), 10);
                    assert!(found.iter().all(|(_, value)| value == first), "half a batch: {found:?}");
                    let number = u64::from_be_bytes(first[..8].try_into().unwrap());
                    assert!(number >= last, "time went backwards");
                    last = number;
                }
            });
        }
        for number in 1..3000_u64 {
            let mut batch = Batch::new();
            for key in 0..10 {
                batch.put(table, &[b'k', key], number.to_be_bytes().to_vec());
            }
            index.commit(batch).unwrap();
        }
        done.store(true, Ordering::Release);
    });
}

/// Data files that write down when they are synced, and fail when told to.
#[derive(Default)]
struct Recorder {
    table: Mutex<Option<Table>>,
    syncs: AtomicU64,
    fail: AtomicBool,
    panic: AtomicBool,
}

impl DataFiles for Recorder {
    fn make_durable(&self) -> std::io::Result<Vec<DataRow>> {
        assert!(!self.panic.load(Ordering::Acquire), "told to panic");
        if self.fail.load(Ordering::Acquire) {
            return Err(std::io::Error::other("the disk is on fire"));
        }
        let number = self.syncs.fetch_add(1, Ordering::AcqRel) + 1;
        let table = self.table.lock();
        let row = |table| DataRow {
            table,
            key: Bytes::from_static(b"syncs"),
            value: Bytes::copy_from_slice(&number.to_be_bytes()),
        };
        Ok(table.map(row).into_iter().collect())
    }
}

#[test]
fn what_the_data_files_report_is_committed_with_the_generation() {
    let dir = tempfile::tempdir().unwrap();
    let recorder = Arc::new(Recorder::default());
    let recovered = RecoveredIndex::open(&dir.path().join("index"), &IndexOptions::default()).unwrap();
    let table = recovered.table("one").unwrap();
    *recorder.table.lock() = Some(table);
    let index = recovered.start(recorder.clone()).unwrap();
    let mut batch = Batch::new();
    batch.put(table, b"entry", b"value".to_vec());
    index.commit(batch).unwrap();
    index.sync().unwrap();
    let synced = recorder.syncs.load(Ordering::Acquire);
    assert!(synced > 0);
    let row = index.get(&table, b"syncs").unwrap().unwrap();
    assert_eq!(row, synced.to_be_bytes()[..]);
}

#[test]
fn data_that_cannot_be_made_durable_stops_commits_and_leaves_no_entry() {
    let dir = tempfile::tempdir().unwrap();
    let recorder = Arc::new(Recorder::default());
    let recovered = RecoveredIndex::open(&dir.path().join("index"), &IndexOptions::default()).unwrap();
    let table = recovered.table("one").unwrap();
    let index = recovered.start(recorder.clone()).unwrap();
    let commit = |key: &[u8]| {
        let mut batch = Batch::new();
        batch.put(table, key, b"value".to_vec());
        index.commit(batch)
    };
    commit(b"before").unwrap();
    index.sync().unwrap();
    recorder.fail.store(true, Ordering::Release);
    commit(b"doomed").unwrap();
    let data_failed = |result: Result<(), IndexError>| match result {
        Err(IndexError::Flush(error)) => matches!(*error, IndexError::Data(_)),
        _ => false,
    };
    assert!(data_failed(index.sync()));
    assert!(data_failed(index.sync()), "the error stays");
    assert!(data_failed(commit(b"after")));
    assert!(index.get(&table, b"doomed").unwrap().is_some(), "what was committed stays visible");
    // A sync that works again proves nothing about what the failed one left behind.
    recorder.fail.store(false, Ordering::Release);
    assert!(data_failed(index.sync()));
    drop(index);

    let index = Index::open(&dir.path().join("index"), &IndexOptions::default()).unwrap();
    let table = index.table("one").unwrap();
    assert!(index.get(&table, b"before").unwrap().is_some());
    assert!(index.get(&table, b"doomed").unwrap().is_none(), "its data may not be there");
}

#[test]
fn a_panic_while_flushing_is_an_error_for_all_and_no_wait_without_end() {
    let dir = tempfile::tempdir().unwrap();
    let recorder = Arc::new(Recorder::default());
    let recovered = RecoveredIndex::open(&dir.path().join("index"), &IndexOptions::default()).unwrap();
    let table = recovered.table("one").unwrap();
    let index = Arc::new(recovered.start(recorder.clone()).unwrap());
    recorder.panic.store(true, Ordering::Release);
    let (send, receive) = std::sync::mpsc::channel();
    let other = Arc::clone(&index);
    std::thread::spawn(move || {
        let committed = |key: &[u8]| {
            let mut batch = Batch::new();
            batch.put(table, key, b"value".to_vec());
            other.commit(batch)
        };
        committed(b"before").unwrap();
        for result in [other.sync(), other.sync(), committed(b"after")] {
            send.send(result).unwrap();
        }
    });
    for _ in 0..3 {
        let result = receive.recv_timeout(std::time::Duration::from_secs(30)).expect("somebody waits for ever");
        assert!(matches!(result, Err(IndexError::Flush(error)) if matches!(*error, IndexError::Panicked)));
    }
}

#[test]
fn commits_become_durable_by_themselves() {
    let dir = tempfile::tempdir().unwrap();
    let recorder = Arc::new(Recorder::default());
    let recovered = RecoveredIndex::open(&dir.path().join("index"), &IndexOptions::default()).unwrap();
    let table = recovered.table("one").unwrap();
    let index = recovered.start(recorder.clone()).unwrap();
    let mut batch = Batch::new();
    batch.put(table, b"key", b"value".to_vec());
    index.commit(batch).unwrap();
    let began = std::time::Instant::now();
    while recorder.syncs.load(Ordering::Acquire) == 0 {
        assert!(began.elapsed().as_secs() < 30, "no flush came");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[test]
fn whoever_waits_for_room_finds_some() {
    let dir = tempfile::tempdir().unwrap();
    let (index, [table, _]) = open(dir.path());
    let mut batch = Batch::new();
    batch.put(table, b"key", vec![0; 1500]);
    index.commit(batch).unwrap();
    index.wait_for_room().unwrap();
    assert!(!index.inner.overlay.is_half_full());
}
