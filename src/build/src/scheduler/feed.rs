//! One build's news for everybody who waits for it, whenever they came.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;

use super::session::{BuildActivity, Session, activity_id};
use crate::failure::{Failure, render};

/// Log kept in memory for those who come later; what is older they find in the log file.
const MAX_HISTORY: usize = 4 << 20;

/// The watchers of a goal, and what they have been told.
#[derive(Default)]
pub(crate) struct Feed(Mutex<State>);

#[derive(Default)]
struct State {
    watchers: Vec<Watcher>,
    /// Whether a build is needed, as far as known.
    expected: bool,
    run: Option<Run>,
    ended: bool,
}

struct Watcher {
    session: Arc<Session>,
    /// Whether the client asked for this goal itself: then the failure is part of its answer.
    asked: bool,
}

/// A build that has begun.
struct Run {
    activity: BuildActivity,
    history: VecDeque<Box<[u8]>>,
    bytes: usize,
    dropped: u64,
    phase: Option<String>,
}

impl Feed {
    /// Adds a watcher, who is told everything from the beginning. False when it watches already.
    pub(crate) fn attach(&self, session: &Arc<Session>, asked: bool) -> bool {
        let mut state = self.0.lock();
        if let Some(known) = state.watchers.iter_mut().find(|w| Arc::ptr_eq(&w.session, session)) {
            known.asked |= asked;
            return false;
        }
        if state.ended {
            return true;
        }
        if state.expected {
            session.expect_build();
        }
        if let Some(run) = &state.run {
            let id = run.activity.id;
            session.build_started(&run.activity);
            if run.dropped > 0 {
                let text = format!("[{} earlier lines are in the log file]", run.dropped);
                session.build_line(id, text.as_bytes());
            }
            run.history.iter().for_each(|line| session.build_line(id, line));
            if let Some(phase) = &run.phase {
                session.build_phase(id, phase);
            }
        }
        // Those who went away are noticed here, so their number stays in proportion to those who came.
        state.watchers.retain(|watcher| watcher.session.is_open());
        state.watchers.push(Watcher { session: session.clone(), asked });
        true
    }

    /// The sessions that watch.
    pub(crate) fn watchers(&self) -> Vec<Arc<Session>> {
        self.0.lock().watchers.iter().map(|watcher| watcher.session.clone()).collect()
    }

    /// A build is needed.
    pub(crate) fn expect_build(&self) {
        let mut state = self.0.lock();
        if !std::mem::replace(&mut state.expected, true) {
            state.watchers.iter().for_each(|watcher| watcher.session.expect_build());
        }
    }

    /// The builder starts, on `machine` unless that is empty.
    pub(crate) fn started(&self, drv: String, text: String, machine: String) {
        let mut state = self.0.lock();
        let activity = BuildActivity { id: activity_id(), drv, text, machine };
        state.watchers.iter().for_each(|watcher| watcher.session.build_started(&activity));
        state.run = Some(Run { activity, history: VecDeque::new(), bytes: 0, dropped: 0, phase: None });
    }

    /// A line of the builder's log.
    pub(crate) fn line(&self, line: &[u8]) {
        let mut state = self.0.lock();
        let State { watchers, run: Some(run), .. } = &mut *state else { return };
        watchers.iter().for_each(|watcher| watcher.session.build_line(run.activity.id, line));
        run.bytes += line.len();
        run.history.push_back(line.into());
        while run.bytes > MAX_HISTORY {
            let Some(oldest) = run.history.pop_front() else { break };
            run.bytes -= oldest.len();
            run.dropped += 1;
        }
    }

    /// The builder says what it is doing.
    pub(crate) fn phase(&self, phase: String) {
        let mut state = self.0.lock();
        let State { watchers, run: Some(run), .. } = &mut *state else { return };
        watchers.iter().for_each(|watcher| watcher.session.build_phase(run.activity.id, &phase));
        run.phase = Some(phase);
    }

    /// The present phase of a running build.
    pub(crate) fn current_phase(&self) -> Option<String> {
        self.0.lock().run.as_ref()?.phase.clone()
    }

    /// The other machine that a running build is on.
    pub(crate) fn current_machine(&self) -> Option<String> {
        let state = self.0.lock();
        state.run.as_ref().map(|run| run.activity.machine.clone()).filter(|machine| !machine.is_empty())
    }

    /// A message to every watcher that is no line of the build's log.
    pub(crate) fn note(&self, text: &str) {
        self.0.lock().watchers.iter().for_each(|watcher| watcher.session.log(text.to_owned()));
    }

    /// The goal is done. Whoever did not ask for it learns of a failure in its log.
    pub(crate) fn ended(&self, failure: Option<&Failure>) {
        let mut state = self.0.lock();
        let activity = state.run.take().map(|run| run.activity.id);
        let counted = state.expected;
        for Watcher { session, asked } in state.watchers.drain(..) {
            if counted {
                session.build_ended(activity, failure.is_none());
            }
            if let Some(failure) = failure.filter(|_| !asked) {
                session.log(render(&failure.message));
            }
        }
        state.ended = true;
    }
}
