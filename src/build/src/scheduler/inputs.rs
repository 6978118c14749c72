//! What a derivation builds upon: which of it is there, and having the rest made.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::Arc;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use nix_compat::derivation::{Derivation, InputOutputs, OutputName};
use nix_compat::store_path::StorePath;
use nix_compat::worker::{BuildMode, BuildStatus, OutputsSpec};
use store::Store;

use super::goal::{Realisation, blocking};
use super::graph::GoalKey;
use super::plan::Plan;
use crate::failure::Failure;

/// The paths of outputs of input derivations.
pub(crate) type InputPaths = BTreeMap<(StorePath, OutputName), StorePath>;

/// What a look at the store tells of inputs.
pub(crate) struct Inputs {
    /// Input sources that are not valid.
    sources: Vec<StorePath>,
    /// Outputs that are valid already.
    known: InputPaths,
    /// Derivations with wanted outputs that are not.
    unknown: Vec<(StorePath, InputOutputs)>,
    /// Whether the derivation is one that another is built in the place of, once the paths of its inputs are known.
    pub(crate) needs_resolving: bool,
    /// All store paths that are known to be needed, valid or not: to be kept before anybody relies on them.
    pub(crate) paths: BTreeSet<StorePath>,
}

/// Why an input could not be made.
enum InputFailure {
    /// Its build failed; whether by the settings of this goal's client.
    Failed { by_settings: bool },
    /// Nothing could be tried.
    Other(Failure),
}

/// What making one input gives.
type Made = Result<InputPaths, InputFailure>;

impl Inputs {
    /// Looks what of the inputs of a derivation, at `itself`, is there. Blocks.
    ///
    /// What is neither impure nor known beforehand must not depend on what differs from build to build.
    pub(crate) fn look(store: &Store, itself: &StorePath, derivation: &Derivation) -> Result<Self, Failure> {
        let mut inputs = Self {
            sources: Vec::new(),
            known: BTreeMap::new(),
            unknown: Vec::new(),
            needs_resolving: false,
            paths: derivation.basic.input_srcs.clone(),
        };
        for path in &derivation.basic.input_srcs {
            if !store.is_valid(path)? {
                inputs.sources.push(path.clone());
            }
        }
        let mut derivations = BTreeMap::new();
        for (drv, wanted) in &derivation.input_drvs {
            let plan = Plan::peek(store, drv)?;
            if plan.derivation.basic.is_impure() && !derivation.basic.has_network() {
                let dir = store.store_dir();
                let text = format!(
                    "pure derivation '{}' depends on impure derivation '{}'",
                    dir.display(itself),
                    dir.display(drv)
                );
                return Err(Failure::misc(text));
            }
            inputs.paths.extend(plan.paths().cloned());
            match known_outputs(store, drv, wanted, &plan)? {
                Some(known) if wanted.dynamic.is_empty() => inputs.known.extend(known),
                _ => inputs.unknown.push((drv.clone(), wanted.clone())),
            }
            derivations.insert(drv, plan.derivation);
        }
        inputs.needs_resolving = derivation.needs_resolving(&mut |drv, output| {
            let output = derivations.get(drv).and_then(|derivation| derivation.basic.outputs.get(output));
            output.is_some_and(|output| output.path().is_some())
        });
        Ok(inputs)
    }
}

/// The wanted outputs of a derivation, if they are all valid. Outputs of outputs are not looked at.
fn known_outputs(
    store: &Store,
    drv: &StorePath,
    wanted: &InputOutputs,
    plan: &Plan,
) -> Result<Option<InputPaths>, Failure> {
    let mut known = InputPaths::new();
    for name in wanted.names() {
        let Some(output) = plan.outputs.get(name) else {
            let drv = store.store_dir().display(drv);
            return Err(Failure::misc(format!("derivation '{drv}' does not have the wanted output '{name}'")));
        };
        match &output.path {
            Some(path) if output.valid => drop(known.insert((drv.clone(), name.clone()), path.clone())),
            _ => return Ok(None),
        }
    }
    Ok(Some(known))
}

impl Realisation {
    /// Has everything made that the builder will read. Gives the paths of what comes from derivations.
    pub(crate) async fn realise_inputs(&self, plan: &Plan, inputs: Inputs) -> Result<InputPaths, Failure> {
        for path in inputs.sources {
            if !self.scheduler.substitute(&self.session, path.clone().into()).await.is_valid() {
                return Err(Failure::no_substituter(self.scheduler.store.store_dir(), &path));
            }
        }
        let mut paths = inputs.known;
        let mut making: FuturesUnordered<_> =
            inputs.unknown.into_iter().map(|(drv, wanted)| self.realise_input(drv, wanted)).collect();
        let (mut failed, mut blamed) = (0, false);
        while let Some(made) = making.next().await {
            match made {
                Ok(made) => paths.extend(made),
                Err(InputFailure::Other(failure)) => return Err(failure),
                Err(InputFailure::Failed { by_settings }) => {
                    failed += 1;
                    blamed |= by_settings;
                    if !self.session.options.keep_going {
                        break;
                    }
                }
            }
        }
        drop(making);
        let failure = match failed {
            0 => return Ok(paths),
            1 => self.dependencies_failed(plan, "1 dependency failed."),
            n => self.dependencies_failed(plan, &format!("{n} dependencies failed.")),
        };
        Err(if blamed { failure.by_settings() } else { failure })
    }

    /// Has outputs of one derivation made, and what is wanted of these in turn.
    fn realise_input(&self, drv: StorePath, wanted: InputOutputs) -> Pin<Box<dyn Future<Output = Made> + Send + '_>> {
        Box::pin(async move {
            let names = wanted.names().cloned().collect();
            let obtained = self.scheduler.obtain(&self.session, &drv, None, &OutputsSpec::Names(names)).await;
            let result = match obtained {
                Ok(Some(result)) => Arc::new(result),
                Ok(None) => {
                    let key = GoalKey::stored(drv.clone(), BuildMode::Normal);
                    let add_need = |need: &_| self.goal.add_need(need);
                    let (result, by_settings) =
                        self.scheduler.settle(key, &self.session, BuildMode::Normal, None, add_need).await;
                    let success = result.filter(|result| result.status.is_success());
                    success.ok_or(InputFailure::Failed { by_settings })?
                }
                Err(failure) if failure.status == BuildStatus::TransientFailure => {
                    self.session.log(format!("error: {}\n", failure.message));
                    return Err(InputFailure::Failed { by_settings: true });
                }
                Err(failure) => return Err(InputFailure::Other(failure)),
            };
            let path = |name: &OutputName| {
                let built = result.built_outputs.get(name).map(|built| built.path.clone());
                let drv = self.scheduler.store.store_dir().display(&drv);
                let text = format!("derivation '{drv}' does not have the wanted output '{name}'");
                built.ok_or_else(|| InputFailure::Other(Failure::misc(text)))
            };
            let mut made = InputPaths::new();
            for name in wanted.names() {
                let path = path(name)?;
                // From here on nobody else need keep it.
                self.goal.add_roots([path.clone()]);
                made.insert((drv.clone(), name.clone()), path);
            }
            for (name, wanted) in wanted.dynamic {
                made.extend(self.realise_dynamic(path(&name)?, wanted).await?);
            }
            Ok(made)
        })
    }

    /// The same for a derivation that has just been built.
    async fn realise_dynamic(&self, drv: StorePath, wanted: InputOutputs) -> Made {
        if !drv.is_derivation() {
            let path = self.scheduler.store.store_dir().display(&drv);
            return Err(InputFailure::Other(Failure::misc(format!("'{path}' is not a derivation"))));
        }
        self.session.let_see(&drv).await.map_err(InputFailure::Other)?;
        let (store, path, needed) = (self.scheduler.store.clone(), drv.clone(), wanted.clone());
        let known = blocking(move || known_outputs(&store, &path, &needed, &Plan::peek(&store, &path)?)).await;
        match known.map_err(InputFailure::Other)? {
            Some(known) if wanted.dynamic.is_empty() => Ok(known),
            _ => self.realise_input(drv, wanted).await,
        }
    }
}
