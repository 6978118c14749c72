//! A disk that is full to the last byte: clear errors, nothing lost, and all is well again when there is space.

// Everything here is test code, helpers as well.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use castore::Digest;
use castore::index::{Batch, IndexError};
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
