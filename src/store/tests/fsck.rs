//! Damage in the packs and in the index: found, named, repaired or quarantined, and never served.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use common::{Fixture, add, info, nar};
use nix_compat::store_path::{StoreDir, StorePath};
use store::fsck::{Elsewhere, Mended, Report, Stage, Watch};
use store::view::{StoreEvent, StoreView};
use store::{Config, Error, Store};

/// Flips in a run of the tests; more with `CASTORED_FLIPS`.
const FLIPS: u64 = 60;

struct Quiet;

impl Watch for Quiet {
    fn stage(&self, _: Stage, _: u64) {}
    fn advance(&self, _: u64) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

fn check(store: &Store) -> Report {
    store.fsck(false, &Quiet).unwrap()
}

fn names(report: &Report) -> BTreeSet<&str> {
    report.affected.keys().map(|path| path.name()).collect()
}

/// Flips a bit of the first file in `packs` at a place.
fn flip(dir: &Path, at: u64) {
    let path = dir.join("castored/packs/00000000.pack");
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x20], at).unwrap();
}

fn length(dir: &Path) -> u64 {
    fs::metadata(dir.join("castored/packs/00000000.pack")).unwrap().len()
}

/// Puts the contents of paths that tests add again, as a substituter would.
fn again(store: &Store, path: &StorePath) -> Mended {
    let bytes = nar(path.name(), 100_000);
    let references = store.path_info(path).unwrap().unwrap().references;
    let claims = info(path.name(), &bytes, &references.iter().collect::<Vec<_>>());
    let new = store.import_with_info(claims, &mut &bytes[..]).map_err(|e| e.to_string())?;
    store.replace_contents(new).map_err(|e| e.to_string())
}

#[test]
fn a_sound_store_is_found_sound() {
    let fixture = Fixture::new();
    let a = add(fixture.store(), "a", &[]);
    add(fixture.store(), "b", &[&a]);
    let report = check(fixture.store());
    assert!(report.is_sound(), "{report:?}");
    assert_eq!(report.paths, 2);
}

/// What many paths have in common is stored once; when it is damaged all of them are.
#[test]
fn shared_damage_names_every_path_and_is_repaired_by_one() {
    let mut fixture = Fixture::new();
    let store = fixture.store();
    add(store, "a", &[]);
    store.sync().unwrap();
    let shared = length(fixture.dir.path());
    // The same data, but for the name in it.
    for name in ["b", "c", "d"] {
        add(store, name, &[]);
    }
    add(store, "a-longer-name", &[]);
    store.sync().unwrap();
    fixture.reopen();
    // The first block is the data's: noise is at its end.
    flip(fixture.dir.path(), shared / 2);
    let store = fixture.store().clone();
    let report = check(&store);
    assert_eq!(names(&report), BTreeSet::from(["a", "b", "c", "d"]), "{report:?}");
    assert!(!report.damaged.is_empty());

    let mut asked = Vec::new();
    let mut mend = |path: &StorePath| {
        asked.push(path.clone());
        again(&store, path)
    };
    let repair = store.repair(&report, &mut mend, &Quiet).unwrap();
    assert!(repair.quarantined.is_empty(), "{repair:?}");
    // What the first brought, the others have as well. Only `a` may have lost more: its own data is in that block.
    assert!(asked.iter().filter(|path| path.name() != "a").count() <= 1, "{asked:?}");
    assert!(check(&store).is_sound());
    drop(store);
    fixture.reopen();
    assert!(check(fixture.store()).is_sound(), "also on disk");
}

#[test]
fn what_cannot_be_had_is_quarantined_and_everything_else_stays() {
    let mut fixture = Fixture::new();
    let store = fixture.store();
    let a = add(store, "a", &[]);
    store.sync().unwrap();
    let at = length(fixture.dir.path()) / 2;
    let user = add(store, "a-user-of-it", &[&a]);
    store.sync().unwrap();
    fixture.reopen();
    flip(fixture.dir.path(), at);
    let store = fixture.store().clone();
    let report = check(&store);
    assert_eq!(names(&report), BTreeSet::from(["a"]));
    let repair = store.repair(&report, &mut |_| Err("nobody has it".to_owned()), &Quiet).unwrap();
    assert_eq!(repair.quarantined.len(), 1);
    let quarantined = store.quarantined().unwrap();
    assert!(quarantined[0].path == a && quarantined[0].reason.contains("nobody has it") && !quarantined[0].withheld);
    assert!(store.is_valid(&a).unwrap() && store.is_valid(&user).unwrap(), "nothing is deleted");
    let mut out = Vec::new();
    assert!(store.write_nar(&a, &mut out).is_err());
    store.write_nar(&user, &mut Vec::new()).unwrap();
    store.sync().unwrap();
    drop(store);

    // It is remembered, and ends when the contents come.
    fixture.reopen();
    let store = fixture.store().clone();
    assert_eq!(store.quarantined().unwrap().len(), 1);
    let report = check(&store);
    let repair = store.repair(&report, &mut |path| again(&store, path), &Quiet).unwrap();
    assert!(repair.quarantined.is_empty() && store.quarantined().unwrap().is_empty());
    assert!(check(&store).is_sound());
}

/// Objects that are whole and make another NAR than the one registered: nothing of such a path is served.
#[test]
fn other_contents_are_withheld() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let (right, wrong) = (nar("right", 1000), nar("wrong", 1000));
    let claims = info("right", &right, &[]);
    let path = claims.path.clone();
    let new = store.import_with_info(claims.clone(), &mut &right[..]).unwrap();
    let other = store.import_with_info(info("wrong", &wrong, &[]), &mut &wrong[..]).unwrap();
    store.register(vec![store::NewPath { node: other.node, ..new.clone() }]).unwrap();
    let report = check(store);
    assert!(report.affected[&path].other_contents && report.damaged.is_empty());
    store.repair(&report, &mut |_| Err("no".into()), &Quiet).unwrap();
    assert!(matches!(store.write_nar(&path, &mut Vec::new()), Err(Error::Quarantined { .. })));
    assert!(store.lookup(path.base_name()).is_err());

    // The right contents are a change of the path for the mount.
    let number = store.entry(&path).unwrap().unwrap().number;
    let events = Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = events.clone();
    store.subscribe(Arc::new(move |news: &[StoreEvent]| seen.lock().unwrap().extend_from_slice(news)));
    store.replace_contents(new).unwrap();
    let entry = store.entry(&path).unwrap().unwrap();
    assert_ne!(entry.number, number);
    let name = path.to_string();
    let expected = [
        StoreEvent::Changing { name: name.clone() },
        StoreEvent::Removed { name: name.clone(), number },
        StoreEvent::Added { name, number: entry.number },
    ];
    assert_eq!(events.lock().unwrap()[..], expected);
    let mut out = Vec::new();
    store.write_nar(&path, &mut out).unwrap();
    assert!(out == right && check(store).is_sound());
    assert_eq!(store.lookup(path.base_name()).unwrap().unwrap().number, entry.number);
}

/// Bits anywhere in the packs of a store with paths: no NAR is ever another one, the check names every path that cannot
/// be read, and with a source all is repaired.
#[test]
fn flipped_bits_are_never_served_and_all_are_repaired() {
    let flips = std::env::var("CASTORED_FLIPS").map_or(FLIPS, |flips| flips.parse().unwrap());
    let template = tempfile::tempdir().unwrap();
    let mut nars = BTreeMap::new();
    {
        let store = Store::open(Config::new(StoreDir::default(), template.path())).unwrap();
        let mut last = None;
        for name in ["a", "bb", "ccc", "dddd", "e"] {
            let path = add(&store, name, &last.iter().collect::<Vec<_>>());
            nars.insert(path.clone(), nar(name, 100_000));
            last = Some(path);
        }
        store.sync().unwrap();
    }
    let length = length(template.path());
    let mut fetched = 0;
    for round in 0..flips {
        let dir = tempfile::tempdir().unwrap();
        copy(template.path(), dir.path());
        let at = (round * 2_654_435_761 + round * round * 40_503) % length;
        flip(dir.path(), at);
        let store = open(dir.path());
        let mut unreadable = BTreeSet::new();
        for (path, right) in &nars {
            let mut out = Vec::new();
            match store.write_nar(path, &mut out) {
                Ok(()) => assert!(out == *right, "byte {at}: a wrong byte of {path}"),
                Err(_) => drop(unreadable.insert(path.clone())),
            }
        }
        let report = check(&store);
        assert!(!report.is_sound(), "byte {at} is not found");
        let affected: BTreeSet<StorePath> = report.affected.keys().cloned().collect();
        assert_eq!(affected, unreadable, "byte {at}");
        let mut mend = |path: &StorePath| {
            fetched += 1;
            again(&store, path)
        };
        let repair = store.repair(&report, &mut mend, &Quiet).unwrap();
        assert!(repair.quarantined.is_empty(), "byte {at}: {repair:?}");
        drop(store);
        let store = open(dir.path());
        let report = check(&store);
        assert!(report.is_sound(), "byte {at}: {report:?}");
        for (path, right) in &nars {
            let mut out = Vec::new();
            store.write_nar(path, &mut out).unwrap();
            assert!(out == *right);
        }
    }
    println!("{flips} flips, {fetched} paths were fetched again");
}

/// Bits anywhere in the files of the index: what is served is right, what is lost is found, and a new index made from the
/// packs has everything.
#[test]
fn flipped_bits_in_the_index_lose_nothing_that_a_new_one_does_not_have() {
    let flips = std::env::var("CASTORED_FLIPS").map_or(FLIPS, |flips| flips.parse().unwrap());
    let template = tempfile::tempdir().unwrap();
    let mut nars = BTreeMap::new();
    {
        let store = Store::open(Config::new(StoreDir::default(), template.path())).unwrap();
        for number in 0..40 {
            let name = format!("path-{number}");
            nars.insert(add(&store, &name, &[]), nar(&name, 100_000));
        }
        store.sync().unwrap();
    }
    // Opened once more, so that some of it is in other files than the first journal.
    drop(open(template.path()));
    let mut files = Vec::new();
    find_files(&template.path().join("castored/index"), &mut files);
    let total: u64 = files.iter().map(|(_, length)| length).sum();
    let (mut unharmed, mut found, mut refused) = (0, 0, 0);
    for round in 0..flips {
        let dir = tempfile::tempdir().unwrap();
        copy(template.path(), dir.path());
        let mut at = (round * 2_654_435_761 + round * round * 40_503) % total;
        let (file, _) = files
            .iter()
            .find(|(_, length)| {
                let here = at < *length;
                at -= if here { 0 } else { *length };
                here
            })
            .unwrap();
        let file = dir.path().join(file.strip_prefix(template.path()).unwrap());
        let handle = fs::OpenOptions::new().read(true).write(true).open(&file).unwrap();
        let mut byte = [0];
        handle.read_exact_at(&mut byte, at).unwrap();
        handle.write_all_at(&[byte[0] ^ (1 << (round % 8))], at).unwrap();

        let opened = Store::open(Config::new(StoreDir::default(), dir.path()));
        let sound = match &opened {
            Err(_) => {
                refused += 1;
                false
            }
            Ok(store) => {
                let mut right = 0;
                for (path, nar) in &nars {
                    let mut out = Vec::new();
                    if store.write_nar(path, &mut out).is_ok() {
                        assert!(out == *nar, "byte {at} of {}: a wrong byte", file.display());
                        right += 1;
                    }
                }
                let sound = store.fsck(false, &Quiet).is_ok_and(|report| report.is_sound());
                assert!(right == nars.len() || !sound, "byte {at} of {}: a loss is not found", file.display());
                if sound {
                    unharmed += 1
                } else {
                    found += 1
                }
                sound
            }
        };
        drop(opened);
        if sound {
            continue;
        }
        let rebuilt = loop {
            match Store::rebuild(Config::new(StoreDir::default(), dir.path()), &|_| ControlFlow::Continue(())) {
                Err(Error::InUse { .. }) => std::thread::sleep(std::time::Duration::from_millis(5)),
                rebuilt => break rebuilt.unwrap(),
            }
        };
        assert_eq!(rebuilt.paths, nars.len() as u64, "byte {at} of {}", file.display());
        let store = open(dir.path());
        for (path, nar) in &nars {
            let mut out = Vec::new();
            store.write_nar(path, &mut out).unwrap();
            assert!(out == *nar);
        }
        assert!(check(&store).is_sound());
    }
    println!(
        "{flips} flips in {total} bytes: {unharmed} harmed nothing, {found} were found, {refused} opened no store"
    );
}

fn find_files(dir: &Path, files: &mut Vec<(std::path::PathBuf, u64)>) {
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let length = entry.metadata().unwrap().len();
        match entry.file_type().unwrap().is_dir() {
            true => find_files(&entry.path(), files),
            false if length > 0 => files.push((entry.path(), length)),
            false => {}
        }
    }
    files.sort();
}

fn open(dir: &Path) -> Arc<Store> {
    let began = std::time::Instant::now();
    loop {
        match Store::open(Config::new(StoreDir::default(), dir)) {
            Err(Error::InUse { .. }) if began.elapsed().as_secs() < 30 => {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            opened => return opened.unwrap(),
        }
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// Each object of a path in its turn is damaged, and had from another store that has the same contents elsewhere.
#[test]
fn what_is_damaged_is_had_from_another_castore() {
    let other = Fixture::new();
    add(other.store(), "a", &[]);
    let template = Fixture::new();
    let a = add(template.store(), "a", &[]);
    template.store().sync().unwrap();
    let end = length(template.dir.path());
    let template = template.closed();
    let nobody = Fixture::new();
    fn elsewhere(store: &Store) -> Elsewhere<'_> {
        Elsewhere { blobs: &**store.engine(), directories: &**store.engine() }
    }
    let (mut healed, mut sound) = (0, 0);
    for at in (32..end).step_by((end as usize / 24).max(1)) {
        let dir = tempfile::tempdir().unwrap();
        let copied = std::process::Command::new("cp").arg("-aT").arg(template.dir.path()).arg(dir.path()).status();
        assert!(copied.unwrap().success());
        flip(dir.path(), at);
        let fixture = Fixture::over(dir);
        let store = fixture.store();
        if check(store).affected.is_empty() {
            // The head of a block or a record: not the path's contents.
            sound += 1;
            continue;
        }
        assert!(!store.heal_from(&a, elsewhere(nobody.store())).is_ok_and(|healed| healed), "nobody has it");
        assert!(store.heal_from(&a, elsewhere(other.store())).unwrap(), "flipped at {at}");
        let mut bytes = Vec::new();
        store.write_nar(&a, &mut bytes).unwrap();
        assert!(bytes == nar("a", 100_000));
        assert!(check(store).affected.is_empty());
        healed += 1;
    }
    println!("{healed} healed, {sound} had no damage in the path");
    assert!(healed > 10);
    let unknown = StorePath::from_parts([3; 20], "unknown").unwrap();
    assert!(!other.store().heal_from(&unknown, elsewhere(other.store())).unwrap());
}
