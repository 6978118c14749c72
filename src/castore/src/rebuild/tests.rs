use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use super::rebuild_index;
use crate::Digest;
use crate::engine::{Engine, Options};
use crate::index::IndexOptions;
use crate::objects::{ObjectError, ObjectKey, ObjectKind, Stats, key_of};
use crate::rebuild::Rebuilt;
use crate::services::contract::noise;

fn open(dir: &Path) -> Arc<Engine> {
    Engine::open(dir, Options { seal_at: 100 << 10, ..Options::default() }).unwrap()
}

fn rebuild(dir: &Path) -> Rebuilt {
    rebuild_index(dir, &IndexOptions::default(), &|_| ControlFlow::Continue(())).unwrap()
}

fn rows(engine: &Engine) -> BTreeMap<ObjectKey, Vec<u8>> {
    let mut rows = BTreeMap::new();
    let core = &engine.objects().core;
    let mut each = |key: &[u8], value: &[u8]| {
        rows.insert(key_of(key).unwrap(), value.to_vec());
        ControlFlow::Continue(())
    };
    core.index.scan_prefix(&core.tables.objects, &[], &mut each).unwrap();
    rows
}

fn fill(dir: &Path) -> (BTreeMap<ObjectKey, Vec<u8>>, Stats) {
    let engine = open(dir);
    let mut session = engine.session();
    for number in 0..20 {
        session.put_blob_bytes(&noise(number, 30_000)).unwrap();
    }
    session.put_blob_bytes(&noise(100, 400_000)).unwrap();
    session.flush().unwrap();
    drop(session);
    let mut writer = engine.objects().writer();
    let record = b"a record";
    writer.put(ObjectKey { kind: ObjectKind::Record, digest: Digest::of(record) }, record).unwrap();
    writer.flush().unwrap();
    engine.sync().unwrap();
    (rows(&engine), engine.stats())
}

#[test]
fn a_lost_index_comes_back_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let (before, stats) = fill(dir.path());
    std::fs::remove_dir_all(dir.path().join("index")).unwrap();

    let refused = Engine::open(dir.path(), Options::default()).err().unwrap();
    assert!(matches!(refused, crate::Error::Objects(ObjectError::IndexLost(_))), "{refused}");
    let rebuilt = rebuild(dir.path());
    assert!(rebuilt.is_whole() && rebuilt.before.is_none(), "{rebuilt:?}");
    assert_eq!(rebuilt.objects, stats.objects);

    let engine = open(dir.path());
    assert_eq!(rows(&engine), before);
    assert_eq!(engine.stats(), Stats { cache_hits: 0, cache_misses: 0, ..stats });
    let checked = engine.objects().check(&|_| ControlFlow::Continue(())).unwrap();
    assert!(checked.damaged.is_empty() && checked.miscounted.is_empty());
    drop(engine);

    // An index that is there is kept.
    let kept = rebuild(dir.path()).before.unwrap();
    assert!(kept.join("keyspaces").exists() || std::fs::read_dir(&kept).unwrap().count() > 0);
    assert_eq!(rows(&open(dir.path())), before);
}

/// Bytes that look like a block inside a raw payload are never taken for one.
#[test]
fn blocks_after_a_damaged_head_are_found_and_nothing_else() {
    let template = tempfile::tempdir().unwrap();
    let (before, _) = fill(template.path());
    // Any byte of the first block's header but the magic's neighbourhood: number of objects, lengths, checksums.
    let mut rescued = 0;
    for at in 32..72_u64 {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("packs")).unwrap();
        for entry in std::fs::read_dir(template.path().join("packs")).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), dir.path().join("packs").join(entry.file_name())).unwrap();
        }
        let file =
            std::fs::OpenOptions::new().read(true).write(true).open(dir.path().join("packs/00000000.pack")).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        byte[0] ^= 0x10;
        file.write_all_at(&byte, at).unwrap();
        let rebuilt = rebuild(dir.path());
        let found = rows(&open(dir.path()));
        let missing = before.keys().filter(|key| !found.contains_key(*key)).count();
        assert!(found.keys().all(|key| before.contains_key(key)));
        let in_first_block =
            before.values().filter(|value| value[..12] == [&[0; 4][..], &32_u64.to_le_bytes()[..]].concat()).count();
        assert!(missing > 0 && missing == in_first_block, "byte {at}: {missing} of {in_first_block} missing");
        assert!(!rebuilt.is_whole());
        // A list cannot be verified, and with another codec, or none that is known, the payload is noise.
        assert!(
            rebuilt
                .rescued
                .iter()
                .all(|(key, contents)| { before.contains_key(key) && crate::check::verifies(key, contents) })
        );
        rescued += usize::from(rebuilt.rescued.len() >= missing - 1);
    }
    assert!(rescued > 10, "{rescued}");
}

#[test]
fn packs_that_are_gone_or_shorter_than_they_were_are_missed() {
    let template = tempfile::tempdir().unwrap();
    let (before, _) = fill(template.path());
    for (gone, closed) in [(1, true), (2, false)] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("packs")).unwrap();
        let copy = |from: &Path| {
            for entry in std::fs::read_dir(from.join("packs")).unwrap() {
                let entry = entry.unwrap();
                std::fs::copy(entry.path(), dir.path().join("packs").join(entry.file_name())).unwrap();
            }
            std::fs::copy(from.join("packs.durable"), dir.path().join("packs.durable")).unwrap();
        };
        let before = if closed {
            copy(template.path());
            before.clone()
        } else {
            // As after kill -9: the note is of the time at which the newest pack was begun.
            let killed = tempfile::tempdir().unwrap();
            let engine = open(killed.path());
            for number in 0..20 {
                let mut session = engine.session();
                session.put_blob_bytes(&noise(number, 30_000)).unwrap();
                session.flush().unwrap();
                engine.sync().unwrap();
            }
            copy(killed.path());
            rows(&engine)
        };
        let pack = dir.path().join(format!("packs/{gone:08x}.pack"));
        let of_pack = before.values().filter(|value| value[..4] == u32::to_le_bytes(gone)).count();
        assert!(of_pack > 0);
        std::fs::remove_file(&pack).unwrap();
        // The second time is as after a first one that was killed.
        for _ in 0..2 {
            let rebuilt = rebuild(dir.path());
            assert!(!rebuilt.is_whole());
            assert!(
                rebuilt.told.iter().any(|told| told.starts_with(&format!("pack {gone:08x}"))),
                "{:?}",
                rebuilt.told
            );
            assert_eq!(rebuilt.objects as usize, before.len() - of_pack);
            drop(open(dir.path()));
        }
        super::finish(dir.path()).unwrap();
        assert!(rebuild(dir.path()).is_whole(), "nobody is told of it for ever");
    }
    // Cut off where a block ends, nothing in the pack tells.
    let pack = template.path().join("packs/00000000.pack");
    let end = before.values().filter(|value| value[..4] == [0; 4]).map(|value| &value[4..12]).max().unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&pack).unwrap();
    file.set_len(u64::from_le_bytes(end.try_into().unwrap())).unwrap();
    let rebuilt = rebuild(template.path());
    assert!(!rebuilt.is_whole());
    assert!(rebuilt.told[0].starts_with("pack 00000000 had"), "{:?}", rebuilt.told);
}
