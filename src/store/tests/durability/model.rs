//! Random steps, with crashes among them, against a model: after a crash the store is at one of the states that it went
//! through since its last durable point.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix_compat::realisation::Realisation;
use nix_compat::store_path::StorePath;
use store::{Durability, Error, GcAction, GcScope, SignaturePolicy, Store, TempRoots};

use crate::check::whole;
use crate::crash::{Loss, Replay};
use crate::disk::Disk;
use crate::load::{self, ROOTS, config};
use crate::mounted::Mounted;
use crate::random::Random;

/// Steps unless the environment says otherwise.
const STEPS: usize = 10_000;
/// Paths there are. All states since the last durable point are kept, so not too many.
const NAMES: usize = 60;
/// Crashes after which a store is thrown away for a new one.
const CRASHES_OF_A_STORE: usize = 20;

/// What is valid: each path with what it refers to, and whether its realisation is known.
type State = BTreeMap<StorePath, (BTreeSet<StorePath>, bool)>;

/// The model: what the store should be.
struct Model {
    /// The states since the last durable point, which is the first of them. The last is the present one.
    states: Vec<State>,
    /// Links that must be there.
    roots: BTreeMap<String, StorePath>,
    /// Links taken away, which may come back with a crash.
    removed: BTreeMap<String, StorePath>,
    /// Paths kept by the temporary roots of the one client.
    held: BTreeSet<StorePath>,
}

impl Model {
    fn new() -> Self {
        Self { states: vec![State::new()], roots: BTreeMap::new(), removed: BTreeMap::new(), held: BTreeSet::new() }
    }

    fn now(&self) -> &State {
        self.states.last().unwrap()
    }

    fn change(&mut self, change: impl FnOnce(&mut State)) {
        let mut state = self.now().clone();
        change(&mut state);
        self.states.push(state);
    }

    fn durable(&mut self) {
        self.states.drain(..self.states.len() - 1);
    }

    /// What the roots reach.
    fn live(&self) -> BTreeSet<StorePath> {
        let mut live = BTreeSet::new();
        let mut waiting: Vec<&StorePath> = self.roots.values().chain(&self.held).collect();
        while let Some(path) = waiting.pop() {
            if let Some((references, _)) = self.now().get(path)
                && live.insert(path.clone())
            {
                waiting.extend(references);
            }
        }
        live
    }

    fn with_referrers(&self, path: &StorePath) -> BTreeSet<StorePath> {
        let mut all = BTreeSet::from([path.clone()]);
        loop {
            let before = all.len();
            let refers = |(_, (references, _)): &(&StorePath, &(BTreeSet<StorePath>, bool))| {
                references.iter().any(|reference| all.contains(reference))
            };
            let more: Vec<StorePath> = self.now().iter().filter(refers).map(|(path, _)| path.clone()).collect();
            all.extend(more);
            if all.len() == before {
                return all;
            }
        }
    }
}

/// A store and the disk it is on.
struct Rig {
    store: Option<Arc<Store>>,
    temp_roots: Option<TempRoots>,
    mounted: Mounted,
}

impl Rig {
    fn new(disk: Arc<Disk>) -> Self {
        let mounted = Mounted::new(disk);
        let mut rig = Self { store: None, temp_roots: None, mounted };
        rig.open();
        rig
    }

    fn store(&self) -> &Arc<Store> {
        self.store.as_ref().unwrap()
    }

    fn close(&mut self) {
        self.temp_roots = None;
        self.store = None;
    }

    fn open(&mut self) {
        let began = Instant::now();
        let store = loop {
            match Store::open(config(&self.mounted.state(), Durability::Grouped)) {
                // A sweep may still be letting go of it.
                Err(Error::InUse { .. }) if began.elapsed().as_secs() < 30 => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                opened => break opened.unwrap(),
            }
        };
        self.temp_roots = Some(store.new_temp_roots());
        self.store = Some(store);
    }
}

fn actual(store: &Store) -> State {
    let paths = store.all_valid_paths().unwrap();
    let state = |path: StorePath| {
        let references = store.valid_entry(&path).unwrap().info.references;
        let realised = store.realisation(&load::output_of(&path)).unwrap().is_some();
        (path, (references, realised))
    };
    paths.into_iter().map(state).collect()
}

#[test]
fn random_steps_and_crashes_agree_with_a_model() {
    if crate::skipped() {
        return;
    }
    let steps = crate::number("CASTORED_MODEL_STEPS", STEPS);
    let mut random = Random::new(crate::number("CASTORED_SEED", 1) as u64);
    let began = Instant::now();
    let (mut crashes, mut lost) = (0, 0);
    let (mut rig, mut model) = (Rig::new(Disk::new(None)), Model::new());
    for number in 0..steps {
        let context = format!("step {number}");
        match random.below(100) {
            0..45 => add(&rig, &mut model, &mut random),
            45..55 => realise(&rig, &mut model, &mut random),
            55..65 => {
                rig.store().sync().unwrap();
                model.durable();
            }
            65..75 => root(&rig, &mut model, &mut random),
            75..81 => unroot(&rig, &mut model, &mut random),
            81..85 => {
                rig.temp_roots = Some(rig.store().new_temp_roots());
                model.held.clear();
            }
            85..90 => collect(&rig, &mut model, &context),
            90..95 => delete(&rig, &mut model, &mut random, &context),
            95..97 => {
                // Closing writes what is left.
                rig.close();
                rig.open();
                model.durable();
                model.held.clear();
                assert_eq!(actual(rig.store()), *model.now(), "{context}: after closing and opening");
            }
            _ => {
                crashes += 1;
                lost += crash(&mut rig, &mut model, &mut random, &context);
                if crashes % CRASHES_OF_A_STORE == 0 {
                    (rig, model) = (Rig::new(Disk::new(None)), Model::new());
                }
            }
        }
        if random.once_in(10) {
            assert_eq!(actual(rig.store()), *model.now(), "{context}");
        }
        if random.once_in(200) {
            whole(rig.store()).unwrap_or_else(|wrong| panic!("{context}: {wrong}"));
        }
    }
    println!("{steps} steps, {crashes} crashes, {lost} of them lost something, {:.1?}", began.elapsed());
}

fn add(rig: &Rig, model: &mut Model, random: &mut Random) {
    let name = format!("path-{}", random.below(NAMES));
    let archive = load::nar(&name);
    let held: Vec<&StorePath> = model.held.iter().collect();
    let references: Vec<StorePath> =
        (0..random.below(4)).filter_map(|_| held.get(random.below(held.len())).map(|path| (*path).clone())).collect();
    let info = load::info(&name, &archive, &references);
    let path = info.path.clone();
    rig.temp_roots.as_ref().unwrap().add(&path);
    rig.store().add_with_info(info, &mut &archive[..]).unwrap();
    model.held.insert(path.clone());
    let references = references.into_iter().collect();
    model.change(|state| {
        state.entry(path).or_insert((references, false));
    });
}

fn any(model: &Model, random: &mut Random) -> Option<StorePath> {
    model.now().keys().nth(random.below(model.now().len())).cloned()
}

fn realise(rig: &Rig, model: &mut Model, random: &mut Random) {
    let Some(path) = any(model, random) else { return };
    let realisation = Realisation::new(load::output_of(&path), path.clone());
    rig.store().register_realisation(&realisation, SignaturePolicy::DontCheck).unwrap();
    model.change(|state| state.get_mut(&path).unwrap().1 = true);
}

fn root(rig: &Rig, model: &mut Model, random: &mut Random) {
    let Some(path) = any(model, random) else { return };
    let link = format!("{:x}", random.next());
    rig.store().add_permanent_root(&path, &rig.store().state_dir().join(ROOTS).join(&link)).unwrap();
    model.durable();
    model.roots.insert(link, path);
}

fn unroot(rig: &Rig, model: &mut Model, random: &mut Random) {
    let Some(link) = model.roots.keys().nth(random.below(model.roots.len())).cloned() else { return };
    std::fs::remove_file(rig.store().state_dir().join(ROOTS).join(&link)).unwrap();
    let path = model.roots.remove(&link).unwrap();
    model.removed.insert(link, path);
}

fn collect(rig: &Rig, model: &mut Model, context: &str) {
    let live = model.live();
    let outcome = load::collect(rig.store(), GcAction::DeleteDead, GcScope::WholeStore).unwrap();
    let dead: BTreeSet<StorePath> = model.now().keys().filter(|path| !live.contains(*path)).cloned().collect();
    assert_eq!(outcome.paths, dead, "{context}: what a collection deletes");
    model.change(|state| state.retain(|path, _| live.contains(path)));
}

fn delete(rig: &Rig, model: &mut Model, random: &mut Random, context: &str) {
    let Some(path) = any(model, random) else { return };
    let scope = GcScope::Paths { paths: [path.clone()].into(), with_referrers: true };
    let doomed = model.with_referrers(&path);
    let alive = !model.live().is_disjoint(&doomed);
    match load::collect(rig.store(), GcAction::DeleteSpecific, scope) {
        Err(Error::Alive(_)) => assert!(alive, "{context}: {path} is dead, and was not deleted"),
        Err(error) => panic!("{context}: {error}"),
        Ok(_) => {
            assert!(!alive, "{context}: {path} is alive, and was deleted");
            model.change(|state| state.retain(|path, _| !doomed.contains(path)));
        }
    }
}

/// The power fails, and comes back. Answers 1 when something was lost.
fn crash(rig: &mut Rig, model: &mut Model, random: &mut Random, context: &str) -> usize {
    // Sometimes in the middle of what goes on in the background.
    std::thread::sleep(Duration::from_millis([0, 0, 5, 30][random.below(4)]));
    let mut replay = Replay::new(&rig.mounted.disk, random.next());
    replay.advance(replay.length());
    let loss = Loss::any(random);
    let image = replay.image(loss, random);
    rig.close();
    *rig = Rig::new(Disk::new(Some(image)));

    let found = actual(rig.store());
    // The newest that it can be: with what is equal nothing is lost.
    let Some(at) = model.states.iter().rposition(|state| *state == found) else {
        let wanted = model.states.last().unwrap();
        let gone: Vec<_> = wanted.keys().filter(|path| !found.contains_key(*path)).collect();
        let more: Vec<_> = found.keys().filter(|path| !wanted.contains_key(*path)).collect();
        panic!(
            "{context}, {loss:?}: no state that existed among {}; the last one without {gone:?}, with {more:?}",
            model.states.len()
        );
    };
    whole(rig.store()).unwrap_or_else(|wrong| panic!("{context}, {loss:?}: {wrong}"));
    let lost = usize::from(at + 1 < model.states.len());
    model.states = vec![found];
    model.held.clear();
    let dir = rig.store().state_dir().join(ROOTS);
    for (link, path) in &model.roots {
        assert!(dir.join(link).symlink_metadata().is_ok(), "{context}, {loss:?}: the root {link} is gone");
        assert!(model.states[0].contains_key(path), "{context}, {loss:?}: the root {link} is there and {path} is not");
    }
    for (link, path) in std::mem::take(&mut model.removed) {
        if dir.join(&link).symlink_metadata().is_err() {
            continue;
        }
        if model.states[0].contains_key(&path) {
            model.roots.insert(link, path);
        } else {
            // It was taken away, and then its path: only the first of the two was lost.
            std::fs::remove_file(dir.join(&link)).unwrap();
            model.removed.insert(link, path);
        }
    }
    lost
}
