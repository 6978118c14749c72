//! Runs tests, some at a time. Each has a pid namespace of its own, so that no daemon and no builder outlives it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::fchown;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use super::cases::Case;
use super::setting::Setting;
use crate::error::{Context, Result};
use crate::room::USER;

/// How long a test may take.
const LIMIT: Duration = Duration::from_secs(180);
/// What the suite prints after the reason for skipping a test.
const SKIPPING: &str = ", skipping this test...";

/// How a test ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    Passed,
    /// The suite does not want to run it, for this reason.
    Skipped(String),
    Failed,
    TimedOut,
}

impl Verdict {
    /// For a line of progress.
    pub(crate) fn word(&self) -> &'static str {
        match self {
            Self::Passed => "pass",
            Self::Skipped(_) => "skip",
            Self::Failed => "fail",
            Self::TimedOut => "timeout",
        }
    }

    /// For a sentence about the test.
    pub(crate) fn phrase(&self) -> String {
        match self {
            Self::Passed => "it passes".into(),
            Self::Skipped(reason) => format!("it is skipped ({reason})"),
            Self::Failed => "it fails".into(),
            Self::TimedOut => format!("it takes more than {LIMIT:?}"),
        }
    }
}

/// What a test did.
#[derive(Debug, Clone)]
pub(crate) struct Outcome {
    pub(crate) verdict: Verdict,
    pub(crate) seconds: f64,
}

/// Runs the tests, so many at a time, and tells of each when it is over.
pub(crate) fn run(
    setting: &Setting,
    logs: &Path,
    cases: &[Case],
    jobs: usize,
    tell: &mut dyn FnMut(&Case, &Outcome),
) -> Result<BTreeMap<String, Outcome>> {
    let next = Mutex::new(cases.iter());
    let (done, results) = mpsc::channel();
    thread::scope(|scope| {
        for _ in 0..jobs {
            let (done, next) = (done.clone(), &next);
            scope.spawn(move || {
                loop {
                    let case = next.lock().map(|mut cases| cases.next()).ok().flatten();
                    let Some(case) = case else { return };
                    if done.send((case, run_one(setting, logs, case))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(done);
        let mut outcomes = BTreeMap::new();
        for (case, outcome) in results {
            let outcome = outcome?;
            tell(case, &outcome);
            outcomes.insert(case.name(), outcome);
        }
        Ok(outcomes)
    })
}

fn run_one(setting: &Setting, logs: &Path, case: &Case) -> Result<Outcome> {
    let log = case.log(logs);
    let file = File::create(&log).doing("creating", &log)?;
    // Tests open /dev/stderr.
    fchown(&file, Some(USER.id), Some(USER.id)).doing("giving away", &log)?;
    let copy = file.try_clone().doing("opening", &log)?;
    let started = Instant::now();
    if let Some(script) = setting.layout.prepare {
        let mut command = in_namespace(setting, case);
        command.args(["bash", "-x", "-e", script]).current_dir(setting.tests()).env_remove("NIX_DAEMON_PACKAGE");
        let [out, err] = [file.try_clone(), file.try_clone()].map(|file| file.doing("opening", &log));
        let status = command.stdin(Stdio::null()).stdout(out?).stderr(err?).status().doing("starting", "unshare")?;
        if !status.success() {
            return Ok(Outcome { verdict: Verdict::Failed, seconds: started.elapsed().as_secs_f64() });
        }
    }
    let mut command = in_namespace(setting, case);
    command.args(["bash", "-x"]).args(setting.layout.shell_options).arg(format!("{}.sh", case.test));
    command.current_dir(setting.tests().join(&case.directory));
    command.stdin(Stdio::null()).stdout(copy).stderr(file);
    let mut child = command.spawn().doing("starting", "unshare")?;
    let status = loop {
        if let Some(status) = child.try_wait().doing("waiting for", "a test")? {
            break Some(status);
        }
        if started.elapsed() > LIMIT {
            child.kill().doing("ending", "a test")?;
            child.wait().doing("waiting for", "a test")?;
            break None;
        }
        thread::sleep(Duration::from_millis(10));
    };
    let seconds = started.elapsed().as_secs_f64();
    let root = setting.temporary().join("nix-test").join(case.name());
    // What a process that was just killed still holds does not matter: the room is removed in the end.
    let _ = fs::remove_dir_all(&root);
    let verdict = match status.map(|s| s.code()) {
        None => Verdict::TimedOut,
        Some(Some(0)) => Verdict::Passed,
        Some(Some(code)) if code == setting.layout.skipped => Verdict::Skipped(why_skipped(&log)),
        Some(_) => Verdict::Failed,
    };
    Ok(Outcome { verdict, seconds })
}

/// A command in a pid namespace of its own, as the user who runs the tests.
fn in_namespace(setting: &Setting, case: &Case) -> Command {
    let id = USER.id.to_string();
    let mut command = setting.command("unshare", &case.suite, &case.test);
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc", "--"]);
    command.args(["setpriv", "--reuid", &id, "--regid", &id, "--clear-groups", "--"]);
    command
}

/// The reason that a skipped test gave. The log has the shell's trace as well, whose lines begin with `+`.
fn why_skipped(log: &Path) -> String {
    let bytes = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let line = text.lines().rev().find(|line| line.ends_with(SKIPPING) && !line.starts_with('+'));
    line.and_then(|line| line.strip_suffix(SKIPPING)).unwrap_or("no reason given").to_owned()
}
