//! One build on another machine, from the connection to the registered outputs, on a thread of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix_compat::derivation::{BasicDerivation, Output, OutputName};
use nix_compat::machines::Machine;
use nix_compat::path_info::PathInfo;
use nix_compat::serve::BuildOptions;
use nix_compat::store_path::StorePath;
use nix_compat::store_uri::StoreUri;
use nix_compat::worker::handshake::Trust;
use nix_compat::worker::{BuildResult, BuildStatus};
use parking_lot::Mutex;
use remote::{ClientError, Limits, RemoteStore, SharedLog, Stopper};
use store::{NewPath, Store};

use super::log::RemoteLog;
use super::pool::Slot;
use super::{Built, Wish};
use crate::failure::Failure;
use crate::log::{LineSplitter, LogFile};
use crate::options::Options;
use crate::run::log_too_long;
use crate::scheduler::goal::now;
use crate::scheduler::graph::Goal;
use crate::scheduler::status::Running;

/// How long a machine may take to answer at first. Names and keys are looked up meanwhile.
const CONNECTING: Duration = Duration::from_secs(60);
/// How long to wait for another build to have copied its inputs.
const UPLOADING: Duration = Duration::from_secs(15 * 60);
/// How often is looked whether anybody still wants the build while that is waited for.
const GLANCE: Duration = Duration::from_millis(200);

/// Everything one build elsewhere needs to know.
pub(super) struct Job {
    pub(super) store: Arc<Store>,
    pub(super) config: Arc<crate::BuildConfig>,
    pub(super) options: Arc<Options>,
    pub(super) goal: Arc<Goal>,
    pub(super) running: Arc<Running>,
    pub(super) wish: Arc<Wish>,
    pub(super) machine: Machine,
    pub(super) stopper: Stopper,
}

/// How it ended, unless it failed.
pub(super) enum Ended {
    Built(Built),
    /// It did not begin: another machine may be tried.
    Unreachable(Slot, ClientError),
    /// The connection broke, which says nothing of the build: it may be tried elsewhere.
    Lost(Slot, Failure),
}

/// Why a build was not done.
enum Trouble {
    Failed(Failure),
    Lost(Failure),
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl From<store::Error> for Trouble {
    fn from(error: store::Error) -> Self {
        Self::Failed(error.into())
    }
}

impl Job {
    /// Builds. Blocks until the outputs are registered and the connection's process is gone.
    pub(super) fn run(self, slot: Slot) -> Result<Ended, Failure> {
        let dir = self.store.store_dir();
        let mut remote = match RemoteStore::open(&self.store_uri(), dir, CONNECTING, &self.stopper) {
            Ok(remote) => remote,
            Err(_) if self.stopper.is_stopped() => return Err(Failure::cancelled()),
            Err(error) => return Ok(Ended::Unreachable(slot, error)),
        };
        slot.reached();
        let outcome = self.build(&mut remote, &slot);
        // Until here the slot is taken.
        drop(remote);
        match outcome {
            Ok(built) => Ok(Ended::Built(built)),
            Err(Trouble::Failed(failure)) => Err(failure),
            Err(Trouble::Lost(failure)) => Ok(Ended::Lost(slot, failure)),
        }
    }

    /// The machine's store with what the list of machines says of the way there.
    fn store_uri(&self) -> StoreUri {
        let mut uri = self.machine.store.clone();
        let more = [("ssh-key", &self.machine.ssh_key), ("base64-ssh-public-host-key", &self.machine.public_host_key)];
        for (name, value) in more {
            if let Some(value) = value {
                uri.params.insert(name.to_owned(), value.clone());
            }
        }
        uri
    }

    fn name(&self) -> String {
        self.store.store_dir().display(&self.goal.key.drv)
    }

    fn build(&self, remote: &mut RemoteStore, slot: &Slot) -> Result<Built, Trouble> {
        let drv_path = &self.goal.key.drv;
        let roots = self.store.new_temp_roots();
        let known = self.wish.outputs.values().flatten();
        self.wish.inputs.iter().chain(known).chain([drv_path]).for_each(|path| roots.add(path));
        // Rooted first, so what is in the closure stays valid.
        let closure = self.store.closure(&self.wish.inputs)?;
        if let Some(missing) = self.wish.inputs.iter().find(|path| !closure.contains(*path)) {
            let missing = self.store.store_dir().display(missing);
            return Err(Failure::misc(format!("path '{missing}', an input of '{}', is not valid", self.name())).into());
        }
        self.copy_there(remote, slot, &closure)?;

        // A machine that does not trust us builds what proves itself, or what it can check: a derivation of its store.
        let sends_derivation = remote.trust() != Trust::NotTrusted || self.wish.drv.is_content_addressed();
        if !sends_derivation {
            if !self.store.is_valid(drv_path)? {
                return Err(Failure::no_derivation(self.store.store_dir(), drv_path).into());
            }
            let derivations = self.store.closure([drv_path])?;
            self.copy_there(remote, slot, &derivations)?;
        }

        let machine = self.machine.store.to_string();
        self.goal.feed.started(self.name(), format!("building '{}' on '{machine}'", self.name()), machine);
        let running = self.running.enter(&self.goal, now());
        let log = Arc::new(Mutex::new(self.log()));
        let shared: SharedLog = log.clone();
        let limits = Limits {
            silence: self.options.max_silent_time,
            deadline: self.options.timeout.map(|timeout| Instant::now() + timeout),
        };
        let result = if sends_derivation {
            remote.build(drv_path, &self.derivation(&closure), &self.build_options(), limits, &shared)
        } else {
            remote.build_stored(drv_path, limits, &shared)
        };
        let too_long = {
            let mut log = log.lock();
            log.finish();
            log.too_long
        };
        if too_long {
            let limit = self.options.max_log_size.unwrap_or_default();
            let text = log_too_long(&self.name(), limit);
            return Err(Failure::new(BuildStatus::LogLimitExceeded, text).by_settings().into());
        }
        let result = result.map_err(|error| self.broken("building", &error))?;
        self.judge(&result)?;
        let outputs = self.outputs(&result)?;
        self.copy_back(remote, &outputs)?;
        drop(running);
        Ok(Built { outputs, result })
    }

    fn log(&self) -> RemoteLog {
        let drv = &self.goal.key.drv;
        let file = self.options.keep_log.then(|| LogFile::create(&self.config.log_dir, drv, self.options.compress_log));
        let file = file.and_then(|file| {
            // A build is not given up because its log cannot be kept.
            file.inspect_err(|error| tracing::warn!("cannot keep the log of {drv}: {error}")).ok()
        });
        RemoteLog {
            goal: self.goal.clone(),
            splitter: LineSplitter::default(),
            file,
            left: self.options.max_log_size,
            stopper: self.stopper.clone(),
            too_long: false,
        }
    }

    /// The derivation with its inputs resolved. One that had no derivations among them is left as it is, for the paths
    /// of its outputs may depend on them.
    fn derivation(&self, closure: &BTreeSet<StorePath>) -> BasicDerivation {
        let mut derivation = BasicDerivation::clone(&self.wish.drv);
        if self.wish.has_input_drvs {
            derivation.input_srcs = closure.clone();
        }
        derivation
    }

    fn build_options(&self) -> BuildOptions {
        let seconds = |duration: Option<Duration>| duration.map_or(0, |duration| duration.as_secs());
        BuildOptions {
            max_silent_time: seconds(self.options.max_silent_time),
            timeout: seconds(self.options.timeout),
            max_log_size: self.options.max_log_size.unwrap_or_default(),
            repeats: 0,
            enforce_determinism: false,
            keep_failed: self.options.keep_failed,
        }
    }

    /// Copies those of these paths that the machine does not have, in an order in which it can take them.
    fn copy_there(&self, remote: &mut RemoteStore, slot: &Slot, paths: &BTreeSet<StorePath>) -> Result<(), Trouble> {
        let copying = |error: ClientError| self.broken("copying its inputs", &error);
        let start = Instant::now();
        let _turn = loop {
            match slot.upload.try_lock_for(GLANCE) {
                None if self.stopper.is_stopped() => return Err(Failure::cancelled().into()),
                None if start.elapsed() < UPLOADING => {}
                // Somebody is hogging it; then both copy.
                turn => break turn,
            }
        };
        let there = remote.valid_paths(paths.clone(), self.options.builders_use_substitutes).map_err(copying)?;
        let missing: BTreeSet<StorePath> = paths.difference(&there).cloned().collect();
        let mut infos = BTreeMap::new();
        for path in missing {
            let info = self.store.valid_entry(&path)?.info;
            infos.insert(path, info);
        }
        remote.add(&remote::references_first(infos), &mut |info, out| self.write_nar(&info.path, out)).map_err(copying)
    }

    fn write_nar(&self, path: &StorePath, out: &mut dyn Write) -> io::Result<()> {
        self.store.write_nar(path, out).map_err(io::Error::other)
    }

    /// What the end of a conversation means for the build.
    fn broken(&self, doing: &str, error: &ClientError) -> Trouble {
        if self.stopper.is_stopped() {
            return Failure::cancelled().into();
        }
        let (name, machine) = (self.name(), &self.machine.store);
        if doing == "building" && error.is_too_late() {
            let limits = [self.options.timeout, self.options.max_silent_time];
            let limit = limits.into_iter().flatten().min().unwrap_or_default();
            let text = format!("timed out after {} seconds", limit.as_secs());
            return Failure::new(BuildStatus::TimedOut, text).by_settings().into();
        }
        let failure = Failure::misc(format!("build of '{name}' on '{machine}' failed: {doing}: {error}"));
        if error.is_broken() { Trouble::Lost(failure) } else { failure.into() }
    }

    fn judge(&self, result: &BuildResult) -> Result<(), Failure> {
        if result.status.is_success() {
            return Ok(());
        }
        if self.options.keep_failed {
            let again = if self.options.builds_for(&self.wish.drv.platform) {
                " You can re-run the command with `--builders ''` to disable remote building for this invocation."
            } else {
                ""
            };
            self.goal.feed.note(&format!(
                "warning: The failed build directory was kept on the remote builder due to `--keep-failed`.{again}"
            ));
        }
        let text =
            format!("build of '{}' on '{}' failed: {}", self.name(), self.machine.store, result.error.trim_end());
        let failure = Failure::new(result.status, text);
        let by_settings = matches!(result.status, BuildStatus::TimedOut | BuildStatus::LogLimitExceeded);
        Err(if by_settings { failure.by_settings() } else { failure })
    }

    /// Where the outputs are: by the derivation, or else by what the machine says.
    fn outputs(&self, result: &BuildResult) -> Result<BTreeMap<OutputName, StorePath>, Failure> {
        let mut outputs = BTreeMap::new();
        for (name, known) in &self.wish.outputs {
            let told = || result.built_outputs.get(name).map(|built| built.path.clone());
            let path = known.clone().or_else(told).ok_or_else(|| {
                let machine = &self.machine.store;
                Failure::misc(format!("'{machine}' does not tell where the output '{name}' of '{}' is", self.name()))
            })?;
            outputs.insert(name.clone(), path);
        }
        Ok(outputs)
    }

    /// Copies those outputs that are not valid here, and makes them valid and durable, all of them or none.
    fn copy_back(&self, remote: &mut RemoteStore, outputs: &BTreeMap<OutputName, StorePath>) -> Result<(), Trouble> {
        let copying = |error: ClientError| self.broken("copying its outputs", &error);
        let mut missing = BTreeSet::new();
        for path in outputs.values() {
            if !self.store.is_valid(path)? {
                missing.insert(path.clone());
            }
        }
        let told = remote.path_infos(&missing).map_err(copying)?;
        let mut new = Vec::new();
        for (name, path) in outputs.iter().filter(|(_, path)| missing.contains(*path)) {
            if new.iter().any(|new: &NewPath| new.info.path == *path) {
                continue;
            }
            let Some(info) = told.iter().find(|info| info.path == *path) else {
                let path = self.store.store_dir().display(path);
                let machine = &self.machine.store;
                return Err(Failure::misc(format!("'{machine}' has built '{}' but not '{path}'", self.name())).into());
            };
            new.push(self.fetch(remote, name, info)?);
        }
        let _coming = self.store.queue_uploads(new.iter().map(|new| &new.info.path))?;
        self.store.register(new)?;
        self.store.sync()?;
        Ok(())
    }

    /// Brings one output into the castore, and holds it to what is known of it.
    fn fetch(&self, remote: &mut RemoteStore, name: &OutputName, info: &PathInfo) -> Result<NewPath, Trouble> {
        let mut info = PathInfo {
            deriver: Some(self.goal.key.drv.clone()),
            registration_time: 0,
            // Another machine has built it.
            ultimate: false,
            ..info.clone()
        };
        match self.wish.drv.outputs.get(name) {
            Some(Output::Fixed { ca, .. }) => info.ca = Some(ca.clone()),
            Some(Output::InputAddressed(_)) => info.ca = None,
            Some(Output::Floating { method, algo }) => {
                let right = info.ca.as_ref().is_some_and(|ca| ca.method == *method && ca.hash.algorithm() == *algo);
                if !right {
                    let text = format!("'{}' gave '{name}' a content address of another kind", self.machine.store);
                    return Err(Failure::new(BuildStatus::OutputRejected, text).into());
                }
            }
            _ => {}
        }
        let path = info.path.clone();
        let size = info.nar_size;
        let store = &self.store;
        let imported = remote
            .nar(&path, |nar| store.import_with_info(info, &mut nar.take(size)))
            .map_err(|error| self.broken("copying its outputs", &error))?;
        if self.stopper.is_stopped() {
            return Err(Failure::cancelled().into());
        }
        Ok(imported.map_err(|error| match error {
            store::Error::ContentAddressMismatch { .. } => match self.wish.drv.outputs.get(name) {
                Some(Output::Fixed { ca, .. }) => {
                    Failure::hash_mismatch(&self.name(), &ca.hash.to_sri(), &format!("another ({error})"))
                }
                _ => Failure::new(BuildStatus::OutputRejected, error.to_string()),
            },
            other => Failure::misc(format!("cannot copy the outputs of '{}': {other}", self.name())),
        })?)
    }
}
