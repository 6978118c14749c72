//! Damage in directories and lists of chunks that are in use: collections go on, and take nothing that can be read.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use castore::objects::ObjectKind;
use common::{Fixture, add, gc, info, nar};
use nix_compat::nar::NarWriter;
use nix_compat::store_path::{StoreDir, StorePath};
use store::fsck::{Report, Stage, Watch};
use store::{Config, Error, GcAction, Store};

/// Places where a bit is flipped; more with `CASTORED_FLIPS`.
const FLIPS: u64 = 12;
/// Bytes of noise in the one large path: two files that are cut into chunks.
const LARGE: usize = 300_000;

struct Quiet;

impl Watch for Quiet {
    fn stage(&self, _: Stage, _: u64) {}
    fn advance(&self, _: u64) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

/// A path with directories in directories, small files and large ones.
fn large_nar() -> Vec<u8> {
    let mut state = 7_u64;
    let mut noise = |size: usize| -> Vec<u8> {
        let next = |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u8
        };
        (0..size).map(next).collect()
    };
    let mut nar = NarWriter::new(Vec::new());
    nar.enter_directory().unwrap();
    for directory in 0..8 {
        nar.entry(format!("directory-{directory}").as_bytes()).unwrap();
        nar.enter_directory().unwrap();
        for file in 0..20 {
            nar.entry(format!("file-{file:02}").as_bytes()).unwrap();
            let contents = noise(if directory % 4 == 0 && file == 0 { LARGE } else { 100 });
            nar.regular_header(false, contents.len() as u64).unwrap();
            nar.contents(&contents).unwrap();
            nar.end_regular().unwrap();
        }
        nar.leave_directory().unwrap();
    }
    nar.leave_directory().unwrap();
    nar.finish().unwrap()
}

fn put(store: &Store, name: &str, nar: &[u8]) -> StorePath {
    let claims = info(name, nar, &[]);
    let path = claims.path.clone();
    store.add_with_info(claims, &mut &nar[..]).unwrap();
    path
}

fn read(store: &Store, path: &StorePath) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    store.write_nar(path, &mut out).ok().map(|()| out)
}

/// Deletes `path` alone and waits for the sweep.
fn collect(store: &Store, path: &StorePath) {
    let before = store.engine().stats().objects;
    assert_eq!(store.collect_garbage(&gc(GcAction::DeleteDead)).unwrap().paths, BTreeSet::from([path.clone()]));
    let began = Instant::now();
    while store.is_sweep_due().unwrap() {
        assert!(began.elapsed().as_secs() < 30, "the sweep is given up");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(store.engine().stats().objects < before, "nothing went");
}

fn repair(store: &Store, nars: &BTreeMap<StorePath, Vec<u8>>, with_source: bool) -> Report {
    let report = store.fsck(false, &Quiet).unwrap();
    let mut mend = |path: &StorePath| {
        let nar = nars.get(path).filter(|_| with_source).ok_or("nobody has it")?;
        let new = store.import_with_info(info(path.name(), nar, &[]), &mut &nar[..]).map_err(|e| e.to_string())?;
        store.replace_contents(new).map_err(|e| e.to_string())
    };
    store.repair(&report, &mut mend, &Quiet).unwrap();
    report
}

fn quarantined(store: &Store) -> BTreeSet<StorePath> {
    store.quarantined().unwrap().into_iter().map(|quarantined| quarantined.path).collect()
}

/// A copy of a store with a bit of its pack flipped.
fn flipped(template: &Path, at: u64) -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let copied = std::process::Command::new("cp").arg("-aT").arg(template).arg(dir.path()).status();
    assert!(copied.unwrap().success());
    let pack = dir.path().join("castored/packs/00000000.pack");
    let file = fs::OpenOptions::new().read(true).write(true).open(pack).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x20], at).unwrap();
    Fixture::over(dir)
}

/// A store with a path that will be garbage and two that are kept, which share a directory and files.
struct Template {
    dir: tempfile::TempDir,
    garbage: StorePath,
    kept: BTreeMap<StorePath, Vec<u8>>,
    length: u64,
}

fn template() -> Template {
    let fixture = Fixture::new();
    let store = fixture.store();
    let large = large_nar();
    let mut kept = BTreeMap::new();
    for name in ["large", "same"] {
        kept.insert(put(store, name, &large), large.clone());
    }
    kept.insert(add(store, "other", &[]), nar("other", 100_000));
    let garbage = put(store, "garbage", &nar("garbage-with-a-longer-seed", 5000));
    store.sync().unwrap();
    let dir = fixture.closed().dir;
    let length = fs::metadata(dir.path().join("castored/packs/00000000.pack")).unwrap().len();
    Template { dir, garbage, kept, length }
}

/// With a bit flipped anywhere: garbage goes, whatever could be read or saved before still can, and with a source all is
/// whole again. Once with a repair that has no source before the collection, once with a collection that meets the damage.
#[test]
fn a_flipped_bit_stops_no_collection_and_costs_nothing_that_is_whole() {
    let flips = std::env::var("CASTORED_FLIPS").map_or(FLIPS, |flips| flips.parse().unwrap());
    let Template { dir: template, garbage, kept, length } = template();
    let (mut structure, mut saved) = (0, 0);
    for round in 0..flips {
        // The directories' block and the records come last.
        let at = if round % 2 == 0 { length - 1 - (round / 2 * 397) % 16_384 } else { round * 2_654_435_761 % length };
        let survivors = |fixture: &Fixture, repaired: bool| {
            let store = fixture.store();
            let held = store.new_temp_roots();
            kept.keys().for_each(|path| held.add(path));
            let report = if repaired { Some(repair(store, &kept, false)) } else { None };
            collect(store, &garbage);
            for path in kept.keys() {
                assert!(store.is_valid(path).unwrap(), "byte {at}");
                assert!(read(store, path).is_none_or(|nar| nar == kept[path]), "byte {at}: a wrong byte");
            }
            let met = quarantined(store);
            repair(store, &kept, false);
            let readable: BTreeSet<StorePath> =
                kept.keys().filter(|path| read(store, path).is_some()).cloned().collect();
            let damaged = quarantined(store);
            assert!(damaged.is_superset(&met), "byte {at}: what can be read was given up");
            assert!(readable.is_disjoint(&damaged) && readable.len() + damaged.len() == kept.len(), "byte {at}");
            (readable, met, report)
        };
        let names = |report: Report, kind| report.damaged.iter().any(|object| object.key.kind == kind);
        let collected = flipped(template.path(), at);
        let (left, met, _) = survivors(&collected, false);
        let repaired = flipped(template.path(), at);
        let (expected, _, report) = survivors(&repaired, true);
        assert_eq!(left, expected, "byte {at}: a collection costs what a repair would have saved");
        structure += u64::from(!met.is_empty());
        saved += u64::from(names(report.unwrap(), ObjectKind::Directory) && expected.len() == kept.len());

        for mut fixture in [collected, repaired] {
            repair(fixture.store(), &kept, true);
            fixture.reopen();
            let store = fixture.store();
            assert!(store.fsck(false, &Quiet).unwrap().is_sound() && quarantined(store).is_empty(), "byte {at}");
            for (path, nar) in &kept {
                assert!(read(store, path).unwrap() == *nar, "byte {at}");
            }
        }
    }
    println!("{flips} flips: {structure} times a sweep quarantined, {saved} times it or a repair saved a directory");
    assert!(structure > 0 && saved > 0, "no flip was where it matters");
}

/// The other way a directory cannot be read: the file that has it is gone, and may come back.
#[test]
fn a_file_that_is_gone_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let open = || {
        let mut config = Config::new(StoreDir::default(), dir.path());
        // Small packs, so that most are closed.
        config.engine.seal_at = 64 << 10;
        loop {
            match Store::open(config.clone()) {
                Err(Error::InUse { .. }) => std::thread::sleep(Duration::from_millis(10)),
                opened => break opened.unwrap(),
            }
        }
    };
    let large = large_nar();
    let kept = put(&open(), "large", &large);
    let store = open();
    let garbage = add(&store, "garbage", &[]);
    let held = store.new_temp_roots();
    held.add(&kept);
    store.sync().unwrap();
    let mut packs = Vec::new();
    for entry in fs::read_dir(dir.path().join("castored/packs")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "pack") {
            packs.push(path);
        }
    }
    assert!(packs.len() > 3, "{packs:?}");
    let away = |pack: &Path| pack.with_extension("away");
    packs.iter().for_each(|pack| fs::rename(pack, away(pack)).unwrap());
    let before = store.engine().stats().objects;
    assert_eq!(store.collect_garbage(&gc(GcAction::DeleteDead)).unwrap().paths, BTreeSet::from([garbage]));
    std::thread::sleep(Duration::from_secs(1));
    assert!(store.is_sweep_due().unwrap() && quarantined(&store).is_empty());
    assert!(store.engine().stats().objects >= before, "something was removed");

    // Those that are open were put back by whoever appended.
    let missing = packs.iter().filter(|pack| !pack.exists());
    assert!(missing.inspect(|pack| fs::rename(away(pack), pack).unwrap()).count() > 1);
    let more = add(&store, "more-garbage", &[]);
    collect(&store, &more);
    assert!(read(&store, &kept).unwrap() == large && quarantined(&store).is_empty());
}
