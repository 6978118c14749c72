//! A disk that is full to the last byte: clear errors, nothing lost, and all is well again when there is space.

// Everything here is test code, helpers as well.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use castore::Digest;
use castore::index::{Batch, Index, IndexError, IndexOptions};
use castore::objects::{ObjectError, ObjectKey, ObjectKind, ObjectStore, Options};

/// A small filesystem, unmounted at the end.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// None where mounting is not allowed.
    fn mount(dir: &Path) -> Option<Self> {
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=48m", "tmpfs"]).arg(dir).status();
        mounted.is_ok_and(|status| status.success()).then(|| Self(dir.to_owned()))
    }

    fn fill(&self) {
        let mut filler = File::create(self.0.join("filler")).unwrap();
        for size in [1 << 20, 4096, 1] {
            let block = vec![1; size];
            while filler.write_all(&block).is_ok() {}
        }
    }

    /// Leaves this many bytes to write to.
    fn fill_but(&self, left: u64) {
        self.fill();
        let filler = File::options().write(true).open(self.0.join("filler")).unwrap();
        filler.set_len(filler.metadata().unwrap().len() - left).unwrap();
    }

    fn free(&self) {
        std::fs::remove_file(self.0.join("filler")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

fn contents(number: u64) -> Vec<u8> {
    let mut contents = vec![0; 20_000];
    blake3::Hasher::new().update(&number.to_le_bytes()).finalize_xof().fill(&mut contents);
    contents
}

fn key(number: u64) -> ObjectKey {
    ObjectKey { kind: ObjectKind::Chunk, digest: Digest::of(&contents(number)) }
}

fn put(store: &Arc<ObjectStore>, numbers: std::ops::Range<u64>) -> Result<(), ObjectError> {
    let mut writer = store.writer();
    for number in numbers {
        writer.put(key(number), &contents(number))?;
    }
    writer.flush()
}

#[test]
fn a_full_disk_is_an_error_that_passes() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount(dir.path()) else {
        println!("SKIPPED: mounting a tmpfs is not allowed here");
        return;
    };
    let state = dir.path().join("state");
    std::fs::create_dir(&state).unwrap();
    let store = ObjectStore::open(&state, Options::default()).unwrap();
    let table = store.index().table("notes").unwrap();
    let note = |name: &str| {
        let mut batch = Batch::new();
        batch.put(table, name.as_bytes(), vec![b'n'; 1 << 20]);
        store.index().commit(batch)
    };
    put(&store, 0..100).unwrap();
    note("before").unwrap();
    store.sync().unwrap();

    disk.fill();
    assert!(matches!(put(&store, 100..200), Err(ObjectError::Pack(_))), "packs cannot grow");
    note("accepted").unwrap();
    for _ in 0..3 {
        assert!(matches!(store.sync(), Err(ObjectError::Index(IndexError::Flush(_)))), "nor can the journal");
    }
    assert!(matches!(note("refused"), Err(IndexError::Flush(_))));
    for number in 0..100 {
        assert_eq!(store.get(&key(number)).unwrap().unwrap(), contents(number), "reading goes on");
    }
    assert!(store.index().get(&table, b"accepted").unwrap().is_some());
    assert!(store.index().get(&table, b"refused").unwrap().is_none());

    disk.free();
    store.sync().unwrap();
    put(&store, 100..200).unwrap();
    note("after").unwrap();
    store.sync().unwrap();
    drop(store);
    let store = ObjectStore::open(&state, Options::default()).unwrap();
    let table = store.index().table("notes").unwrap();
    for number in 0..200 {
        assert_eq!(store.get(&key(number)).unwrap().unwrap(), contents(number));
    }
    for name in ["before", "accepted", "after"] {
        assert!(store.index().get(&table, name.as_bytes()).unwrap().is_some(), "{name}");
    }
    drop(store);
}

/// The journal has space, but the table that the database's own thread makes of it has not: the database declares itself
/// poisoned, and no commit of ours saw the full disk.
#[test]
fn a_disk_that_was_full_for_the_database_alone_is_an_error_that_passes() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount(dir.path()) else {
        println!("SKIPPED: mounting a tmpfs is not allowed here");
        return;
    };
    let index_dir = dir.path().join("index");
    let options = IndexOptions { memtable_bytes: 16 << 20, ..IndexOptions::default() };
    let index = Index::open(&index_dir, &options).unwrap();
    let table = index.table("notes").unwrap();
    let mut noise = blake3::Hasher::new().finalize_xof();
    let mut note = |number: u32| {
        let mut value = vec![0; 1 << 20];
        noise.fill(&mut value);
        let mut batch = Batch::new();
        batch.put(table, &number.to_be_bytes(), value);
        index.commit(batch)
    };
    disk.fill_but(24 << 20);
    // A table is written out at 16 MiB, which the journal has by then as well.
    let mut accepted = 0;
    let error = loop {
        assert!(accepted < 40, "more fits than there is space for");
        let result = note(accepted).and_then(|()| index.sync());
        match result {
            Err(error) => break error,
            Ok(()) => accepted += 1,
        }
        // Gives the thread the time to fail before the journal does.
        std::thread::sleep(std::time::Duration::from_millis(100));
    };
    let IndexError::Flush(cause) = &error else { panic!("{error:?}") };
    assert!(format!("{cause:?}").contains("Poisoned"), "this test meets another failure than it is about: {cause:?}");

    disk.free();
    let began = std::time::Instant::now();
    while let Err(error) = index.sync() {
        assert!(began.elapsed().as_secs() < 30, "there is space, and still: {error:?}");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    note(1000).unwrap();
    index.sync().unwrap();
    drop(index);
    let index = Index::open(&index_dir, &IndexOptions::default()).unwrap();
    let table = index.table("notes").unwrap();
    for number in (0..=accepted).chain([1000]) {
        assert!(index.get(&table, &number.to_be_bytes()).unwrap().is_some(), "{number}");
    }
}
