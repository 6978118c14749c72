//! Disks that fail, and processes that run out of something: a clear error, nothing pretended, nothing lost that was
//! acknowledged.

use std::panic::catch_unwind;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use fuser::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix_compat::store_path::StorePath;
use store::{Durability, Store};

use crate::check::{told, whole};
use crate::crash::{Loss, Replay, write_out};
use crate::disk::{Call, Disk, Fault};
use crate::examine::scratch;
use crate::load::{self, config};
use crate::mounted::Mounted;
use crate::random::Random;

/// Set for the process that runs out of something: where its store is, and what it runs out of.
const STORE: &str = "CASTORED_FAULT_STORE";
const LIMIT: &str = "CASTORED_FAULT_LIMIT";

fn add(store: &Store, name: &str) -> store::Result<StorePath> {
    let archive = load::nar(name);
    let info = load::info(name, &archive, &[]);
    let path = info.path.clone();
    store.add_with_info(info, &mut &archive[..])?;
    Ok(path)
}

fn open(state: &Path) -> Arc<Store> {
    let began = std::time::Instant::now();
    loop {
        match Store::open(config(state, Durability::Grouped)) {
            Err(store::Error::InUse { .. }) if began.elapsed().as_secs() < 30 => {
                std::thread::sleep(Duration::from_millis(1));
            }
            opened => return opened.unwrap(),
        }
    }
}

/// A store on a disk, with three paths that are durable.
fn rig() -> (Mounted, Arc<Store>, Vec<StorePath>) {
    let mounted = Mounted::new(Disk::new(None));
    let store = open(&mounted.state());
    let paths = ["a", "b", "c"].map(|name| add(&store, name).unwrap());
    store.sync().unwrap();
    (mounted, store, paths.into())
}

fn fail(call: Call, suffix: &'static str, error: Errno, times: usize) -> Fault {
    Fault { call, suffix, error: Some(error), times }
}

#[test]
fn a_failed_fsync_is_never_made_good_by_a_later_one() {
    if crate::skipped() {
        return;
    }
    for suffix in [".pack", ".jnl", "packs"] {
        let (mounted, store, durable) = rig();
        // The journal would be written for a new path's number as well; that is no part of this.
        mounted.disk.inject(fail(Call::Sync, suffix, Errno::EIO, 1));
        let mut added = Vec::new();
        let refused = (0..200).find_map(|number| {
            let name = format!("doomed-{number}");
            let result = add(&store, &name).and_then(|path| {
                added.push(path);
                store.sync()
            });
            result.err()
        });
        let refused = refused.unwrap_or_else(|| panic!("no fsync of {suffix} came by, or its failure was hidden"));
        println!("{suffix}: {}", told("the error", &refused));
        // From now on every fsync succeeds, and says nothing of what is in doubt.
        let acknowledged = added.len() - 1;
        for _ in 0..3 {
            assert!(store.sync().is_err(), "{suffix}: made durable what is in doubt");
        }
        assert!(add(&store, "after").is_err(), "{suffix}: takes more");
        for path in &durable {
            let mut archive = Vec::new();
            store.write_nar(path, &mut archive).unwrap();
            assert!(archive == load::nar(path.name()), "{suffix}: reading goes on");
        }
        drop(store);
        for seed in 0..12 {
            let mut replay = Replay::new(&mounted.disk, seed);
            replay.advance(replay.length());
            let mut random = Random::new(seed);
            let dir = scratch();
            write_out(&replay.image(Loss::any(&mut random), &mut random), dir.path());
            let store = open(&dir.path().join("state"));
            let valid = store.all_valid_paths().unwrap();
            for path in durable.iter().chain(&added[..acknowledged]) {
                assert!(valid.contains(path), "{suffix}: {path} was acknowledged");
            }
            whole(&store).unwrap();
            add(&store, "after").unwrap();
            store.sync().unwrap();
        }
    }
}

#[test]
fn a_disk_that_cannot_be_read_is_an_error_that_passes() {
    if crate::skipped() {
        return;
    }
    let (mounted, store, paths) = rig();
    drop(store);
    let store = open(&mounted.state());
    mounted.disk.inject(fail(Call::Read, ".pack", Errno::EIO, usize::MAX));
    let error = store.write_nar(&paths[0], &mut Vec::new()).unwrap_err();
    println!("{}", told("the error", &error));
    assert!(told("", &error).contains(".pack"), "names the file");
    mounted.disk.heal();
    let mut archive = Vec::new();
    store.write_nar(&paths[0], &mut archive).unwrap();
    assert!(archive == load::nar("a"));
    whole(&store).unwrap();
}

#[test]
fn a_disk_that_cannot_be_written_is_an_error_and_no_loss() {
    if crate::skipped() {
        return;
    }
    for suffix in [".pack", ".jnl"] {
        for error in [Errno::EIO, Errno::ENOSPC] {
            let (mounted, store, durable) = rig();
            mounted.disk.inject(fail(Call::Write, suffix, error, 4));
            let failed = (0..4).any(|number| add(&store, &format!("x{number}")).and_then(|_| store.sync()).is_err());
            assert!(failed, "{suffix}: a failed write was hidden");
            mounted.disk.heal();
            drop(store);
            let store = open(&mounted.state());
            let valid = store.all_valid_paths().unwrap();
            assert!(durable.iter().all(|path| valid.contains(path)), "{suffix}");
            add(&store, "after").unwrap();
            store.sync().unwrap();
            whole(&store).unwrap();
        }
    }
}

/// Runs a child with this test's name that runs out of something; whether it said that its end was a good one.
fn child(test: &str, state: &Path, limit: usize) -> (bool, Vec<String>) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("faults::{test}"), "--nocapture"])
        .env(STORE, state)
        .env(LIMIT, limit.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let acknowledged = text.lines().filter_map(|line| line.split("durable ").nth(1)).map(str::to_owned).collect();
    (output.status.success(), acknowledged)
}

/// What the child is told, if this is one.
fn as_child() -> Option<(std::path::PathBuf, usize)> {
    let store = std::env::var_os(STORE)?;
    Some((store.into(), std::env::var(LIMIT).ok()?.parse().ok()?))
}

fn acknowledged_is_there(state: &Path, acknowledged: &[String]) {
    let store = open(state);
    let valid = store.all_valid_paths().unwrap();
    for name in acknowledged {
        assert!(valid.contains(&load::path(name)), "{name} was acknowledged");
    }
    whole(&store).unwrap();
    add(&store, "after").unwrap();
    store.sync().unwrap();
}

#[test]
fn a_store_without_descriptors_recovers_when_there_are_some() {
    if let Some((state, left)) = as_child() {
        let store = open(&state);
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let used = std::fs::read_dir("/proc/self/fd").unwrap().count() - 1;
        setrlimit(Resource::RLIMIT_NOFILE, (used + left) as u64, hard).unwrap();
        let mut failures = 0;
        for number in 0..150 {
            let name = format!("path-{left}-{number}");
            match add(&store, &name).and_then(|_| store.sync()) {
                Ok(()) => println!("durable {name}"),
                Err(error) => {
                    failures += 1;
                    if failures == 1 {
                        println!("{}", told("the error", &error));
                    }
                }
            }
        }
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
        // A failed write of the database is tried again after a second.
        std::thread::sleep(Duration::from_millis(1200));
        add(&store, "with-descriptors").unwrap();
        store.sync().unwrap();
        println!("durable with-descriptors");
        whole(&store).unwrap();
        return;
    }
    for left in [0, 1, 2, 4, 8] {
        let dir = scratch();
        let test = "a_store_without_descriptors_recovers_when_there_are_some";
        let (well, acknowledged) = child(test, dir.path(), left);
        println!(
            "{left} descriptors left: {} of 150 additions, {}",
            acknowledged.len(),
            if well { "well" } else { "failed" }
        );
        assert!(well, "with {left} descriptors left the store did not recover");
        acknowledged_is_there(dir.path(), &acknowledged);
    }
}

/// Allocation fails, and the process ends there and then: what an OOM kill or a limit does, at an allocation of its own.
#[test]
fn a_process_that_runs_out_of_memory_loses_nothing_it_acknowledged() {
    if let Some((state, megabytes)) = as_child() {
        let store = open(&state);
        let status = std::fs::read_to_string("/proc/self/statm").unwrap();
        let pages: u64 = status.split_whitespace().next().unwrap().parse().unwrap();
        let limit = pages * 4096 + megabytes as u64 * (1 << 20);
        setrlimit(Resource::RLIMIT_AS, limit, limit).unwrap();
        let mut hoard = Vec::new();
        for number in 0..10_000 {
            let name = format!("path-{megabytes}-{number}");
            if add(&store, &name).and_then(|_| store.sync()).is_ok() {
                println!("durable {name}");
            }
            hoard.push(vec![1_u8; 100_000]);
        }
        return;
    }
    for megabytes in [0, 1, 3, 6, 10] {
        let dir = scratch();
        let test = "a_process_that_runs_out_of_memory_loses_nothing_it_acknowledged";
        let (well, acknowledged) = child(test, dir.path(), megabytes);
        println!("{megabytes} MiB left: {} additions", acknowledged.len());
        assert!(!well, "the limit was never reached");
        acknowledged_is_there(dir.path(), &acknowledged);
    }
}

/// Files of the index that end too early or lack a page: an error when opening, or a store that is whole. Never a wrong byte.
#[test]
fn a_torn_file_of_the_index_is_an_error_or_no_loss() {
    if crate::skipped() {
        return;
    }
    let mounted = Mounted::new(Disk::new(None));
    let ledger = load::run(&mounted, crate::PLAN);
    let image = {
        let mut replay = Replay::new(&mounted.disk, 1);
        replay.advance(replay.length());
        replay.image(Loss::Nothing, &mut Random::new(1))
    };
    let entries = ledger.entries.lock();
    let (mut errors, mut shorter, mut unharmed) = (0, 0, 0);
    let dir = scratch();
    write_out(&image, dir.path());
    for file in files_below(&dir.path().join("state/castored/index")) {
        let bytes = std::fs::read(&file).unwrap();
        // A journal is mostly space that was set aside.
        let length = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
        for cut in [length / 2, length.saturating_sub(1)] {
            let torn = scratch();
            write_out(&image, torn.path());
            let victim = torn.path().join(file.strip_prefix(dir.path()).unwrap());
            let context = format!("{} cut to {cut} of {length}", victim.display());
            std::fs::write(&victim, &bytes[..cut]).unwrap();
            let state = torn.path().join("state");
            let opened = catch_unwind(|| Store::open(config(&state, Durability::Grouped)));
            match opened.unwrap_or_else(|_| panic!("{context}: a panic")) {
                Err(error) => {
                    errors += 1;
                    println!("{context}: {}", told("the error", &error));
                }
                Ok(store) => {
                    if let Err(wrong) = whole(&store) {
                        // Tables that were written out are ahead of a journal without its end. That only reading shows;
                        // that it shows is what counts.
                        assert!(context.contains(".jnl") && wrong.contains("cannot be read"), "{context}: {wrong}");
                        errors += 1;
                        continue;
                    }
                    let valid = store.all_valid_paths().unwrap();
                    let at = mounted.disk.position();
                    let lost = |(path, history)| entries.must_be_there(history, at) && !valid.contains(path);
                    if entries.paths.iter().any(lost) {
                        // A journal without its end is one that was not written so far: an earlier state.
                        assert!(context.contains(".jnl"), "{context}: what was durable is lost, and nobody is told");
                        shorter += 1;
                    } else {
                        unharmed += 1;
                    }
                }
            }
        }
    }
    println!("{errors} errors, {shorter} earlier states, {unharmed} without harm");
    assert!(errors > 0);
}

fn files_below(dir: &Path) -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(files_below(&path)) } else { files.push(path) }
    }
    files
}
