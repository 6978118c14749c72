//! One build, from its inputs to its registered outputs, on a thread of its own.
//!
//! The thread is where the log passes through, the outputs are hashed and the directories removed, all of which block.
//! Whoever started it can end it at any moment through its [`Control`].

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, PipeReader, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix_compat::conf::Settings;
use nix_compat::derivation::{BasicDerivation, OutputName};
use nix_compat::store_path::{StorePath, scratch_path};
use nix_compat::worker::{BuildMode, BuildStatus};
use parking_lot::Mutex;
use store::{Store, TempRoots};

use crate::attributes::Attributes;
use crate::builtin::{Builtin, Task};
use crate::cgroup::Cgroup;
use crate::environment::{Environment, Surroundings};
use crate::failure::Failure;
use crate::graphs::{self, Exported};
use crate::helper::{Helper, Killer, Window};
use crate::log::{LineSplitter, LogFile, Tail};
use crate::options::Options;
use crate::output::Finished;
use crate::place::Place;
use crate::recursive::{self, Opening, RecursiveStore, Served, Socket};
use crate::room::{Room, own_builds_dir};
use crate::sandbox::{Executable, Program, Raw, Report, Spec};
use crate::scheduler::feed::Feed;
use crate::scheduler::plan::PlannedOutput;
use crate::users::UserLease;

/// Bytes of log read at once.
const LOG_PIECE: usize = 64 * 1024;

/// How long after the helper's end the log is still read. Its processes are gone by then, except when the helper was
/// killed or told to kill them: then this is the time the kernel has for it.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// So many inputs are looked up while the build is prepared; fewer are not worth a thread.
const MANY_INPUTS: usize = 64;

/// Systems whose programs run on machines with 64 bits, and expect not to notice.
const PLATFORMS_32: [&[u8]; 4] = [b"i686-linux", b"armv7l-linux", b"armv6l-linux", b"armv5tel-linux"];

/// Everything one build needs to know.
pub(crate) struct Job {
    pub(crate) store: Arc<Store>,
    pub(crate) config: Arc<crate::BuildConfig>,
    pub(crate) options: Arc<Options>,
    pub(crate) drv_path: StorePath,
    pub(crate) drv: Arc<BasicDerivation>,
    pub(crate) outputs: BTreeMap<OutputName, PlannedOutput>,
    /// Store paths it builds upon; their closure is what the builder sees.
    pub(crate) inputs: BTreeSet<StorePath>,
    pub(crate) mode: BuildMode,
    pub(crate) user: UserLease,
    /// What it needs to use the store itself, if it may.
    pub(crate) recursion: Option<Recursion>,
}

/// What a build needs to use the store while it runs.
pub(crate) struct Recursion {
    pub(crate) store: Arc<dyn RecursiveStore>,
    /// The settings of the client that wants it.
    pub(crate) settings: Arc<Settings>,
    /// The derivations that are being built around it.
    pub(crate) enclosing: Vec<StorePath>,
}

/// Processor time of a build, in microseconds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct CpuTime {
    pub(crate) user: u64,
    pub(crate) system: u64,
}

/// A build that succeeded.
#[derive(Clone, Debug, Default)]
pub(crate) struct Done {
    pub(crate) cpu: CpuTime,
    /// The valid paths of its outputs.
    pub(crate) outputs: BTreeMap<OutputName, StorePath>,
}

/// Ends a running build from outside.
#[derive(Debug, Default)]
pub(crate) struct Control {
    cancelled: AtomicBool,
    killer: Mutex<Option<Killer>>,
}

impl Control {
    /// Ends the build: its processes are killed, its outputs not registered.
    pub(crate) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
        if let Some(killer) = &*self.killer.lock() {
            killer.kill();
        }
    }

    fn arm(&self, killer: Killer) {
        let mut place = self.killer.lock();
        if self.cancelled.load(Ordering::Relaxed) {
            killer.kill();
        }
        *place = Some(killer);
    }

    pub(crate) fn check(&self) -> Result<(), Failure> {
        if self.cancelled.load(Ordering::Relaxed) { Err(Failure::cancelled()) } else { Ok(()) }
    }
}

/// Why the daemon itself ended a builder.
enum Killed {
    TimedOut(Duration),
    LogTooLong(u64),
}

impl Job {
    /// Builds. Blocks until every process of the build is gone and its directories are removed.
    pub(crate) fn run(self, control: &Control, feed: &Feed) -> Result<Done, Failure> {
        control.check()?;
        let roots = Arc::new(self.store.new_temp_roots());
        let known = self.outputs.values().filter_map(|output| output.path.as_ref());
        self.inputs.iter().chain(known).chain([&self.drv_path]).for_each(|path| roots.add(path));
        let scratch = self.scratch_paths()?;
        // Rooted first, so what is in the closure stays valid.
        let closure = self.store.closure(&self.inputs)?;
        if let Some(missing) = self.inputs.iter().find(|path| !closure.contains(*path)) {
            let missing = self.store.store_dir().display(missing);
            return Err(Failure::misc(format!("path '{missing}', an input of '{}', is not valid", self.name())));
        }

        self.look_up_ahead(&closure);

        let attributes = Attributes::new(&self.drv).map_err(|e| Failure::attributes(&self.name(), &e))?;
        let identity = self.user.identity();
        let no_room =
            |dir: &Path, e| Failure::misc(format!("cannot make a build directory in '{}': {e}", dir.display()));
        let builds_dir = match &self.options.build_dir {
            Some(dir) => own_builds_dir(dir).map_err(|e| no_room(dir, e))?,
            None => self.config.build_dir.clone(),
        };
        let room = Room::create(&builds_dir, identity).map_err(|e| no_room(&builds_dir, e))?;
        // Outlives the helper.
        let cgroup = self.options.cgroups.then(|| Cgroup::create(identity)).transpose()?;
        let exported = graphs::export(&self, &attributes, &closure)?;
        let mut place = Place::new(&self, &attributes, &room, builds_dir, closure, control)?;

        let mut environment = self.environment(&attributes, &place, &scratch, exported);
        let recursion = self.make_socket(&attributes, &room)?;
        if recursion.is_some() {
            environment.set_remote(&Socket::uri(&place.build_dir_inside));
        }
        for (name, contents) in &environment.files {
            room.add_file(name, contents, identity)
                .map_err(|e| Failure::misc(format!("cannot write '{name}' for '{}': {e}", self.name())))?;
        }
        let spec = Spec {
            grows: recursion.is_some(),
            cgroup: cgroup.as_ref().map(|group| group.path().into()),
            ..self.spec(environment, &place, &scratch)
        };
        let (mut helper, log) = Helper::spawn(&self.config.helper_exe, &spec)
            .map_err(|e| Failure::misc(format!("cannot start '{}': {e}", self.config.helper_exe.display())))?;
        control.arm(helper.killer().map_err(|e| Failure::misc(format!("cannot control the build: {e}")))?);

        let served = self.serve(recursion, helper.take_window(), &place, &scratch, &roots)?;
        let verb = if self.mode == BuildMode::Check { "checking outputs of" } else { "building" };
        feed.started(self.name(), format!("{verb} '{}'", self.name()), String::new());
        let mut tail = Tail::new(self.options.log_lines);
        let killed = self.follow(&helper, log, feed, &mut tail)?;
        let report =
            helper.wait().map_err(|e| Failure::misc(format!("cannot read the end of '{}': {e}", self.name())))?;
        if let Some(served) = served {
            place.inputs = served.close();
        }
        let taken = cgroup.and_then(Cgroup::end);

        let result = control.check().and_then(|()| self.judge(killed, report, tail)).and_then(|cpu| {
            let cpu = taken.unwrap_or(cpu);
            let finished = Finished {
                job: &self,
                attributes: &attributes,
                scratch: &scratch,
                inputs: &place.inputs,
                room: &room,
                roots: &roots,
                cancelled: &control.cancelled,
            };
            finished.take_outputs().map(|outputs| Done { cpu, outputs })
        });
        // The room still takes the space that was missing.
        result.map_err(|failure| self.look_after(failure.with_advice(&self.store), room, control, feed))
    }

    pub(crate) fn name(&self) -> String {
        self.store.store_dir().display(&self.drv_path)
    }

    /// Has the kernel look up the inputs in the mount while the build is prepared: the sandbox binds each of them, and a
    /// name that nobody has asked for takes a question to the daemon.
    fn look_up_ahead(&self, closure: &BTreeSet<StorePath>) {
        if closure.len() < MANY_INPUTS {
            return;
        }
        let paths: Vec<PathBuf> = closure.iter().map(|path| self.config.store_mount.join(path.base_name())).collect();
        let look = move || paths.iter().for_each(|path| drop(fs::symlink_metadata(path)));
        // Without a thread for it the sandbox asks itself.
        let _ = std::thread::Builder::new().name("inputs".into()).spawn(look);
    }

    /// Makes the socket of a build that asks for one.
    fn make_socket(&self, attributes: &Attributes<'_>, room: &Room) -> Result<Option<(Socket, &Recursion)>, Failure> {
        if !attributes.requires_feature(recursive::FEATURE) {
            return Ok(None);
        }
        self.options.require_feature(recursive::FEATURE)?;
        let Some(recursion) = &self.recursion else {
            return Err(Failure::misc(format!("'{}' wants to use the store, but nobody serves it", self.name())));
        };
        let socket = Socket::create(room, self.user.identity());
        let socket = socket.map_err(|e| Failure::misc(format!("cannot make a socket for '{}': {e}", self.name())))?;
        Ok(Some((socket, recursion)))
    }

    /// Begins to serve the store to the builder.
    fn serve(
        &self,
        recursion: Option<(Socket, &Recursion)>,
        window: Option<Window>,
        place: &Place,
        scratch: &BTreeMap<OutputName, StorePath>,
        roots: &Arc<TempRoots>,
    ) -> Result<Option<Served>, Failure> {
        let (Some((socket, recursion)), Some(window)) = (recursion, window) else { return Ok(None) };
        let opening = Opening {
            store: self.store.clone(),
            settings: recursion.settings.clone(),
            client_uid: self.options.client_uid,
            roots: roots.clone(),
            outputs: scratch.values().cloned().collect(),
            enclosing: recursion.enclosing.iter().chain([&self.drv_path]).cloned().collect(),
            inputs: place.inputs.clone(),
            window,
        };
        let served = socket.serve(&*recursion.store, opening);
        served.map(Some).map_err(|e| Failure::misc(format!("cannot serve the store to '{}': {e}", self.name())))
    }

    /// Where the builder is told to put its outputs. One whose path follows from its contents is built under a
    /// provisional path, the same that stock takes.
    fn scratch_paths(&self) -> Result<BTreeMap<OutputName, StorePath>, Failure> {
        let dir = self.store.store_dir();
        let mut paths = BTreeMap::new();
        for (name, output) in &self.drv.outputs {
            let path = match output.path() {
                Some(path) => path.clone(),
                None => scratch_path(dir, &self.drv_path, name, &self.drv.name).map_err(Failure::misc)?,
            };
            paths.insert(name.clone(), path);
        }
        Ok(paths)
    }

    fn environment(
        &self,
        attributes: &Attributes<'_>,
        place: &Place,
        outputs: &BTreeMap<OutputName, StorePath>,
        exported: Exported,
    ) -> Environment {
        let around = Surroundings {
            store_dir: self.store.store_dir(),
            build_dir: &place.build_dir_inside,
            cores: self.options.cores,
            outputs,
            exported: &exported,
            daemon_variable: &|name| match self.options.impure_env.get(name) {
                Some(value) => Some(value.clone().into_bytes()),
                None => std::env::var_os(name).map(OsStringExt::into_vec),
            },
        };
        Environment::new(&self.drv, attributes, &around)
    }

    fn spec(&self, environment: Environment, place: &Place, outputs: &BTreeMap<OutputName, StorePath>) -> Spec {
        Spec {
            identity: self.user.identity(),
            view: place.view.clone(),
            host_network: place.host_network,
            personality_32: PLATFORMS_32.contains(&self.drv.platform.as_slice()),
            program: self.program(environment, outputs),
            linux_26: self.options.linux_26,
            filter_system_calls: self.options.filter_system_calls,
            new_privileges: self.options.new_privileges,
            grows: false,
            cgroup: None,
            work_dir: place.build_dir_inside.as_str().into(),
        }
    }

    fn program(&self, environment: Environment, outputs: &BTreeMap<OutputName, StorePath>) -> Program {
        if let Some(builtin) = Builtin::named(&self.drv.builder) {
            return Program::Builtin(Box::new(Task::new(builtin, self, outputs, environment)));
        }
        // The builder's own name is its first argument, without the directory.
        let name = self.drv.builder.rsplit(|&b| b == b'/').next().unwrap_or_default();
        Program::Executable(Executable {
            path: self.drv.builder.clone().into(),
            args: [Raw::from(name)].into_iter().chain(environment.args.into_iter().map(Raw::from)).collect(),
            env: environment.variables.into_iter().map(|(k, v)| (k.into(), v.into())).collect(),
        })
    }

    /// Reads the log until its end, which is the end of all processes that could write to it.
    ///
    /// Somebody outside of the build may have been handed a descriptor of it, so the end of the helper counts as well:
    /// what is not read [shortly after](LAST_WORDS) it is lost.
    fn follow(
        &self,
        helper: &Helper,
        mut log: PipeReader,
        feed: &Feed,
        tail: &mut Tail,
    ) -> Result<Option<Killed>, Failure> {
        let broken = |e: io::Error| Failure::misc(format!("cannot read the log of '{}': {e}", self.name()));
        // The builder may open the pipe anew and read what was announced here.
        fcntl(&log, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(|e| broken(e.into()))?;
        let mut file = self.log_file();
        let mut splitter = LineSplitter::default();
        let mut each = |line: &[u8]| {
            if feed.builder_line(line) {
                tail.push(line);
            }
        };
        let mut killed = None;
        let mut ended: Option<Instant> = None;
        let mut total = 0u64;
        let start = Instant::now();
        let mut last_output = start;
        let mut buffer = vec![0; LOG_PIECE];
        loop {
            let limits = [(self.options.timeout, start), (self.options.max_silent_time, last_output)];
            let limit = limits.iter().filter_map(|(limit, since)| limit.map(|limit| (*since + limit, limit))).min();
            let limit = limit.filter(|_| killed.is_none() && ended.is_none());
            let deadline = ended.map(|ended| ended + LAST_WORDS).or(limit.map(|(deadline, _)| deadline));
            let end = if ended.is_none() { Some(helper.end()) } else { None };
            let woken = wait_readable(log.as_fd(), end, deadline).map_err(broken)?;
            if woken.ended {
                ended = Some(Instant::now());
            }
            // A builder that never stops talking gets no longer than others.
            let late = limit.is_some() && self.options.timeout.is_some_and(|timeout| start.elapsed() >= timeout);
            if !woken.readable || late {
                match limit {
                    _ if woken.ended => continue,
                    Some((_, limit)) => {
                        killed = Some(Killed::TimedOut(limit));
                        helper.killer().map_err(broken)?.kill();
                        continue;
                    }
                    None => break,
                }
            }
            let length = match log.read(&mut buffer) {
                Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => continue,
                other => other.map_err(broken)?,
            };
            if length == 0 || ended.is_some_and(|ended| ended.elapsed() > LAST_WORDS) {
                break;
            }
            last_output = Instant::now();
            total += length as u64;
            if let Some(limit) = self.options.max_log_size.filter(|limit| total > *limit && killed.is_none()) {
                killed = Some(Killed::LogTooLong(limit));
                helper.killer().map_err(broken)?.kill();
            }
            if killed.is_some() {
                continue;
            }
            if let Some(open) = &mut file
                && let Err(error) = open.write(&buffer[..length])
            {
                tracing::warn!("cannot write the log of {}: {error}", self.name());
                file = None;
            }
            splitter.feed(&buffer[..length], &mut each);
        }
        splitter.finish(&mut each);
        if let Some(Err(error)) = file.map(LogFile::finish) {
            tracing::warn!("cannot write the log of {}: {error}", self.name());
        }
        Ok(killed)
    }

    /// A build is not given up because its log cannot be kept.
    fn log_file(&self) -> Option<LogFile> {
        if !self.options.keep_log {
            return None;
        }
        LogFile::create(&self.config.log_dir, &self.drv_path, self.options.compress_log)
            .inspect_err(|error| tracing::warn!("cannot keep the log of {}: {error}", self.name()))
            .ok()
    }

    fn judge(&self, killed: Option<Killed>, report: Option<Report>, tail: Tail) -> Result<CpuTime, Failure> {
        match killed {
            Some(Killed::TimedOut(limit)) => {
                let text = format!("timed out after {} seconds", limit.as_secs());
                return Err(Failure::new(BuildStatus::TimedOut, text).by_settings());
            }
            Some(Killed::LogTooLong(limit)) => {
                let text = log_too_long(&self.name(), limit);
                return Err(Failure::new(BuildStatus::LogLimitExceeded, text).by_settings());
            }
            None => {}
        }
        let reason = match report {
            Some(Report::Ended { code: Some(0), cpu_user, cpu_system, .. }) => {
                return Ok(CpuTime { user: cpu_user, system: cpu_system });
            }
            Some(Report::Ended { code: Some(code), .. }) => format!("builder failed with exit code {code}."),
            Some(Report::Ended { signal, .. }) => {
                format!("builder failed due to signal {}.", signal.map_or("unknown".into(), signal_name))
            }
            Some(Report::Failed { error }) => {
                let text = format!("the sandbox could not be set up: {error}");
                return Err(Failure::cannot_build(BuildStatus::MiscFailure, &self.name(), &text));
            }
            None => return Err(Failure::misc(format!("the sandbox of '{}' ended without a report", self.name()))),
        };
        let known = self.outputs.values().filter_map(|output| output.path.as_ref());
        let outputs: Vec<String> = known.map(|path| self.store.store_dir().display(path)).collect();
        Err(Failure::builder(BuildStatus::PermanentFailure, &self.name(), &reason, &outputs, &tail.into_lines()))
    }
}

/// What stock says of such a build.
pub(crate) fn log_too_long(drv: &str, limit: u64) -> String {
    format!("building derivation '{drv}' killed after writing more than {limit} bytes of log output")
}

pub(crate) fn signal_name(number: i32) -> String {
    match nix::sys::signal::Signal::try_from(number) {
        Ok(signal) => format!("{number} ({signal})"),
        Err(_) => number.to_string(),
    }
}

/// What a wait ended with. Neither: the deadline.
struct Woken {
    readable: bool,
    ended: bool,
}

/// Waits until there is something to read in `log`, something happens to `end`, or the deadline.
fn wait_readable(log: BorrowedFd<'_>, end: Option<BorrowedFd<'_>>, deadline: Option<Instant>) -> io::Result<Woken> {
    loop {
        let timeout = match deadline {
            // Rounded up, so as not to wake before the deadline again and again.
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_micros(999);
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            }
            None => PollTimeout::NONE,
        };
        let fds = [Some(log), end].into_iter().flatten();
        let mut fds: Vec<PollFd<'_>> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut fds, timeout) {
            Ok(0) if deadline.is_some_and(|deadline| Instant::now() < deadline) => {}
            Ok(_) => {
                let woken = |fd: Option<&PollFd<'_>>| fd.and_then(PollFd::any).unwrap_or(false);
                return Ok(Woken { readable: woken(fds.first()), ended: woken(fds.get(1)) });
            }
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Where leftovers of earlier runs are looked for.
pub(crate) fn default_build_dir(state_dir: &std::path::Path) -> PathBuf {
    state_dir.join("castored").join("builds")
}
