//! `compat-tests/run`: every check of the project, one after the other, with closing lines that say how it went.
//!
//! Arguments are passed on to the test runner (a filter, for example); stock's functional suite is then left out.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use compat_tests::error::Context;
use compat_tests::functional::{self, Options, RELEASES, Report};
use compat_tests::{Error, Result, machine};

fn main() -> ExitCode {
    let started = Instant::now();
    let mut counts = Counts::default();
    let outcome = everything(&mut counts);
    let seconds = started.elapsed().as_secs();
    println!();
    if let Err(e) = &outcome {
        println!("{e}");
    }
    println!("tests:           {}", counts.summary);
    println!("client commands: {} ok, {} wrong", counts.commands_ok, counts.commands_wrong);
    for suite in &counts.suites {
        println!("functional suite: {suite}");
    }
    println!("skipped:         {}", counts.skipped);
    println!("time:            {} min {} s", seconds / 60, seconds % 60);
    let passed = outcome.is_ok() && counts.skipped == 0 && counts.commands_wrong == 0;
    println!("{}", if passed { "PASSED" } else { "FAILED" });
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// What the tests said about themselves.
#[derive(Debug, Default)]
struct Counts {
    /// The runner's own closing line; cargo's has one for each binary, and the last failing one counts.
    summary: String,
    /// Whether nextest has given its summary: what follows repeats failures.
    over: bool,
    commands_ok: usize,
    commands_wrong: usize,
    skipped: usize,
    /// What stock's functional suites did.
    suites: Vec<String>,
}

impl Counts {
    /// Notes one line of the tests' output.
    fn note(&mut self, line: &str) {
        let line = line.trim();
        if line.starts_with("ok    ") {
            self.commands_ok += 1;
        } else if line.starts_with("WRONG ") {
            self.commands_wrong += 1;
        } else if line.starts_with("SKIPPED:") {
            self.skipped += 1;
            println!("{line}");
        } else if line.starts_with("Summary [") {
            self.summary = line.to_owned();
            self.over = true;
        } else if line.starts_with("test result:") && !self.summary.contains("FAILED") {
            self.summary = line.to_owned();
        }
    }
}

fn everything(counts: &mut Counts) -> Result<()> {
    if let Some(reason) = machine::obstacle() {
        println!("SKIPPED: {reason}");
        counts.skipped += 1;
    } else {
        step("machine: packages, /dev/fuse, the four stock releases, their test data");
        machine::prepare()?;
    }
    step("format");
    cargo(&["fmt", "--all", "--check"])?;
    step("clippy");
    cargo(&["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"])?;
    step("build");
    cargo(&["build", "--quiet", "--workspace", "--bins"])?;
    step("tests");
    let mut outcome = tests(counts);
    if std::env::args().len() > 1 || machine::obstacle().is_some() {
        return outcome;
    }
    for version in RELEASES {
        step(&format!("stock's functional suite, {version}"));
        let suite = functional_suite(version).and_then(|report| {
            counts.suites.push(report.summary);
            let list = format!("compat-tests/suites/{version}.txt");
            let wrong = || Error::Wrong(format!("not as {list} says:\n    {}", report.wrong.join("\n    ")));
            if report.wrong.is_empty() { Ok(()) } else { Err(wrong()) }
        });
        outcome = outcome.and(suite);
    }
    outcome
}

/// Runs a suite in a thread of its own, which stays in the room that it enters.
fn functional_suite(version: &str) -> Result<Report> {
    let options = Options { version: version.to_owned(), ..Options::default() };
    let machine = machine::prepare()?;
    let outcome = std::thread::scope(|scope| scope.spawn(|| functional::run(machine, &options)).join());
    outcome.map_err(|_| Error::Wrong("running the functional suite panicked".into()))?
}

fn step(name: &str) {
    println!("== {name}");
}

/// Runs cargo with its output shown.
fn cargo(args: &[&str]) -> Result<()> {
    let status = Command::new("cargo").args(args).status().doing("running", "cargo")?;
    if status.success() { Ok(()) } else { Err(Error::Wrong(format!("`cargo {}` failed", args.join(" ")))) }
}

/// Runs all tests with nextest where it is there or can be had, else with cargo's own runner. Everything they print
/// goes to a log; progress and failures are shown.
fn tests(counts: &mut Counts) -> Result<()> {
    let passed_on: Vec<String> = std::env::args().skip(1).collect();
    let mut command = Command::new("cargo");
    let nextest = has_nextest();
    if nextest {
        command.args(["nextest", "run", "--workspace", "--no-fail-fast", "--color", "never"]);
        command.args(["--config-file", "compat-tests/nextest.toml", "--success-output", "immediate"]);
        command.args(["--failure-output", "immediate-final"]);
    } else {
        println!("cargo-nextest is not to be had here: using cargo test");
        command.args(["test", "--workspace", "--no-fail-fast"]);
    }
    command.args(passed_on);
    if !nextest {
        command.args(["--", "--nocapture"]);
    }
    let log = PathBuf::from(std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into())).join("run.log");
    let mut file = File::create(&log).doing("creating", &log)?;
    println!("everything the tests print: {}", log.display());
    let (reader, writer) = std::io::pipe().doing("creating", "a pipe")?;
    command.stdout(writer.try_clone().doing("copying", "a pipe")?).stderr(writer).stdin(Stdio::null());
    let mut child = command.spawn().doing("running", "cargo")?;
    // Holds the pipe's other end, which would keep the reader waiting.
    drop(command);
    for line in BufReader::new(reader).split(b'\n') {
        let line = line.doing("reading from", "the tests")?;
        let line = String::from_utf8_lossy(&line);
        writeln!(file, "{line}").doing("writing", &log)?;
        if !counts.over {
            counts.note(&line);
        }
        if counts.over || is_progress(&line, nextest) {
            println!("{line}");
        }
    }
    let status = child.wait().doing("waiting for", "the tests")?;
    if status.success() { Ok(()) } else { Err(Error::Wrong(format!("tests failed; see {}", log.display()))) }
}

/// Whether a line of the tests' output is worth showing as it comes.
fn is_progress(line: &str, nextest: bool) -> bool {
    // The compiler's messages begin at the margin; the tests' own output is indented.
    let mut starts = vec!["error", "warning", "    Starting ", "     Running "];
    if !nextest {
        starts.extend(["test ", "test result:"]);
    }
    let states = ["PASS [", "FAIL [", "SLOW [", "TIMEOUT [", "ABORT [", "WRONG "];
    starts.iter().any(|s| line.starts_with(s)) || states.iter().any(|s| line.trim_start().starts_with(s))
}

/// Whether cargo-nextest is there; tries to install it once.
fn has_nextest() -> bool {
    let works = || Command::new("cargo").args(["nextest", "--version"]).output().is_ok_and(|o| o.status.success());
    if works() {
        return true;
    }
    println!("installing cargo-nextest");
    let log = Path::new(machine::CACHE).join("nextest-install.log");
    let output = fs::File::create(&log).map_or_else(|_| Stdio::null(), Stdio::from);
    let installed =
        Command::new("cargo").args(["install", "--quiet", "--locked", "cargo-nextest"]).stderr(output).status();
    installed.is_ok_and(|s| s.success()) && works()
}
