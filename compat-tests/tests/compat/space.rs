//! A state directory on a small filesystem: full to the last byte, and kept from becoming so.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use compat_tests::Who;
use compat_tests::checks::expect_contains;
use compat_tests::nar::Tree;
use compat_tests::subject::default_conf;
use compat_tests::wire::Client;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::mount::{MntFlags, umount2};

use crate::builds::wait_until;
use crate::{Setup, castored_setup, derivation};

const MIB: u64 = 1 << 20;
/// Where the small filesystem is: the state directory and the logs.
const DISK: &str = "/nix/var";

/// A small filesystem in the room, until dropped.
struct SmallDisk;

impl SmallDisk {
    /// An ext4 in a file. None, after saying why, where that cannot be mounted.
    fn mount(s: &Setup, bytes: u64) -> Option<Self> {
        let image = s.room.tmp("disk.img");
        File::create(&image).unwrap().set_len(bytes).unwrap();
        fs::create_dir_all(DISK).unwrap();
        let made = Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(&image).status();
        let mounted = Command::new("mount").args(["-o", "loop"]).arg(&image).arg(DISK).status();
        if !made.is_ok_and(|status| status.success()) || !mounted.is_ok_and(|status| status.success()) {
            println!("SKIPPED: a filesystem in a file cannot be mounted here");
            return None;
        }
        fs::set_permissions(DISK, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        Some(Self)
    }

    /// Bytes that are free.
    fn free(&self) -> u64 {
        let stat = nix::sys::statvfs::statvfs(DISK).unwrap();
        stat.blocks_free() * stat.fragment_size()
    }

    /// Writes until nothing goes.
    fn fill(&self) {
        let mut filler = File::options().create(true).append(true).open(format!("{DISK}/filler")).unwrap();
        for size in [1 << 20, 4096, 1] {
            while filler.write_all(&vec![1; size]).is_ok() {}
        }
        let _ = filler.sync_all();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = umount2(DISK, MntFlags::MNT_DETACH);
    }
}

/// Bytes that do not compress.
fn pseudo_random(seed: u64, bytes: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut contents = vec![0; bytes as usize];
    for word in contents.as_chunks_mut::<8>().0 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *word = state.to_le_bytes();
    }
    contents
}

/// A file of them.
fn noise(s: &Setup, seed: u64, bytes: u64) -> std::path::PathBuf {
    s.room.write(&format!("noise-{seed}"), pseudo_random(seed, bytes)).unwrap()
}

fn within(limit: Duration, what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < limit, "{what}");
        thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_disk_full_to_the_last_byte_is_collected_by_a_stock_client_and_all_goes_on() {
    let Some(s) = castored_setup("full") else { return };
    let Some(disk) = SmallDisk::mount(&s, 300 * MIB) else { return };
    let conf = format!("{}min-free = 0\n", default_conf());
    let daemon = s.subject.start_with(&s.room, &conf).unwrap();
    let add = |seed: u64, bytes: u64| {
        let file = noise(&s, seed, bytes);
        let added = s.nix(Who::User, "nix-store").quiet().arg("--add").arg(&file).run().unwrap();
        fs::remove_file(file).unwrap();
        added
    };
    let kept = add(0, 2 * MIB).text();
    let root = s.room.tmp("kept");
    s.nix(Who::User, "nix-store").args(["--realise", &kept, "--add-root"]).arg(&root).arg("--indirect").ok().unwrap();
    let contents = fs::read(&kept).unwrap();

    let valid = || Client::new(daemon.connect().unwrap()).unwrap().all_valid_paths().unwrap().len();
    let refused = (1..100).map(|seed| add(seed, 16 * MIB)).find(|added| added.code != 0).expect("the disk has an end");
    for told in ["No space left on device", "/nix/var/nix", "nix-store --gc"] {
        expect_contains(&refused.all(), told).unwrap();
    }
    // It ended before the last byte was taken, and what it had written is given back by itself.
    let packs = || -> u64 {
        let packs = fs::read_dir("/nix/var/nix/castored/packs").unwrap();
        packs.map(|entry| entry.unwrap().metadata().map_or(0, |metadata| metadata.len())).sum()
    };
    assert!(disk.free() > MIB, "{} bytes are free", disk.free());
    let whole = (valid() as u64 - 1) * 16 * MIB + 2 * MIB;
    println!("packs have {} bytes, {whole} of them of whole paths", packs());
    within(Duration::from_secs(60), "what did not fit is still there", || packs() < whole + 5 * MIB);
    disk.fill();
    // Whatever is tried now fails clearly or succeeds, the daemon serves, and contents are right.
    let still = |told: &str| {
        assert_eq!(fs::read(&kept).unwrap(), contents, "{told}");
        s.nix(Who::User, "nix-store").quiet().args(["-q", "--hash", &kept]).ok().unwrap();
    };
    let old = s.machine.release("2.3.7").unwrap();
    let file = s.room.write("small", "small\n").unwrap();
    for release in [s.machine.newest(), old] {
        let added =
            compat_tests::Call::nix(&s.room, Who::User, release, "nix-store").quiet().arg("--add").arg(&file).run();
        println!("a small file: {}", added.unwrap().all());
        still("after an add");
    }
    let big = noise(&s, 500, 4 * MIB);
    let stream = s.nix(Who::Root, "nix").quiet().args(["store", "add", "--mode", "flat"]).arg(&big).run().unwrap();
    assert_ne!(stream.code, 0);
    expect_contains(&stream.all(), "No space left on device").unwrap();
    still("after a large add");
    // Where there is room enough again to begin it, the builder is who finds the end.
    let builder = "while echo 0123456789abcdef; do :; done > $out; exit 1";
    let built = s.build(&derivation("full", builder, "")).quiet().run().unwrap();
    assert_ne!(built.code, 0);
    expect_contains(&built.all(), "nix-store --gc").unwrap();
    still("after a build");

    // A restart on the full disk.
    daemon.stop().unwrap();
    disk.fill();
    let daemon = s.subject.start_with(&s.room, &conf).unwrap();
    disk.fill();
    still("after a restart");

    s.nix(Who::Root, "nix-store").arg("--gc").ok().expect("a collection needs no space");
    still("after the collection");
    within(Duration::from_secs(60), "there is no space again", || {
        let added = add(600, 16 * MIB);
        println!("{}\n{}", added.all(), daemon.log().lines().rev().take(5).collect::<Vec<_>>().join("\n"));
        added.code == 0
    });
    for seed in 601..605 {
        let added = add(seed, 16 * MIB);
        assert_eq!(added.code, 0, "{}", added.all());
    }
    let check = s.nix(Who::Root, "nix-store").args(["--verify", "--check-contents"]).ok().unwrap();
    assert!(!check.all().contains("modified"), "{}", check.all());
    daemon.stop().unwrap();
}

/// The reserve was used up, or somebody removed it.
#[test]
fn a_collection_that_cannot_even_begin_says_what_helps() {
    let Some(s) = castored_setup("no-reserve") else { return };
    let Some(disk) = SmallDisk::mount(&s, 300 * MIB) else { return };
    let daemon = s.subject.start_with(&s.room, &format!("{}min-free = 0\n", default_conf())).unwrap();
    for seed in 1..8 {
        let file = noise(&s, seed, 16 * MIB);
        s.nix(Who::User, "nix-store").quiet().arg("--add").arg(&file).ok().unwrap();
        fs::remove_file(file).unwrap();
    }
    for reserve in ["reserve", "reserve-for-opening"] {
        fs::remove_file(format!("/nix/var/nix/castored/{reserve}")).unwrap();
    }
    disk.fill();
    let refused = s.nix(Who::Root, "nix-store").arg("--gc").fails().unwrap().all();
    for told in ["cannot collect garbage", "'/nix/var/nix' is full", "Remove something else"] {
        expect_contains(&refused, told).unwrap();
    }
    let filler = File::options().write(true).open(format!("{DISK}/filler")).unwrap();
    filler.set_len(filler.metadata().unwrap().len() - 4 * MIB).unwrap();
    let free = disk.free();
    s.nix(Who::Root, "nix-store").arg("--gc").ok().unwrap();
    within(Duration::from_secs(60), "the space does not come back", || disk.free() > free + 90 * MIB);
    daemon.stop().unwrap();
}

#[test]
fn garbage_goes_before_space_runs_out_in_adds_and_in_builds() {
    let Some(s) = castored_setup("auto-gc") else { return };
    let Some(_disk) = SmallDisk::mount(&s, 300 * MIB) else { return };
    let conf =
        format!("{}min-free = {}\nmax-free = {}\nmin-free-check-interval = 0\n", default_conf(), 100 * MIB, 140 * MIB);
    let daemon = s.subject.start_with(&s.room, &conf).unwrap();
    for seed in 1..40 {
        let file = noise(&s, seed, 15 * MIB);
        // The client reads it back: nothing may have taken it before the client has gone.
        s.nix(Who::User, "nix-store").quiet().arg("--add").arg(&file).ok().unwrap();
        fs::remove_file(file).unwrap();
    }
    let collections = || daemon.log().matches("collecting garbage because space is short").count();
    assert!(collections() > 2, "{}", daemon.log());
    // A build eats what is left: twice what is free now has to be found while it runs.
    let dead = || {
        let dead = s.nix(Who::Root, "nix-store").quiet().args(["--gc", "--print-dead"]).ok().unwrap();
        dead.lines().len()
    };
    let (before, dead_before) = (collections(), dead());
    assert!(dead_before > 2);
    let script = "dd if=/dev/zero of=$TMPDIR/eaten bs=1M count=90; sleep 6; dd if=/dev/urandom of=$out bs=1M count=30";
    let built = s.build(&derivation("eats-space", script, "")).ok().unwrap();
    assert!(collections() > before, "{}", daemon.log());
    assert_eq!(fs::metadata(Path::new(&built.text())).unwrap().len(), 30 * MIB);
    daemon.stop().unwrap();
}

/// Texts that are much alike, added: their paths and contents.
fn add_texts(s: &Setup) -> Vec<(String, Vec<u8>)> {
    let text = |number: u32| (number..number + 3000).map(|n| format!("line {n} of a text that others have as well\n"));
    (0..30)
        .map(|number| {
            let file = s.room.write(&format!("text-{number}"), text(number).collect::<String>()).unwrap();
            let path = s.nix(Who::User, "nix-store").quiet().arg("--add").arg(&file).ok().unwrap().text();
            (path, fs::read(file).unwrap())
        })
        .collect()
}

fn bytes_in_packs() -> u64 {
    let packs = fs::read_dir("/nix/var/nix/castored/packs").unwrap();
    packs.map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
}

#[test]
fn optimising_a_store_saves_space_and_says_so() {
    let Some(s) = castored_setup("optimise") else { return };
    let daemon = s.start();
    let paths = add_texts(&s);
    let before = bytes_in_packs();
    let said = s.nix(Who::User, "nix-store").arg("--optimise").ok().unwrap();
    expect_contains(&said.all(), "MiB freed").unwrap();
    let after = bytes_in_packs();
    println!("{before} bytes before, {after} after");
    assert!(after < before * 9 / 10);
    s.nix(Who::User, "nix").args(["store", "optimise"]).ok().unwrap();
    for (path, contents) in &paths {
        assert!(fs::read(path).unwrap() == *contents);
    }
    daemon.stop().unwrap();
    let daemon = s.start();
    for (path, contents) in &paths {
        assert!(fs::read(path).unwrap() == *contents);
    }
    let check = s.nix(Who::Root, "nix-store").args(["--verify", "--check-contents"]).ok().unwrap();
    assert!(!check.all().contains("modified"), "{}", check.all());
    daemon.stop().unwrap();
}

#[test]
fn a_store_that_nobody_uses_is_optimised_without_being_asked() {
    let Some(s) = castored_setup("optimise-idle") else { return };
    s.start().stop().unwrap();
    fs::write(s.room.dir().join("daemon-conf/castored.conf"), "optimise-when-idle = 3\n").unwrap();
    let daemon = s.start();
    let paths = add_texts(&s);
    let before = bytes_in_packs();
    let connected = daemon.connect().unwrap();
    std::thread::sleep(Duration::from_secs(8));
    assert!(bytes_in_packs() >= before, "somebody is here");
    drop(connected);
    assert!(wait_until(Duration::from_secs(120), || bytes_in_packs() < before * 9 / 10), "{}", daemon.log());
    for (path, contents) in &paths {
        assert!(fs::read(path).unwrap() == *contents);
    }
    daemon.stop().unwrap();
}

/// Packs are rewritten under the hands of those who read.
#[test]
fn readers_of_the_mount_notice_nothing_of_rewriting() {
    let Some(s) = castored_setup("rewriting") else { return };
    let daemon = s.start();
    let contents = |seed: u64| {
        let mut contents = pseudo_random(seed, 160_000);
        contents.extend(b"what all of them have in common\n".repeat(1000));
        contents
    };
    // Temporary roots keep what was added as long as the client that added it is connected.
    let mut keeping = Client::new(daemon.connect().unwrap()).unwrap();
    let mut leaving = Client::new(daemon.connect().unwrap()).unwrap();
    let mut kept = Vec::new();
    for seed in 0..400 {
        let tree = Tree::File(contents(seed));
        if seed % 4 == 0 {
            kept.push((seed, keeping.add("kept", &tree).unwrap()));
        } else {
            leaving.add("dropped", &tree).unwrap();
        }
    }
    drop(leaving);
    let packs = || -> u64 {
        let packs = fs::read_dir("/nix/var/nix/castored/packs").unwrap();
        packs.map(|entry| entry.unwrap().metadata().map_or(0, |metadata| metadata.len())).sum()
    };
    let before = packs();
    let over = AtomicBool::new(false);
    let reads = thread::scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|offset| {
                let (kept, over) = (&kept, &over);
                scope.spawn(move || {
                    let mut reads = 0;
                    while !over.load(Ordering::Relaxed) {
                        for (seed, path) in kept.iter().cycle().skip(offset * 37).take(kept.len()) {
                            let mut file = File::open(path).unwrap();
                            let mut read = Vec::new();
                            file.read_to_end(&mut read).unwrap();
                            assert!(read == contents(*seed), "{path} reads wrong");
                            // The next read comes to the daemon again.
                            posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
                            reads += 1;
                        }
                    }
                    reads
                })
            })
            .collect();
        thread::sleep(Duration::from_millis(300));
        s.nix(Who::Root, "nix-store").quiet().arg("--gc").ok().unwrap();
        within(Duration::from_secs(60), "the pack is not rewritten", || packs() < before / 3);
        s.nix(Who::Root, "nix-store").arg("--optimise").ok().unwrap();
        thread::sleep(Duration::from_millis(300));
        over.store(true, Ordering::Relaxed);
        readers.into_iter().map(|reader| reader.join().unwrap()).sum::<u32>()
    });
    println!("{reads} files read meanwhile; packs had {before} bytes and have {}", packs());
    assert!(reads > 200);
    drop(keeping);
    daemon.stop().unwrap();
}
