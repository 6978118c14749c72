//! What a goal does: have its inputs made, then its outputs.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use nix_compat::derivation::BasicDerivation;
use nix_compat::store_path::StorePath;
use nix_compat::worker::{BuildMode, BuildResult, BuildStatus};
use store::TempRoots;
use tokio::sync::Semaphore;

use super::Scheduler;
use super::graph::{Goal, Graph};
use super::inputs::Inputs;
use super::plan::Plan;
use super::session::Session;
use crate::attributes::Attributes;
use crate::builtin::Builtin;
use crate::failure::Failure;
use crate::hooks::PostBuild;
use crate::remote::{self, Place, Wish};
use crate::run::{Control, Done, Job, Recursion};
use crate::users::needs_id_range;

/// Looks into the store, and the like, that may be under way for goals at once.
const BRIEF_THREADS: usize = 8;

/// A goal at work.
pub(crate) struct Realisation {
    pub(crate) scheduler: Arc<Scheduler>,
    pub(crate) goal: Arc<Goal>,
    /// Whoever wanted it first: its settings are in force.
    pub(crate) session: Arc<Session>,
    pub(crate) mode: BuildMode,
    /// A derivation that a client sent instead of putting it into the store.
    pub(crate) inline: Option<BasicDerivation>,
}

impl Realisation {
    /// Runs to the end and tells everybody who waits.
    pub(crate) async fn run(self) {
        let goal = self.goal.clone();
        let scheduler = self.scheduler.clone();
        // Also when something panics nobody may wait for ever.
        let _end = End { graph: scheduler.graph.clone(), goal: goal.clone() };
        self.scheduler.keep_room(&self.session.settings).await;
        let (started, outcome) = (now(), self.realise().await.map_err(|failure| failure.with_advice(&scheduler.store)));
        let mut result = match &outcome {
            Ok(result) => result.clone(),
            Err(failure) => BuildResult::new(failure.status, failure.message.clone()),
        };
        result.is_non_deterministic = result.status == BuildStatus::NotDeterministic;
        if result.start_time == 0 && result.status != BuildStatus::AlreadyValid {
            (result.start_time, result.stop_time) = (started, now());
        }
        if outcome.as_ref().is_err_and(|failure| failure.by_settings) {
            goal.blame_settings();
        }
        goal.feed.ended(outcome.as_ref().err());
        scheduler.graph.forget(&goal);
        goal.finish(result);
    }

    async fn realise(self) -> Result<BuildResult, Failure> {
        let plan = self.scheduler.plan(&self.goal.key.drv, self.inline.as_ref()).await?;
        plan.check_features(&self.session.options)?;
        let roots = self.scheduler.store.new_temp_roots();
        self.keep(&roots, plan.paths().chain([&self.goal.key.drv]));
        self.check_mode(&plan)?;
        if self.mode == BuildMode::Normal && plan.is_complete() {
            return Ok(plan.success(BuildStatus::AlreadyValid));
        }
        self.goal.feed.expect_build();
        // Kept before anybody looks again whether they are valid: what is found to be valid then stays so.
        self.keep(&roots, &self.look_at_inputs(&plan).await?.paths);
        let inputs = self.look_at_inputs(&plan).await?;
        let resolves = inputs.needs_resolving;
        let paths = self.realise_inputs(&plan, inputs).await?;
        self.keep(&roots, paths.values());
        if resolves {
            return self.build_resolved(plan, paths, &roots).await;
        }
        let inputs = plan.derivation.basic.input_srcs.iter().cloned().chain(paths.into_values()).collect();
        self.build(plan, inputs).await
    }

    async fn look_at_inputs(&self, plan: &Plan) -> Result<Inputs, Failure> {
        let (store, drv) = (self.scheduler.store.clone(), self.goal.key.drv.clone());
        let derivation = plan.derivation.clone();
        blocking(move || Inputs::look(&store, &drv, &derivation)).await
    }

    /// Keeps paths from being collected until this goal is done, and for its watchers as long as they are connected.
    pub(super) fn keep<'a>(&self, roots: &TempRoots, paths: impl IntoIterator<Item = &'a StorePath>) {
        let kept: Vec<StorePath> = paths.into_iter().inspect(|path| roots.add(path)).cloned().collect();
        self.goal.add_roots(kept);
    }

    fn check_mode(&self, plan: &Plan) -> Result<(), Failure> {
        let name = || self.scheduler.store.store_dir().display(&self.goal.key.drv);
        match self.mode {
            BuildMode::Check if !plan.is_complete() && !plan.derivation.basic.is_impure() => {
                Err(Failure::misc(format!("some outputs of '{}' are not valid, so checking is not possible", name())))
            }
            BuildMode::Check | BuildMode::Normal | BuildMode::Repair => Ok(()),
        }
    }

    pub(super) fn dependencies_failed(&self, plan: &Plan, reason: &str) -> Failure {
        let dir = self.scheduler.store.store_dir();
        let outputs: Vec<String> = plan.paths().map(|path| dir.display(path)).collect();
        Failure::builder(BuildStatus::DependencyFailed, &dir.display(&self.goal.key.drv), reason, &outputs, &[])
    }

    /// Waits for its turn, then builds.
    async fn build(&self, plan: Plan, inputs: BTreeSet<StorePath>) -> Result<BuildResult, Failure> {
        let started = now();
        let wish = Wish {
            drv: Arc::new(plan.derivation.basic.clone()),
            has_input_drvs: !plan.derivation.input_drvs.is_empty(),
            outputs: plan.outputs.iter().map(|(name, output)| (name.clone(), output.path.clone())).collect(),
            inputs: inputs.clone(),
            here: self.check_buildable(&plan),
        };
        let turn = match remote::place(self, wish).await? {
            Place::Here(turn) => turn,
            Place::Elsewhere(built) => {
                self.note_outputs(&plan, built.outputs.clone()).await?;
                self.post_build_hook(built.outputs.values().cloned().collect()).await?;
                let built_outputs = plan.success_with(BuildStatus::Built, &built.outputs).built_outputs;
                let (start_time, stop_time) = (started, now());
                let status = BuildStatus::Built;
                return Ok(BuildResult { status, built_outputs, start_time, stop_time, ..built.result });
            }
        };
        let scheduler = &self.scheduler;
        let user = scheduler
            .users
            .lease(&self.session.options.users, needs_id_range(&plan.derivation.basic))
            .await
            .map_err(Failure::misc)?;

        let job = Job {
            store: scheduler.store.clone(),
            config: scheduler.config.clone(),
            options: self.session.options.clone(),
            drv_path: self.goal.key.drv.clone(),
            drv: Arc::new(plan.derivation.basic.clone()),
            outputs: plan.outputs.clone(),
            inputs,
            mode: self.mode,
            user,
            recursion: scheduler.recursive.get().map(|store| Recursion {
                store: store.clone(),
                settings: self.session.settings.clone(),
                enclosing: self.session.enclosing().to_vec(),
            }),
        };
        let running = scheduler.running.enter(&self.goal, now());
        let cancel = CancelOnDrop(Arc::default());
        let (control, goal) = (cancel.0.clone(), self.goal.clone());
        let started = now();
        let building = lengthy(move || {
            // Held until the processes are gone and the directories removed, also when nobody waits any more.
            let _held = (turn, running);
            job.run(&control, &goal.feed)
        });
        let done: Done = self.scheduler.keeping_room(&self.session.settings, building).await?;
        self.post_build_hook(done.outputs.values().cloned().collect()).await?;

        self.goal.add_roots(done.outputs.values().cloned());
        let mut result = plan.success_with(BuildStatus::Built, &done.outputs);
        result.times_built = 1;
        (result.start_time, result.stop_time) = (started, now());
        (result.cpu_user, result.cpu_system) = (Some(done.cpu.user), Some(done.cpu.system));
        Ok(result)
    }

    /// Runs the post-build hook, which holds up nobody but who waits for this goal.
    async fn post_build_hook(&self, outputs: BTreeSet<StorePath>) -> Result<(), Failure> {
        if self.mode != BuildMode::Normal || self.session.options.hooks.post_build.is_none() {
            return Ok(());
        }
        let closed = |_| Failure::misc("the daemon is stopping");
        let turn = self.scheduler.post_build_hooks.clone().acquire_owned().await.map_err(closed)?;
        let hook = PostBuild {
            store_dir: self.scheduler.store.store_dir().clone(),
            options: self.session.options.clone(),
            config: self.scheduler.config.clone(),
            drv: self.goal.key.drv.clone(),
            outputs,
        };
        let cancel = CancelOnDrop(Arc::default());
        let (control, goal) = (cancel.0.clone(), self.goal.clone());
        lengthy(move || {
            let _held = turn;
            Ok(hook.run(&control, &goal.feed)?)
        })
        .await
    }

    fn check_buildable(&self, plan: &Plan) -> Result<(), Failure> {
        let options = &self.session.options;
        let drv = &plan.derivation.basic;
        let name = self.scheduler.store.store_dir().display(&self.goal.key.drv);
        let fail = |reason: &str| Err(Failure::cannot_build(BuildStatus::InputRejected, &name, reason).by_settings());
        if !options.builds_for(&drv.platform) {
            let wanted = String::from_utf8_lossy(&drv.platform);
            let text = format!("platform mismatch\nRequired system: '{wanted}'\nCurrent system: '{}'", options.system);
            return fail(&text);
        }
        let attributes = Attributes::new(drv).map_err(|e| Failure::attributes(&name, &e))?;
        let required = attributes.words("requiredSystemFeatures").unwrap_or_default();
        if required.iter().any(|feature| !options.features.contains(feature)) {
            let available: Vec<&str> = options.features.iter().map(String::as_str).collect();
            let text = format!(
                "missing system features\nRequired features: {{{}}}\nAvailable features: {{{}}}",
                required.join(", "),
                available.join(", ")
            );
            return fail(&text);
        }
        if options.max_jobs == 0 && !drv.is_builtin() {
            return fail(
                "local builds are disabled (max-jobs = 0)\nHint: set 'max-jobs' to a non-zero value to enable local \
                 builds, or configure remote builders via 'builders'",
            );
        }
        if drv.is_builtin() && Builtin::named(&drv.builder).is_none() {
            return fail(&format!("unsupported builtin builder '{}'", String::from_utf8_lossy(&drv.builder)));
        }
        Ok(())
    }
}

/// The end of a goal's task, whatever ends it.
struct End {
    graph: Arc<Graph>,
    goal: Arc<Goal>,
}

impl Drop for End {
    fn drop(&mut self) {
        self.graph.forget(&self.goal);
        self.goal.finish(BuildResult::new(BuildStatus::MiscFailure, "the build was given up"));
    }
}

struct CancelOnDrop(Arc<Control>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// Runs what waits for the disk, or computes for a moment. It takes its turn: thousands of goals can begin at a time, and
/// a thread for each of them would cost memory and make nothing faster.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    /// Shared by all schedulers of the process, as its threads are.
    static TURNS: Semaphore = Semaphore::const_new(BRIEF_THREADS);
    // Nobody closes it.
    let turn = TURNS.acquire().await.ok();
    lengthy(move || {
        let _held = turn;
        work()
    })
    .await
}

/// Runs what takes its time, a build for example, on a thread for it. Who calls this sees to it that there are few.
async fn lengthy<T: Send + 'static>(work: impl FnOnce() -> Result<T, Failure> + Send + 'static) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Failure::misc(format!("a thread of the daemon failed: {error}"))),
    }
}

pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}
