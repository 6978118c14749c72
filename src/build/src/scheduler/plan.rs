//! What is known of a derivation before anything is built.

use std::collections::BTreeMap;
use std::sync::Arc;

use nix_compat::content_address::Method;
use nix_compat::derivation::{BasicDerivation, Derivation, HashModulo, Output, OutputName};
use nix_compat::realisation::DrvOutput;
use nix_compat::store_path::{StorePath, fixed_output_path};
use nix_compat::worker::{BuildResult, BuildStatus, BuiltOutput};
use store::Store;

use crate::failure::Failure;
use crate::options::Options;

/// A derivation, and what is known of its outputs.
#[derive(Clone)]
pub(crate) struct Plan {
    pub(crate) derivation: Arc<Derivation>,
    pub(crate) outputs: BTreeMap<OutputName, PlannedOutput>,
}

/// An output that somebody may want.
#[derive(Clone, Debug)]
pub(crate) struct PlannedOutput {
    /// The hash that names it, with its own name, in realisations.
    pub(crate) drv_hash: [u8; 32],
    /// Its path: from the derivation, or from a realisation.
    pub(crate) path: Option<StorePath>,
    /// Whether that path is valid.
    pub(crate) valid: bool,
}

/// What stock sends in the place of a hash when it has none.
pub(crate) const NO_HASH: [u8; 32] = [0; 32];

impl Plan {
    /// Reads a derivation from the store. Blocks.
    pub(crate) fn load(store: &Store, drv: &StorePath) -> Result<Self, Failure> {
        Self::of(store, drv, read(store, drv)?)
    }

    /// The same without the hash, where the paths are known without it: enough to see what is there. Blocks.
    pub(crate) fn peek(store: &Store, drv: &StorePath) -> Result<Self, Failure> {
        let derivation = read(store, drv)?;
        if derivation.basic.outputs.values().any(|output| output.path().is_none()) {
            return Self::of(store, drv, derivation);
        }
        Self::with_hash(store, drv, derivation, &HashModulo::Deferred(NO_HASH))
    }

    /// The plan for a derivation that need not be in the store. Blocks.
    pub(crate) fn of(store: &Store, drv: &StorePath, derivation: Arc<Derivation>) -> Result<Self, Failure> {
        // Of a derivation that a client sent the inputs' derivations need not be here. Then nothing is known of it.
        let hash = store.output_hash_modulo(drv, &derivation).unwrap_or(HashModulo::Deferred(NO_HASH));
        Self::with_hash(store, drv, derivation, &hash)
    }

    fn with_hash(
        store: &Store,
        drv: &StorePath,
        derivation: Arc<Derivation>,
        hash: &HashModulo,
    ) -> Result<Self, Failure> {
        let impure = derivation.basic.is_impure();
        let mut outputs = BTreeMap::new();
        for (name, output) in &derivation.basic.outputs {
            check_fixed_path(store, drv, &derivation.basic, name, output)?;
            let drv_hash = hash.of(name).unwrap_or(NO_HASH);
            let mut path = output.path().cloned();
            if path.is_none() && drv_hash != NO_HASH && !impure {
                let id = DrvOutput::Modulo { hash: drv_hash, output: name.clone() };
                path = store.realisation(&id)?.map(|realisation| realisation.out_path);
            }
            let valid = path.as_ref().map(|path| store.is_valid(path)).transpose()?.unwrap_or(false);
            outputs.insert(name.clone(), PlannedOutput { drv_hash, path, valid });
        }
        Ok(Self { derivation, outputs })
    }

    /// Whether an output is valid.
    pub(crate) fn has(&self, output: &OutputName) -> bool {
        self.outputs.get(output).is_some_and(|output| output.valid)
    }

    /// Whether every output is.
    pub(crate) fn is_complete(&self) -> bool {
        self.outputs.values().all(|output| output.valid)
    }

    /// The paths that are known, of valid outputs and others.
    pub(crate) fn paths(&self) -> impl Iterator<Item = &StorePath> {
        self.outputs.values().filter_map(|output| output.path.as_ref())
    }

    /// A result with the outputs whose paths are known.
    pub(crate) fn success(&self, status: BuildStatus) -> BuildResult {
        self.success_with(status, &BTreeMap::new())
    }

    /// A result with the outputs whose paths are known, and those that were made.
    pub(crate) fn success_with(&self, status: BuildStatus, made: &BTreeMap<OutputName, StorePath>) -> BuildResult {
        let mut result = BuildResult::new(status, "");
        for (name, output) in &self.outputs {
            if let Some(path) = made.get(name).or(output.path.as_ref()) {
                let built = BuiltOutput { drv_hash: output.drv_hash, path: path.clone() };
                result.built_outputs.insert(name.clone(), built);
            }
        }
        result
    }

    /// Refuses what needs an experimental feature that is not enabled.
    pub(crate) fn check_features(&self, options: &Options) -> Result<(), Failure> {
        let outputs = || self.derivation.basic.outputs.values();
        let floating = outputs().any(|output| matches!(output, Output::Floating { .. } | Output::Deferred));
        let git = outputs().any(|output| match output {
            Output::Fixed { ca, .. } => ca.method == Method::Git,
            Output::Floating { method, .. } | Output::Impure { method, .. } => *method == Method::Git,
            Output::InputAddressed(_) | Output::Deferred => false,
        });
        for (needed, feature) in [
            (git, "git-hashing"),
            (floating, "ca-derivations"),
            (self.derivation.basic.is_impure(), "impure-derivations"),
            (self.derivation.is_dynamic(), "dynamic-derivations"),
        ] {
            if needed {
                options.require_feature(feature)?;
            }
        }
        Ok(())
    }
}

fn read(store: &Store, drv: &StorePath) -> Result<Arc<Derivation>, Failure> {
    if !store.is_valid(drv)? {
        return Err(Failure::no_derivation(store.store_dir(), drv));
    }
    Ok(store.derivation(drv)?)
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
