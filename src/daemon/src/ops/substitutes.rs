//! What could be fetched from elsewhere, and fetching it.

use std::collections::{BTreeMap, BTreeSet};

use nix_compat::content_address::ContentAddress;
use nix_compat::store_path::StorePath;
use nix_compat::worker::Response;
use substitute::Wanted;

use super::build::client;
use crate::context::Session;
use crate::error::OpError;

async fn available(session: &Session, paths: BTreeSet<StorePath>) -> BTreeSet<StorePath> {
    session.daemon.scheduler.substitutable_paths(paths, session.settings.clone(), client(session)).await
}

/// HasSubstitutes.
pub(super) async fn has(session: &Session, path: StorePath) -> Response {
    Response::Bool(!available(session, BTreeSet::from([path])).await.is_empty())
}

/// QuerySubstitutablePaths.
pub(super) async fn paths(session: &Session, paths: BTreeSet<StorePath>) -> Response {
    Response::Paths(available(session, paths).await)
}

/// QuerySubstitutablePathInfo.
pub(super) async fn info(session: &Session, path: StorePath) -> Response {
    let (scheduler, settings) = (&session.daemon.scheduler, session.settings.clone());
    let found = scheduler.substitutable(vec![path.into()], false, settings, client(session)).await;
    Response::SubstitutableInfo(found.into_values().next())
}

/// QuerySubstitutablePathInfos.
pub(super) async fn infos(session: &Session, paths: BTreeMap<StorePath, Option<ContentAddress>>) -> Response {
    let wanted = paths.into_iter().map(|(path, ca)| Wanted { path, ca, explicit: false }).collect();
    let (scheduler, settings) = (&session.daemon.scheduler, session.settings.clone());
    Response::SubstitutableInfos(scheduler.substitutable(wanted, false, settings, client(session)).await)
}

/// Fetches what of the paths is not valid, as far as it can be had. Derivations are left out, as in stock.
pub(super) async fn fetch(session: &Session, paths: &BTreeSet<StorePath>) -> Result<(), OpError> {
    let mut absent = Vec::new();
    for path in paths.iter().filter(|path| !path.is_derivation()) {
        if !session.store().is_valid(path)? {
            absent.push(path.clone());
        }
    }
    if !absent.is_empty() {
        session.daemon.scheduler.substitute_paths(absent, session.settings.clone(), client(session)).await;
    }
    Ok(())
}
