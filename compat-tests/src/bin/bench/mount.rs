//! The mount beside ext4, on the same tree, in the same run: warm, interleaved, medians of five. Wrong when the mount is
//! slower than the promised ratio.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use compat_tests::error::Context;
use compat_tests::machine::Machine;
use compat_tests::{Call, Error, Result, Room, Subject, Who, tree};

/// How many times each command is measured.
const ROUNDS: usize = 5;
/// The mount may take this many times what ext4 takes.
const PROMISED: f64 = 1.3;
/// The tree's size at least.
const TREE_BYTES: u64 = 500_000_000;

/// Shell commands over `$1`, each reading everything it is about.
const MEASURED: [(&str, &str); 2] =
    [("find -ls", "find \"$1\" -ls | wc -l"), ("tar c | wc -c", "tar -c -C \"$1\" . | wc -c")];

/// Whether the promise is kept.
pub(crate) fn bench(machine: &Machine) -> Result<bool> {
    let subject = Subject::from_environment()?;
    let room = Room::enter("bench")?;
    let daemon = subject.start(&room)?;
    let plain = tree::from_usr(&room.tmp("usr"), TREE_BYTES)?;
    let add = Call::nix(&room, Who::User, machine.newest(), "nix-store").args(["--add", &plain]);
    let stored = add.limit(Duration::from_secs(600)).ok()?.text();
    println!("{:<16} {:>10} {:>10} {:>7}", "warm", "ext4", "mount", "ratio");
    let mut kept = true;
    for (name, script) in MEASURED {
        let (mut on_disk, mut mounted) = (Vec::new(), Vec::new());
        for round in 0..=ROUNDS {
            let times = (measure(script, &plain)?, measure(script, &stored)?);
            // The first round only fills the caches.
            if round > 0 {
                on_disk.push(times.0);
                mounted.push(times.1);
            }
        }
        let (on_disk, mounted) = (median(on_disk), median(mounted));
        let ratio = mounted.as_secs_f64() / on_disk.as_secs_f64();
        println!("{name:<16} {on_disk:>10.1?} {mounted:>10.1?} {ratio:>7.2}");
        kept &= ratio <= PROMISED;
    }
    daemon.stop()?;
    println!("{} at most {PROMISED}", if kept { "ok: both" } else { "WRONG: not both" });
    Ok(kept)
}

/// Runs a shell command over a tree and answers how long it took.
fn measure(script: &str, tree: &str) -> Result<Duration> {
    let started = Instant::now();
    let mut command = Command::new("/bin/sh");
    let status = command.args(["-euc", script, "sh", tree]).stdout(Stdio::null()).status();
    if status.doing("measuring", Path::new(tree))?.success() {
        Ok(started.elapsed())
    } else {
        Err(Error::Wrong(format!("`{script}` failed on {tree}")))
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}
