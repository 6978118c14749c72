//! The index is lost, wholly, and comes back from the packs.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{Fixture, add, gc, info, nar};
use nix_compat::content_address::{ContentAddress, Method};
use nix_compat::derivation::{BasicDerivation, Derivation, Output, OutputName};
use nix_compat::hash::{Algorithm, Hash, sha256};
use nix_compat::realisation::{DrvOutput, Realisation};
use nix_compat::store_path::{StoreDir, StorePath, fixed_output_path};
use store::view::StoreView;
use store::{AddOptions, Config, Entry, Error, GcAction, Rebuilt, SignaturePolicy, Store};

/// Everything that can be asked of a store.
#[derive(Debug, PartialEq)]
struct Dump {
    entries: BTreeMap<StorePath, String>,
    referrers: BTreeMap<StorePath, BTreeSet<StorePath>>,
    derivers: BTreeMap<StorePath, BTreeMap<StorePath, String>>,
    realisations: Vec<Option<Realisation>>,
    numbers: Vec<(u32, StorePath)>,
    nars: BTreeMap<StorePath, Vec<u8>>,
}

fn dump(store: &Store, ids: &[DrvOutput]) -> Dump {
    let mut entries = BTreeMap::new();
    store
        .for_each(&mut |entry| {
            entries.insert(entry.info.path.clone(), format!("{entry:?}"));
            ControlFlow::Continue(())
        })
        .unwrap();
    let paths: Vec<StorePath> = entries.keys().cloned().collect();
    let nar = |path: &StorePath| {
        let mut nar = Vec::new();
        store.write_nar(path, &mut nar).unwrap();
        nar
    };
    Dump {
        referrers: paths.iter().map(|path| (path.clone(), store.referrers(path).unwrap())).collect(),
        derivers: paths.iter().map(|path| (path.clone(), store.valid_derivers(path).unwrap())).collect(),
        realisations: ids.iter().map(|id| store.realisation(id).unwrap()).collect(),
        numbers: store.list(0, 10_000).unwrap().into_iter().map(|root| (root.number, root.path)).collect(),
        nars: paths.iter().map(|path| (path.clone(), nar(path))).collect(),
        entries,
    }
}

fn id(byte: u8) -> DrvOutput {
    DrvOutput::Modulo { hash: [byte; 32], output: OutputName::default() }
}

/// Adds paths of all kinds; gives the names of realisations.
fn fill(store: &Store) -> Vec<DrvOutput> {
    let a = add(store, "a", &[]);
    let b = add(store, "b", &[&a]);
    let bytes = nar("self", 300_000);
    let mut own = info("self", &bytes, &[&a, &b]);
    own.references.insert(own.path.clone());
    own.ultimate = true;
    own.deriver = Some(StorePath::from_parts([7; 20], "gone.drv").unwrap());
    own.registration_time = 1_234_567;
    own.signatures.insert("one:AAAA".parse().unwrap());
    store.add_with_info(own.clone(), &mut &bytes[..]).unwrap();
    store.add_signatures(&own.path, ["two:AAAA".parse().unwrap()]).unwrap();
    store.add_signatures(&a, ["three:AAAA".parse().unwrap()]).unwrap();
    // A second registration adds what it knows.
    let mut again = info("b", &nar("b", 100_000), &[&a]);
    again.ultimate = true;
    again.signatures.insert("four:AAAA".parse().unwrap());
    store.add_with_info(again, &mut &nar("b", 100_000)[..]).unwrap();
    let options = |method, name: &str| AddOptions {
        name: name.into(),
        method,
        algorithm: Algorithm::Sha256,
        references: BTreeSet::new(),
    };
    let flat = store.add(&options(Method::Flat, "flat"), &mut &b"contents"[..]).unwrap().path;
    store.add(&options(Method::Text, "text"), &mut &b""[..]).unwrap();
    let ca = ContentAddress { method: Method::Flat, hash: Hash::of(Algorithm::Sha256, b"contents") };
    let made = fixed_output_path(store.store_dir(), "flat", ca.method, &ca.hash).unwrap();
    assert_eq!(made, flat);
    let derivation = BasicDerivation {
        name: "flat".into(),
        outputs: BTreeMap::from([(OutputName::default(), Output::Fixed { path: made.clone(), ca })]),
        input_srcs: BTreeSet::from([b.clone()]),
        platform: b"x86_64-linux".to_vec(),
        builder: b"/bin/sh".to_vec(),
        args: Vec::new(),
        env: BTreeMap::from([(b"out".to_vec(), store.store_dir().display(&made).into_bytes())]),
    };
    store.add_derivation(&Derivation::from(derivation), &store.new_temp_roots()).unwrap();
    assert_eq!(store.valid_derivers(&flat).unwrap().len(), 1);
    let mut realisation = Realisation::new(id(1), a.clone());
    realisation.signatures.insert("one:AAAA".parse().unwrap());
    realisation.dependencies.insert(id(9), b.clone());
    store.register_realisation(&realisation, SignaturePolicy::DontCheck).unwrap();
    realisation.signatures.insert("two:AAAA".parse().unwrap());
    store.register_realisation(&realisation, SignaturePolicy::DontCheck).unwrap();
    let drv = StorePath::from_parts([9; 20], "named.drv").unwrap();
    let by_path = DrvOutput::Path { drv, output: OutputName::default() };
    store.register_realisation(&Realisation::new(by_path.clone(), b), SignaturePolicy::DontCheck).unwrap();
    vec![id(1), id(2), by_path]
}

fn state(fixture: &Fixture) -> std::path::PathBuf {
    fixture.dir.path().join("castored")
}

fn rebuild(dir: &Path) -> Rebuilt {
    let began = Instant::now();
    loop {
        match Store::rebuild(Config::new(StoreDir::default(), dir), &|_| ControlFlow::Continue(())) {
            Err(Error::InUse { .. }) if began.elapsed().as_secs() < 30 => {
                std::thread::sleep(Duration::from_millis(10));
            }
            rebuilt => return rebuilt.unwrap(),
        }
    }
}

/// Loses the index of a store that nobody has open any more, and makes it anew.
fn lose_and_rebuild(fixture: Fixture) -> (Fixture, Rebuilt) {
    let Fixture { dir, .. } = fixture.closed();
    fs::remove_dir_all(dir.path().join("castored/index")).unwrap();
    let refused = Store::open(Config::new(StoreDir::default(), dir.path())).err().unwrap();
    assert!(refused.to_string().contains("fsck --rebuild-index"), "{refused}");
    let rebuilt = rebuild(dir.path());
    (Fixture::over(dir), rebuilt)
}

fn wait_for_sweep(store: &Store) {
    let began = Instant::now();
    while store.is_sweep_due().unwrap() {
        assert!(began.elapsed().as_secs() < 30, "nobody sweeps");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn everything_is_as_it_was() {
    let fixture = Fixture::new();
    let ids = fill(fixture.store());
    fixture.store().sync().unwrap();
    let before = dump(fixture.store(), &ids);
    assert!(before.entries.len() >= 6 && before.realisations[0].is_some() && before.realisations[2].is_some());

    let (fixture, rebuilt) = lose_and_rebuild(fixture);
    assert!(rebuilt.packs.is_whole() && rebuilt.dropped.is_empty() && rebuilt.damaged.is_empty(), "{rebuilt:?}");
    assert_eq!(dump(fixture.store(), &ids), before);

    // No number comes twice.
    let highest = before.numbers.iter().map(|(number, _)| *number).max().unwrap();
    let new = add(fixture.store(), "new", &[]);
    assert!(fixture.store().entry(&new).unwrap().unwrap().number > highest);

    // Nor is anything lost by a sweep, or by losing the index a second time.
    wait_for_sweep(fixture.store());
    let before = dump(fixture.store(), &ids);
    let (fixture, _) = lose_and_rebuild(fixture);
    assert_eq!(dump(fixture.store(), &ids), before);
    assert!(state(&fixture).join("index").is_dir());
}

#[test]
fn what_was_deleted_stays_deleted_and_its_number_unused() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let ids = fill(store);
    let root = fixture.dir.path().join("gcroots");
    fs::create_dir_all(&root).unwrap();
    let kept = add(store, "kept", &[]);
    std::os::unix::fs::symlink(store.store_dir().display(&kept), root.join("kept")).unwrap();
    let last = add(store, "last", &[]);
    let highest = store.entry(&last).unwrap().unwrap().number;
    // Of the same name, and so with another number.
    let again = add(store, "again", &[]);
    store.collect_garbage(&gc(GcAction::DeleteDead)).unwrap();
    assert!(!store.is_valid(&again).unwrap());
    wait_for_sweep(store);
    add(store, "again", &[]);
    store.sync().unwrap();
    let before = dump(store, &ids);
    assert_eq!(before.entries.len(), 2);

    let (fixture, rebuilt) = lose_and_rebuild(fixture);
    assert_eq!(dump(fixture.store(), &ids), before, "{rebuilt:?}");
    let new = add(fixture.store(), "new", &[]);
    assert!(fixture.store().entry(&new).unwrap().unwrap().number > highest + 1);
}

/// The checkpoint comes with the sweep. Without it a path that was deleted is back, as garbage.
#[test]
fn what_was_deleted_without_a_trace_comes_back_whole_or_not_at_all() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let path = add(store, "a", &[]);
    let entry: Entry = store.entry(&path).unwrap().unwrap();
    store.sync().unwrap();
    // A store that is held open by an import does not sweep.
    let pin = store.import_nar(&mut &nar("pin", 10)[..], store::nar_digest::NarDigest::new(None, None)).unwrap();
    store.collect_garbage(&gc(GcAction::DeleteDead)).unwrap();
    assert!(!store.is_valid(&path).unwrap());
    store.sync().unwrap();
    let copy = tempfile::tempdir().unwrap();
    fs::create_dir_all(copy.path().join("castored/packs")).unwrap();
    for entry in fs::read_dir(state(&fixture).join("packs")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.path().join("castored/packs").join(entry.file_name())).unwrap();
    }
    drop(pin);
    let rebuilt = rebuild(copy.path());
    assert_eq!(rebuilt.paths, 1);
    let fixture = Fixture::over(copy);
    assert_eq!(format!("{:?}", fixture.store().entry(&path).unwrap().unwrap()), format!("{entry:?}"));
    fixture.store().collect_garbage(&gc(GcAction::DeleteDead)).unwrap();
    assert!(!fixture.store().is_valid(&path).unwrap());
}

/// The index and a block are damaged at a time: what is left is told, and nothing that is whole is dropped.
#[test]
fn damage_is_told_and_kept_for_repair() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let a = add(store, "a", &[]);
    store.sync().unwrap();
    let after_a = fs::metadata(state(&fixture).join("packs/00000000.pack")).unwrap().len();
    let b = add(store, "another-name", &[&a]);
    store.sync().unwrap();
    let Fixture { dir, .. } = fixture.closed();
    fs::remove_dir_all(dir.path().join("castored/index")).unwrap();
    // The middle of what `a` wrote: the contents that only it has, or shares.
    let file = fs::OpenOptions::new().read(true).write(true).open(dir.path().join("castored/packs/00000000.pack"));
    let file = file.unwrap();
    let at = after_a / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();

    let rebuilt = rebuild(dir.path());
    assert!(!rebuilt.packs.is_whole());
    let fixture = Fixture::over(dir);
    let store = fixture.store();
    assert!(store.is_valid(&b).unwrap());
    assert_eq!(store.is_valid(&a).unwrap(), rebuilt.unreadable_records == 0 && rebuilt.paths == 2);
    let told: BTreeSet<StorePath> = rebuilt.damaged.iter().map(|damaged| damaged.path.clone()).collect();
    for path in [&a, &b] {
        let mut bytes = Vec::new();
        let right = if *path == a { nar("a", 100_000) } else { nar("another-name", 100_000) };
        match store.is_valid(path).unwrap().then(|| store.write_nar(path, &mut bytes)) {
            Some(Ok(())) => assert!(bytes == right),
            _ => assert!(told.contains(path) || !store.is_valid(path).unwrap()),
        }
    }
}

#[test]
fn an_interrupted_rebuilding_is_not_taken_for_a_store() {
    let fixture = Fixture::new();
    fill(fixture.store());
    let Fixture { dir, .. } = fixture.closed();
    fs::remove_dir_all(dir.path().join("castored/index")).unwrap();
    let options = castore::index::IndexOptions::default();
    castore::rebuild::rebuild_index(&dir.path().join("castored"), &options, &|_| ControlFlow::Continue(())).unwrap();
    // Here the process died.
    let refused = Store::open(Config::new(StoreDir::default(), dir.path())).err().unwrap();
    assert!(matches!(refused, Error::RebuildUnfinished), "{refused}");
    assert!(rebuild(dir.path()).paths > 0);
    assert!(!Fixture::over(dir).store().all_valid_paths().unwrap().is_empty());
}

/// A whole pack file is gone: what it had is missed, path by path, and the rest goes on.
#[test]
fn what_needs_a_pack_that_is_gone_is_quarantined_and_named() {
    // Contents that do not compress, so that each path fills packs of its own.
    let noisy = |name: &str| {
        let mut contents: Vec<u8> = sha256(name.as_bytes()).to_vec();
        while contents.len() < 100_000 {
            contents.extend(sha256(&contents[contents.len() - 32..]));
        }
        let mut nar = nix_compat::nar::NarWriter::new(Vec::new());
        nar.regular_header(false, contents.len() as u64).unwrap();
        nar.contents(&contents).unwrap();
        nar.end_regular().unwrap();
        nar.finish().unwrap()
    };
    let add = |store: &Store, name: &str, references: &[&StorePath]| {
        let nar = noisy(name);
        let info = info(name, &nar, references);
        store.add_with_info(info.clone(), &mut &nar[..]).unwrap();
        store.sync().unwrap();
        info.path
    };
    let dir = tempfile::tempdir().unwrap();
    let open = || loop {
        let mut config = Config::new(StoreDir::default(), dir.path());
        config.engine.seal_at = 16 << 10;
        match Store::open(config) {
            Err(Error::InUse { .. }) => std::thread::sleep(Duration::from_millis(10)),
            opened => return opened,
        }
    };
    let store = open().unwrap();
    let [lost, apart] = ["lost", "apart"].map(|name| add(&store, name, &[]));
    let user = add(&store, "refers-to-it", &[&lost]);
    let packs = dir.path().join("castored/packs");
    let count = fs::read_dir(&packs).unwrap().count();
    assert!(count > 4, "{count} packs");
    drop(store);
    drop(open().unwrap());

    // The pack with the contents of the first path. (Whoever still has the store open does not read them.)
    fs::remove_file(packs.join("00000000.pack")).unwrap();
    let refused = open().err().unwrap();
    assert!(refused.to_string().contains("fsck --rebuild-index"), "{refused}");
    let rebuilt = rebuild(dir.path());
    assert!(rebuilt.packs.told.iter().any(|told| told.contains("pack 00000000") && told.contains("is gone")));
    assert!(rebuilt.dropped.is_empty(), "{rebuilt:?}");
    let told: Vec<&StorePath> = rebuilt.damaged.iter().map(|damaged| &damaged.path).collect();
    assert_eq!(told, [&lost], "{rebuilt:?}");

    let store = open().unwrap();
    let quarantined: Vec<StorePath> = store.quarantined().unwrap().into_iter().map(|q| q.path).collect();
    assert_eq!(quarantined.iter().collect::<Vec<_>>(), told);
    let read = |path: &StorePath| {
        let mut bytes = Vec::new();
        store.write_nar(path, &mut bytes).map(|()| bytes)
    };
    for path in [&apart, &user] {
        assert!(read(path).unwrap() == noisy(path.name()));
    }
    assert!(store.is_valid(&lost).unwrap());
    read(&lost).unwrap_err();
    // A copy from elsewhere heals it.
    let right = noisy("lost");
    drop(store.import_with_info(info("lost", &right, &[]), &mut &right[..]).unwrap());
    assert!(read(&lost).unwrap() == right);
}
