//! Packing contents more densely while nobody needs the machine: what OptimiseStore does, without being asked.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ::daemon::Daemon;
use build::Scheduler;
use store::Store;
use tokio::sync::watch::Receiver;

/// How often to look whether anybody is here, unless the machine has to be idle for less.
const INTERVAL: Duration = Duration::from_secs(10);
/// The machine is idle when its processors are, for so many hundredths of the time between two looks.
const IDLE_HUNDREDTHS: u64 = 60;

/// Optimises the store of an idle daemon.
pub(crate) struct Idle {
    pub(crate) daemon: Arc<Daemon>,
    pub(crate) scheduler: Arc<Scheduler>,
    pub(crate) store: Arc<Store>,
    /// Nobody has to have been here for so long.
    pub(crate) after: Duration,
}

impl Idle {
    /// Goes on until `stopped`.
    pub(crate) async fn run(self, mut stopped: Receiver<bool>) {
        let idle = Arc::new(self);
        let (mut since, mut visits, mut done_at) = (Instant::now(), idle.daemon.visits(), None);
        let mut processors = Processors::now();
        loop {
            tokio::select! {
                // An error means that the sender is gone, which is a stop as well.
                _ = stopped.wait_for(|stopped| *stopped) => return,
                () = tokio::time::sleep(INTERVAL.min(idle.after)) => {}
            }
            let before = std::mem::replace(&mut processors, Processors::now());
            if !idle.is_alone(&mut visits) || processors.were_busy(before) {
                since = Instant::now();
                continue;
            }
            let stored = Some(idle.store.engine().stats().stored_bytes);
            // Once is enough until something is added or removed.
            if since.elapsed() < idle.after || stored == done_at {
                continue;
            }
            let (working, stopping, seen) = (idle.clone(), stopped.clone(), visits);
            let whole = tokio::task::spawn_blocking(move || working.optimise(seen, &stopping)).await;
            done_at = whole.unwrap_or(false).then(|| idle.store.engine().stats().stored_bytes);
            processors = Processors::now();
        }
    }

    /// Whether there is no client and no build, and there was no client since the last look.
    fn is_alone(&self, visits: &mut u64) -> bool {
        let before = std::mem::replace(visits, self.daemon.visits());
        before == *visits && self.daemon.clients().is_empty() && self.scheduler.status().is_empty()
    }

    /// Packs until somebody comes. Whether it came to the end.
    fn optimise(&self, mut visits: u64, stopping: &Receiver<bool>) -> bool {
        let mut whole = true;
        let done = self.store.optimise(&mut |_| {
            whole = self.is_alone(&mut visits) && !*stopping.borrow();
            if whole { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        });
        match done {
            Ok(done) if done.moved_objects > 0 => {
                tracing::info!(saved_bytes = done.saved_bytes(), "packed contents more densely, since nobody was here");
            }
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "cannot pack contents more densely");
            }
        }
        whole
    }
}

/// The processors' time since the machine started, in ticks: all of it, and what no program used, or one that lets others
/// go first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Processors {
    all: u64,
    idle: u64,
}

impl Processors {
    /// Where that cannot be read, the machine seems idle.
    fn now() -> Self {
        Self::of(&std::fs::read_to_string("/proc/stat").unwrap_or_default())
    }

    /// `user nice system idle iowait irq softirq steal`, and guests, which are in the first two (proc_stat(5)).
    fn of(stat: &str) -> Self {
        let first = stat.lines().next().unwrap_or_default();
        let ticks: Vec<u64> = first.split_whitespace().skip(1).take(8).filter_map(|ticks| ticks.parse().ok()).collect();
        match ticks[..] {
            [_, nice, _, idle, ..] => Self { all: ticks.iter().sum(), idle: nice + idle },
            _ => Self::default(),
        }
    }

    /// Whether they were busy between `before` and this.
    fn were_busy(self, before: Self) -> bool {
        let [all, idle] = [self.all.saturating_sub(before.all), self.idle.saturating_sub(before.idle)];
        idle * 100 < all * IDLE_HUNDREDTHS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_busy_when_its_processors_were() {
        let before = Processors::of("cpu  100 10 50 1000 5 0 1 0 0 0\ncpu0 1 2 3 4\n");
        assert_eq!(before, Processors { all: 1166, idle: 1010 });
        let busy = Processors::of("cpu  300 10 50 1100 5 0 1 0 0 0\n");
        let nice = Processors::of("cpu  110 210 50 1100 5 0 1 0 0 0\n");
        assert!(busy.were_busy(before) && !nice.were_busy(before) && !before.were_busy(before));
        assert_eq!(Processors::of("what"), Processors::default());
    }
}
