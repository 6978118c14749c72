//! Watches a daemon's processes while something is built.

use std::fs;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use compat_tests::{Error, Result, memory};
use nix::unistd::{Pid, SysconfVar, sysconf};

/// How often they are looked at.
const EVERY: Duration = Duration::from_millis(30);

/// The most that was seen.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Peak {
    /// Memory in use by the daemon and what it forked, builders left out. Bytes.
    pub(crate) rss: u64,
    /// Processes with this in their command lines that have no ancestor like that.
    pub(crate) marked: usize,
}

/// A watch that is under way.
pub(crate) struct Watch {
    over: Arc<AtomicBool>,
    thread: JoinHandle<Peak>,
}

impl Watch {
    /// Begins to watch; counts different processes whose command lines are exactly `mark` besides.
    pub(crate) fn begin(daemon: Pid, mark: &'static [u8]) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&over);
        let thread = thread::spawn(move || {
            let mut peak = Peak::default();
            let own = namespace(daemon);
            let mut marked: Vec<Pid> = Vec::new();
            while !told.load(Ordering::Relaxed) {
                let mut rss = 0;
                for pid in tree(daemon) {
                    if namespace(pid) == own {
                        // One that has ended in between uses nothing.
                        rss += memory::rss(pid).unwrap_or(0);
                    } else if !mark.is_empty()
                        && !marked.contains(&pid)
                        && fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line == mark)
                    {
                        marked.push(pid);
                    }
                }
                peak.rss = peak.rss.max(rss);
                peak.marked = marked.len();
                thread::sleep(EVERY);
            }
            peak
        });
        Self { over, thread }
    }

    /// Ends it.
    pub(crate) fn end(self) -> Result<Peak> {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| Error::Wrong("watching a daemon panicked".into()))
    }
}

/// A process and all that descend from it.
pub(crate) fn tree(root: Pid) -> Vec<Pid> {
    let mut all = vec![root];
    let mut next = 0;
    while next < all.len() {
        all.extend(memory::children(all[next]));
        next += 1;
    }
    all
}

fn namespace(pid: Pid) -> Option<std::path::PathBuf> {
    fs::read_link(format!("/proc/{pid}/ns/pid")).ok()
}

/// CPU time of a daemon and of all its children that have ended and been waited for, builders included. Seconds.
pub(crate) fn cpu(daemon: Pid) -> f64 {
    // utime, stime, cutime, cstime: 12th to 15th after the command.
    times(&daemon.to_string(), 11..15)
}

/// CPU time of this process's own children that have ended and been waited for, as clients have. Seconds.
pub(crate) fn clients_cpu() -> f64 {
    times("self", 13..15)
}

/// The sum of fields of a process's `stat`, counted from the command's end. Seconds.
fn times(process: &str, fields: Range<usize>) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let all = stat.rsplit_once(") ").map(|(_, rest)| rest).unwrap_or_default().split(' ');
    let ticks: f64 = all.skip(fields.start).take(fields.len()).filter_map(|n| n.parse::<f64>().ok()).sum();
    let per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
    ticks / per_second as f64
}
