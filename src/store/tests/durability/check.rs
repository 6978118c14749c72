//! Opens what a crash left and holds it to the ledger.

use std::collections::{BTreeSet, HashMap};
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use castore::index::RecoveredIndex;
use store::{Durability, GcAction, GcScope, MAX_QUEUED, Store};

use crate::ledger::Entries;
use crate::load::{self, ROOTS, config};

/// What is wrong, if anything, with the store in `state` after a crash when the disk's log had `at` operations.
pub(crate) fn check(state: &Path, entries: &Entries, at: usize) -> Result<(), String> {
    let all = || {
        pack_usage(state)?;
        let store = Store::open(config(state, Durability::Grouped)).map_err(|error| told("opening", &error))?;
        valid_paths(&store, entries, at)?;
        queue(&store)?;
        whole(&store)?;
        roots(&store, entries, at)?;
        goes_on(&store, entries, at)
    };
    catch_unwind(AssertUnwindSafe(all)).unwrap_or_else(|_| Err("a panic, see above".into()))
}

pub(crate) fn told(doing: &str, error: &dyn std::error::Error) -> String {
    let mut text = format!("{doing}: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

/// The table `pack-usage` against the entries it counts. Both by `castore/FORMAT.md`.
fn pack_usage(state: &Path) -> Result<(), String> {
    let dir = state.join("castored/index");
    if !dir.exists() {
        return Ok(());
    }
    let failed = |error| told("reading the index", &error);
    let options = config(state, Durability::Grouped).engine.index;
    let index = RecoveredIndex::open(&dir, &options).map_err(|error| told("opening the index", &error))?;
    let mut counted: HashMap<[u8; 4], [u64; 2]> = HashMap::new();
    let objects = index.table("objects").map_err(failed)?;
    index
        .scan_prefix(&objects, &[], &mut |_, entry| {
            // The pack's number is little-endian here, and big-endian in the key below.
            let mut pack: [u8; 4] = entry[..4].try_into().unwrap();
            pack.reverse();
            let length = u32::from_le_bytes(entry[20..24].try_into().unwrap());
            let counts = counted.entry(pack).or_default();
            *counts = [counts[0] + 1, counts[1] + u64::from(length)];
            ControlFlow::Continue(())
        })
        .map_err(failed)?;
    let usage = index.table("pack-usage").map_err(failed)?;
    let mut wrong = None;
    index
        .scan_prefix(&usage, &[], &mut |pack, value| {
            let counts = counted.remove(pack).unwrap_or_default();
            let recorded = [0, 8].map(|at| u64::from_le_bytes(value[at..at + 8].try_into().unwrap()));
            if recorded != counts {
                wrong =
                    Some(format!("pack {pack:02x?} is recorded with {recorded:?} objects and bytes, has {counts:?}"));
            }
            ControlFlow::Continue(())
        })
        .map_err(failed)?;
    match wrong {
        Some(wrong) => Err(wrong),
        None if !counted.is_empty() => Err(format!("packs with objects and no count: {counted:02x?}")),
        None => Ok(()),
    }
}

/// Which paths are valid: no more and no less than may be, and none without what came before it.
fn valid_paths(store: &Store, entries: &Entries, at: usize) -> Result<(), String> {
    let valid = store.all_valid_paths().map_err(|error| told("listing", &error))?;
    for (path, history) in &entries.paths {
        if !valid.contains(path) && entries.must_be_there(history, at) {
            return Err(format!("{path} was acknowledged as durable and is gone: {history:?}"));
        }
        if valid.contains(path) && !entries.may_be_there(history, at) {
            return Err(format!("{path} is valid, though it was never added or durably deleted: {history:?}"));
        }
    }
    if let Some(path) = valid.iter().find(|path| !entries.paths.contains_key(*path)) {
        return Err(format!("{path} is valid, and nobody added it"));
    }
    // A state that existed: what had been registered before something that is here began is here as well.
    let first_of = |path| {
        entries.paths[path].added.iter().filter(|(added, _)| added.begun(at)).map(|(added, _)| added.begin.tick).min()
    };
    let newest = valid.iter().filter_map(first_of).max().unwrap_or_default();
    for (path, history) in entries.paths.iter().filter(|(path, _)| !valid.contains(*path)) {
        let due = |added: &crate::ledger::Span| {
            added.end.tick < newest && history.deleted.iter().all(|deleted| !deleted.begun(at) || deleted.before(added))
        };
        if history.added.iter().any(|(added, _)| due(added)) {
            return Err(format!("{path} is gone, and what was registered later is here"));
        }
    }
    for (id, path, span) in &entries.realisations {
        let durable = entries.durable_from(span).is_some_and(|durable| durable <= at);
        let untouched = entries.paths[path].deleted.iter().all(|deleted| !deleted.begun(at) || deleted.before(span));
        let found = store.realisation(id).map_err(|error| told("reading a realisation", &error))?;
        match found {
            None if durable && untouched => return Err(format!("the realisation {id} was durable and is gone")),
            Some(found) if !valid.contains(&found.out_path) => {
                return Err(format!("the realisation {id} names {path}, which is not valid"));
            }
            _ => {}
        }
    }
    Ok(())
}

/// All that is valid was queued before.
fn queue(store: &Store) -> Result<(), String> {
    let target = load::upload_target();
    let told = |error| told("reading the queue of uploads", &error);
    store.set_upload_targets(&[target]).map_err(told)?;
    let queued = store.queued_uploads(target, None, MAX_QUEUED).map_err(told)?;
    let valid = store.all_valid_paths().map_err(told)?;
    match valid.iter().find(|path| !queued.contains(path)) {
        None => Ok(()),
        Some(path) => Err(format!("{path} is valid and not queued")),
    }
}

/// Nothing is there by half: every valid path can be read and has its hash, and the tables agree.
pub(crate) fn whole(store: &Store) -> Result<(), String> {
    let damage = store.verify(true, &mut |_| ControlFlow::Continue(())).map_err(|error| told("verifying", &error))?;
    if let Some(damage) = damage.first() {
        return Err(damage.message.clone());
    }
    let mut numbers = BTreeSet::new();
    let mut wrong = None;
    let each = &mut |entry: store::Entry| {
        let path = &entry.info.path;
        if !numbers.insert(entry.number) {
            wrong = Some(format!("{path} has the number of another path"));
        }
        for reference in &entry.info.references {
            if !store.referrers(reference).is_ok_and(|referrers| referrers.contains(path)) {
                wrong = Some(format!("{path} refers to {reference}, which does not know of it"));
            }
        }
        match store.referrers(path) {
            Ok(referrers) => {
                let false_one = |referrer: &&_| {
                    !store
                        .entry(referrer)
                        .is_ok_and(|entry| entry.is_some_and(|entry| entry.info.references.contains(path)))
                };
                if let Some(referrer) = referrers.iter().find(false_one) {
                    wrong = Some(format!("{referrer} is said to refer to {path}, and does not"));
                }
            }
            Err(error) => wrong = Some(told("reading referrers", &error)),
        }
        ControlFlow::Continue(())
    };
    store.for_each(each).map_err(|error| told("listing", &error))?;
    wrong.map_or(Ok(()), Err)
}

/// A root that is there has its path; one that was acknowledged and not taken away is there.
fn roots(store: &Store, entries: &Entries, at: usize) -> Result<(), String> {
    let dir = store.state_dir().join(ROOTS);
    for root in entries.roots.iter().filter(|root| root.made.begun(at)) {
        let link = dir.join(&root.link);
        let there = link.symlink_metadata().is_ok();
        let removed = root.removed.is_some_and(|removed| removed.position < at);
        if !there && root.made.answered(at) && !removed {
            return Err(format!("the root {} was made and is gone", root.link));
        }
        let history = &entries.paths[&root.path];
        let deleted = history.deleted.iter().any(|deleted| deleted.begun(at) && root.made.before(deleted));
        if there && !deleted && !store.is_valid(&root.path).map_err(|error| told("asking", &error))? {
            return Err(format!("the root {} is there, and {} is not", root.link, root.path));
        }
    }
    Ok(())
}

/// The store takes a path that shares contents with others, and a collection.
fn goes_on(store: &std::sync::Arc<Store>, entries: &Entries, at: usize) -> Result<(), String> {
    let roots = store.new_temp_roots();
    for name in ["after-the-crash", "path-7"] {
        let archive = load::nar(name);
        let info = load::info(name, &archive, &[]);
        let path = info.path.clone();
        roots.add(&path);
        let known = store.is_valid(&path).map_err(|error| told("asking", &error))?;
        store.add_with_info(info, &mut &archive[..]).map_err(|error| told("adding after the crash", &error))?;
        let number = store.valid_entry(&path).map_err(|error| told("reading what was added", &error))?.number;
        // A number is shown to nobody before its reservation is durable, so one of an addition under way may be given anew.
        let shown = |(added, shown): &(crate::ledger::Span, u32)| added.answered(at) && *shown == number;
        let taken = entries.paths.iter().any(|(other, history)| *other != path && history.added.iter().any(shown));
        if taken && !known {
            return Err(format!("{path} got the number {number}, which another path had before the crash"));
        }
    }
    store.sync().map_err(|error| told("syncing after the crash", &error))?;
    load::collect(store, GcAction::DeleteDead, GcScope::WholeStore).map_err(|error| told("collecting", &error))?;
    store.sync().map_err(|error| told("syncing after the collection", &error))?;
    whole(store)
}
