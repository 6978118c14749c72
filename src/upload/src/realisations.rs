//! Realisations that go with paths: without them nobody who wants an output of a content-addressed derivation finds its path.

use std::collections::BTreeSet;

use nix_compat::realisation::{DrvOutput, Realisation};
use nix_compat::store_path::StorePath;
use remote::OutputNames;
use store::{Signer, Store};

use crate::destination::{Destination, Error};

/// What the destination is told of an output.
enum Told {
    /// Nothing: it knows that already.
    Nothing,
    /// This.
    Of(Realisation),
    /// It believes that the output is another path, which is kept: others may have been built with it.
    Otherwise(StorePath),
}

/// The realisations of these paths but those that are `known` there, each after those it depends on.
pub(crate) fn wanted(
    store: &Store,
    paths: &BTreeSet<StorePath>,
    known: &BTreeSet<DrvOutput>,
) -> Result<Vec<Realisation>, Error> {
    let mut left = Vec::new();
    for path in paths {
        left.extend(store.realisations_of(path)?.into_iter().filter(|realisation| !known.contains(&realisation.id)));
    }
    let mut ordered = Vec::with_capacity(left.len());
    while !left.is_empty() {
        let ids: BTreeSet<DrvOutput> = left.iter().map(|realisation| realisation.id.clone()).collect();
        let is_last = |realisation: &Realisation| realisation.dependencies.keys().any(|id| ids.contains(id));
        let (later, mut next): (Vec<_>, Vec<_>) = left.into_iter().partition(is_last);
        left = later;
        if next.is_empty() {
            // A circle, which nobody who builds makes.
            next = std::mem::take(&mut left);
        }
        ordered.append(&mut next);
    }
    Ok(ordered)
}

/// The same realisation under the name that the derivation's path gives it, if it is still known which one that was.
fn by_path(store: &Store, realisation: &Realisation) -> Result<Option<Realisation>, Error> {
    let DrvOutput::Modulo { hash, output } = &realisation.id else { return Ok(Some(realisation.clone())) };
    let Some(drv) = store.path_info(&realisation.out_path)?.and_then(|info| info.deriver) else { return Ok(None) };
    if !store.is_valid(&drv)? {
        return Ok(None);
    }
    let derivation = store.derivation(&drv)?;
    if store.output_hash_modulo(&drv, &derivation)?.of(output) != Some(*hash) {
        return Ok(None);
    }
    let id = DrvOutput::Path { drv, output: output.clone() };
    Ok(Some(Realisation::new(id, realisation.out_path.clone())))
}

/// What is new in ours beside what it knows.
fn told(ours: Realisation, theirs: Option<Realisation>) -> Told {
    match theirs {
        None => Told::Of(ours),
        Some(theirs) if theirs.out_path != ours.out_path => Told::Otherwise(theirs.out_path),
        Some(theirs) if ours.signatures.is_subset(&theirs.signatures) => Told::Nothing,
        // Its signatures cover its own list of dependencies.
        Some(mut theirs) => {
            theirs.signatures.extend(ours.signatures);
            Told::Of(theirs)
        }
    }
}

impl Destination {
    /// Tells what an output turned out to be, signed, unless that is known there. The path should be there.
    pub(crate) fn send_realisation(
        &mut self,
        store: &Store,
        signer: &Signer,
        realisation: Realisation,
    ) -> Result<(), Error> {
        let id = realisation.id.clone();
        let ours = match (self.output_names(), &id) {
            (Some(OutputNames::ByHash), DrvOutput::Modulo { .. }) => Some(realisation),
            (Some(OutputNames::ByPath), _) => by_path(store, &realisation)?,
            (Some(OutputNames::ByHash), DrvOutput::Path { .. }) | (None, _) => None,
        };
        let Some(mut ours) = ours else {
            tracing::debug!(%id, "the destination has no words for a realisation");
            return Ok(());
        };
        signer.sign_realisation(&mut ours);
        let theirs = self.realisation(&ours.id)?;
        match told(ours, theirs) {
            Told::Nothing => Ok(()),
            Told::Of(realisation) => self.put_realisation(&realisation),
            Told::Otherwise(theirs) => {
                tracing::warn!(output = %id, %theirs, "a destination of uploads has another path for an output, and keeps it");
                Ok(())
            }
        }
    }
}
