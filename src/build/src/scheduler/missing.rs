//! What a request would build, found out without building anything.

use std::collections::HashSet;

use nix_compat::store_path::StorePath;
use nix_compat::worker::{DerivedPath, Missing, OutputsSpec};
use store::Store;

use super::plan::Plan;
use crate::failure::Failure;

/// Walks from the wanted paths down to what is valid. Blocks.
pub(crate) fn query(store: &Store, wanted: &[DerivedPath]) -> Result<Missing, Failure> {
    let mut missing = Missing::default();
    let mut seen: HashSet<StorePath> = HashSet::new();
    let mut todo = wanted.to_vec();
    while let Some(path) = todo.pop() {
        let (drv, outputs) = match path {
            DerivedPath::Opaque(path) => {
                if !store.is_valid(&path)? {
                    missing.unknown.insert(path);
                }
                continue;
            }
            DerivedPath::Built { drv, outputs } => (drv, outputs),
            // Nothing is known of the derivation that the last outputs are of.
            DerivedPath::Dynamic { drv, through, .. } => {
                (drv, OutputsSpec::Names(through.into_iter().take(1).collect()))
            }
        };
        if !store.is_valid(&drv)? {
            missing.unknown.insert(drv);
            continue;
        }
        // What cannot be planned will say so when it is built.
        let Ok(plan) = Plan::load(store, &drv) else { continue };
        if plan.outputs.keys().all(|name| plan.has(name) || !outputs.contains(name)) || !seen.insert(drv.clone()) {
            continue;
        }
        missing.will_build.insert(drv);
        todo.extend(plan.derivation.basic.input_srcs.iter().cloned().map(DerivedPath::Opaque));
        todo.extend(plan.derivation.input_drvs.iter().map(|(drv, wanted)| DerivedPath::Built {
            drv: drv.clone(),
            outputs: OutputsSpec::Names(wanted.outputs.iter().chain(wanted.dynamic.keys()).cloned().collect()),
        }));
    }
    Ok(missing)
}
