use std::collections::BTreeSet;
use std::sync::Arc;

use super::{MAX_OBJECT, ObjectError, ObjectKey, ObjectKind, ObjectStore, Options};
use crate::Digest;
use crate::index::Batch;

fn open(dir: &std::path::Path) -> Arc<ObjectStore> {
    ObjectStore::open(dir, Options::default()).unwrap()
}

fn chunk(contents: &[u8]) -> ObjectKey {
    ObjectKey { kind: ObjectKind::Chunk, digest: Digest::of(contents) }
}

/// Text of about `length` bytes that differs for each `number`.
fn text(number: usize, length: usize) -> Vec<u8> {
    format!("the {number}th object says what objects say. ").into_bytes().into_iter().cycle().take(length).collect()
}

/// Bytes that do not compress.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

#[test]
fn blocks_lie_in_packs_in_the_order_in_which_they_were_gathered() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut writer = store.writer();
    // Some take much longer to compress than others, and there are more than wait for a thread.
    let contents: Vec<Vec<u8>> =
        (0..100).map(|n| if n % 3 == 0 { text(n, 4_000_000) } else { noise(n as u64, 130_000) }).collect();
    for contents in &contents {
        writer.put(chunk(contents), contents).unwrap();
    }
    writer.flush().unwrap();
    let place = |contents: &Vec<u8>| store.core.entry(&chunk(contents)).unwrap().unwrap().place;
    let places: Vec<_> = contents.iter().map(|contents| (place(contents).pack, place(contents).offset)).collect();
    assert!(places.is_sorted());
}

#[test]
fn what_was_put_is_there_before_and_after_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let mut contents: Vec<Vec<u8>> = (0..2000).map(|n| text(n, n * 7 % 5000)).collect();
    contents.extend((0..10).map(|n| noise(n, 200_000)));
    contents.push(Vec::new());
    let mut total = 0;
    {
        let store = open(dir.path());
        let mut writer = store.writer();
        for contents in &contents {
            if writer.put(chunk(contents), contents).unwrap() {
                total += contents.len() as u64;
            }
        }
        writer.flush().unwrap();
        for contents in &contents {
            assert_eq!(store.get(&chunk(contents)).unwrap().unwrap(), contents);
            assert_eq!(store.length(&chunk(contents)).unwrap(), Some(contents.len() as u32));
            assert!(!writer.put(chunk(contents), contents).unwrap());
        }
        assert_eq!(store.get(&chunk(b"never put")).unwrap(), None);
        let as_directory = ObjectKey { kind: ObjectKind::Directory, ..chunk(&contents[5]) };
        assert!(!store.contains(&as_directory).unwrap(), "the kind belongs to the key");
    }
    let store = open(dir.path());
    for contents in &contents {
        assert_eq!(store.get(&chunk(contents)).unwrap().unwrap(), contents);
    }
    let stats = store.stats();
    assert_eq!(stats.raw_bytes, total);
    // The text shrinks, the noise does not.
    assert!(stats.stored_bytes > 2_000_000 && stats.stored_bytes < 3_000_000, "{stats:?}");
}

/// How many blocks have to be read for these objects.
fn blocks_of(store: &ObjectStore, keys: &[ObjectKey]) -> usize {
    let place = |key| store.core.entry(key).unwrap().unwrap().place;
    keys.iter().map(place).map(|place| (place.pack, place.offset)).collect::<BTreeSet<_>>().len()
}

fn directory(number: usize) -> (ObjectKey, Vec<u8>) {
    let contents = noise(number as u64, 1000);
    (ObjectKey { kind: ObjectKind::Directory, digest: Digest::of(&contents) }, contents)
}

#[test]
fn directories_stand_together_and_what_is_small_is_one_block() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut writer = store.writer();
    let mut directories = Vec::new();
    for number in 0..200 {
        let files = noise(1000 + number as u64, 50_000);
        writer.put(chunk(&files), &files).unwrap();
        let (key, contents) = directory(number);
        writer.put(key, &contents).unwrap();
        directories.push(key);
    }
    writer.flush().unwrap();
    // 200 kB in blocks of 128 KiB, among 10 MB of files.
    assert_eq!(blocks_of(&store, &directories), 2);
    let (key, contents) = directory(1000);
    writer.put(key, &contents).unwrap();
    writer.put(chunk(b"small"), b"small").unwrap();
    writer.flush_with(Batch::new()).unwrap();
    assert_eq!(blocks_of(&store, &[key, chunk(b"small")]), 1);
}

#[test]
fn what_was_not_flushed_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut writer = store.writer();
    assert!(writer.put(chunk(b"a"), b"a").unwrap());
    assert!(!writer.put(chunk(b"a"), b"a").unwrap(), "the writer itself knows");
    drop(writer);
    assert!(!store.contains(&chunk(b"a")).unwrap());
}

#[test]
fn an_object_that_is_too_long_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let contents = vec![0; MAX_OBJECT + 1];
    let refused = store.writer().put(chunk(b"key"), &contents);
    assert!(matches!(refused, Err(ObjectError::TooLong { length, .. }) if length == MAX_OBJECT + 1));
}

#[test]
fn a_store_that_is_open_is_not_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let _store = open(dir.path());
    let again = ObjectStore::open(dir.path(), Options::default());
    assert!(matches!(again, Err(ObjectError::Index(crate::index::IndexError::Locked(_)))));
}

#[test]
fn writers_of_the_same_objects_and_readers_get_along() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let contents: Vec<Vec<u8>> = (0..3000).map(|n| text(n, 100 + n % 3000)).collect();
    std::thread::scope(|scope| {
        for shift in 0..4 {
            let (store, contents) = (&store, &contents);
            scope.spawn(move || {
                let mut writer = store.writer();
                for n in 0..contents.len() {
                    let contents = &contents[(n + shift * 700) % contents.len()];
                    writer.put(chunk(contents), contents).unwrap();
                }
                writer.flush().unwrap();
                for contents in contents {
                    assert_eq!(store.get(&chunk(contents)).unwrap().unwrap(), contents);
                }
            });
        }
        for _ in 0..2 {
            scope.spawn(|| {
                for contents in contents.iter().rev() {
                    if let Some(found) = store.get(&chunk(contents)).unwrap() {
                        assert_eq!(found, contents);
                    }
                }
            });
        }
    });
    let stats = store.stats();
    assert_eq!(stats.objects, contents.len() as u64, "each object counts once");
    assert_eq!(stats.raw_bytes, contents.iter().map(|contents| contents.len() as u64).sum::<u64>());
}

#[test]
fn a_flipped_bit_in_a_pack_is_an_error_and_never_served() {
    let dir = tempfile::tempdir().unwrap();
    let contents: Vec<Vec<u8>> = (0..40).map(|n| text(n, 900)).chain([noise(1, 150_000)]).collect();
    {
        let store = open(dir.path());
        let mut writer = store.writer();
        for contents in &contents {
            writer.put(chunk(contents), contents).unwrap();
            // Several blocks, small and large.
            writer.flush().unwrap();
        }
    }
    let path = dir.path().join("packs/00000000.pack");
    let good = std::fs::read(&path).unwrap();
    let (mut damaged, mut intact) = (0, 0);
    for at in (32..good.len()).step_by(good.len() / 60) {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        std::fs::write(&path, &bad).unwrap();
        let store = open(dir.path());
        let mut bad_here = 0;
        for contents in &contents {
            match store.get(&chunk(contents)) {
                Ok(found) => assert_eq!(found.unwrap(), contents),
                Err(ObjectError::Unreadable { key, source: crate::pack::PackError::Block { pack: 0, .. } }) => {
                    assert_eq!(key, chunk(contents));
                    bad_here += 1;
                }
                Err(error) => panic!("{error:?}"),
            }
        }
        assert_eq!(bad_here, 1, "each object has a block of its own, and byte {at} is in one of them");
        damaged += bad_here;
        intact += contents.len() - bad_here;
    }
    assert!(damaged >= 60 && intact >= 60 * 40);
}

#[test]
fn who_reads_in_order_finds_what_is_wanted_next() {
    const BLOCK: usize = 128 << 10;
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut writer = store.writer();
    let contents = |n: u64| noise(n, (n as usize * 7919) % 60_000).iter().map(|byte| byte & 15).collect();
    let contents: Vec<Vec<u8>> = (0..2000).map(contents).collect();
    for contents in &contents {
        writer.put(chunk(contents), contents).unwrap();
    }
    writer.flush().unwrap();
    let read = |contents: &Vec<u8>| assert_eq!(store.get(&chunk(contents)).unwrap().unwrap(), contents);
    // Faster than anybody decodes ahead, which must not be the end of it.
    let (quickly, slowly) = contents.split_at(1000);
    quickly.iter().for_each(read);
    let before = store.stats().cache_misses;
    for contents in slowly {
        read(contents);
        std::thread::sleep(std::time::Duration::from_micros(500));
    }
    let blocks = slowly.iter().map(Vec::len).sum::<usize>() / BLOCK;
    let missed = store.stats().cache_misses - before;
    assert!(missed < blocks as u64 / 2, "{missed} of {blocks} blocks");
}
