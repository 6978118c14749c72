//! Questions about paths. Those answered from the index alone are answered in place.

use std::collections::BTreeSet;

use nix_compat::nixbase32;
use nix_compat::store_path::StorePath;
use nix_compat::worker::Response;
use store::derivations::output_paths;

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
fn is_no_derivation(store: &store::Store, path: &StorePath) -> Result<bool, OpError> {
    Ok(!path.is_derivation() && store.is_valid(path)?)
}

pub(super) async fn derivation_outputs(session: &Session, path: StorePath) -> Result<Response, OpError> {
    session
        .blocking(move |store| {
            if is_no_derivation(store, &path)? {
                return Ok(Response::Paths(BTreeSet::new()));
            }
            let outputs = output_paths(&store.derivation(&path)?.basic);
            Ok(Response::Paths(outputs.into_values().collect()))
        })
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
    session
        .blocking(move |store| {
            if is_no_derivation(store, &path)? {
                return Ok(Response::OutputMap(std::collections::BTreeMap::new()));
            }
            let derivation = store.derivation(&path)?;
            let paths = output_paths(&derivation.basic);
            let names = derivation.basic.outputs.keys();
            Ok(Response::OutputMap(names.map(|name| (name.clone(), paths.get(name).cloned())).collect()))
        })
        .await
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
    paths: BTreeSet<StorePath>,
    // Nothing can be substituted yet.
    _substitute: bool,
) -> Result<Response, OpError> {
    session
        .blocking(move |store| {
            let mut valid = BTreeSet::new();
            for path in paths {
                if store.is_valid(&path)? {
                    valid.insert(path);
                }
            }
            Ok(Response::Paths(valid))
        })
        .await
}
