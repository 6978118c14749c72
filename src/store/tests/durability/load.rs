//! A mixed load on a store: imports that share contents, registrations, signatures, realisations, roots, durable points,
//! collections with their sweeps, also such as end early, and rewriting of packs.
//!
//! A new operation of the store becomes a further step here, with what it promises noted in the [`Ledger`].

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use castore::engine::Options;
use castore::index::{Batch, IndexOptions};
use nix_compat::derivation::OutputName;
use nix_compat::hash::{NarHash, sha256};
use nix_compat::nar::NarWriter;
use nix_compat::path_info::PathInfo;
use nix_compat::realisation::{DrvOutput, Realisation};
use nix_compat::signature::Signature;
use nix_compat::store_path::{StoreDir, StorePath};
use store::{Config, Durability, GcAction, GcOptions, GcScope, GcStep, GcWatch, SignaturePolicy, Store, UploadTarget};

use crate::ledger::{Ledger, Root};
use crate::mounted::Mounted;
use crate::random::Random;

/// Paths the load knows. Few enough that they are deleted and come again.
const NAMES: usize = 120;
/// Contents that paths share.
const SHARED: usize = 16;
/// Below this directory of the state directory are the load's roots.
pub(crate) const ROOTS: &str = "gcroots/load";

/// How a load is run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    /// Threads that add.
    pub(crate) threads: usize,
    /// Additions of each.
    pub(crate) steps: usize,
    pub(crate) durability: Durability,
    /// Begin with a journal that is nearly as long as one gets, so that the load needs another.
    pub(crate) long_journal: bool,
}

/// The configuration of all tests: everything small, so that packs are sealed, tables written and merged all the time.
pub(crate) fn config(state_dir: &Path, durability: Durability) -> Config {
    let index = IndexOptions { cache_bytes: 1 << 20, overlay_bytes: 64 << 10, memtable_bytes: 24 << 10 };
    let engine = Options { cache_bytes: 1 << 20, index, seal_at: 128 << 10, ..Options::default() };
    Config { engine, durability, ..Config::new(StoreDir::default(), state_dir) }
}

/// The archive of the path with that name; the same for each registration of it.
pub(crate) fn nar(name: &str) -> Vec<u8> {
    let seed = u64::from_le_bytes(sha256(name.as_bytes())[..8].try_into().unwrap());
    let mut random = Random::new(seed);
    let mut nar = NarWriter::new(Vec::new());
    nar.enter_directory().unwrap();
    let own_length = random.below(3000);
    let own = random.bytes(own_length);
    file(&mut nar, b"own", &own);
    nar.entry(b"shared").unwrap();
    nar.enter_directory().unwrap();
    for number in 0..random.below(3) {
        let shared = random.below(SHARED);
        let mut contents = Random::new(shared as u64);
        let length = [40, 900, 5000, 30_000, 70_000, 160_000][contents.below(6)];
        file(&mut nar, number.to_string().as_bytes(), &contents.bytes(length));
    }
    nar.leave_directory().unwrap();
    nar.leave_directory().unwrap();
    nar.finish().unwrap()
}

fn file(nar: &mut NarWriter<Vec<u8>>, name: &[u8], contents: &[u8]) {
    nar.entry(name).unwrap();
    nar.regular_header(false, contents.len() as u64).unwrap();
    nar.contents(contents).unwrap();
    nar.end_regular().unwrap();
}

/// What is claimed of a path.
pub(crate) fn info(name: &str, nar: &[u8], references: &[StorePath]) -> PathInfo {
    PathInfo {
        path: path(name),
        deriver: None,
        nar_hash: NarHash::from(sha256(nar)),
        references: references.iter().cloned().collect(),
        registration_time: 0,
        nar_size: nar.len() as u64,
        ultimate: false,
        signatures: Default::default(),
        ca: None,
    }
}

pub(crate) fn path(name: &str) -> StorePath {
    StorePath::from_parts(sha256(name.as_bytes())[..20].try_into().unwrap(), name).unwrap()
}

/// Where all paths are to be sent.
pub(crate) fn upload_target() -> UploadTarget {
    UploadTarget::new("somewhere")
}

/// The output that turned out to be `path`.
pub(crate) fn output_of(path: &StorePath) -> DrvOutput {
    DrvOutput::Modulo { hash: sha256(path.to_string().as_bytes()), output: OutputName::new("out").unwrap() }
}

/// So many signatures that a path's record fills more than one page of a journal.
pub(crate) fn signatures() -> Vec<Signature> {
    let key = "a-key-with-a-name-that-is-long-enough-to-take-some-room-in-a-record";
    let data = [b'A'; 86];
    let data = std::str::from_utf8(&data).unwrap();
    (0..60).map(|number| format!("{key}-{number}:{data}==").parse().unwrap()).collect()
}

pub(crate) fn collect(store: &Store, action: GcAction, scope: GcScope) -> store::Result<store::GcOutcome> {
    let options = GcOptions { action, scope, max_freed: u64::MAX, keep_derivations: true, keep_outputs: false };
    store.collect_garbage(&options)
}

/// A collection that somebody ends in its middle, or that stops when enough is free.
fn collect_some(store: &Store, random: &mut Random) -> store::GcOutcome {
    struct Ending {
        questions: AtomicUsize,
        deleted: Mutex<BTreeSet<StorePath>>,
    }
    impl GcWatch for Ending {
        fn step(&self, step: GcStep<'_>) {
            if let GcStep::Deleted(path) = step {
                self.deleted.lock().unwrap().insert(path.clone());
            }
        }

        fn go_on(&self) -> bool {
            self.questions.fetch_sub(1, Ordering::AcqRel) > 1
        }
    }
    let watch = Ending { questions: AtomicUsize::new(1 + random.below(4)), deleted: Mutex::default() };
    let max_freed = random.below(400_000) as u64;
    let (action, scope) = (GcAction::DeleteDead, GcScope::WholeStore);
    let options = GcOptions { action, scope, max_freed, keep_derivations: true, keep_outputs: false };
    match store.collect_garbage_watched(&options, &watch) {
        Ok(_) | Err(store::Error::Cancelled) => {}
        Err(error) => panic!("{error}"),
    }
    store::GcOutcome { paths: watch.deleted.into_inner().unwrap(), bytes_freed: 0 }
}

/// Runs the load on a mounted disk and closes the store.
pub(crate) fn run(mounted: &Mounted, plan: Plan) -> Ledger {
    let ledger = Ledger::new(Arc::clone(&mounted.disk), plan.durability == Durability::Immediate);
    let store = Store::open(config(&mounted.state(), plan.durability)).unwrap();
    store.set_upload_targets(&[upload_target()]).unwrap();
    if plan.long_journal {
        lengthen_journal(&store);
        ledger.entries.lock().start = mounted.disk.position();
    }
    let adding = AtomicUsize::new(plan.threads);
    std::thread::scope(|scope| {
        for thread in 0..plan.threads {
            let (ledger, store, adding) = (&ledger, &store, &adding);
            scope.spawn(move || {
                add(store, ledger, plan, thread as u64);
                adding.fetch_sub(1, Ordering::AcqRel);
            });
        }
        scope.spawn(|| {
            let mut random = Random::new(plan.seed ^ 0xc0);
            while adding.load(Ordering::Acquire) > 0 {
                std::thread::sleep(Duration::from_millis(random.next() % 30));
                tidy(&store, &ledger, &mut random);
            }
        });
    });
    drop(store);
    ledger
}

/// fjall begins another journal behind 64,000,000 bytes.
fn lengthen_journal(store: &Store) {
    let index = store.engine().index();
    let table = index.table("ballast").unwrap();
    for length in [1 << 20; 60].into_iter().chain([930_000]) {
        let mut batch = Batch::new();
        batch.put(table, b"the same", vec![b'b'; length]);
        index.commit(batch).unwrap();
        index.sync().unwrap();
    }
}

/// What a client does.
fn add(store: &Arc<Store>, ledger: &Ledger, plan: Plan, thread: u64) {
    let mut random = Random::new(plan.seed.wrapping_mul(31) + thread);
    let mut roots = store.new_temp_roots();
    let mut held = Vec::new();
    for _ in 0..plan.steps {
        if random.once_in(12) {
            roots = store.new_temp_roots();
            held.clear();
        }
        let name = format!("path-{}", random.below(NAMES));
        let archive = nar(&name);
        let references: Vec<_> =
            (0..random.below(4)).filter_map(|_| held.get(random.below(held.len())).cloned()).collect();
        let info = info(&name, &archive, &references);
        let path = info.path.clone();
        roots.add(&path);
        // Queued before, as a build does: the load takes no path out of the queue.
        let coming = store.queue_uploads([&path]).unwrap();
        let (result, added) = ledger.time(|| store.add_with_info(info, &mut &archive[..]));
        result.unwrap();
        drop(coming);
        let number = store.entry(&path).unwrap().expect("a temporary root keeps it").number;
        ledger.entries.lock().paths.entry(path.clone()).or_default().added.push((added, number));
        held.push(path.clone());
        if random.once_in(6) {
            store.add_signatures(&path, signatures()).unwrap();
        }
        if random.once_in(4) {
            let realisation = Realisation::new(output_of(&path), path.clone());
            let (result, span) = ledger.time(|| store.register_realisation(&realisation, SignaturePolicy::DontCheck));
            result.unwrap();
            ledger.entries.lock().realisations.push((realisation.id, path, span));
        }
        // What the daemon does when a build has finished and when a connection is closed.
        if random.once_in(8) {
            let (result, span) = ledger.time(|| store.sync());
            result.unwrap();
            ledger.entries.lock().syncs.push(span);
        }
    }
}

/// What an administrator does.
fn tidy(store: &Arc<Store>, ledger: &Ledger, random: &mut Random) {
    let valid: Vec<StorePath> = store.all_valid_paths().unwrap().into_iter().collect();
    match random.below(8) {
        0 | 1 => delete(ledger, || collect(store, GcAction::DeleteDead, GcScope::WholeStore).unwrap()),
        2 if !valid.is_empty() => {
            let paths = [valid[random.below(valid.len())].clone()].into();
            let scope = GcScope::Paths { paths, with_referrers: true };
            delete(ledger, || collect(store, GcAction::DeleteSpecific, scope).unwrap_or_default());
        }
        6 => {
            // To its end, or broken off in some pack.
            let mut left = random.below(20);
            store
                .optimise(&mut |_| {
                    left = left.saturating_sub(1);
                    if left > 0 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
                })
                .unwrap();
        }
        7 => delete(ledger, || collect_some(store, random)),
        3 | 4 if !valid.is_empty() => {
            let path = valid[random.below(valid.len())].clone();
            let held = store.new_temp_roots();
            held.add(&path);
            if !store.is_valid(&path).unwrap() {
                return;
            }
            let link = format!("{:x}", random.next());
            let place = store.state_dir().join(ROOTS).join(&link);
            let (result, made) = ledger.time(|| store.add_permanent_root(&path, &place));
            result.unwrap();
            let mut entries = ledger.entries.lock();
            entries.syncs.push(made);
            entries.roots.push(Root { link, path, made, removed: None });
        }
        _ => {
            let mut entries = ledger.entries.lock();
            let Some(number) = entries.roots.iter().position(|root| root.removed.is_none()) else { return };
            entries.roots[number].removed = Some(ledger.now());
            std::fs::remove_file(store.state_dir().join(ROOTS).join(&entries.roots[number].link)).unwrap();
        }
    }
}

fn delete(ledger: &Ledger, act: impl FnOnce() -> store::GcOutcome) {
    let (outcome, span) = ledger.time(act);
    let mut entries = ledger.entries.lock();
    for path in outcome.paths {
        entries.paths.entry(path).or_default().deleted.push(span);
    }
}
