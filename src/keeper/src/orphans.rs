//! What a dead server left running.

use std::fs;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// How long processes that are killed may take to die before something is thought to hold them.
const PATIENCE: Duration = Duration::from_millis(50);
const STEP: Duration = Duration::from_millis(1);
/// SIGKILL, in a set of signals.
const KILLED: u64 = 1 << 8;

/// Kills all children of this process, which has become the parent of whatever a dead server had started, and the children
/// that become ours by that. Answers the threads of those that do not die: they may be waiting for the mount, that is for the
/// next server.
///
/// Those in `spared` were there before any server.
pub(crate) fn kill_all(spared: &[Pid]) -> Vec<u32> {
    let until = Instant::now() + PATIENCE;
    loop {
        reap();
        let mut alive = children();
        alive.retain(|pid| !spared.contains(pid));
        if alive.is_empty() {
            return Vec::new();
        }
        for pid in &alive {
            // It may have ended by itself.
            let _ = kill(*pid, Signal::SIGKILL);
        }
        if Instant::now() > until {
            return alive.into_iter().flat_map(dying).collect();
        }
        std::thread::sleep(STEP);
    }
}

/// Threads of a process that have been killed and are still there.
pub(crate) fn dying(pid: Pid) -> Vec<u32> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let killed = threads.filter(|thread| {
        let status = fs::read_to_string(thread.path().join("status")).unwrap_or_default();
        let pending = status.lines().find_map(|line| line.strip_prefix("SigPnd:"));
        pending.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).is_some_and(|set| set & KILLED != 0)
    });
    killed.filter_map(|thread| thread.file_name().to_str()?.parse().ok()).collect()
}

/// Takes leave of all children that have ended.
fn reap() {
    while matches!(
        waitpid(None, Some(WaitPidFlag::WNOHANG)),
        Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..) | WaitStatus::Stopped(..))
    ) {}
}

/// Children of this process that run or have not been taken leave of.
pub(crate) fn children() -> Vec<Pid> {
    let list = fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
    list.split_whitespace().filter_map(|pid| pid.parse().ok()).map(Pid::from_raw).collect()
}
