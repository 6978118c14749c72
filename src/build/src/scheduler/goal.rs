//! What a goal does: have its inputs made, then its outputs.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use nix_compat::derivation::{BasicDerivation, Derivation, HashModulo, Output, OutputName};
use nix_compat::store_path::{StorePath, fixed_output_path};
use nix_compat::worker::{BuildMode, BuildResult, BuildStatus, BuiltOutput};
use store::{Store, TempRoots};

use super::Scheduler;
use super::graph::{Goal, GoalKey, Graph};
use super::session::Session;
use crate::attributes::Attributes;
use crate::failure::Failure;
use crate::remote::{self, Place, Wish};
use crate::run::{Control, CpuTime, Job};

/// What is known of a derivation before anything is built.
#[derive(Clone)]
pub(crate) struct Plan {
    pub(crate) derivation: Arc<Derivation>,
    /// Paths of all its outputs.
    pub(crate) outputs: BTreeMap<OutputName, StorePath>,
    /// Those that are not valid.
    pub(crate) missing: BTreeSet<OutputName>,
    /// By which old clients name its outputs.
    drv_hash: [u8; 32],
}

impl Plan {
    /// Reads a derivation from the store. Blocks.
    pub(crate) fn load(store: &Store, drv: &StorePath) -> Result<Self, Failure> {
        if !store.is_valid(drv)? {
            return Err(Failure::no_derivation(store.store_dir(), drv));
        }
        Self::of(store, drv, store.derivation(drv)?)
    }

    /// The plan for a derivation that need not be in the store. Blocks.
    pub(crate) fn of(store: &Store, drv: &StorePath, derivation: Arc<Derivation>) -> Result<Self, Failure> {
        let mut outputs = BTreeMap::new();
        let mut missing = BTreeSet::new();
        for (name, output) in &derivation.basic.outputs {
            let Some(path) = output.path() else {
                let text = format!(
                    "derivation '{}' has the output '{name}', whose path is known only when it is built; this needs \
                     content-addressed derivations, which are not supported",
                    store.store_dir().display(drv)
                );
                return Err(Failure::rejected(text));
            };
            check_fixed_path(store, drv, &derivation.basic, name, output)?;
            if !store.is_valid(path)? {
                missing.insert(name.clone());
            }
            outputs.insert(name.clone(), path.clone());
        }
        let modulo = derivation.output_hash_modulo(store.store_dir(), &mut |input| store.hash_modulo(input).ok());
        let drv_hash = match modulo {
            Ok(HashModulo::Regular(hash)) => hash,
            Ok(HashModulo::Fixed(hashes)) => hashes.into_values().next().unwrap_or_default(),
            // What stock sends when it has none.
            Ok(HashModulo::Deferred) | Err(_) => [0; 32],
        };
        Ok(Self { derivation, outputs, missing, drv_hash })
    }

    /// A result for outputs that are valid.
    pub(crate) fn success(&self, status: BuildStatus) -> BuildResult {
        let mut result = BuildResult::new(status, "");
        result.built_outputs = self
            .outputs
            .iter()
            .map(|(name, path)| (name.clone(), BuiltOutput { drv_hash: self.drv_hash, path: path.clone() }))
            .collect();
        result
    }
}

/// The path of a fixed output follows from its name and hash; any other path would be somebody else's.
fn check_fixed_path(
    store: &Store,
    drv: &StorePath,
    derivation: &BasicDerivation,
    name: &OutputName,
    output: &Output,
) -> Result<(), Failure> {
    let Output::Fixed { path, ca } = output else { return Ok(()) };
    let dir = store.store_dir();
    let right = fixed_output_path(dir, &name.path_name(&derivation.name), ca.method, &ca.hash);
    if right.as_ref() != Ok(path) {
        let right = right.map_or_else(|e| e.to_string(), |right| format!("should be '{}'", dir.display(&right)));
        let text = format!(
            "derivation '{}' has incorrect output '{}' for '{name}': {right}",
            dir.display(drv),
            dir.display(path)
        );
        return Err(Failure::rejected(text));
    }
    if derivation.env(name.as_str()).is_some_and(|value| value != dir.display(path).as_bytes()) {
        let text = format!(
            "derivation '{}' has an environment variable '{name}' that is not the path of this output, '{}'",
            dir.display(drv),
            dir.display(path)
        );
        return Err(Failure::rejected(text));
    }
    Ok(())
}

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
        let (started, outcome) = (now(), self.realise().await);
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
        let plan = self.plan().await?;
        let roots = self.scheduler.store.new_temp_roots();
        self.keep(&roots, plan.outputs.values().chain([&self.goal.key.drv]));
        self.check_mode(&plan)?;
        if self.mode == BuildMode::Normal && (plan.missing.is_empty() || self.scheduler.substitute_outputs(&plan).await)
        {
            return Ok(plan.success(BuildStatus::AlreadyValid));
        }
        self.goal.feed.expect_build();
        // Kept before anybody looks whether they are valid: what is found to be valid then stays so.
        let (store, derivation) = (self.scheduler.store.clone(), plan.derivation.clone());
        let inputs = blocking(move || inputs(&store, &derivation)).await?;
        self.keep(&roots, &inputs);
        self.realise_inputs(&plan).await?;
        self.build(plan, inputs).await
    }

    /// Keeps paths from being collected until this goal is done, and for its watchers as long as they are connected.
    fn keep<'a>(&self, roots: &TempRoots, paths: impl IntoIterator<Item = &'a StorePath>) {
        let kept: Vec<StorePath> = paths.into_iter().inspect(|path| roots.add(path)).cloned().collect();
        self.goal.add_roots(kept);
    }

    async fn plan(&self) -> Result<Plan, Failure> {
        let (store, drv, inline) = (self.scheduler.store.clone(), self.goal.key.drv.clone(), self.inline.clone());
        blocking(move || match inline {
            Some(basic) => Plan::of(&store, &drv, Arc::new(basic.into())),
            None => Plan::load(&store, &drv),
        })
        .await
    }

    fn check_mode(&self, plan: &Plan) -> Result<(), Failure> {
        let name = || self.scheduler.store.store_dir().display(&self.goal.key.drv);
        match self.mode {
            BuildMode::Check if !plan.missing.is_empty() => {
                Err(Failure::misc(format!("some outputs of '{}' are not valid, so checking is not possible", name())))
            }
            BuildMode::Repair => Err(Failure::misc(format!("cannot repair '{}': not supported yet", name()))),
            BuildMode::Check | BuildMode::Normal => Ok(()),
        }
    }

    /// Has everything made that the builder will read.
    async fn realise_inputs(&self, plan: &Plan) -> Result<(), Failure> {
        let (store, derivation) = (self.scheduler.store.clone(), plan.derivation.clone());
        let (sources, derivations) = blocking(move || {
            let mut sources = Vec::new();
            for path in &derivation.basic.input_srcs {
                if !store.is_valid(path)? {
                    sources.push(path.clone());
                }
            }
            let mut derivations = Vec::new();
            for (drv, wanted) in &derivation.input_drvs {
                let plan = Plan::load(&store, drv)?;
                if wanted.iter().any(|output| !plan.outputs.contains_key(output) || plan.missing.contains(output)) {
                    derivations.push(drv.clone());
                }
            }
            Ok((sources, derivations))
        })
        .await?;
        for path in sources {
            if !self.scheduler.substitute(&path).await {
                return Err(Failure::no_substituter(self.scheduler.store.store_dir(), &path));
            }
        }

        let mode = BuildMode::Normal;
        let mut results: FuturesUnordered<_> = derivations
            .into_iter()
            .map(|drv| {
                let key = GoalKey::stored(drv, mode);
                self.scheduler.settle(key, &self.session, mode, None, |need| self.goal.add_need(need))
            })
            .collect();
        let (mut failed, mut blamed) = (0, false);
        while let Some((result, by_settings)) = results.next().await {
            if !result.is_some_and(|result| result.status.is_success()) {
                failed += 1;
                blamed |= by_settings;
                if !self.session.options.keep_going {
                    break;
                }
            }
        }
        drop(results);
        let failure = match failed {
            0 => return Ok(()),
            1 => self.dependencies_failed(plan, "1 dependency failed."),
            n => self.dependencies_failed(plan, &format!("{n} dependencies failed.")),
        };
        Err(if blamed { failure.by_settings() } else { failure })
    }

    fn dependencies_failed(&self, plan: &Plan, reason: &str) -> Failure {
        let dir = self.scheduler.store.store_dir();
        let outputs: Vec<String> = plan.outputs.values().map(|path| dir.display(path)).collect();
        Failure::builder(BuildStatus::DependencyFailed, &dir.display(&self.goal.key.drv), reason, &outputs, &[])
    }

    /// Waits for its turn, then builds.
    async fn build(&self, plan: Plan, inputs: BTreeSet<StorePath>) -> Result<BuildResult, Failure> {
        let started = now();
        let wish = Wish {
            drv: Arc::new(plan.derivation.basic.clone()),
            has_input_drvs: !plan.derivation.input_drvs.is_empty(),
            outputs: plan.outputs.iter().map(|(name, path)| (name.clone(), Some(path.clone()))).collect(),
            inputs: inputs.clone(),
            here: self.check_buildable(&plan),
        };
        let (own_turn, turn) = match remote::place(self, wish).await? {
            Place::Here(own_turn, turn) => (own_turn, turn),
            Place::Elsewhere(built) => {
                let mut built_outputs = plan.success(BuildStatus::Built).built_outputs;
                for (name, output) in &mut built_outputs {
                    if let Some(path) = built.outputs.get(name) {
                        output.path = path.clone();
                    }
                }
                let (start_time, stop_time) = (started, now());
                let status = BuildStatus::Built;
                return Ok(BuildResult { status, built_outputs, start_time, stop_time, ..built.result });
            }
        };
        let scheduler = &self.scheduler;
        let user = scheduler.users.lease(&self.session.options.users).await.map_err(Failure::misc)?;

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
        };
        let running = scheduler.running.enter(&self.goal, now());
        let cancel = CancelOnDrop(Arc::default());
        let (control, goal) = (cancel.0.clone(), self.goal.clone());
        let started = now();
        let cpu: CpuTime = blocking(move || {
            // Held until the processes are gone and the directories removed, also when nobody waits any more.
            let _held = (own_turn, turn, running);
            job.run(&control, &goal.feed)
        })
        .await?;

        let mut result = plan.success(BuildStatus::Built);
        result.times_built = 1;
        (result.start_time, result.stop_time) = (started, now());
        (result.cpu_user, result.cpu_system) = (Some(cpu.user), Some(cpu.system));
        Ok(result)
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
        if options.max_jobs == 0 {
            return fail(
                "local builds are disabled (max-jobs = 0)\nHint: set 'max-jobs' to a non-zero value to enable local \
                 builds, or configure remote builders via 'builders'",
            );
        }
        if drv.is_builtin() {
            return fail(&format!("unsupported builtin builder '{}'", String::from_utf8_lossy(&drv.builder)));
        }
        Ok(())
    }
}

/// The store paths a derivation builds upon. Blocks.
fn inputs(store: &Store, derivation: &Derivation) -> Result<BTreeSet<StorePath>, Failure> {
    let mut inputs = derivation.basic.input_srcs.clone();
    for (drv, wanted) in &derivation.input_drvs {
        if !store.is_valid(drv)? {
            return Err(Failure::no_derivation(store.store_dir(), drv));
        }
        let input = store.derivation(drv)?;
        for output in wanted {
            let Some(path) = input.basic.outputs.get(output).and_then(|output| output.path()) else {
                // Says so when it is an output whose path nobody can know yet.
                Plan::load(store, drv)?;
                let text = format!(
                    "derivation '{}' does not have the wanted output '{output}'",
                    store.store_dir().display(drv)
                );
                return Err(Failure::misc(text));
            };
            inputs.insert(path.clone());
        }
    }
    Ok(inputs)
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

/// Runs what blocks on a thread for it.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Failure::misc(format!("a thread of the daemon failed: {error}"))),
    }
}

pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}
