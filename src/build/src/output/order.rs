//! In which order outputs get their paths: what one refers to comes before it.

use std::collections::{BTreeMap, BTreeSet};

use nix_compat::derivation::OutputName;
use nix_compat::store_path::StorePath;
use nix_compat::worker::BuildStatus;
use store::Ingested;

use crate::failure::Failure;

/// The outputs in an order in which each comes after its fellows that it refers to. An output may refer to itself.
///
/// # Errors
/// When two refer to each other, directly or not: neither could be moved, or deleted, without the other.
pub(super) fn fellows_first(
    taken: &BTreeMap<OutputName, Ingested>,
    scratch: &BTreeMap<OutputName, StorePath>,
    drv: &str,
) -> Result<Vec<OutputName>, Failure> {
    let mut waiting: BTreeMap<&OutputName, BTreeSet<&OutputName>> = BTreeMap::new();
    for (name, ingested) in taken {
        let refers = |fellow: &&OutputName| {
            *fellow != name && scratch.get(*fellow).is_some_and(|path| ingested.nar.references.contains(path))
        };
        waiting.insert(name, taken.keys().filter(refers).collect());
    }
    let mut order = Vec::new();
    while let Some((first, fellows)) = waiting.first_key_value() {
        let Some(next) = waiting.iter().find(|(_, fellows)| fellows.is_empty()).map(|(name, _)| *name) else {
            let other = fellows.first().map(ToString::to_string).unwrap_or_default();
            let text = format!(
                "cycle detected in build of '{drv}' in the references of output '{first}' from output '{other}'"
            );
            return Err(Failure::new(BuildStatus::OutputRejected, text));
        };
        waiting.remove(next);
        waiting.values_mut().for_each(|fellows| {
            fellows.remove(next);
        });
        order.push(next.clone());
    }
    Ok(order)
}
