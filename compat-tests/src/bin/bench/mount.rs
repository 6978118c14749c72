//! The mount beside ext4, on the same tree, in the same run: in turns, medians of five. Wrong when the mount takes more than
//! the promised ratio of what ext4 takes.
//!
//! Before each cold measurement the kernel's caches are dropped and the daemon is started anew, so that the store is
//! mounted again and nothing is in its memory either. Cold means cold in this machine: where it is a virtual one, what is
//! below may have the disk in memory, for both alike.

mod work;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use compat_tests::error::Context;
use compat_tests::machine::Machine;
use compat_tests::memory;
use compat_tests::{Call, Daemon, Result, Room, Subject, Who, tree};

/// How many times each row is measured.
const ROUNDS: usize = 5;
/// The tree holds at least this much.
const TREE_BYTES: u64 = 1_000_000_000;
const TREE_FILES: u64 = 50_000;
/// The length of the large file, in bytes.
const LARGE_BYTES: u64 = 1 << 30;
/// What a daemon holds at most in its caches, in bytes, by default: of blocks, directories, chunk lists, the index.
const CACHES: u64 = (64 + 32 + 16 + 32) << 20;
/// What it may use beside them, in bytes.
const PROMISED_MEMORY: u64 = 64 << 20;
/// Rows to measure, by parts of their names with commas between; all if it is not set.
const ROWS_VARIABLE: &str = "CASTORED_BENCH_ROWS";

/// Where what is measured lies.
struct Place {
    tree: PathBuf,
    large: PathBuf,
}

/// One row of the table.
struct Row {
    what: &'static str,
    cold: bool,
    /// The mount may take this many times what ext4 takes.
    promised: f64,
    work: fn(&Room, &Place) -> Result<()>,
}

const ROWS: [Row; 8] = [
    Row { what: "warm walk (find -ls)", cold: false, promised: 1.07, work: |_, copy| work::walk(&copy.tree) },
    Row { what: "warm read of all (tar)", cold: false, promised: 1.1, work: |_, copy| work::archive(&copy.tree) },
    Row { what: "warm 10,000 small files", cold: false, promised: 1.3, work: |_, copy| work::small_files(&copy.tree) },
    Row {
        what: "gcc, all inputs, warm",
        cold: false,
        promised: 1.03,
        work: |room, copy| work::compile(room, &copy.tree),
    },
    Row { what: "cold walk", cold: true, promised: 1.05, work: |_, copy| work::walk(&copy.tree) },
    Row { what: "cold read of all, 2 readers", cold: true, promised: 0.85, work: |_, copy| work::read_all(&copy.tree) },
    Row { what: "cold 1 GiB in order", cold: true, promised: 1.3, work: |_, copy| work::read_large(&copy.large) },
    Row { what: "cold 10,000 small files", cold: true, promised: 1.3, work: |_, copy| work::small_files(&copy.tree) },
];

/// Whether the promises are kept.
pub(crate) fn bench(machine: &Machine) -> Result<bool> {
    let subject = Subject::from_environment()?;
    let room = Room::enter("bench")?;
    let mut daemon = subject.start(&room)?;
    let plain = prepare(&room)?;
    let add = |path: &Path| {
        let call = Call::nix(&room, Who::User, machine.newest(), "nix-store").arg("--add").arg(path);
        Ok::<_, compat_tests::Error>(PathBuf::from(call.limit(Duration::from_secs(900)).ok()?.text()))
    };
    let stored = Place { tree: add(&plain.tree)?, large: add(&plain.large)? };
    let wanted = std::env::var(ROWS_VARIABLE).unwrap_or_default();
    let is_wanted = |row: &&Row| wanted.is_empty() || wanted.split(',').any(|part| row.what.contains(part));
    println!("{:<28} {:>10} {:>10} {:>7} {:>9}", "", "ext4", "mount", "ratio", "promised");
    let (mut kept, mut most) = (true, 0);
    for row in ROWS.iter().filter(is_wanted) {
        let (mut on_disk, mut mounted) = (Vec::new(), Vec::new());
        // The first round of a warm row only fills the caches.
        for round in usize::from(row.cold)..=ROUNDS {
            for (copy, times) in [(&plain, &mut on_disk), (&stored, &mut mounted)] {
                if row.cold {
                    daemon = restarted(&subject, &room, daemon)?;
                }
                let begun = Instant::now();
                (row.work)(&room, copy)?;
                if round > 0 {
                    times.push(begun.elapsed());
                }
            }
            most = most.max(memory::rss(daemon.pid())?);
        }
        let (on_disk, mounted) = (median(on_disk), median(mounted));
        let ratio = mounted.as_secs_f64() / on_disk.as_secs_f64();
        let mark = if ratio <= row.promised { "" } else { "  WRONG" };
        println!("{:<28} {on_disk:>10.1?} {mounted:>10.1?} {ratio:>7.2} {:>9.2}{mark}", row.what, row.promised);
        kept &= ratio <= row.promised;
    }
    let promised = CACHES + PROMISED_MEMORY;
    println!("{:<28} {:>28} {:>9} MiB", "resident memory at most", format!("{} MiB", most >> 20), promised >> 20);
    kept &= most <= promised;
    println!("load at the end: {}", fs::read_to_string("/proc/loadavg").unwrap_or_default().trim_end());
    daemon.stop()?;
    println!("{}", if kept { "ok: as promised" } else { "WRONG: not as promised" });
    Ok(kept)
}

fn prepare(room: &Room) -> Result<Place> {
    let copy = Place { tree: room.tmp("tree"), large: room.tmp("large") };
    let (files, bytes) = tree::of_usr(&copy.tree, TREE_BYTES, TREE_FILES)?;
    println!("a tree of {files} entries and {} MB", bytes / 1_000_000);
    work::write_project(&copy.tree)?;
    work::small_names(&copy.tree)?;
    tree::large_file(&copy.tree, &copy.large, LARGE_BYTES)?;
    Ok(copy)
}

/// Drops the kernel's caches and starts the daemon anew.
fn restarted(subject: &Subject, room: &Room, daemon: Daemon) -> Result<Daemon> {
    const DROP: &str = "/proc/sys/vm/drop_caches";
    daemon.stop()?;
    nix::unistd::sync();
    fs::write(DROP, "3").doing("writing", DROP)?;
    let daemon = subject.start(room)?;
    // What starting it has read does not count either.
    fs::write(DROP, "3").doing("writing", DROP)?;
    Ok(daemon)
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}
