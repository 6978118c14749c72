use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use super::{Checked, Damage};
use crate::engine::{Engine, Options};
use crate::objects::{ObjectKey, ObjectKind};
use crate::services::contract::noise;
use crate::{BlobService, Digest};

/// Flips in a run of the tests; more with `CASTORED_FLIPS`.
const FLIPS: u64 = 150;

fn open(dir: &Path) -> Arc<Engine> {
    Engine::open(dir, Options { seal_at: 300 << 10, ..Options::default() }).unwrap()
}

fn check(engine: &Engine) -> Checked {
    engine.objects().check(&|_| ControlFlow::Continue(())).unwrap()
}

/// Objects of all kinds, some that compress and some that do not.
fn fill(engine: &Engine) -> BTreeMap<ObjectKey, Vec<u8>> {
    let mut all = BTreeMap::new();
    let mut session = engine.session();
    session.put_blob_bytes(&noise(1, 400_000)).unwrap();
    session.flush().unwrap();
    let mut writer = engine.objects().writer();
    for number in 0..300_u64 {
        let kind = [ObjectKind::Chunk, ObjectKind::Directory, ObjectKind::Record][number as usize % 3];
        let contents = match number % 4 {
            0 => noise(number, 1000),
            1 => number.to_le_bytes().repeat(400),
            2 => noise(number, 12),
            _ => noise(number, 3000),
        };
        writer.put(ObjectKey { kind, digest: Digest::of(&contents) }, &contents).unwrap();
    }
    writer.flush().unwrap();
    drop(writer);
    engine.sync().unwrap();
    engine
        .index()
        .scan_prefix(&engine.objects().core.tables.objects, &[], &mut |key, _| {
            let key = crate::objects::key_of(key).unwrap();
            all.insert(key, engine.objects().get(&key).unwrap().unwrap().to_vec());
            ControlFlow::Continue(())
        })
        .unwrap();
    all
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn a_sound_store_is_found_sound() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    let all = fill(&engine);
    let checked = check(&engine);
    assert_eq!(checked.objects, all.len() as u64);
    assert_eq!(checked.bytes, engine.stats().raw_bytes);
    assert!(checked.damaged.is_empty() && checked.headers.is_empty() && checked.miscounted.is_empty());
    let ended = engine.objects().check(&|_| ControlFlow::Break(())).unwrap();
    assert!(ended.objects < all.len() as u64, "it can be ended");
}

/// One bit anywhere in the packs: what is read is right or an error, the check finds all that cannot be read and what
/// stands in the same block (some of which can be read without the rest), what is intact in a damaged block is saved, and what is put again takes the place of the rest.
#[test]
fn every_flipped_bit_is_found_and_none_is_served() {
    let flips = std::env::var("CASTORED_FLIPS").map_or(FLIPS, |flips| flips.parse().unwrap());
    let template = tempfile::tempdir().unwrap();
    let all = {
        let engine = open(template.path());
        fill(&engine)
    };
    let files = std::fs::read_dir(template.path().join("packs")).unwrap().map(|entry| entry.unwrap().file_name());
    let mut packs: Vec<_> = files.filter(|name| name.to_str().unwrap().ends_with(".pack")).collect();
    packs.sort();
    assert!(packs.len() > 1);
    let (mut harmed, mut salvaged) = (0, 0);
    for flip in 0..flips {
        let dir = tempfile::tempdir().unwrap();
        copy(template.path(), dir.path());
        let random = u64::from_le_bytes(noise(flip + 1000, 8).try_into().unwrap());
        let pack = dir.path().join("packs").join(&packs[(random % packs.len() as u64) as usize]);
        let file = std::fs::OpenOptions::new().read(true).write(true).open(&pack).unwrap();
        let length = file.metadata().unwrap().len();
        // Every fourth in the first bytes, where headers and tables are.
        let at = if flip % 4 == 0 { (random >> 8) % 600 } else { (random >> 8) % length };
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        byte[0] ^= 1 << (random >> 60 & 7);
        file.write_all_at(&byte, at).unwrap();

        let engine = open(dir.path());
        let unreadable: Vec<ObjectKey> = all
            .iter()
            .filter(|(key, contents)| match engine.objects().get(key) {
                Ok(found) => {
                    assert!(found.unwrap() == **contents, "a wrong byte of {key}");
                    false
                }
                Err(_) => true,
            })
            .map(|(key, _)| *key)
            .collect();
        let checked = check(&engine);
        let mut found: Vec<ObjectKey> = checked.damaged.iter().map(|damaged| damaged.key).collect();
        found.sort();
        let missed: Vec<_> = unreadable.iter().filter(|key| !found.contains(key)).collect();
        assert!(missed.is_empty(), "byte {at} of {}: {missed:?}", pack.display());
        assert!(!found.is_empty(), "byte {at} of {} belongs to nothing", pack.display());
        harmed += 1;

        engine.objects().restore_headers(&checked.headers).unwrap();
        let damaged = if checked.headers.is_empty() { checked.damaged } else { check(&engine).damaged };
        let before = damaged.len();
        let left = engine.objects().salvage(damaged).unwrap();
        salvaged += before - left.len();
        // From elsewhere.
        let mut writer = engine.objects().writer();
        for damaged in &left {
            assert!(writer.put(damaged.key, &all[&damaged.key]).unwrap());
        }
        writer.flush().unwrap();
        drop(writer);
        for (key, contents) in &all {
            assert!(engine.objects().get(key).unwrap().unwrap() == *contents);
        }
        let again = check(&engine);
        assert!(again.damaged.is_empty() && again.headers.is_empty() && again.miscounted.is_empty(), "{again:?}");
        drop(engine);
        let engine = open(dir.path());
        assert!(check(&engine).damaged.is_empty(), "also after a restart");
        assert_eq!(engine.stats().objects, all.len() as u64);
    }
    println!("{flips} flips: {harmed} harmed something, {salvaged} objects were saved from damaged blocks");
    assert!(salvaged > 0);
}

#[test]
fn an_index_that_points_astray_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    let all = fill(&engine);
    let core = &engine.objects().core;
    let keys: Vec<ObjectKey> = all.keys().filter(|key| key.kind == ObjectKind::Record).take(3).copied().collect();
    let entries: Vec<_> = keys.iter().map(|key| core.entry(key).unwrap().unwrap()).collect();
    let mut batch = crate::index::Batch::new();
    let row = |key: &ObjectKey| crate::objects::key_bytes(key);
    batch.put(core.tables.objects, &row(&keys[0]), entries[1].encode().to_vec());
    let gone = crate::objects::Entry { place: crate::pack::Place { pack: 999, ..entries[1].place }, ..entries[1] };
    batch.put(core.tables.objects, &row(&keys[1]), gone.encode().to_vec());
    batch.put(core.tables.objects, &row(&keys[2]), b"nonsense".to_vec());
    core.index.commit(batch).unwrap();
    let checked = check(&engine);
    let found = |key| checked.damaged.iter().find(|damaged| damaged.key == key).map(|damaged| &damaged.damage);
    assert!(matches!(found(keys[0]), Some(Damage::Elsewhere { .. })));
    assert!(matches!(found(keys[1]), Some(Damage::Unreadable(_))));
    assert!(matches!(found(keys[2]), Some(Damage::Entry)));
    assert_eq!(checked.damaged.len(), 3);
    assert!(!checked.miscounted.is_empty());

    engine.objects().salvage(checked.damaged).unwrap();
    let mut writer = engine.objects().writer();
    keys.iter().for_each(|key| assert!(writer.put(*key, &all[key]).unwrap()));
    writer.flush().unwrap();
    engine.objects().recount().unwrap();
    let checked = check(&engine);
    assert!(checked.damaged.is_empty() && checked.miscounted.is_empty(), "{checked:?}");
}

/// A list of chunks whose own copy is whole, but which was stored for another blob.
#[test]
fn a_list_that_makes_another_blob_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    let mut session = engine.session();
    let blob = session.put_blob_bytes(&noise(1, 400_000)).unwrap();
    session.flush().unwrap();
    let list = engine.objects().get(&crate::blob::chunk_list(&blob)).unwrap().unwrap();
    let other = crate::blob::chunk_list(&Digest::of(b"another blob"));
    let mut writer = engine.objects().writer();
    writer.put(other, &list).unwrap();
    writer.flush().unwrap();
    let checked = check(&engine);
    assert_eq!(checked.damaged.len(), 1);
    assert!(checked.damaged[0].key == other && matches!(checked.damaged[0].damage, Damage::List));
    assert_eq!(engine.read_at(&blob, 399_990, 100).unwrap().len(), 10);
}
