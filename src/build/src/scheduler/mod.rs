//! Builds for all clients at once.
//!
//! There is one graph of goals for the whole daemon ([`graph`]). A request ([`session`]) holds an interest in the goals
//! it asked for and watches them; a goal ([`goal`]) holds interests in those it depends on. Each goal has one feed
//! ([`feed`]) that tells its watchers, early or late, the same story from its beginning.
//!
//! A finished goal is forgotten at once: whether something is valid is the store's knowledge alone.

pub(crate) mod feed;
pub(crate) mod goal;
pub(crate) mod graph;
mod inputs;
mod missing;
mod nested;
pub(crate) mod plan;
mod repair;
mod resolved;
mod session;
mod space;
pub(crate) mod status;
mod substitution;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use nix_compat::conf::Settings;
use nix_compat::derivation::{BasicDerivation, OutputName};
use nix_compat::store_path::StorePath;
use nix_compat::worker::{BuildMode, BuildResult, BuildStatus, DerivedPath, Missing, OutputsSpec};
use store::{Store, TempRoots};
use substitute::{Substituter, Wanted};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use self::goal::{Realisation, blocking};
use self::graph::{Goal, GoalKey, Graph, Interest};
use self::plan::Plan;
use self::session::Session;
use self::status::Running;
use crate::failure::Failure;
use crate::hooks::MAX_POST_BUILD_HOOKS;
use crate::options::Options;
use crate::recursive::{Gate, RecursiveStore};
use crate::remote::Pool;
use crate::run::default_build_dir;
use crate::users::Users;

pub use self::session::{Events, activity_id};
pub use self::status::RunningBuild;

/// Below the state directory, as in stock Nix since 2.30.
const KEPT_DIR: &str = "builds";

/// Where and how much the daemon builds.
#[derive(Clone, Debug)]
pub struct BuildConfig {
    /// The log directory, e.g. `/nix/var/log/nix`.
    pub log_dir: PathBuf,
    /// Where build directories are made, unless a setting says otherwise.
    pub build_dir: PathBuf,
    /// Where directories of failed builds are kept, unless a setting says otherwise. Users can enter it.
    pub kept_dir: PathBuf,
    /// Where the store is mounted. Builders see it there.
    pub store_mount: PathBuf,
    /// The program that becomes the sandbox helper when called by that name.
    pub helper_exe: PathBuf,
    /// Builds at the same time on this machine, whoever wants them.
    pub max_jobs: usize,
    /// What a Nix client in a hook needs in its environment to find this daemon.
    pub client_env: Vec<(OsString, OsString)>,
}

impl BuildConfig {
    /// The usual places for a store with this state directory.
    pub fn new(state_dir: &Path, log_dir: PathBuf, store_mount: PathBuf, helper_exe: PathBuf, max_jobs: usize) -> Self {
        let build_dir = default_build_dir(state_dir);
        let kept_dir = state_dir.join(KEPT_DIR);
        Self { log_dir, build_dir, kept_dir, store_mount, helper_exe, max_jobs, client_env: Vec::new() }
    }
}

/// Who asks for something to be built.
pub struct Client {
    /// Where its messages go.
    pub events: Arc<dyn Events>,
    /// The temporary roots of its connection.
    pub temp_roots: Arc<TempRoots>,
    /// Its user on this machine, if the kernel has told.
    pub uid: Option<u32>,
    /// Ends its request early. Dropping the request's future does the same without an answer.
    pub cancel: CancellationToken,
    /// For a client that is part of a running build: what that may see.
    pub gate: Option<Arc<Gate>>,
}

/// Builds derivations for any number of clients.
pub struct Scheduler {
    pub(crate) store: Arc<Store>,
    pub(crate) config: Arc<BuildConfig>,
    substituter: Box<dyn Substituter>,
    graph: Arc<Graph>,
    pub(crate) jobs: Arc<Semaphore>,
    post_build_hooks: Arc<Semaphore>,
    users: Arc<Users>,
    pub(crate) running: Arc<Running>,
    /// Other machines' places, shared by all clients.
    pub(crate) pool: Arc<Pool>,
    /// Who serves the store to builds that ask for it.
    recursive: OnceLock<Arc<dyn RecursiveStore>>,
}

/// Ends a session however its request ends.
struct OpenSession(Arc<Session>);

impl Drop for OpenSession {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Scheduler {
    /// A scheduler for the store. What builds of an earlier process left behind is removed.
    pub fn new(store: Arc<Store>, config: BuildConfig, substituter: Box<dyn Substituter>) -> Arc<Self> {
        crate::room::remove_leftovers(&config.build_dir);
        let jobs = Arc::new(Semaphore::new(config.max_jobs.clamp(1, Semaphore::MAX_PERMITS)));
        Arc::new(Self {
            store,
            config: Arc::new(config),
            substituter,
            graph: Arc::default(),
            jobs,
            post_build_hooks: Arc::new(Semaphore::new(MAX_POST_BUILD_HOOKS)),
            users: Arc::default(),
            running: Arc::default(),
            pool: Arc::default(),
            recursive: OnceLock::new(),
        })
    }

    /// Has builds that ask for it use the store through `server`. Only the first one counts.
    pub fn serve_builds(&self, server: Arc<dyn RecursiveStore>) {
        let _ = self.recursive.set(server);
    }

    /// Has paths made, and says how each of them went, in the order of the request.
    ///
    /// Without `keep-going` the first failure ends the request; what was not decided by then is a failure without a reason.
    /// Dropping the future withdraws the client's interest: builds that nobody else wants are killed.
    pub async fn realise(
        self: &Arc<Self>,
        paths: Vec<DerivedPath>,
        mode: BuildMode,
        settings: Arc<Settings>,
        client: Client,
    ) -> Vec<(DerivedPath, BuildResult)> {
        let options = Arc::new(Options { client_uid: client.uid, ..Options::new(&settings) });
        let session = OpenSession(Session::open(client.events, client.temp_roots, options, settings, client.gate));
        let mut results: Vec<Option<BuildResult>> = Vec::new();
        results.resize(paths.len(), None);
        {
            let mut pending: FuturesUnordered<_> = paths
                .iter()
                .enumerate()
                .map(|(i, path)| {
                    let session = &session.0;
                    async move { (i, self.realise_one(path.clone(), mode, session).await) }
                })
                .collect();
            loop {
                tokio::select! {
                    () = client.cancel.cancelled() => break,
                    () = session.0.entangled() => {
                        for (path, result) in paths.iter().zip(&mut results) {
                            result.get_or_insert_with(|| failed(session.0.entangled_failure(&self.store.store_dir().display(path.base()))));
                        }
                        break;
                    }
                    next = pending.next() => {
                        let Some((i, result)) = next else { break };
                        let failed = !result.status.is_success();
                        results[i] = Some(result);
                        if failed && !session.0.options.keep_going {
                            break;
                        }
                    }
                }
            }
        }
        let undecided = || BuildResult::new(BuildStatus::MiscFailure, "");
        paths.into_iter().zip(results).map(|(path, result)| (path, result.unwrap_or_else(undecided))).collect()
    }

    /// Builds a derivation that the client has at hand; its inputs are in the store.
    pub async fn build_derivation(
        self: &Arc<Self>,
        drv_path: StorePath,
        drv: BasicDerivation,
        mode: BuildMode,
        settings: Arc<Settings>,
        client: Client,
    ) -> BuildResult {
        let options = Arc::new(Options { client_uid: client.uid, ..Options::new(&settings) });
        let session = OpenSession(Session::open(client.events, client.temp_roots, options, settings, client.gate));
        let key = GoalKey::inline(self.store.store_dir(), drv_path.clone(), &drv, mode);
        let realise = async {
            if mode != BuildMode::Check
                && let Some(result) = self.obtain(&session.0, &key.drv, Some(&drv), &OutputsSpec::All).await?
                && (mode == BuildMode::Normal || self.repair_closure(&result, &session.0).await.is_ok())
            {
                return Ok(result);
            }
            let (result, _) = self.settle(key, &session.0, mode, Some(drv), |goal| goal.attach(&session.0)).await;
            Ok(unwrap_result(result.as_deref()))
        };
        tokio::select! {
            result = realise => result.unwrap_or_else(failed),
            () = client.cancel.cancelled() => failed(Failure::cancelled()),
            () = session.0.entangled() => failed(session.0.entangled_failure(&self.store.store_dir().display(&drv_path))),
        }
    }

    /// What a request would build and fetch.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn query_missing(
        &self,
        paths: Vec<DerivedPath>,
        settings: Arc<Settings>,
        client: Client,
    ) -> Result<Missing, BuildError> {
        self.missing(paths, settings, client).await.map_err(BuildError)
    }

    /// Every build that is wanted and not done.
    pub fn status(&self) -> Vec<RunningBuild> {
        self.running.status(&self.graph)
    }

    async fn realise_one(self: &Arc<Self>, path: DerivedPath, mode: BuildMode, session: &Arc<Session>) -> BuildResult {
        session.temp_roots.add(path.base());
        let outcome = match path {
            DerivedPath::Opaque(path) if mode == BuildMode::Repair => self.repair_opaque(path, session).await,
            DerivedPath::Opaque(path) => self.realise_opaque(path, session).await,
            DerivedPath::Built { drv, outputs } => self.realise_or_repair(drv, &outputs, mode, session).await,
            DerivedPath::Dynamic { drv, through, outputs } => match self.realise_through(drv, through, session).await {
                Ok(drv) => self.realise_or_repair(drv, &outputs, mode, session).await,
                Err(failure) => Err(failure),
            },
        };
        outcome.unwrap_or_else(failed)
    }

    /// Has derivations built that are outputs of one another, and gives the last one.
    async fn realise_through(
        self: &Arc<Self>,
        mut drv: StorePath,
        through: Vec<OutputName>,
        session: &Arc<Session>,
    ) -> Result<StorePath, Failure> {
        session.options.require_feature("dynamic-derivations")?;
        for output in through {
            let wanted = OutputsSpec::Names([output.clone()].into());
            let result = self.realise_built(drv.clone(), &wanted, BuildMode::Normal, session).await?;
            if !result.status.is_success() {
                return Err(Failure::new(result.status, result.error));
            }
            let dir = self.store.store_dir();
            let Some(built) = result.built_outputs.get(&output).filter(|built| built.path.is_derivation()) else {
                let text = format!("output '{output}' of '{}' is not a derivation", dir.display(&drv));
                return Err(Failure::misc(text));
            };
            drv = built.path.clone();
            session.temp_roots.add(&drv);
            session.let_see(&drv).await?;
        }
        Ok(drv)
    }

    async fn realise_opaque(&self, path: StorePath, session: &Session) -> Result<BuildResult, Failure> {
        let (store, wanted) = (self.store.clone(), path.clone());
        if blocking(move || Ok(store.is_valid(&wanted)?)).await? {
            return Ok(BuildResult::new(BuildStatus::AlreadyValid, ""));
        }
        if self.substitute(session, Wanted::explicitly(path.clone())).await.is_valid() {
            return Ok(BuildResult::new(BuildStatus::Substituted, ""));
        }
        Err(Failure::no_substituter(self.store.store_dir(), &path))
    }

    async fn realise_or_repair(
        self: &Arc<Self>,
        drv: StorePath,
        wanted: &OutputsSpec,
        mode: BuildMode,
        session: &Arc<Session>,
    ) -> Result<BuildResult, Failure> {
        match mode {
            BuildMode::Repair => self.repair_built(drv, wanted, session).await,
            BuildMode::Normal | BuildMode::Check => self.realise_built(drv, wanted, mode, session).await,
        }
    }

    async fn realise_built(
        self: &Arc<Self>,
        drv: StorePath,
        wanted: &OutputsSpec,
        mode: BuildMode,
        session: &Arc<Session>,
    ) -> Result<BuildResult, Failure> {
        if !self.store.is_valid(&drv)? {
            // Without it the plan says what is wrong.
            self.substitute(session, drv.clone().into()).await;
        }
        let (store, path) = (self.store.clone(), drv.clone());
        let plan = blocking(move || Plan::load(&store, &path)).await?;
        if let OutputsSpec::Names(names) = wanted
            && let Some(unknown) = names.iter().find(|name| !plan.outputs.contains_key(*name))
        {
            let drv = self.store.store_dir().display(&drv);
            return Err(Failure::misc(format!("derivation '{drv}' does not have wanted outputs '{unknown}'")));
        }
        plan.paths().for_each(|path| session.temp_roots.add(path));
        let obtained = match mode {
            BuildMode::Normal => self.obtain(session, &drv, None, wanted).await?,
            _ => None,
        };
        let mut result = match obtained {
            Some(result) => result,
            None => {
                let key = GoalKey::stored(drv, mode);
                let (result, _) = self.settle(key, session, mode, None, |goal| goal.attach(session)).await;
                unwrap_result(result.as_deref())
            }
        };
        result.built_outputs.retain(|name, _| wanted.contains(name));
        Ok(result)
    }

    /// Joins or starts a goal.
    fn want(
        self: &Arc<Self>,
        key: GoalKey,
        session: &Arc<Session>,
        mode: BuildMode,
        inline: Option<BasicDerivation>,
    ) -> Interest {
        self.graph.want(&key, session, |goal| {
            let realisation = Realisation { scheduler: self.clone(), goal, session: session.clone(), mode, inline };
            tokio::spawn(realisation.run()).abort_handle()
        })
    }

    /// Has a goal done: what became of it, and whether that is due to settings.
    ///
    /// One that failed by the settings of another client is wanted again, until it is this client's that are in force.
    async fn settle(
        self: &Arc<Self>,
        key: GoalKey,
        session: &Arc<Session>,
        mode: BuildMode,
        inline: Option<BasicDerivation>,
        watch: impl Fn(&Arc<Goal>),
    ) -> (Option<Arc<BuildResult>>, bool) {
        loop {
            let interest = self.want(key.clone(), session, mode, inline.clone());
            watch(&interest.goal);
            let result = interest.goal.result().await;
            let by_settings = interest.goal.failed_by_settings();
            if !by_settings || interest.goal.is_owned_by(session) {
                return (result, by_settings);
            }
        }
    }
}

/// Why nothing could be said about a request.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct BuildError(Failure);

fn failed(failure: Failure) -> BuildResult {
    BuildResult::new(failure.status, failure.message)
}

fn unwrap_result(result: Option<&BuildResult>) -> BuildResult {
    result.cloned().unwrap_or_else(|| failed(Failure::misc("the goal was given up")))
}
