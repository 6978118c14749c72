//! `compat-tests/bench [mount|protocol|engine|build|gc|open|adopt|substitute|source|lazy]...`: castored measured beside what it replaces, in the same run. All groups
//! unless some are named. Ends with an error when a target is missed.

mod adopt;
mod build;
mod engine;
mod gc;
mod lazy;
mod mount;
mod open;
mod protocol;
mod sides;
mod source;
mod substitute;
mod usage;

use std::process::ExitCode;

use compat_tests::machine::{self, Machine};
use compat_tests::{Error, Result};

type Group = (&'static str, fn(&Machine) -> Result<bool>);

/// What can be measured.
const GROUPS: [Group; 10] = [
    ("mount", mount::bench),
    ("protocol", protocol::bench),
    ("engine", engine::bench),
    ("build", build::bench),
    ("gc", gc::bench),
    ("open", open::bench),
    ("adopt", adopt::bench),
    ("substitute", substitute::bench),
    ("source", source::bench),
    ("lazy", lazy::bench),
];

/// Another number of rounds, for the groups that measure in rounds.
const ROUNDS_VARIABLE: &str = "CASTORED_BENCH_ROUNDS";

/// How often a group measures that does so `usual` times unless told otherwise.
pub(crate) fn rounds(usual: usize) -> usize {
    std::env::var(ROUNDS_VARIABLE).ok().and_then(|n| n.parse().ok()).unwrap_or(usual)
}

/// Groups that can take less than they are meant to do so by this.
const PART_VARIABLE: &str = "CASTORED_BENCH_PART";

/// What part of its inputs a group is to take: one of so many.
pub(crate) fn part() -> usize {
    std::env::var(PART_VARIABLE).ok().and_then(|n| n.parse().ok()).filter(|n| *n > 0).unwrap_or(1)
}

/// Prints how busy the machine is.
pub(crate) fn show_load() {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("load average at the end: {}", load.split(' ').take(3).collect::<Vec<_>>().join(" "));
}

fn main() -> ExitCode {
    match bench() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("the benchmark failed: {e}");
            ExitCode::FAILURE
        }
    }
}

fn bench() -> Result<bool> {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    if let Some(unknown) = wanted.iter().find(|name| GROUPS.iter().all(|(group, _)| group != name)) {
        let known: Vec<&str> = GROUPS.iter().map(|(name, _)| *name).collect();
        return Err(Error::Wrong(format!("there is no group '{unknown}' of measurements, only {}", known.join(", "))));
    }
    if let Some(reason) = machine::obstacle() {
        return Err(Error::Wrong(reason.into()));
    }
    let machine = machine::prepare()?;
    let mut kept = true;
    for (name, group) in GROUPS {
        if wanted.is_empty() || wanted.iter().any(|w| w == name) {
            // A room is for the thread that enters it, and each group has its own.
            let outcome = std::thread::scope(|scope| scope.spawn(|| group(machine)).join());
            kept &= outcome.map_err(|_| Error::Wrong(format!("measuring '{name}' panicked")))??;
        }
    }
    Ok(kept)
}
