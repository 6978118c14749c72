//! Stock Nix's own functional suite, from the source package of a release, with that release's client and the daemon
//! under test.
//!
//! `compat-tests/suites/VERSION.txt` says of every test of a suite what is expected of it ([`expected`]); a test that
//! does anything else is a failure of ours, also one that passes though it is not expected to. [`layout`] says where a
//! release has what, [`setting`] lays out the suite's files in a room, [`cases`] reads which tests there are, [`runner`]
//! runs them, each in a pid namespace of its own, as an unprivileged user; [`tools`] fetches what the tests need and
//! Debian 12 lacks.

mod cases;
mod expected;
mod layout;
mod runner;
mod setting;
mod tools;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::error::Context;
use crate::machine::{self, CACHE, Machine};
use crate::{Error, Result, Room, Subject, apt, sources};
use cases::Case;
use expected::{Expected, List};
use layout::Layout;
use runner::{Outcome, Verdict};
use setting::Setting;

/// The suites that can be run; the first is the usual one.
pub const RELEASES: [&str; 2] = ["2.26.3", "2.8.0"];

/// Debian packages that the tests use.
const PACKAGES: &[&str] = &["bash-static", "busybox-static", "fuse3", "git", "mercurial", "openssh-client", "patchelf"];

/// Lines of a failed test's log that are shown when it was asked for by name.
const SHOWN_LINES: usize = 60;

/// What is to be run.
#[derive(Debug, Default)]
pub struct Options {
    /// The release whose suite it is.
    pub version: String,
    /// Tests by their names (`gc`) or full names (`main/gc`); all, if empty.
    pub tests: Vec<String>,
    /// Writes what happened into the list instead of comparing.
    pub bless: bool,
    /// How many run at a time; 0 stands for two.
    pub jobs: usize,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Report {
    /// A line that says how many did what.
    pub summary: String,
    /// What is not as the list says, a line each.
    pub wrong: Vec<String>,
}

/// Runs a suite and compares it with its list. The calling thread stays in the room it was run in.
pub fn run(machine: &Machine, options: &Options) -> Result<Report> {
    let started = Instant::now();
    let layout = Layout::of(&options.version)?;
    let (source, tools) = fetch(&options.version)?;
    // Absolute, since in the room the working directory is another one.
    let list_file = Path::new("compat-tests/suites").join(format!("{}.txt", options.version));
    let list_file = std::path::absolute(list_file).doing("finding", "the suite's list")?;
    let logs = logs(&options.version)?;
    let mut list = List::read(&list_file)?;
    let subject = Subject::from_environment()?;
    let room = Room::enter("functional")?;
    let setting = Setting::lay_out(&room, layout, machine.release(&options.version)?, &subject, &source, &tools)?;
    let all = cases::read(&setting.tests(), layout.list)?;
    let chosen: Vec<Case> = all.iter().filter(|case| case.is_chosen(&options.tests)).cloned().collect();
    if let Some(unknown) = options.tests.iter().find(|test| !all.iter().any(|case| case.is_named(test))) {
        return Err(Error::Wrong(format!("the suite of nix {} has no test '{unknown}'", options.version)));
    }
    let mut wrong = Vec::new();
    let mut tell = |case: &Case, outcome: &Outcome| {
        let objection = (!options.bless && !subject.is_stock())
            .then(|| list.get(&case.name()).objection(&outcome.verdict))
            .flatten();
        println!("{:<8} {:<50} {:>5.1} s {}", outcome.verdict.word(), case.name(), outcome.seconds, reason(outcome));
        let Some(objection) = objection else { return };
        let log = case.log(&logs);
        println!("WRONG    {}: {objection}; its log: {}", case.name(), log.display());
        if !options.tests.is_empty() {
            show_end(&log);
        }
        wrong.push(format!("{}: {objection}", case.name()));
    };
    let outcomes = runner::run(&setting, &logs, &chosen, if options.jobs == 0 { 2 } else { options.jobs }, &mut tell)?;
    if options.bless {
        list.bless(&outcomes);
        fs::write(&list_file, list.to_string()).doing("writing", &list_file)?;
    } else if options.tests.is_empty() {
        let names: Vec<String> = all.iter().map(Case::name).collect();
        wrong.extend(list.strangers(&names).map(|name| format!("{name} is in the list, but not in the suite")));
    }
    let summary = summary(&options.version, &list, &outcomes, started.elapsed().as_secs());
    Ok(Report { summary, wrong })
}

/// The suite's source and the tools it needs.
fn fetch(version: &str) -> Result<(PathBuf, PathBuf)> {
    apt::install(PACKAGES)?;
    let cache = Path::new(CACHE);
    let _turn = machine::lock(cache)?;
    Ok((sources::fetch(cache, version)?, tools::fetch(cache)?))
}

/// A directory for the tests' logs, empty.
fn logs(version: &str) -> Result<PathBuf> {
    let target = PathBuf::from(std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()));
    let logs = std::path::absolute(target.join("functional").join(version)).doing("finding", "the logs' directory")?;
    fs::create_dir_all(&logs).doing("creating", &logs)?;
    Ok(logs)
}

fn reason(outcome: &Outcome) -> &str {
    if let Verdict::Skipped(reason) = &outcome.verdict { reason } else { "" }
}

/// Prints the last lines of a log.
fn show_end(log: &Path) {
    let bytes = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    for line in &lines[lines.len().saturating_sub(SHOWN_LINES)..] {
        println!("    {line}");
    }
}

/// Counts what happened. A test that is not expected to pass counts by the reason that the list gives.
fn summary(version: &str, list: &List, outcomes: &BTreeMap<String, Outcome>, seconds: u64) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for (name, outcome) in outcomes {
        let counted_as = match (&outcome.verdict, list.get(name)) {
            (Verdict::Passed, _) => "pass",
            (Verdict::Skipped(_), _) => "skip",
            (_, Expected::Inapplicable(_)) => "inapplicable",
            (_, Expected::Stock(_)) => "stock",
            (_, Expected::Missing(_)) => "missing",
            (_, Expected::Pass | Expected::Skip(_) | Expected::Unlisted) => "fail",
        };
        *counts.entry(counted_as).or_default() += 1;
    }
    let count = |name| counts.get(name).copied().unwrap_or_default();
    format!(
        "{version}: {} pass, {} skipped by the suite itself, {} inapplicable, {} fail with stock's daemon too, {} \
         missing, {} fail; {} in {seconds} s",
        count("pass"),
        count("skip"),
        count("inapplicable"),
        count("stock"),
        count("missing"),
        count("fail"),
        outcomes.len()
    )
}
