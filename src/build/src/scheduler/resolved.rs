//! A derivation whose inputs are content-addressed: another one is built in its place.
//!
//! Once the paths of its inputs are known they are put into it. What comes of that is a derivation of its own, in the
//! store and with a goal of its own; two that become the same are built once. What its outputs turned out to be is noted
//! for both.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use nix_compat::derivation::{BasicDerivation, Derivation, Output, OutputName};
use nix_compat::realisation::{DrvOutput, Realisation as Noted};
use nix_compat::store_path::StorePath;
use nix_compat::worker::{BuildMode, BuildResult, BuildStatus, OutputsSpec};
use store::{Signer, Store, TempRoots};

use super::goal::{Realisation, blocking};
use super::graph::GoalKey;
use super::inputs::InputPaths;
use super::plan::Plan;
use crate::failure::Failure;

impl Realisation {
    /// Has the derivation built that `plan`'s becomes with the paths of its inputs in it.
    pub(crate) async fn build_resolved(
        &self,
        plan: Plan,
        inputs: InputPaths,
        roots: &TempRoots,
    ) -> Result<BuildResult, Failure> {
        let (store, derivation) = (self.scheduler.store.clone(), plan.derivation.clone());
        let paths = inputs.clone();
        let resolved = blocking(move || {
            let mut path = |drv: &StorePath, output: &OutputName| paths.get(&(drv.clone(), output.clone())).cloned();
            derivation.resolve(store.store_dir(), &mut path).map_err(Failure::misc)
        })
        .await?;
        let drv = self.write_derivation(resolved).await?;
        self.keep(roots, [&drv]);

        let key = GoalKey::stored(drv, self.mode);
        let add_need = |need: &_| self.goal.add_resolved(need);
        let obtained = match self.mode {
            BuildMode::Normal => self.scheduler.obtain(&self.session, &key.drv, None, &OutputsSpec::All).await,
            _ => Ok(None),
        };
        let (result, by_settings) = match obtained.map_err(Failure::by_settings)? {
            Some(result) => (Some(Arc::new(result)), false),
            None => self.scheduler.settle(key, &self.session, self.mode, None, add_need).await,
        };
        let Some(result) = result else { return Err(Failure::misc("the goal was given up")) };
        if !result.status.is_success() {
            // Its own watchers have been told already.
            let failure = Failure::new(result.status, result.error.clone()).told();
            return Err(if by_settings { failure.by_settings() } else { failure });
        }
        let mut made = BTreeMap::new();
        for (name, built) in &result.built_outputs {
            made.insert(name.clone(), built.path.clone());
        }
        self.keep(roots, made.values());
        if !plan.derivation.basic.is_impure() {
            let (store, plan, made) = (self.scheduler.store.clone(), plan.clone(), made.clone());
            let keys = self.session.options.secret_key_files.clone();
            let built = result.status != BuildStatus::Substituted;
            blocking(move || note_realisations(&store, &plan, &inputs, &made, &Signer::new(&keys)?, built)).await?;
        }
        let status = match result.status {
            BuildStatus::AlreadyValid => BuildStatus::ResolvesToAlreadyValid,
            status => status,
        };
        let named = plan.success_with(status, &made);
        Ok(BuildResult { status, built_outputs: named.built_outputs, ..(*result).clone() })
    }

    /// Notes what the outputs of a build on another machine turned out to be.
    pub(super) async fn note_outputs(&self, plan: &Plan, made: BTreeMap<OutputName, StorePath>) -> Result<(), Failure> {
        self.goal.add_roots(made.values().cloned());
        let floating = |output: &Output| matches!(output, Output::Floating { .. });
        if !plan.derivation.basic.outputs.values().any(floating) {
            return Ok(());
        }
        let (store, plan, keys) =
            (self.scheduler.store.clone(), plan.clone(), self.session.options.secret_key_files.clone());
        blocking(move || note_realisations(&store, &plan, &InputPaths::new(), &made, &Signer::new(&keys)?, true)).await
    }

    /// Puts a derivation into the store, as its owner would have.
    async fn write_derivation(&self, derivation: BasicDerivation) -> Result<StorePath, Failure> {
        let (store, temp_roots) = (self.scheduler.store.clone(), self.session.temp_roots.clone());
        blocking(move || Ok(store.add_derivation(&Derivation::from(derivation), &temp_roots)?)).await
    }
}

/// Notes what a derivation's outputs turned out to be, under the name that follows from the derivation as it was before
/// its inputs were known. What was built is sent elsewhere with that. Blocks.
fn note_realisations(
    store: &Store,
    plan: &Plan,
    inputs: &InputPaths,
    made: &BTreeMap<OutputName, StorePath>,
    signer: &Signer,
    built: bool,
) -> Result<(), Failure> {
    // They may have been sent by now, without what is noted here.
    let _coming = store.queue_uploads(made.values().filter(|_| built))?;
    for (name, path) in made {
        let Some(output) = plan.outputs.get(name) else { continue };
        let id = DrvOutput::Modulo { hash: output.drv_hash, output: name.clone() };
        let mut noted = Noted::new(id, path.clone());
        // What of the inputs the output refers to: clients up to 2.33 copy the realisations of these with it.
        let references = store.path_info(path)?.map(|info| info.references).unwrap_or_default();
        noted.dependencies = dependencies(store, inputs, &references)?;
        signer.sign_realisation(&mut noted);
        store.register_realisation(&noted, store::SignaturePolicy::DontCheck)?;
    }
    Ok(())
}

fn dependencies(
    store: &Store,
    inputs: &InputPaths,
    references: &BTreeSet<StorePath>,
) -> Result<BTreeMap<DrvOutput, StorePath>, Failure> {
    let mut dependencies = BTreeMap::new();
    for ((drv, output), path) in inputs {
        if references.contains(path)
            && let Some(hash) = store.output_hash_modulo(drv, store.derivation(drv)?.as_ref())?.of(output)
        {
            dependencies.insert(DrvOutput::Modulo { hash, output: output.clone() }, path.clone());
        }
    }
    Ok(dependencies)
}
