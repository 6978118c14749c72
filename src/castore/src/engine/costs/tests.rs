use std::sync::Arc;

use tempfile::TempDir;

use super::*;
use crate::engine::Options;
use crate::services::contract::noise;
use crate::{Digest, Directory, NodeName};

struct Rig {
    engine: Arc<Engine>,
    _dir: TempDir,
}

impl Rig {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { engine: Engine::open(dir.path(), Options::default()).unwrap(), _dir: dir }
    }

    /// A tree of these files, each flushed into blocks of its own.
    fn tree(&self, files: &[(&str, &[u8])]) -> Node {
        let mut session = self.engine.session();
        let mut entries = Vec::new();
        for (name, contents) in files {
            let (digest, size) = session.put_blob(&mut &**contents).unwrap();
            session.flush().unwrap();
            entries.push((NodeName::try_from(*name).unwrap(), Node::File { digest, size, executable: false }));
        }
        let directory = Directory::new(entries).unwrap();
        session.put_directory(&directory).unwrap();
        session.flush().unwrap();
        directory.to_node()
    }

    fn encoded(&self, node: &Node) -> u64 {
        let Node::Directory { digest, .. } = node else { return 0 };
        u64::from(self.engine.objects.length(&directory_key(digest)).unwrap().unwrap())
    }
}

/// Noise does not pack: its block is as long as it is, with a header and a row.
const BLOCK: u64 = 40 + 37;

#[test]
fn what_is_unique_and_what_is_shared_comes_out_exactly() {
    let rig = Rig::new();
    let (common, own, other) = (noise(1, 50_000), noise(2, 30_000), noise(3, 20_000));
    let a = rig.tree(&[("common", &common), ("own", &own)]);
    let b = rig.tree(&[("common", &common), ("other", &other)]);
    let alone = rig.tree(&[("alone", &other[..10_000])]);
    let mut costs = rig.engine.costs();
    // Sets: a, a and b, b.
    costs.add(&a, 0b011).unwrap();
    costs.add(&b, 0b110).unwrap();
    costs.set_against(&alone).unwrap();
    let (first, both, second) = (costs.of(0), costs.of(1), costs.of(2));
    let directory = |node: &Node| rig.encoded(node) + BLOCK;
    assert_eq!(first, Cost { unique: 30_000 + BLOCK + directory(&a), shared: 50_000 + BLOCK });
    assert_eq!(second, Cost { unique: 20_000 + BLOCK + directory(&b), shared: 50_000 + BLOCK });
    assert_eq!(both, Cost { unique: first.unique + second.unique + 50_000 + BLOCK, shared: 0 });
    // Whoever comes now takes from all of them what is common.
    costs.set_against(&rig.tree(&[("again", &common)])).unwrap();
    let taken = Cost { unique: both.unique - 50_000 - BLOCK, shared: 50_000 + BLOCK };
    assert_eq!((costs.of(1), costs.of(0)), (taken, first));
}

#[test]
fn chunks_of_different_files_are_shared() {
    let rig = Rig::new();
    let start = noise(4, 1 << 20);
    let longer = [&start[..], &noise(5, 1 << 20)].concat();
    let (a, b) = (rig.tree(&[("file", &start)]), rig.tree(&[("file", &longer)]));
    let mut costs = rig.engine.costs();
    costs.add(&a, 1).unwrap();
    let before = costs.of(0);
    assert_eq!(before.shared, 0);
    costs.set_against(&b).unwrap();
    let after = costs.of(0);
    // All but the last chunk, which ended with the file, and the list of chunks.
    assert!(after.shared > (1 << 20) - 2 * crate::chunk::MAX_CHUNK as u64, "{after:?}");
    assert!(after.unique > 0);
    assert_eq!(after.shared + after.unique, before.unique);
}

#[test]
fn equal_files_and_directories_count_once() {
    let rig = Rig::new();
    let (one, two) = (noise(6, 5_000), noise(7, 700_000));
    let a = rig.tree(&[("one", &one), ("same", &one)]);
    let b = rig.tree(&[("one", &one), ("two", &two)]);
    let mut distinct = rig.engine.distinct();
    for root in [&a, &b, &a, &Node::Directory { digest: Digest::EMPTY, size: 0 }] {
        distinct.add(root).unwrap();
    }
    assert_eq!(distinct.bytes(), 705_000 + rig.encoded(&a) + rig.encoded(&b));
}
