use std::ops::ControlFlow;
use std::time::Duration;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::services::contract::{self, noise};
use crate::{MemoryStore, Node, NodeName};

fn engine() -> (TempDir, Arc<Engine>) {
    let dir = tempfile::tempdir().unwrap();
    let engine = Engine::open(dir.path(), Options::default()).unwrap();
    (dir, engine)
}

fn name(text: &str) -> NodeName {
    NodeName::try_from(text).unwrap()
}

fn file(digest: Digest, size: u64) -> Node {
    Node::File { digest, size, executable: false }
}

#[test]
fn keeps_the_contract() {
    let (_dir, engine) = engine();
    contract::blobs(&*engine);
    contract::directories(&*engine);
}

#[test]
fn keeps_the_contract_with_next_to_no_cache() {
    let dir = tempfile::tempdir().unwrap();
    let none = Options { cache_bytes: 0, directory_cache_bytes: 0, chunk_list_cache_bytes: 0, ..Options::default() };
    let engine = Engine::open(dir.path(), none).unwrap();
    contract::blobs(&*engine);
    contract::directories(&*engine);
}

/// Bytes of `length` that contain runs, repeats and noise, so that chunks of all lengths come out.
fn contents(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 100_000);
    let mut step = seed;
    while bytes.len() < length {
        step = step.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let piece = 1 + (step >> 33) as usize % 90_000;
        match step >> 61 {
            0 => bytes.resize(bytes.len() + piece, 0),
            1 => bytes.extend_from_within(..piece.min(bytes.len())),
            _ => bytes.extend(noise(step, piece)),
        }
    }
    bytes.truncate(length);
    bytes
}

fn length() -> impl Strategy<Value = usize> {
    let near = |size: usize| size - 300..size + 300;
    prop_oneof![
        2 => 0..2000usize,
        2 => near(64 << 10),
        2 => near(128 << 10),
        1 => near(256 << 10),
        2 => near(1 << 20),
        1 => near(2 << 20),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn reads_what_was_put_as_the_model_does(
        seed: u64,
        length in length(),
        ranges in proptest::collection::vec((0.0..1.1f64, prop_oneof![0..100usize, 0..300_000usize]), 1..20),
    ) {
        let (_dir, engine) = engine();
        let model = MemoryStore::new();
        let blob = contents(seed, length);

        let mut session = engine.session();
        let put = session.put_blob(&mut &blob[..]).unwrap();
        prop_assert_eq!(session.put_blob_bytes(&blob).unwrap(), put.0);
        session.flush().unwrap();
        prop_assert_eq!(put, BlobService::put(&model, &mut &blob[..]).unwrap());
        prop_assert_eq!(engine.stat(&put.0).unwrap().unwrap().size, length as u64);
        for (start, len) in ranges {
            let start = (start * length as f64) as u64;
            prop_assert_eq!(engine.read_at(&put.0, start, len).unwrap(), model.read_at(&put.0, start, len).unwrap());
        }
        // The same blob through a slice or a reader is cut at the same places.
        let chunks = engine.stats().objects;
        let again = engine.put_in_pieces(&blob, 1 + (seed % 70_000) as usize);
        prop_assert_eq!(again, put);
        prop_assert_eq!(engine.stats().objects, chunks);
    }
}

impl Engine {
    /// Puts `blob` from a reader that gives `piece` bytes at a time.
    fn put_in_pieces(&self, blob: &[u8], piece: usize) -> (Digest, u64) {
        struct Pieces<'a>(&'a [u8], usize);
        impl Read for Pieces<'_> {
            fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
                let length = buffer.len().min(self.1);
                self.0.read(&mut buffer[..length])
            }
        }
        BlobService::put(self, &mut Pieces(blob, piece)).unwrap()
    }
}

#[test]
fn a_blob_up_to_64_kib_is_one_chunk_and_needs_no_list() {
    let (_dir, engine) = engine();
    let blob = noise(1, 64 << 10);
    let (digest, size) = BlobService::put(&*engine, &mut &blob[..]).unwrap();
    assert_eq!(engine.stat(&digest).unwrap().unwrap().chunks, [(digest, size)]);
    assert_eq!(engine.stats().objects, 1);

    // Larger, but nothing to cut at before the end.
    let zeros = vec![0; 100_000];
    let (digest, size) = BlobService::put(&*engine, &mut &zeros[..]).unwrap();
    assert_eq!(engine.stat(&digest).unwrap().unwrap().chunks, [(digest, size)]);
    assert_eq!(engine.stats().objects, 2);
}

#[test]
fn nothing_is_stored_twice() {
    let (_dir, engine) = engine();
    let mut session = engine.session();
    let old = noise(2, 3 << 20);
    session.put_blob_bytes(&old).unwrap();
    session.flush().unwrap();
    let before = engine.stats();

    session.put_blob_bytes(&old).unwrap();
    session.flush().unwrap();
    assert_eq!((engine.stats().objects, engine.stats().raw_bytes), (before.objects, before.raw_bytes));

    // A new version: a few bytes more in the middle, a few chunks and a list more.
    let new = [&old[..1_500_000], b"changed", &old[1_500_000..]].concat();
    session.put_blob_bytes(&new).unwrap();
    session.flush().unwrap();
    let added = engine.stats().raw_bytes - before.raw_bytes;
    assert!(added < 400_000, "{added} bytes for a change of 7");
}

#[test]
fn nothing_empty_is_stored() {
    let (_dir, engine) = engine();
    let mut session = engine.session();
    assert_eq!(session.put_blob(&mut &b""[..]).unwrap(), (Digest::EMPTY, 0));
    assert_eq!(session.put_blob_bytes(b"").unwrap(), Digest::EMPTY);
    assert_eq!(session.put_directory(&Directory::default()).unwrap(), Digest::EMPTY);
    session.flush().unwrap();
    assert_eq!(engine.stats().objects, 0);
    assert!(engine.get(&Digest::EMPTY).unwrap().is_some());
    assert!(engine.read_at(&Digest::EMPTY, 0, 10).unwrap().is_empty());
}

#[test]
fn everything_is_there_after_reopening() {
    let (dir, engine) = engine();
    let blob = noise(3, 500_000);
    let mut session = engine.session();
    let (digest, size) = session.put_blob(&mut &blob[..]).unwrap();
    let tree = Directory::new([(name("file"), file(digest, size))]).unwrap();
    let root = session.put_directory(&tree).unwrap();
    drop(session.finish().unwrap());
    engine.sync().unwrap();
    drop(engine);

    let engine = Engine::open(dir.path(), Options::default()).unwrap();
    assert_eq!(*engine.get(&root).unwrap().unwrap(), tree);
    let mut copy = Vec::new();
    engine.copy_to(&digest, &mut copy).unwrap();
    assert!(copy == blob);
}

#[test]
fn a_session_that_is_dropped_stores_nothing_small() {
    let (_dir, engine) = engine();
    let mut session = engine.session();
    let (digest, _) = session.put_blob(&mut &b"abandoned"[..]).unwrap();
    drop(session);
    assert!(engine.stat(&digest).unwrap().is_none());
}

/// A tree of two levels with a small and a large file; every `seed` gives another.
fn tree(engine: &Engine, seed: u64) -> (Node, Hold) {
    let mut session = engine.session();
    let small = session.put_blob_bytes(&noise(seed, 100)).unwrap();
    let large = session.put_blob_bytes(&noise(seed + 1, 400_000)).unwrap();
    let below = Directory::new([(name("small"), file(small, 100)), (name("empty"), file(Digest::EMPTY, 0))]).unwrap();
    session.put_directory(&below).unwrap();
    let root = Directory::new([(name("below"), below.to_node()), (name("large"), file(large, 400_000))]).unwrap();
    session.put_directory(&root).unwrap();
    (root.to_node(), session.finish().unwrap())
}

fn collect(engine: &Arc<Engine>, alive: &[&Node]) -> u64 {
    let mut garbage = engine.begin_collection(Duration::from_secs(10)).unwrap();
    for node in alive {
        garbage.mark(node).unwrap();
    }
    garbage.sweep(&mut |_| ControlFlow::Continue(())).unwrap().removed_objects
}

#[test]
fn collects_what_is_not_alive_and_nothing_else() {
    let (_dir, engine) = engine();
    let (kept, hold) = tree(&engine, 10);
    drop(hold);
    let (dropped, hold) = tree(&engine, 20);
    drop(hold);
    let objects = engine.stats().objects;
    drop(engine.hold(&kept).unwrap());
    drop(engine.hold(&dropped).unwrap());

    let removed = collect(&engine, &[&kept]);
    assert_eq!(removed, objects / 2);
    drop(engine.hold(&kept).unwrap());
    let error = engine.hold(&dropped).err().unwrap();
    assert!(matches!(error, Error::DirectoryNotFound(_)), "{error}");
    assert_eq!(collect(&engine, &[&kept]), 0);
}

#[test]
fn a_hold_keeps_a_tree_through_a_collection() {
    let (_dir, engine) = engine();
    let (node, hold) = tree(&engine, 30);
    drop(hold);

    let garbage = engine.begin_collection(Duration::from_secs(10)).unwrap();
    let hold = engine.hold(&node).unwrap();
    assert_eq!(garbage.sweep(&mut |_| ControlFlow::Continue(())).unwrap().removed_objects, 0);
    drop(engine.hold(&node).unwrap());
    drop(hold);

    // And a session that finds everything here already.
    let garbage = engine.begin_collection(Duration::from_secs(10)).unwrap();
    let (again, hold) = tree(&engine, 30);
    assert_eq!(garbage.sweep(&mut |_| ControlFlow::Continue(())).unwrap().removed_objects, 0);
    drop(engine.hold(&again).unwrap());
    drop(hold);
    assert!(collect(&engine, &[]) > 0);
}

#[test]
fn a_collection_waits_for_holds() {
    let (_dir, engine) = engine();
    let (_, hold) = tree(&engine, 40);
    assert!(matches!(
        engine.begin_collection(Duration::from_millis(10)),
        Err(crate::collect::CollectError::Busy { .. })
    ));
    drop(hold);
    assert!(engine.begin_collection(Duration::from_millis(10)).is_ok());
}

#[test]
fn a_hold_finds_what_is_wrong() {
    let (_dir, engine) = engine();
    let mut session = engine.session();
    let small = session.put_blob_bytes(b"twelve bytes").unwrap();
    let large = session.put_blob_bytes(&noise(50, 300_000)).unwrap();
    let missing = Digest::of(b"never put");
    let mut wrong = |node: Node| {
        let directory = Directory::new([(name("it"), node)]).unwrap();
        session.put_directory(&directory).unwrap();
        session.flush().unwrap();
        engine.hold(&directory.to_node()).err().unwrap()
    };
    assert!(matches!(wrong(file(small, 13)), Error::BlobSize { claimed: 13, actual: 12, .. }));
    assert!(matches!(wrong(file(large, 299_999)), Error::BlobSize { actual: 300_000, .. }));
    assert!(matches!(wrong(file(missing, 1)), Error::BlobNotFound(_)));
    assert!(matches!(wrong(Node::Directory { digest: missing, size: 0 }), Error::DirectoryNotFound(_)));
    assert!(matches!(wrong(Node::Directory { digest: Digest::EMPTY, size: 1 }), Error::ChildSize { actual: 0, .. }));
}

#[test]
fn a_collection_goes_on_where_a_tree_is_broken() {
    let (_dir, engine) = engine();
    let (whole, hold) = tree(&engine, 60);
    drop(hold);
    let mut session = engine.session();
    let lost = Node::Directory { digest: Digest::of(b"lost"), size: 3 };
    let broken = Directory::new([(name("a-lost"), lost), (name("whole"), whole.clone())]).unwrap();
    session.put_directory(&broken).unwrap();
    drop(session.finish().unwrap());

    assert_eq!(collect(&engine, &[&broken.to_node()]), 0);
    drop(engine.hold(&whole).unwrap());
}

#[test]
fn damage_is_told_apart_from_absence() {
    let (_dir, engine) = engine();
    let blob = Digest::of(b"a blob whose list is made up");
    let damage_with = |list: &[u8]| {
        let mut writer = engine.objects().writer();
        writer.put(crate::blob::chunk_list(&blob), list).unwrap();
        writer.flush().unwrap();
        drop(writer);
        let damage = match engine.read_at(&blob, 5, 20).unwrap_err() {
            Error::DamagedBlob { digest, damage } if digest == blob => damage,
            other => panic!("{other}"),
        };
        assert!(collect(&engine, &[]) > 0, "so that the next list can be put");
        damage
    };
    assert_eq!(damage_with(b"not a list"), crate::BlobDamage::ChunkList);

    let (there, missing) = (Digest::of(b"0123456789"), Digest::of(b"missing"));
    let list = |lengths: [u32; 2]| {
        let mut session = engine.session();
        session.put_blob_bytes(b"0123456789").unwrap();
        session.flush().unwrap();
        let mut list = crate::chunk::ChunkListBuilder::default();
        assert!(list.push(&there, lengths[0]) && list.push(&missing, lengths[1]));
        list.finish().unwrap()
    };
    assert_eq!(damage_with(&list([10, 10])), crate::BlobDamage::MissingChunk(missing));
    assert_eq!(damage_with(&list([11, 10])), crate::BlobDamage::ChunkLength(there));
}
