//! What one request shows its client: the activities that progress bars are made of.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix_compat::conf::Settings;
use nix_compat::machines::{self, Machine};
use nix_compat::store_path::StorePath;
use nix_compat::worker::stderr::{ActivityKind, Field, Message, ResultKind, Verbosity};
use parking_lot::Mutex;
use store::TempRoots;
use substitute::Copying;
use tokio::sync::{OnceCell, Semaphore};
use tokio_util::sync::CancellationToken;

use super::goal::blocking;
use super::substitution::ToSession;
use crate::failure::Failure;
use crate::options::Options;
use crate::recursive::Gate;

/// Where a client's messages go. Each implementation is a connection's own bounded queue.
pub trait Events: Send + Sync {
    /// Takes a message; never blocks.
    fn emit(&self, message: Message);

    /// Takes a line of log, if the client wants to see what is of this importance; never blocks.
    fn log(&self, level: Verbosity, line: &str);
}

/// A number for an activity, unlike any other of this daemon and, as far as clients merge them, of others.
pub fn activity_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    (u64::from(std::process::id()) << 32) + NEXT.fetch_add(1, Ordering::Relaxed)
}

/// One request and the client behind it.
///
/// Clients abort on news of an activity they have not been told of, so everything passes through here: what is open is
/// known, and once the request is answered nothing is sent any more.
pub(crate) struct Session {
    events: Arc<dyn Events>,
    pub(crate) temp_roots: Arc<TempRoots>,
    pub(crate) options: Arc<Options>,
    /// What may be fetched for it, and from where.
    pub(crate) substitution: substitute::Client,
    /// Builds at the same time that the client allows.
    pub(crate) jobs: Arc<Semaphore>,
    /// The machines its settings name, once somebody wanted to know.
    pub(crate) machines: OnceCell<Result<Arc<[Machine]>, machines::Error>>,
    /// The settings the options were taken from.
    pub(crate) settings: Arc<Settings>,
    /// What the running build may see that the client is part of.
    pub(crate) gate: Option<Arc<Gate>>,
    /// The client waits for a goal that waits for the client.
    entangled: CancellationToken,
    state: Mutex<State>,
}

struct State {
    open: bool,
    realise: u64,
    copies: u64,
    builds: u64,
    /// Activities of running builds.
    running: BTreeSet<u64>,
    /// Activities of post-build hooks.
    hooks: BTreeSet<u64>,
    /// Activities of downloads that builders make.
    transfers: BTreeSet<u64>,
    done: u64,
    expected: u64,
    failed: u64,
    copying: Copies,
}

/// Paths that are fetched, in numbers and as activities.
#[derive(Default)]
struct Copies {
    done: u64,
    expected: u64,
    failed: u64,
    /// Bytes to download, and of NAR: done and still expected together.
    download: u64,
    nar: u64,
    /// The activities of each that runs, the outermost first.
    running: BTreeMap<u64, [u64; 3]>,
}

/// A running build or its hook, as its watchers are told of it.
#[derive(Clone, Debug)]
pub(crate) struct BuildActivity {
    pub(crate) id: u64,
    pub(crate) drv: String,
    pub(crate) text: String,
    /// The other machine that it runs on; empty for this one.
    pub(crate) machine: String,
}

/// A download that a builder makes, as the build's watchers are told of it.
#[derive(Clone, Debug)]
pub(crate) struct Transfer {
    pub(crate) id: u64,
    /// The activity of the build.
    pub(crate) build: u64,
    pub(crate) level: Verbosity,
    pub(crate) text: String,
    pub(crate) fields: Vec<Field>,
}

impl Session {
    /// Tells the client that its request has begun.
    pub(crate) fn open(
        events: Arc<dyn Events>,
        temp_roots: Arc<TempRoots>,
        options: Arc<Options>,
        settings: Arc<Settings>,
        gate: Option<Arc<Gate>>,
    ) -> Arc<Self> {
        let state = State {
            open: true,
            realise: activity_id(),
            copies: activity_id(),
            builds: activity_id(),
            running: BTreeSet::new(),
            hooks: BTreeSet::new(),
            transfers: BTreeSet::new(),
            done: 0,
            expected: 0,
            failed: 0,
            copying: Copies::default(),
        };
        for (id, kind) in [
            (state.realise, ActivityKind::Realise),
            (state.builds, ActivityKind::Builds),
            (state.copies, ActivityKind::CopyPaths),
        ] {
            events.emit(Message::StartActivity {
                id,
                level: Verbosity::Error,
                kind,
                text: Vec::new(),
                fields: Vec::new(),
                parent: 0,
            });
        }
        let no_progress = || vec![Field::Int(0); 4];
        events.emit(result(state.builds, ResultKind::Progress, no_progress()));
        events.emit(result(state.copies, ResultKind::Progress, no_progress()));
        for kind in [ActivityKind::FileTransfer, ActivityKind::CopyPath] {
            let fields = vec![Field::Int(kind.code()), Field::Int(0)];
            events.emit(result(state.realise, ResultKind::SetExpected, fields));
        }
        let jobs = Arc::new(Semaphore::new(options.max_jobs.clamp(1, Semaphore::MAX_PERMITS)));
        Arc::new_cyclic(|session| {
            let watch = Arc::new(ToSession(session.clone()));
            Self {
                events,
                substitution: substitute::Client::new(settings.clone(), temp_roots.clone(), watch),
                temp_roots,
                options,
                jobs,
                machines: OnceCell::new(),
                settings,
                gate,
                entangled: CancellationToken::new(),
                state: Mutex::new(state),
            }
        })
    }

    /// Notes that the client will watch the goal of a derivation. If that is being built around the client, it would
    /// wait for itself.
    pub(crate) fn will_watch(&self, drv: &StorePath) {
        if self.enclosing().contains(drv) {
            self.entangle();
        }
    }

    /// Notes that the client waits for itself.
    pub(crate) fn entangle(&self) {
        self.entangled.cancel();
    }

    /// Waits for the client to wait for itself.
    pub(crate) async fn entangled(&self) {
        self.entangled.cancelled().await;
    }

    /// What such a client is told.
    pub(crate) fn entangled_failure(&self, wanted: &str) -> Failure {
        Failure::misc(format!("cannot build '{wanted}' within a build that it needs itself"))
    }

    /// Lets the running build that the client is part of see a derivation that it has had built, before that is built in
    /// turn: it must not name what the build may not see.
    pub(crate) async fn let_see(&self, drv: &StorePath) -> Result<(), Failure> {
        let Some(gate) = self.gate.clone() else { return Ok(()) };
        let paths = [drv.clone()].into();
        blocking(move || gate.admit_built(&paths).map_err(Failure::misc)).await
    }

    /// The derivations that are being built around the client.
    pub(crate) fn enclosing(&self) -> &[StorePath] {
        self.gate.as_ref().map_or(&[], |gate| gate.enclosing())
    }

    /// Ends everything that is still open. Nothing is sent afterwards.
    pub(crate) fn close(&self) {
        let mut state = self.state.lock();
        if !std::mem::replace(&mut state.open, false) {
            return;
        }
        let (running, hooks) = (std::mem::take(&mut state.running), std::mem::take(&mut state.hooks));
        for activities in std::mem::take(&mut state.copying.running).into_values() {
            activities.iter().rev().for_each(|id| self.events.emit(Message::StopActivity(*id)));
        }
        let transfers = std::mem::take(&mut state.transfers);
        for id in transfers.into_iter().chain(hooks).chain(running).chain([state.copies, state.builds, state.realise]) {
            self.events.emit(Message::StopActivity(id));
        }
    }

    pub(crate) fn is_open(&self) -> bool {
        self.state.lock().open
    }

    /// Another build will be needed.
    pub(crate) fn expect_build(&self) {
        self.change(|state| state.expected += 1);
    }

    pub(crate) fn build_started(&self, build: &BuildActivity) {
        let mut state = self.state.lock();
        if !state.open || !state.running.insert(build.id) {
            return;
        }
        self.events.emit(Message::StartActivity {
            id: build.id,
            level: Verbosity::Info,
            kind: ActivityKind::Build,
            text: build.text.clone().into_bytes(),
            fields: vec![
                Field::Text(build.drv.clone().into_bytes()),
                Field::Text(build.machine.clone().into_bytes()),
                Field::Int(1),
                Field::Int(1),
            ],
            parent: 0,
        });
        self.emit_progress(&state);
    }

    pub(crate) fn build_line(&self, id: u64, line: &[u8]) {
        self.tell(id, ResultKind::BuildLogLine, line);
    }

    pub(crate) fn build_phase(&self, id: u64, phase: &str) {
        self.tell(id, ResultKind::SetPhase, phase.as_bytes());
    }

    pub(crate) fn hook_started(&self, hook: &BuildActivity) {
        let mut state = self.state.lock();
        if state.open && state.hooks.insert(hook.id) {
            self.events.emit(Message::StartActivity {
                id: hook.id,
                level: Verbosity::Talkative,
                kind: ActivityKind::PostBuildHook,
                text: hook.text.clone().into_bytes(),
                fields: vec![Field::Text(hook.drv.clone().into_bytes())],
                parent: 0,
            });
        }
    }

    pub(crate) fn hook_line(&self, id: u64, line: &[u8]) {
        self.tell(id, ResultKind::PostBuildLogLine, line);
    }

    pub(crate) fn hook_ended(&self, id: u64) {
        let mut state = self.state.lock();
        if state.open && state.hooks.remove(&id) {
            self.events.emit(Message::StopActivity(id));
        }
    }

    pub(crate) fn transfer_started(&self, transfer: &Transfer) {
        let mut state = self.state.lock();
        if state.open && state.running.contains(&transfer.build) && state.transfers.insert(transfer.id) {
            self.events.emit(Message::StartActivity {
                id: transfer.id,
                level: transfer.level,
                kind: ActivityKind::FileTransfer,
                text: transfer.text.clone().into_bytes(),
                fields: transfer.fields.clone(),
                parent: transfer.build,
            });
        }
    }

    pub(crate) fn transfer_progress(&self, id: u64, numbers: [u64; 4]) {
        let state = self.state.lock();
        if state.transfers.contains(&id) {
            self.events.emit(result(id, ResultKind::Progress, numbers.map(Field::Int).to_vec()));
        }
    }

    pub(crate) fn transfer_ended(&self, id: u64) {
        let mut state = self.state.lock();
        if state.transfers.remove(&id) {
            self.events.emit(Message::StopActivity(id));
        }
    }

    fn tell(&self, id: u64, kind: ResultKind, text: &[u8]) {
        let state = self.state.lock();
        if state.open && (state.running.contains(&id) || state.hooks.contains(&id)) {
            self.events.emit(result(id, kind, vec![Field::Text(text.to_vec())]));
        }
    }

    /// What the build's activity was about is lost; there will be another one.
    pub(crate) fn build_lost(&self, id: u64) {
        self.change(|state| {
            if state.running.remove(&id) {
                self.events.emit(Message::StopActivity(id));
            }
        });
    }

    /// A build whose activity has the id `started` is over; without one, a build that never began.
    pub(crate) fn build_ended(&self, started: Option<u64>, success: bool) {
        self.change(|state| {
            if let Some(id) = started.filter(|id| state.running.remove(id)) {
                self.events.emit(Message::StopActivity(id));
            }
            if success {
                state.done += 1;
            } else {
                state.failed += 1;
            }
        });
    }

    /// More paths will be fetched: bytes to download, bytes of NAR.
    pub(crate) fn expect_copies(&self, paths: u64, download: u64, nar: u64) {
        self.change_copies(|copies| {
            copies.expected = copies.expected.saturating_add(paths);
            copies.download = copies.download.saturating_add(download);
            copies.nar = copies.nar.saturating_add(nar);
        });
    }

    /// One of them is valid, or will not be.
    pub(crate) fn copy_done(&self, success: bool, download: u64, nar: u64) {
        self.change_copies(|copies| {
            copies.expected = copies.expected.saturating_sub(1);
            if success {
                copies.done += 1;
            } else {
                copies.failed += 1;
                copies.download = copies.download.saturating_sub(download);
                copies.nar = copies.nar.saturating_sub(nar);
            }
        });
    }

    pub(crate) fn copy_started(&self, copying: &Copying) {
        let mut state = self.state.lock();
        if !state.open {
            return;
        }
        let ids = [activity_id(), activity_id(), activity_id()];
        state.copying.running.insert(copying.number, ids);
        let text = |text: &str| Field::Text(text.as_bytes().to_vec());
        let Copying { path, source, file, .. } = copying;
        let copy = format!("copying path '{path}' from '{source}'");
        let fields = [vec![text(path), text(source)], vec![text(path), text(source), text("local")], vec![text(file)]];
        let texts = [String::new(), copy, format!("downloading '{file}'")];
        let kinds = [
            (ActivityKind::Substitute, Verbosity::Error),
            (ActivityKind::CopyPath, Verbosity::Info),
            (ActivityKind::FileTransfer, Verbosity::Talkative),
        ];
        let parents = [0, ids[0], ids[1]];
        for ((((id, (kind, level)), fields), text), parent) in
            ids.into_iter().zip(kinds).zip(fields).zip(texts).zip(parents)
        {
            let text = text.into_bytes();
            self.events.emit(Message::StartActivity { id, level, kind, text, fields, parent });
        }
        self.emit_copies(&state);
    }

    pub(crate) fn copy_progress(&self, copying: &Copying, file: u64, of_file: u64, nar: u64) {
        let state = self.state.lock();
        let Some([_, copy, transfer]) = state.copying.running.get(&copying.number) else { return };
        for (id, done, expected) in [(*copy, nar, copying.nar_size), (*transfer, file, of_file)] {
            self.events.emit(result(id, ResultKind::Progress, [done, expected, 0, 0].map(Field::Int).to_vec()));
        }
    }

    pub(crate) fn copy_ended(&self, copying: &Copying) {
        let mut state = self.state.lock();
        if let Some(ids) = state.copying.running.remove(&copying.number) {
            ids.iter().rev().for_each(|id| self.events.emit(Message::StopActivity(*id)));
            self.emit_copies(&state);
        }
    }

    fn change_copies(&self, change: impl FnOnce(&mut Copies)) {
        let mut state = self.state.lock();
        if state.open {
            change(&mut state.copying);
            self.emit_copies(&state);
        }
    }

    fn emit_copies(&self, state: &State) {
        let copies = &state.copying;
        let numbers = [copies.done, copies.done + copies.expected, copies.running.len() as u64, copies.failed];
        self.events.emit(result(state.copies, ResultKind::Progress, numbers.map(Field::Int).to_vec()));
        for (kind, bytes) in [(ActivityKind::FileTransfer, copies.download), (ActivityKind::CopyPath, copies.nar)] {
            let fields = vec![Field::Int(kind.code()), Field::Int(bytes)];
            self.events.emit(result(state.realise, ResultKind::SetExpected, fields));
        }
    }

    /// A line of log that belongs to no build.
    pub(crate) fn log(&self, text: String) {
        if self.state.lock().open {
            self.events.emit(Message::Next(text.into_bytes()));
        }
    }

    /// The same, of this importance: not all clients want to see all.
    pub(crate) fn log_at(&self, level: Verbosity, line: &str) {
        let state = self.state.lock();
        if state.open {
            self.events.log(level, line);
        }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state.lock();
        if state.open {
            change(&mut state);
            self.emit_progress(&state);
        }
    }

    fn emit_progress(&self, state: &State) {
        let numbers = [state.done, state.expected, state.running.len() as u64, state.failed];
        self.events.emit(result(state.builds, ResultKind::Progress, numbers.map(Field::Int).to_vec()));
    }
}

fn result(id: u64, kind: ResultKind, fields: Vec<Field>) -> Message {
    Message::Result { id, kind, fields }
}
