//! A small filesystem, full to the last byte or on the way there.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{gc, info};
use nix_compat::conf::Settings;
use nix_compat::nar::NarWriter;
use nix_compat::store_path::{StoreDir, StorePath};
use store::{AutoGc, Config, Error, GcAction, Store};

const MIB: u64 = 1 << 20;

/// An ext4 in a file, unmounted at the end.
struct SmallDisk {
    dir: tempfile::TempDir,
}

impl SmallDisk {
    /// None, after saying why, where mounting is not allowed.
    fn mount(bytes: u64) -> Option<Self> {
        let disk = Self { dir: tempfile::tempdir_in("/var/tmp").unwrap() };
        let image = disk.dir.path().join("image");
        File::create(&image).unwrap().set_len(bytes).unwrap();
        std::fs::create_dir(disk.path()).unwrap();
        let run = |program: &str, arguments: &[&str], last: &[&Path]| {
            let status = Command::new(program).args(arguments).args(last).stderr(std::process::Stdio::null()).status();
            status.is_ok_and(|status| status.success())
        };
        if !run("mkfs.ext4", &["-q", "-F"], &[&image]) || !run("mount", &["-o", "loop"], &[&image, &disk.path()]) {
            println!("SKIPPED: a filesystem in a file cannot be mounted here");
            return None;
        }
        Some(disk)
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    /// Writes until nothing goes.
    fn fill(&self) {
        let mut filler = File::options().create(true).append(true).open(self.path().join("filler")).unwrap();
        for size in [1 << 20, 4096, 1] {
            while filler.write_all(&vec![1; size]).is_ok() {}
        }
        let _ = filler.sync_all();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).stderr(std::process::Stdio::null()).status();
    }
}

fn open(disk: &SmallDisk) -> Arc<Store> {
    let began = Instant::now();
    loop {
        match Store::open(Config::new(StoreDir::default(), disk.path().join("state"))) {
            // A sweep may still be letting go of it.
            Err(Error::InUse { .. }) if began.elapsed().as_secs() < 60 => std::thread::sleep(Duration::from_millis(10)),
            opened => return opened.unwrap(),
        }
    }
}

/// One file that does not compress.
fn noise(seed: u64, length: u64) -> Vec<u8> {
    let mut contents = vec![0; length as usize];
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in contents.as_chunks_mut::<8>().0 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *word = state.to_le_bytes();
    }
    let mut nar = NarWriter::new(Vec::new());
    nar.regular_header(false, length).unwrap();
    nar.contents(&contents).unwrap();
    nar.end_regular().unwrap();
    nar.finish().unwrap()
}

fn add(store: &Store, seed: u64, length: u64) -> Result<StorePath, Error> {
    let nar = noise(seed, length);
    let info = info(&format!("noise-{seed}"), &nar, &[]);
    let path = info.path.clone();
    store.add_with_info(info, &mut &nar[..])?;
    Ok(path)
}

fn check(store: &Store, path: &StorePath, seed: u64, length: u64) {
    let mut nar = Vec::new();
    store.write_nar(path, &mut nar).unwrap();
    assert!(nar == noise(seed, length));
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed().as_secs() < 60, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_disk_that_is_full_to_the_last_byte_can_be_collected() {
    let Some(disk) = SmallDisk::mount(300 * MIB) else { return };
    let store = open(&disk);
    let reserve = disk.path().join("state/castored/reserve");
    assert_eq!(reserve.metadata().unwrap().len() / MIB, 2);
    let roots = store.new_temp_roots();
    let kept = add(&store, 0, 8 * MIB).unwrap();
    roots.add(&kept);
    let mut seed = 0;
    let error = loop {
        seed += 1;
        assert!(seed < 60, "more fits than there is space for");
        if let Err(error) = add(&store, seed, 8 * MIB) {
            break error;
        }
    };
    assert!(error.is_disk_full(), "{error:?}");
    disk.fill();
    let advice = store.advise_if_full("failed".into());
    assert!(advice.starts_with("failed") && advice.contains("nix-store --gc"), "{advice}");
    assert_eq!(store.advise_if_full(advice.clone()), advice, "once is enough");
    // Small things fail as well, at the latest when they are to be durable, and all that was there can be read.
    let refused = (1000..1100).find_map(|seed| add(&store, seed, 100_000).and_then(|_| store.sync()).err());
    assert!(refused.unwrap().is_disk_full());
    check(&store, &kept, 0, 8 * MIB);

    // Also a daemon that starts only now can collect.
    drop((roots, store));
    let store = {
        let store = open(&disk);
        disk.fill();
        store
    };
    check(&store, &kept, 0, 8 * MIB);
    let roots = store.new_temp_roots();
    roots.add(&kept);
    let outcome = store.collect_garbage(&gc(GcAction::DeleteDead)).unwrap();
    assert!(outcome.paths.len() > 10, "{outcome:?}");
    wait_for("the space does not come back", || store.space().unwrap().available > 100 * MIB);
    for seed in 2000..2005 {
        let path = add(&store, seed, 8 * MIB).unwrap();
        store.sync().unwrap();
        check(&store, &path, seed, 8 * MIB);
    }
    wait_for("the reserve is not made again", || reserve.exists());
    let sweep = store.last_sweep().unwrap().unwrap();
    assert!(sweep.given_back() > 100 * MIB, "{sweep:?}");
    drop((roots, store));
    let store = open(&disk);
    check(&store, &kept, 0, 8 * MIB);
    assert_eq!(store.last_sweep().unwrap().unwrap().freed_bytes, sweep.freed_bytes);
}

#[test]
fn a_small_disk_has_room_for_more_than_its_size_when_what_is_dead_goes() {
    let Some(disk) = SmallDisk::mount(300 * MIB) else { return };
    let store = open(&disk);
    let mut settings = Settings::default();
    for (name, value) in [("min-free", "100M"), ("max-free", "160M"), ("min-free-check-interval", "0")] {
        settings.set(name, value).unwrap();
    }
    let options = AutoGc::from(&settings);
    let roots = store.new_temp_roots();
    let kept = add(&store, 0, 10 * MIB).unwrap();
    roots.add(&kept);
    let mut collections = 0;
    for seed in 1..80 {
        assert!(store.may_lack_room(&options));
        store.keep_room(&options);
        collections += usize::from(store.is_making_room());
        wait_for("a collection does not end", || !store.is_making_room());
        let path = add(&store, seed, 10 * MIB).unwrap();
        check(&store, &path, seed, 10 * MIB);
        store.sync().unwrap();
    }
    println!("{collections} collections");
    assert!(collections > 3 && collections < 40);
    check(&store, &kept, 0, 10 * MIB);
    // There is nothing dead any more, and looking again and again does not help.
    let all: Vec<StorePath> = store.all_valid_paths().unwrap().into_iter().collect();
    all.iter().for_each(|path| roots.add(path));
    let mut settings = settings.clone();
    settings.set("min-free", "290M").unwrap();
    settings.set("max-free", "290M").unwrap();
    let options = AutoGc::from(&settings);
    store.keep_room(&options);
    wait_for("a collection does not end", || !store.is_making_room());
    store.keep_room(&options);
    assert!(!store.is_making_room(), "the last one did not help");
    assert_eq!(store.all_valid_paths().unwrap().len(), all.len());
}
