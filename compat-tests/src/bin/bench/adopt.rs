//! Taking over a stock store beside copying it: `castored adopt` and `cp -a` with sync of the same store, in turn, with
//! cold caches, medians. What is adopted is hashed, compared with stock's database, deduplicated and compressed.
//!
//! `CASTORED_BENCH_ROUNDS=n` measures so often.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use compat_tests::error::Context;
use compat_tests::machine::Machine;
use compat_tests::{Call, Error, Result, Room, Subject, Who, tree};

/// How many times each side is measured.
const ROUNDS: usize = 3;
/// What the store is made of has at least so many bytes of file contents, and so many files and directories.
const BYTES: u64 = 1_000_000_000;
const ENTRIES: u64 = 55_000;
/// A directory with more entries than this becomes several paths.
const LARGE: u64 = 2500;
/// castored may take this many times what copying takes.
const PROMISED: f64 = 1.0;
/// The store is given to stock in commands of so many paths.
const PATHS_AT_ONCE: usize = 200;

/// Whether the promise is kept.
pub(crate) fn bench(machine: &Machine) -> Result<bool> {
    let room = Room::enter("bench-adopt")?;
    let castored = Subject::from_environment()?.copy_into(&room)?;
    let rounds = crate::rounds(ROUNDS);
    let files = furnish(machine, &room)?;
    let size = disk_usage(Path::new("/nix/store"))?;
    println!("a stock store of {files} files, {} MiB on disk", size >> 20);
    let target = room.tmp("target");
    let (mut copied, mut adopted) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let copy = Call::new(&room, Who::Root, "/bin/sh").limit(Duration::from_secs(600));
        let copy = copy.args(["-euc", "cp -a /nix/store /nix/var $1; sync -f $1", "sh"]).arg(&target);
        copied.push(measure(copy, &target)?.0);
        let adopt = Call::new(&room, Who::Root, &castored).env("NIX_STATE_DIR", target.as_os_str());
        let adopt = adopt.args(["adopt", "--from-state", "/nix/var/nix"]).limit(Duration::from_secs(600));
        let (time, stored) = measure(adopt, &target)?;
        adopted.push(time);
        println!("round {round}: copied {:.1?}, adopted {time:.1?} ({} MiB on disk)", copied[round], stored >> 20);
    }
    let (copied, adopted) = (median(copied), median(adopted));
    let ratio = adopted.as_secs_f64() / copied.as_secs_f64();
    let kept = ratio <= PROMISED;
    println!("{:<50} {:>10} {:>10} {:>7}", "1 GB, cold", "cp -a", "adopt", "ratio");
    let verdict = if kept { "ok" } else { "WRONG" };
    println!(
        "{:<50} {copied:>10.1?} {adopted:>10.1?} {ratio:>7.2} at most {PROMISED} {verdict}",
        "take over a stock store"
    );
    Ok(kept)
}

/// Makes a stock store of the machine's own files, one path for each directory that is not too large. Answers how many
/// files.
fn furnish(machine: &Machine, room: &Room) -> Result<u64> {
    let plain = room.tmp("plain");
    tree::of_usr(&plain, BYTES, ENTRIES)?;
    let mut paths = Vec::new();
    split(&plain.join("usr"), &mut paths)?;
    paths.sort();
    for some in paths.chunks(PATHS_AT_ONCE) {
        let add = Call::nix(room, Who::Root, machine.newest(), "nix-store").env("NIX_REMOTE", "local");
        let add = add.args(["--option", "build-users-group", "", "--add"]).args(some).lines(0).quiet();
        add.limit(Duration::from_secs(600)).ok()?;
    }
    remove(&plain)?;
    let count = Call::new(room, Who::Root, "/bin/sh").args(["-euc", "find /nix/store -type f | wc -l"]).quiet().ok()?;
    count.text().parse().map_err(|_| Error::Wrong(format!("`{}` is no number of files", count.text())))
}

/// What of a directory becomes a path: each entry, of large directories each of theirs. Names that no path can have are
/// left out.
fn split(dir: &Path, paths: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).doing("listing", dir)?.flatten() {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        let is_dir = entry.file_type().doing("looking at", &path)?.is_dir();
        if is_dir && tree::count(&path)? > LARGE {
            split(&path, paths)?;
        } else if !name.starts_with('.') && name.chars().all(|c| c.is_ascii_alphanumeric() || "+-._?=".contains(c)) {
            paths.push(path);
        }
    }
    Ok(())
}

/// Runs a command with cold caches, into an empty directory, which is removed afterwards. Answers how long it took and
/// what it made takes on disk, in bytes.
fn measure(call: Call, target: &Path) -> Result<(Duration, u64)> {
    fs::create_dir(target).doing("creating", target)?;
    drop_caches()?;
    let started = Instant::now();
    call.ok()?;
    let elapsed = started.elapsed();
    let made = disk_usage(target)?;
    remove(target)?;
    Ok((elapsed, made))
}

fn drop_caches() -> Result<()> {
    nix::unistd::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").doing("writing", "/proc/sys/vm/drop_caches")
}

fn remove(path: &Path) -> Result<()> {
    let status = Command::new("rm").arg("-rf").arg(path).status().doing("removing", path)?;
    if status.success() { Ok(()) } else { Err(Error::Wrong(format!("cannot remove {}", path.display()))) }
}

/// Bytes on disk.
fn disk_usage(dir: &Path) -> Result<u64> {
    let output = Command::new("du").args(["-s", "-B1"]).arg(dir).output().doing("measuring", dir)?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.split_whitespace().next().and_then(|n| n.parse().ok()).ok_or_else(|| Error::Wrong(format!("du said '{text}'")))
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}
