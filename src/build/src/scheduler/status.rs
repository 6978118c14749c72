//! What is being built right now.

use std::collections::BTreeMap;
use std::sync::Arc;

use nix_compat::store_path::StorePath;
use parking_lot::Mutex;

use super::graph::{Goal, GoalKey, Graph};

/// A goal that is not done, for people to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunningBuild {
    /// The derivation.
    pub drv: StorePath,
    /// When its builder started, in seconds since 1970; `None` while it waits.
    pub started: Option<u64>,
    /// The phase its builder last announced.
    pub phase: Option<String>,
    /// The other machine it runs on.
    pub machine: Option<String>,
    /// Requests and other goals that want it.
    pub interests: usize,
    /// Goals it waits for.
    pub waits_for: Vec<StorePath>,
}

/// The builds whose builder has been started.
#[derive(Default)]
pub(crate) struct Running(Mutex<BTreeMap<GoalKey, u64>>);

/// One of them; dropped at its end.
pub(crate) struct Entered {
    running: Arc<Running>,
    key: GoalKey,
}

impl Running {
    pub(crate) fn enter(self: &Arc<Self>, goal: &Goal, now: u64) -> Entered {
        let key = goal.key.clone();
        self.0.lock().insert(key.clone(), now);
        Entered { running: self.clone(), key }
    }

    pub(crate) fn status(&self, graph: &Graph) -> Vec<RunningBuild> {
        let started = self.0.lock().clone();
        let mut builds: Vec<RunningBuild> = graph
            .goals()
            .into_iter()
            .map(|(goal, interests)| RunningBuild {
                drv: goal.key.drv.clone(),
                started: started.get(&goal.key).copied(),
                phase: goal.feed.current_phase(),
                machine: goal.feed.current_machine(),
                interests,
                waits_for: goal.needs(),
            })
            .collect();
        builds.sort_by(|a, b| a.drv.cmp(&b.drv));
        builds
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.running.0.lock().remove(&self.key);
    }
}
