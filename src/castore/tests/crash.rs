//! A process that writes to a store is killed at any moment: the store it leaves opens, holds everything that was
//! synced, and nothing that is half there.
//!
//! A kill loses no page the kernel has, so what a power failure adds is done to the files afterwards: what a pack has
//! beyond its committed length is replaced by garbage or cut anywhere.

// Everything here is test code, helpers as well.
#![allow(clippy::unwrap_used)]

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use castore::Digest;
use castore::index::{Batch, IndexOptions, RecoveredIndex};
use castore::objects::{ObjectKey, ObjectKind, ObjectStore, Options};

const ROUNDS: u64 = 20;
/// Set for the process that is killed.
const DIR: &str = "CASTORE_CRASH_DIR";
const ROUND: &str = "CASTORE_CRASH_ROUND";
/// Imports in a round, at most: more than a child gets to do.
const IMPORTS: u64 = 1 << 20;
const OBJECTS_PER_IMPORT: u64 = 12;

fn options() -> Options {
    // Small packs and a small overlay, so that sealing and waiting for flushes happen all the time.
    let index = IndexOptions { overlay_bytes: 64 << 10, ..IndexOptions::default() };
    Options { seal_at: 1 << 20, index, ..Options::default() }
}

/// The contents of an object of an import; every third is shared with other imports, lengths and kinds of data vary.
fn contents(import: u64, object: u64) -> Vec<u8> {
    let seed = if object.is_multiple_of(3) { object % 7 } else { import * OBJECTS_PER_IMPORT + object + 1000 };
    let length = (seed * 2_654_435_761 % 20_000) as usize;
    let mut noise = vec![0; if seed % 2 == 0 { length } else { 64 }];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut noise);
    noise.into_iter().cycle().take(length).collect()
}

fn key(contents: &[u8]) -> ObjectKey {
    ObjectKey { kind: ObjectKind::Chunk, digest: Digest::of(contents) }
}

/// The process that gets killed. Says on its standard output what it may be held to.
fn write_until_killed(dir: &Path, round: u64) {
    let store = ObjectStore::open(dir, options()).unwrap();
    let imports = store.index().table("imports").unwrap();
    let mut out = std::io::stdout();
    for import in round * IMPORTS..(round + 1) * IMPORTS {
        let mut writer = store.writer();
        for object in 0..OBJECTS_PER_IMPORT {
            let contents = contents(import, object);
            writer.put(key(&contents), &contents).unwrap();
        }
        writer.flush().unwrap();
        let mut batch = Batch::new();
        batch.put(imports, &import.to_be_bytes(), b"here".to_vec());
        batch.put(imports, &[b"copy of ", &import.to_be_bytes()[..]].concat(), b"here".to_vec());
        store.index().commit(batch).unwrap();
        drop(writer);
        if import % 5 == 0 {
            store.sync().unwrap();
            writeln!(out, "synced {import}").unwrap();
        }
        if import % 50 == 49 {
            collect(&store);
        }
        if import % 200 == 199 {
            store.optimise(&|| u64::MAX, &mut |_| ControlFlow::Continue(())).unwrap();
        }
    }
}

fn imports_in(store: &ObjectStore) -> Vec<u64> {
    let table = store.index().table("imports").unwrap();
    let mut found = Vec::new();
    let each = &mut |key: &[u8], _: &[u8]| {
        if let Ok(number) = <[u8; 8]>::try_from(key) {
            found.push(u64::from_be_bytes(number));
        }
        ControlFlow::Continue(())
    };
    store.index().scan_prefix(&table, &[], each).unwrap();
    found
}

/// Forgets two imports of three and collects what only they used.
fn collect(store: &Arc<ObjectStore>) {
    let table = store.index().table("imports").unwrap();
    let mut collection = store.begin_collection(Duration::from_secs(60)).unwrap();
    for import in imports_in(store) {
        if import % 3 == 0 {
            for object in 0..OBJECTS_PER_IMPORT {
                collection.mark(&key(&contents(import, object)));
            }
        } else {
            let mut batch = Batch::new();
            batch.delete(table, &import.to_be_bytes());
            batch.delete(table, &[b"copy of ", &import.to_be_bytes()[..]].concat());
            store.index().commit(batch).unwrap();
        }
    }
    collection.sweep(&mut |_| ControlFlow::Continue(())).unwrap();
    // Sparse is what has anything dead, so that there is much to rewrite.
    let below = castore::repack::SPARSE_WHEN_SHORT;
    store.repack_sparse(below, &|| u64::MAX, &mut |_| ControlFlow::Continue(())).unwrap();
}

/// Does to the packs what a power failure may do: whatever is not known to be on disk becomes garbage or goes.
fn lose_power(dir: &Path, round: u64) {
    let index = RecoveredIndex::open(&dir.join("index"), &IndexOptions::default()).unwrap();
    let lengths = index.table("pack-lengths").unwrap();
    let Ok(packs) = std::fs::read_dir(dir.join("packs")) else { return };
    for entry in packs {
        let path = entry.unwrap().path();
        let number = u32::from_str_radix(path.file_stem().unwrap().to_str().unwrap(), 16).unwrap();
        let committed = match index.get(&lengths, &number.to_be_bytes()).unwrap() {
            Some(length) => u64::from_le_bytes(length[..].try_into().unwrap()),
            None => 0,
        };
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        let length = file.metadata().unwrap().len();
        assert!(length >= committed, "{} has lost committed data", path.display());
        match round % 3 {
            0 => file.set_len(committed + (length - committed) * (round % 7) / 7).unwrap(),
            1 => file.write_all_at(&vec![0; (length - committed) as usize], committed).unwrap(),
            _ => {}
        }
    }
}

/// Runs the test below as the process that writes.
fn spawn(dir: &Path, round: u64) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_killed_process_leaves_a_store_at_a_state_that_existed", "--nocapture"])
        .env(DIR, dir)
        .env(ROUND, round.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn a_store_whose_creation_was_killed_can_be_created_again() {
    for round in 0..25 {
        let dir = tempfile::tempdir().unwrap();
        let mut child = spawn(dir.path(), 0);
        std::thread::sleep(Duration::from_millis(round * 2));
        child.kill().unwrap();
        child.wait().unwrap();
        let store = ObjectStore::open(dir.path(), options()).unwrap();
        let contents = contents(0, 1);
        let mut writer = store.writer();
        writer.put(key(&contents), &contents).unwrap();
        writer.flush().unwrap();
        assert_eq!(store.get(&key(&contents)).unwrap().unwrap(), contents);
    }
}

#[test]
fn a_killed_process_leaves_a_store_at_a_state_that_existed() {
    if let (Some(dir), Ok(round)) = (std::env::var_os(DIR), std::env::var(ROUND)) {
        write_until_killed(Path::new(&dir), round.parse().unwrap());
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut synced_in_all = 0;
    for round in 0..ROUNDS {
        let mut child = spawn(dir.path(), round);
        let out = BufReader::new(child.stdout.take().unwrap());
        // Some rounds are killed while the store is being opened, others well under way.
        let pause = Duration::from_millis(if round % 4 == 0 { round * 3 } else { (round * 7919) % 700 });
        let killer = std::thread::spawn(move || {
            std::thread::sleep(pause);
            child.kill().unwrap();
            child.wait().unwrap();
        });
        let synced =
            out.lines().map_while(Result::ok).filter_map(|line| line.split("synced ").nth(1)?.parse().ok()).last();
        killer.join().unwrap();
        lose_power(dir.path(), round);

        let store = ObjectStore::open(dir.path(), options()).unwrap();
        let table = store.index().table("imports").unwrap();
        let found = imports_in(&store);
        let first = round * IMPORTS;
        let last = found.iter().copied().filter(|&import| import >= first).max();
        if let Some(synced) = synced {
            synced_in_all += 1;
            assert!(last.is_some_and(|last| last >= synced), "round {round}: {synced} was synced, {last:?} is there");
        }
        for &import in &found {
            let copy = [b"copy of ", &import.to_be_bytes()[..]].concat();
            assert!(store.index().get(&table, &copy).unwrap().is_some(), "half of a batch is there");
            for object in 0..OBJECTS_PER_IMPORT {
                let contents = contents(import, object);
                let found = store.get(&key(&contents)).unwrap();
                assert_eq!(found.expect("the import is there, so its objects are"), contents);
            }
        }
        collect(&store);
    }
    assert!(synced_in_all > ROUNDS / 3, "the children got to do something in {synced_in_all} rounds");
}
