//! What a collection needs in memory. In a process of its own, whose size is measured.

// Everything here is test code, helpers as well.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use castore::Digest;
use castore::objects::{ObjectKey, ObjectKind, ObjectStore, Options};

/// Just more than a table of the set holds, which is where it costs most.
const OBJECTS: u64 = 1_000_000;

fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
    line("VmRSS:").trim_end_matches(" kB").trim().parse::<u64>().unwrap() * 1024
}

#[test]
fn a_million_marks_take_less_than_40_mb() {
    let dir = tempfile::tempdir().unwrap();
    let store = ObjectStore::open(dir.path(), Options::default()).unwrap();
    let mut collection = store.begin_collection(Duration::from_secs(10)).unwrap();
    let before = resident();
    for number in 0..OBJECTS {
        let mut digest = [0; 32];
        digest[..8].copy_from_slice(&number.to_le_bytes());
        assert!(collection.mark(&ObjectKey { kind: ObjectKind::Chunk, digest: Digest::from(digest) }));
    }
    let bytes = resident() - before;
    println!("{OBJECTS} marks: {bytes} bytes, {} for each", bytes / OBJECTS);
    assert!(bytes < 40_000_000, "{bytes}");
}
