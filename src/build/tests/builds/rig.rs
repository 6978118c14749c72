//! A store, its mount and a scheduler, for one test.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use build::{BuildConfig, Client, Events, Scheduler};
use nix_compat::conf::Settings;
use nix_compat::content_address::{ContentAddress, Method};
use nix_compat::derivation::{
    BasicDerivation, Derivation, Output, OutputName, output_placeholder, upstream_placeholder,
};
use nix_compat::hash::{Algorithm, Hash};
use nix_compat::store_path::{StoreDir, StorePath, fixed_output_path};
use nix_compat::worker::stderr::{ActivityKind, Field, Message, ResultKind, Verbosity};
use nix_compat::worker::{BuildMode, BuildResult, DerivedPath, OutputsSpec};
use parking_lot::Mutex;
use store::{Config, Store};
use substitute::Substituters;
use tokio_util::sync::CancellationToken;

pub(crate) struct Rig {
    pub(crate) scheduler: Arc<Scheduler>,
    pub(crate) store: Arc<Store>,
    // Unmounted before its directory is removed.
    _mount: mount::Mount,
    dir: tempfile::TempDir,
}

/// Collects what a client would be sent.
#[derive(Default)]
pub(crate) struct Log(Mutex<Vec<Message>>);

impl Events for Log {
    fn emit(&self, message: Message) {
        self.0.lock().push(message);
    }

    fn log(&self, level: Verbosity, line: &str) {
        if level <= Verbosity::Info {
            self.emit(Message::Next(line.into()));
        }
    }
}

impl Log {
    pub(crate) fn messages(&self) -> Vec<Message> {
        self.0.lock().clone()
    }

    /// The lines of all build logs.
    pub(crate) fn lines(&self) -> Vec<String> {
        let line = |message: &Message| match message {
            Message::Result { kind: ResultKind::BuildLogLine, fields, .. } => match fields.as_slice() {
                [Field::Text(line)] => Some(String::from_utf8_lossy(line).into_owned()),
                _ => None,
            },
            _ => None,
        };
        self.0.lock().iter().filter_map(line).collect()
    }

    /// Texts of the builds that began.
    pub(crate) fn builds(&self) -> Vec<String> {
        let text = |message: &Message| match message {
            Message::StartActivity { kind: ActivityKind::Build, text, .. } => {
                Some(String::from_utf8_lossy(text).into_owned())
            }
            _ => None,
        };
        self.0.lock().iter().filter_map(text).collect()
    }

    /// Lines outside of builds.
    pub(crate) fn notes(&self) -> Vec<String> {
        let text = |message: &Message| match message {
            Message::Next(text) => Some(String::from_utf8_lossy(text).into_owned()),
            _ => None,
        };
        self.0.lock().iter().filter_map(text).collect()
    }

    /// Clients crash on news of what they have not been told of.
    pub(crate) fn assert_activities_balance(&self) {
        let mut open = BTreeSet::new();
        for message in self.0.lock().iter() {
            match message {
                Message::StartActivity { id, .. } => assert!(open.insert(*id), "{id} started twice"),
                Message::StopActivity(id) => assert!(open.remove(id), "{id} stopped, but not started"),
                Message::Result { id, .. } => assert!(open.contains(id), "news of {id}, which is not started"),
                _ => {}
            }
        }
        assert!(open.is_empty(), "{open:?} never stopped");
    }
}

impl Rig {
    /// `None`, with the reason printed, where builds cannot be tested.
    pub(crate) fn new() -> Option<Rig> {
        if !Path::new("/usr/bin/busybox").exists() {
            println!("SKIPPED: needs a static busybox");
            return None;
        }
        let dir = tempfile::Builder::new().prefix("build-test").tempdir_in("/var/tmp").unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let (mountpoint, state) = (dir.path().join("store"), dir.path().join("state"));
        let store_dir = StoreDir::new(mountpoint.to_str().unwrap()).unwrap();
        let store = Store::open(Config::new(store_dir, &state)).unwrap();
        let mount = match mount::Mount::new(store.clone(), &mountpoint, mount::Options::default()) {
            Ok(mount) => mount,
            Err(error) => {
                println!("SKIPPED: cannot mount: {error}");
                return None;
            }
        };
        let helper = PathBuf::from(env!("CARGO_BIN_EXE_castored-sandbox"));
        let config = BuildConfig::new(&state, dir.path().join("log"), mountpoint, helper, 4);
        let scheduler = Scheduler::new(store.clone(), config, Box::new(Substituters::new(store.clone())));
        Some(Rig { scheduler, store, _mount: mount, dir })
    }

    pub(crate) fn path(&self, sub: &str) -> PathBuf {
        self.dir.path().join(sub)
    }

    /// Settings as a client without configuration has them, but for more jobs.
    pub(crate) fn settings(&self, extra: &[(&str, &str)]) -> Arc<Settings> {
        let mut settings = Settings::default();
        for (name, value) in [
            ("max-jobs", "4"),
            ("build-users-group", ""),
            ("sandbox-paths", "/busybox=/usr/bin/busybox"),
            ("substituters", ""),
        ]
        .iter()
        .chain(extra)
        {
            assert!(settings.set(name, value).unwrap());
        }
        Arc::new(settings)
    }

    /// A derivation that runs a shell script with `$b` for busybox.
    pub(crate) fn derivation(&self, name: &str, script: &str) -> Draft {
        Draft {
            outputs: BTreeMap::from([(OutputName::default(), Output::Deferred)]),
            inputs: BTreeMap::new(),
            sources: BTreeSet::new(),
            env: BTreeMap::from([("name".to_owned(), name.to_owned()), ("b".to_owned(), "/busybox".to_owned())]),
            name: name.to_owned(),
            script: script.to_owned(),
            builtin: None,
            platform: format!("{}-linux", std::env::consts::ARCH),
        }
    }

    /// A derivation with a builder that is part of Nix.
    pub(crate) fn builtin(&self, builder: &str, name: &str) -> Draft {
        let platform = "builtin".to_owned();
        Draft { builtin: Some(format!("builtin:{builder}")), platform, ..self.derivation(name, "") }
    }

    /// Adds a derivation to the store.
    pub(crate) fn add(&self, draft: &Draft) -> StorePath {
        self.store.add_derivation(&self.complete(draft), &self.store.new_temp_roots()).unwrap()
    }

    pub(crate) fn complete(&self, draft: &Draft) -> Derivation {
        let dir = self.store.store_dir();
        let mut env: BTreeMap<Vec<u8>, Vec<u8>> =
            draft.env.iter().map(|(k, v)| (k.clone().into_bytes(), v.clone().into_bytes())).collect();
        for (name, output) in &draft.outputs {
            let value = match output {
                Output::Floating { .. } | Output::Impure { .. } => output_placeholder(name),
                _ => String::new(),
            };
            env.insert(name.as_str().into(), value.into_bytes());
        }
        let mut derivation = Derivation {
            basic: BasicDerivation {
                name: draft.name.clone(),
                outputs: draft.outputs.clone(),
                input_srcs: draft.sources.clone(),
                platform: draft.platform.clone().into_bytes(),
                builder: draft.builtin.as_deref().unwrap_or("/bin/sh").into(),
                args: match draft.builtin {
                    Some(_) => Vec::new(),
                    None => vec![b"-e".to_vec(), b"-c".to_vec(), draft.script.clone().into_bytes()],
                },
                env,
            },
            input_drvs: draft.inputs.iter().map(|(drv, outputs)| (drv.clone(), outputs.clone().into())).collect(),
        };
        derivation.fill_outputs(dir, &mut |input| self.store.hash_modulo(input).ok()).unwrap();
        derivation
    }

    pub(crate) fn output(&self, drv: &StorePath, name: &str) -> StorePath {
        self.store.derivation(drv).unwrap().basic.outputs[name].path().unwrap().clone()
    }

    /// Reads an output through the mount.
    pub(crate) fn read(&self, path: &StorePath) -> String {
        std::fs::read_to_string(self.store.store_dir().display(path)).unwrap()
    }

    /// Reads a file of an output through the mount.
    pub(crate) fn read_below(&self, path: &StorePath, name: &str) -> String {
        std::fs::read_to_string(format!("{}/{name}", self.store.store_dir().display(path))).unwrap()
    }

    pub(crate) fn client(&self) -> (Arc<Log>, Client) {
        let log = Arc::new(Log::default());
        let temp_roots = Arc::new(self.store.new_temp_roots());
        (log.clone(), Client { events: log, temp_roots, uid: None, cancel: CancellationToken::new(), gate: None })
    }

    pub(crate) async fn build(&self, drvs: &[&StorePath], extra: &[(&str, &str)]) -> (Vec<BuildResult>, Arc<Log>) {
        self.build_mode(drvs, extra, BuildMode::Normal).await
    }

    pub(crate) async fn build_mode(
        &self,
        drvs: &[&StorePath],
        extra: &[(&str, &str)],
        mode: BuildMode,
    ) -> (Vec<BuildResult>, Arc<Log>) {
        let (log, client) = self.client();
        let paths = drvs.iter().map(|drv| all_outputs(drv)).collect();
        let results = self.scheduler.realise(paths, mode, self.settings(extra), client).await;
        log.assert_activities_balance();
        (results.into_iter().map(|(_, result)| result).collect(), log)
    }

    /// Builds one derivation that must succeed.
    pub(crate) async fn succeed(&self, draft: &Draft, extra: &[(&str, &str)]) -> (StorePath, Arc<Log>) {
        let drv = self.add(draft);
        let (results, log) = self.build(&[&drv], extra).await;
        assert!(results[0].status.is_success(), "{results:?}\n{:?}", log.lines());
        (drv, log)
    }

    /// Builds one derivation that must fail.
    pub(crate) async fn fail(&self, draft: &Draft, extra: &[(&str, &str)]) -> (BuildResult, Arc<Log>) {
        let drv = self.add(draft);
        let (mut results, log) = self.build(&[&drv], extra).await;
        let result = results.remove(0);
        assert!(!result.status.is_success(), "{result:?}");
        for path in self.store.derivation(&drv).unwrap().basic.outputs.values().filter_map(Output::path) {
            assert!(!self.store.is_valid(path).unwrap(), "the output of a failed build is valid");
        }
        (result, log)
    }
}

pub(crate) fn all_outputs(drv: &StorePath) -> DerivedPath {
    DerivedPath::Built { drv: drv.clone(), outputs: OutputsSpec::All }
}

/// Waits for something that must happen soon.
pub(crate) async fn soon(what: &str, mut happened: impl FnMut() -> bool) {
    let start = Instant::now();
    while !happened() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what} did not happen");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A derivation to be.
#[derive(Clone)]
pub(crate) struct Draft {
    pub(crate) name: String,
    pub(crate) script: String,
    /// A builder that is part of Nix, instead of the script.
    pub(crate) builtin: Option<String>,
    pub(crate) outputs: BTreeMap<OutputName, Output>,
    pub(crate) inputs: BTreeMap<StorePath, BTreeSet<OutputName>>,
    pub(crate) sources: BTreeSet<StorePath>,
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) platform: String,
}

impl Draft {
    pub(crate) fn needs(mut self, rig: &Rig, variable: &str, drv: &StorePath) -> Draft {
        let path = rig.store.store_dir().display(&rig.output(drv, "out"));
        self.inputs.entry(drv.clone()).or_default().insert(OutputName::default());
        self.env(variable, &path)
    }

    /// Needs an output whose path is not known yet.
    pub(crate) fn needs_unknown(mut self, variable: &str, drv: &StorePath) -> Draft {
        let out = OutputName::default();
        let placeholder = upstream_placeholder(drv, &out);
        self.inputs.entry(drv.clone()).or_default().insert(out);
        self.env(variable, &placeholder)
    }

    /// Makes every output one of this kind.
    pub(crate) fn outputs(mut self, kind: &Output) -> Draft {
        self.outputs.values_mut().for_each(|output| *output = kind.clone());
        self
    }

    pub(crate) fn env(mut self, name: &str, value: &str) -> Draft {
        self.env.insert(name.to_owned(), value.to_owned());
        self
    }

    /// With a fixed output, a file that holds `text`.
    pub(crate) fn fixed(mut self, rig: &Rig, text: &str) -> Draft {
        let ca = ContentAddress { method: Method::Flat, hash: Hash::of(Algorithm::Sha256, text.as_bytes()) };
        let path = fixed_output_path(rig.store.store_dir(), &self.name, ca.method, &ca.hash).unwrap();
        self.outputs.insert(OutputName::default(), Output::Fixed { path, ca });
        self
    }

    pub(crate) fn output(mut self, name: &str) -> Draft {
        self.outputs.insert(OutputName::new(name).unwrap(), Output::Deferred);
        self
    }
}
