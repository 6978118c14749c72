//! Questions about paths. Those answered from the index alone are answered in place.

use std::collections::{BTreeMap, BTreeSet};

use nix_compat::derivation::OutputName;
use nix_compat::nixbase32;
use nix_compat::store_path::StorePath;
use nix_compat::worker::Response;
use store::Store;

use crate::context::Session;
use crate::error::OpError;

/// Characters of a hash part.
const HASH_PART: usize = 32;

pub(super) fn path_hash(session: &Session, path: &StorePath) -> Result<Response, OpError> {
    Ok(Response::NarHash(session.store().valid_entry(path)?.info.nar_hash))
}

pub(super) fn references(session: &Session, path: &StorePath) -> Result<Response, OpError> {
    Ok(Response::Paths(session.store().valid_entry(path)?.info.references))
}

pub(super) fn deriver(session: &Session, path: &StorePath) -> Result<Response, OpError> {
    Ok(Response::Path(session.store().valid_entry(path)?.info.deriver))
}

pub(super) fn valid_derivers(session: &Session, path: &StorePath) -> Result<Response, OpError> {
    Ok(Response::Paths(session.store().valid_derivers(path)?.into_keys().collect()))
}

/// Whether a path is valid and by its name no derivation: it has no outputs, which is no error.
fn is_no_derivation(store: &Store, path: &StorePath) -> Result<bool, OpError> {
    Ok(!path.is_derivation() && store.is_valid(path)?)
}

/// The outputs of a derivation with their paths, as far as they are known.
fn output_map(store: &Store, path: &StorePath) -> Result<BTreeMap<OutputName, Option<StorePath>>, OpError> {
    if is_no_derivation(store, path)? { Ok(BTreeMap::new()) } else { Ok(store.output_map(path)?) }
}

pub(super) async fn derivation_outputs(session: &Session, path: StorePath) -> Result<Response, OpError> {
    session
        .blocking(move |store| Ok(Response::Paths(output_map(store, &path)?.into_values().flatten().collect())))
        .await
}

pub(super) async fn derivation_output_names(session: &Session, path: StorePath) -> Result<Response, OpError> {
    session
        .blocking(move |store| {
            let derivation = store.derivation(&path)?;
            Ok(Response::Strings(derivation.basic.outputs.keys().cloned().collect()))
        })
        .await
}

pub(super) async fn derivation_output_map(session: &Session, path: StorePath) -> Result<Response, OpError> {
    session.blocking(move |store| Ok(Response::OutputMap(output_map(store, &path)?))).await
}

pub(super) fn path_from_hash_part(session: &Session, hash_part: &str) -> Result<Response, OpError> {
    if hash_part.len() != HASH_PART {
        return Err(OpError::new("invalid hash part"));
    }
    // What no hash part can be is the hash part of nothing.
    let digest: Option<[u8; 20]> = nixbase32::decode(hash_part).ok().and_then(|digest| digest.try_into().ok());
    Ok(Response::Path(match digest {
        Some(digest) => session.store().path_from_hash_part(&digest)?,
        None => None,
    }))
}

pub(super) async fn all_valid_paths(session: &Session) -> Result<Response, OpError> {
    session.blocking(|store| Ok(Response::Paths(store.all_valid_paths()?))).await
}

pub(super) async fn valid_paths(
    session: &Session,
    mut paths: BTreeSet<StorePath>,
    substitute: bool,
) -> Result<Response, OpError> {
    if substitute {
        super::substitutes::fetch(session, &paths).await?;
    }
    session
        .blocking(move |store| {
            let mut failure = None;
            paths.retain(|path| {
                store.is_valid(path).unwrap_or_else(|error| {
                    failure.get_or_insert(error);
                    false
                })
            });
            failure.map_or(Ok(Response::Paths(paths)), |error| Err(error.into()))
        })
        .await
}
