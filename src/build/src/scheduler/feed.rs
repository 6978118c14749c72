//! One build's news for everybody who waits for it, whenever they came.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use nix_compat::worker::stderr::{Field, Verbosity};
use parking_lot::Mutex;
use remote::Download;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

use super::session::{BuildActivity, Session, Transfer, activity_id};
use crate::failure::{Failure, render};
use crate::said::Said;

/// Log kept in memory for those who come later; what is older they find in the log file.
const MAX_HISTORY: usize = 4 << 20;
/// Downloads of one builder that are shown at the same time.
const MAX_TRANSFERS: usize = 64;

/// The watchers of a goal, and what they have been told.
#[derive(Default)]
pub(crate) struct Feed {
    state: Mutex<State>,
    joined: Notify,
}

#[derive(Default)]
struct State {
    watchers: Vec<Watcher>,
    /// Whether a build is needed, as far as known.
    expected: bool,
    run: Option<Run>,
    hook: Option<Hook>,
    ended: bool,
}

impl State {
    /// Ends the activities below the build's, whose id this gives; that one is still to be ended.
    fn end_run(&mut self) -> Option<u64> {
        let run = self.run.take()?;
        for watcher in &self.watchers {
            run.transfers.values().for_each(|(transfer, _)| watcher.session.transfer_ended(transfer.id));
        }
        Some(run.activity.id)
    }
}

struct Watcher {
    session: Arc<Session>,
    /// Whether the client asked for this goal itself: then the failure is part of its answer.
    asked: bool,
}

/// A build that has begun.
struct Run {
    activity: BuildActivity,
    history: History,
    phase: Option<String>,
    /// Its downloads, under its own numbers, each with how far it is.
    transfers: BTreeMap<u64, (Transfer, Option<[u64; 4]>)>,
}

/// A post-build hook that has begun.
struct Hook {
    activity: BuildActivity,
    history: History,
}

/// The last lines of an output, for those who come later.
#[derive(Default)]
struct History {
    lines: VecDeque<Box<[u8]>>,
    bytes: usize,
    dropped: u64,
}

impl History {
    fn push(&mut self, line: &[u8]) {
        self.bytes += line.len();
        self.lines.push_back(line.into());
        while self.bytes > MAX_HISTORY {
            let Some(oldest) = self.lines.pop_front() else { break };
            self.bytes -= oldest.len();
            self.dropped += 1;
        }
    }
}

impl Feed {
    /// Adds a watcher, who is told everything from the beginning. False when it watches already.
    pub(crate) fn attach(&self, session: &Arc<Session>, asked: bool) -> bool {
        let mut state = self.state.lock();
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
            if run.history.dropped > 0 {
                let text = format!("[{} earlier lines are in the log file]", run.history.dropped);
                session.build_line(id, text.as_bytes());
            }
            run.history.lines.iter().for_each(|line| session.build_line(id, line));
            if let Some(phase) = &run.phase {
                session.build_phase(id, phase);
            }
            for (transfer, progress) in run.transfers.values() {
                session.transfer_started(transfer);
                if let Some(numbers) = progress {
                    session.transfer_progress(transfer.id, *numbers);
                }
            }
        }
        if let Some(hook) = &state.hook {
            session.hook_started(&hook.activity);
            hook.history.lines.iter().for_each(|line| session.hook_line(hook.activity.id, line));
        }
        // Those who went away are noticed here, so their number stays in proportion to those who came.
        state.watchers.retain(|watcher| watcher.session.is_open());
        state.watchers.push(Watcher { session: session.clone(), asked });
        self.joined.notify_waiters();
        true
    }

    /// Waits for another watcher. To be enabled before the present ones are looked at.
    pub(crate) fn joined(&self) -> Notified<'_> {
        self.joined.notified()
    }

    /// The sessions that watch, and whether they asked for this goal themselves.
    pub(crate) fn watchers(&self) -> Vec<(Arc<Session>, bool)> {
        self.state.lock().watchers.iter().map(|watcher| (watcher.session.clone(), watcher.asked)).collect()
    }

    /// A build is needed.
    pub(crate) fn expect_build(&self) {
        let mut state = self.state.lock();
        if !std::mem::replace(&mut state.expected, true) {
            state.watchers.iter().for_each(|watcher| watcher.session.expect_build());
        }
    }

    /// The builder starts, on `machine` unless that is empty.
    pub(crate) fn started(&self, drv: String, text: String, machine: String) {
        let mut state = self.state.lock();
        let activity = BuildActivity { id: activity_id(), drv, text, machine };
        state.watchers.iter().for_each(|watcher| watcher.session.build_started(&activity));
        state.run = Some(Run { activity, history: History::default(), phase: None, transfers: BTreeMap::new() });
    }

    /// A line that the builder has written: log, or a message in the form of one. Says whether it is log.
    pub(crate) fn builder_line(&self, line: &[u8]) -> bool {
        match Said::of(line) {
            Said::Log => {}
            Said::Malformed(text) => self.note(&text),
            Said::Phase(phase) => {
                self.phase(phase);
                return false;
            }
            Said::Note(level, text) => {
                let state = self.state.lock();
                state.watchers.iter().for_each(|watcher| watcher.session.log_at(level, &text));
                return false;
            }
            Said::Download(news) => {
                self.download(news);
                return false;
            }
            Said::Nothing => return false,
        }
        self.line(line);
        true
    }

    /// What the builder says of one of its downloads.
    pub(crate) fn download(&self, news: Download) {
        match news {
            Download::Started { id, level, text, fields } => self.transfer_started(id, level, text, fields),
            Download::Progress(id, numbers) => self.transfer_progress(id, numbers),
            Download::Ended(id) => self.transfer_ended(id),
        }
    }

    fn transfer_started(&self, own: u64, level: Verbosity, text: String, fields: Vec<Field>) {
        let mut state = self.state.lock();
        let State { watchers, run: Some(run), .. } = &mut *state else { return };
        if run.transfers.len() == MAX_TRANSFERS || run.transfers.contains_key(&own) {
            return;
        }
        let transfer = Transfer { id: activity_id(), build: run.activity.id, level, text, fields };
        watchers.iter().for_each(|watcher| watcher.session.transfer_started(&transfer));
        run.transfers.insert(own, (transfer, None));
    }

    fn transfer_progress(&self, own: u64, numbers: [u64; 4]) {
        let mut state = self.state.lock();
        let State { watchers, run: Some(run), .. } = &mut *state else { return };
        let Some((transfer, progress)) = run.transfers.get_mut(&own) else { return };
        *progress = Some(numbers);
        watchers.iter().for_each(|watcher| watcher.session.transfer_progress(transfer.id, numbers));
    }

    fn transfer_ended(&self, own: u64) {
        let mut state = self.state.lock();
        let State { watchers, run: Some(run), .. } = &mut *state else { return };
        let Some((transfer, _)) = run.transfers.remove(&own) else { return };
        watchers.iter().for_each(|watcher| watcher.session.transfer_ended(transfer.id));
    }

    /// A line of the builder's log.
    pub(crate) fn line(&self, line: &[u8]) {
        let mut state = self.state.lock();
        let State { watchers, run: Some(run), .. } = &mut *state else { return };
        watchers.iter().for_each(|watcher| watcher.session.build_line(run.activity.id, line));
        run.history.push(line);
    }

    /// The post-build hook starts.
    pub(crate) fn hook_started(&self, drv: String, text: String) {
        let mut state = self.state.lock();
        let activity = BuildActivity { id: activity_id(), drv, text, machine: String::new() };
        state.watchers.iter().for_each(|watcher| watcher.session.hook_started(&activity));
        state.hook = Some(Hook { activity, history: History::default() });
    }

    /// A line of the post-build hook's output.
    pub(crate) fn hook_line(&self, line: &[u8]) {
        let mut state = self.state.lock();
        let State { watchers, hook: Some(hook), .. } = &mut *state else { return };
        watchers.iter().for_each(|watcher| watcher.session.hook_line(hook.activity.id, line));
        hook.history.push(line);
    }

    /// The post-build hook has ended.
    pub(crate) fn hook_ended(&self) {
        let mut state = self.state.lock();
        let Some(hook) = state.hook.take() else { return };
        state.watchers.iter().for_each(|watcher| watcher.session.hook_ended(hook.activity.id));
    }

    /// The builder says what it is doing.
    pub(crate) fn phase(&self, phase: String) {
        let mut state = self.state.lock();
        let State { watchers, run: Some(run), .. } = &mut *state else { return };
        watchers.iter().for_each(|watcher| watcher.session.build_phase(run.activity.id, &phase));
        run.phase = Some(phase);
    }

    /// The present phase of a running build.
    pub(crate) fn current_phase(&self) -> Option<String> {
        self.state.lock().run.as_ref()?.phase.clone()
    }

    /// The other machine that a running build is on.
    pub(crate) fn current_machine(&self) -> Option<String> {
        let state = self.state.lock();
        state.run.as_ref().map(|run| run.activity.machine.clone()).filter(|machine| !machine.is_empty())
    }

    /// A message to every watcher that is no line of the build's log.
    pub(crate) fn note(&self, text: &str) {
        self.state.lock().watchers.iter().for_each(|watcher| watcher.session.log(text.to_owned()));
    }

    /// What ran is lost, as this text says; it will be started anew.
    pub(crate) fn lost(&self, text: &str) {
        let mut state = self.state.lock();
        let activity = state.end_run();
        for Watcher { session, .. } in &state.watchers {
            activity.iter().for_each(|id| session.build_lost(*id));
            session.log(text.to_owned());
        }
    }

    /// The goal is done. Whoever did not ask for it learns of a failure in its log.
    pub(crate) fn ended(&self, failure: Option<&Failure>) {
        let mut state = self.state.lock();
        let activity = state.end_run();
        let counted = state.expected;
        for Watcher { session, asked } in state.watchers.drain(..) {
            if counted {
                session.build_ended(activity, failure.is_none());
            }
            if let Some(failure) = failure.filter(|failure| !asked && !failure.told) {
                session.log(render(&failure.message));
            }
        }
        state.ended = true;
    }
}
