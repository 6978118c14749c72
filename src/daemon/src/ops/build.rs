//! Building. The work is the scheduler's; here its results become what the protocol wants.

use std::sync::Arc;

use nix_compat::derivation::{BasicDerivation, Derivation};
use nix_compat::store_path::StorePath;
use nix_compat::worker::stderr::Verbosity;
use nix_compat::worker::{BuildMode, BuildResult, DerivedPath, Response};
use store::TempRoots;

use tokio_util::sync::CancellationToken;

use crate::context::Session;
use crate::error::OpError;
use crate::events::Events;

/// A repair replaces what others rely on.
fn check_mode(session: &Session, mode: BuildMode) -> Result<(), OpError> {
    if mode == BuildMode::Repair && !session.is_trusted() {
        return Err(OpError::fatal("repairing is not allowed because you are not in 'trusted-users'"));
    }
    Ok(())
}

/// What stock does not read without its experimental feature ends the connection, as there.
fn check_dynamic(session: &Session, paths: &[DerivedPath]) -> Result<(), OpError> {
    if paths.iter().any(|path| matches!(path, DerivedPath::Dynamic { .. })) {
        session.settings.require_feature("dynamic-derivations").map_err(|e| OpError::fatal(e.to_string()))?;
    }
    Ok(())
}

pub(super) fn client(session: &Session) -> ::build::Client {
    // Giving up is dropping the work, so nothing needs to be cancelled by name.
    let cancel = CancellationToken::new();
    ::build::Client {
        events: session.events.clone(),
        temp_roots: session.temp_roots.clone(),
        uid: session.gate.as_ref().map_or(Some(session.peer.uid), |gate| gate.client_uid()),
        cancel,
        gate: session.gate.clone(),
    }
}

/// A client that is no part of a build, for work that asks several times.
pub(super) fn plain_client(events: Arc<Events>, temp_roots: Arc<TempRoots>, uid: u32) -> ::build::Client {
    ::build::Client { events, temp_roots, uid: Some(uid), cancel: CancellationToken::new(), gate: None }
}

/// Lets a build that is the client see what it has had built.
async fn admit<'a>(session: &Session, results: impl Iterator<Item = &'a BuildResult>) -> Result<(), OpError> {
    let Some(gate) = session.gate.clone() else { return Ok(()) };
    let built = results.filter(|result| result.status.is_success()).flat_map(|result| result.built_outputs.values());
    let paths = built.map(|output| output.path.clone()).collect();
    session.blocking(move |_| Ok(gate.admit_built(&paths)?)).await
}

async fn realise(
    session: &Session,
    paths: Vec<DerivedPath>,
    mode: BuildMode,
) -> Result<Vec<(DerivedPath, BuildResult)>, OpError> {
    let scheduler = &session.daemon.scheduler;
    let results = scheduler.realise(paths, mode, session.settings.clone(), client(session)).await;
    admit(session, results.iter().map(|(_, result)| result)).await?;
    Ok(results)
}

/// BuildPaths: the first failure is the answer.
pub(super) async fn paths(session: &Session, paths: Vec<DerivedPath>, mode: BuildMode) -> Result<Response, OpError> {
    check_mode(session, mode)?;
    check_dynamic(session, &paths)?;
    let results = realise(session, paths, mode).await?;
    all_succeeded(session, &results)
}

/// The answer of an operation that fails with its builds.
fn all_succeeded(session: &Session, results: &[(DerivedPath, BuildResult)]) -> Result<Response, OpError> {
    match ::build::request_error(session.store().store_dir(), results) {
        None => Ok(Response::One),
        Some((texts, error)) => {
            for text in texts {
                session.events.log(Verbosity::Error, format!("error: {text}"));
            }
            let message = String::from_utf8_lossy(&error.message).into_owned();
            Err(OpError::Refused { message, status: error.status, in_payload: false })
        }
    }
}

/// BuildPathsWithResults: failures are results.
pub(super) async fn paths_with_results(
    session: &Session,
    paths: Vec<DerivedPath>,
    mode: BuildMode,
) -> Result<Response, OpError> {
    check_mode(session, mode)?;
    check_dynamic(session, &paths)?;
    Ok(Response::KeyedBuildResults(realise(session, paths, mode).await?))
}

/// EnsurePath.
pub(super) async fn ensure(session: &Session, path: StorePath) -> Result<Response, OpError> {
    session.temp_roots.add(&path);
    let results = realise(session, vec![DerivedPath::Opaque(path)], BuildMode::Normal).await?;
    all_succeeded(session, &results)
}

/// BuildDerivation.
pub(super) async fn derivation(
    session: &Session,
    drv_path: StorePath,
    derivation: BasicDerivation,
    mode: BuildMode,
) -> Result<Response, OpError> {
    let drv_path = if session.is_trusted() { drv_path } else { own_path(session, drv_path, &derivation).await? };
    let scheduler = &session.daemon.scheduler;
    let result =
        scheduler.build_derivation(drv_path, derivation, mode, session.settings.clone(), client(session)).await;
    admit(session, std::iter::once(&result)).await?;
    Ok(Response::BuildResult(result))
}

/// The path under which an untrusted client's derivation is built.
///
/// Nothing ties the outputs of an input-addressed derivation to what is built, so only content-addressed ones are
/// taken, and these must be where their hashes put them. The client's word for the derivation's own path counts for
/// nothing either, since logs and derivers go by it: the derivation is stored, and has the path that follows.
async fn own_path(session: &Session, drv_path: StorePath, derivation: &BasicDerivation) -> Result<StorePath, OpError> {
    if !derivation.is_content_addressed() {
        return Err(OpError::new("you are not privileged to build input-addressed derivations"));
    }
    let derivation = Derivation::from(derivation.clone());
    let temp_roots = session.temp_roots.clone();
    session
        .blocking(move |store| {
            derivation
                .verify_outputs(store.store_dir(), &drv_path, &mut |_| None)
                .map_err(|e| OpError::new(e.to_string()))?;
            Ok(store.add_derivation(&derivation, &temp_roots)?)
        })
        .await
}

/// QueryMissing.
pub(super) async fn missing(session: &Session, paths: Vec<DerivedPath>) -> Result<Response, OpError> {
    check_dynamic(session, &paths)?;
    let missing = session.daemon.scheduler.query_missing(paths, session.settings.clone(), client(session)).await;
    missing.map(Response::Missing).map_err(|e| OpError::new(e.to_string()))
}
