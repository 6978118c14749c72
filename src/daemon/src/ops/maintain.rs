//! Roots, garbage, signatures, logs, and the health of the store.

use std::collections::BTreeSet;
use std::io::Read;
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use nix_compat::signature::Signature;
use nix_compat::store_path::StorePath;
use nix_compat::worker::stderr::Verbosity;
use nix_compat::worker::{CollectGarbage, GcAction as Asked, GcTargets, Payload, Response};
use store::{GcAction, GcOptions};

use crate::connection::Input;
use crate::context::Session;
use crate::error::OpError;
use crate::payload;

/// What an untrusted client sees in place of a root that tells of other users.
const CENSORED: &str = "{censored}";
/// The longest log a client may store, in bytes.
const MAX_LOG: u64 = 1 << 30;
/// Bytes of a log written at a time.
const LOG_PIECE: usize = 64 * 1024;

fn path_buf(bytes: Vec<u8>) -> PathBuf {
    std::ffi::OsString::from_vec(bytes).into()
}

pub(super) async fn add_indirect_root(session: &Session, link: Vec<u8>) -> Result<Response, OpError> {
    session
        .blocking(move |store| {
            store.add_indirect_root(&path_buf(link))?;
            Ok(Response::One)
        })
        .await
}

pub(super) async fn add_permanent_root(session: &Session, path: StorePath, link: Vec<u8>) -> Result<Response, OpError> {
    if !session.is_trusted() {
        // Stock refuses before it has read the link, and then has to close.
        return Err(OpError::new(
            "you are not privileged to create perm roots\n\nhint: you can just do this client-side without special \
             privileges, and probably want to do that instead.",
        ));
    }
    session
        .blocking(move |store| {
            store.add_permanent_root(&path, &path_buf(link.clone()))?;
            Ok(Response::Bytes(link))
        })
        .await
}

pub(super) async fn find_roots(session: &Session) -> Result<Response, OpError> {
    let trusted = session.is_trusted();
    session
        .blocking(move |store| {
            let roots = store.find_roots()?;
            let shown = roots.into_iter().map(|root| {
                let link = if root.private && !trusted { CENSORED.into() } else { root.link };
                (link, root.path)
            });
            Ok(Response::Roots(shown.collect::<BTreeSet<_>>().into_iter().collect()))
        })
        .await
}

pub(super) async fn collect_garbage(session: &Session, asked: CollectGarbage) -> Result<Response, OpError> {
    if asked.ignore_liveness {
        return Err(OpError::new("you are not allowed to ignore liveness"));
    }
    let action = match (asked.action, asked.targets) {
        (Asked::ReturnLive, _) => GcAction::ReturnLive,
        (Asked::ReturnDead, _) => GcAction::ReturnDead,
        (Asked::DeleteDead, GcTargets::WholeStore) => GcAction::DeleteDead,
        (Asked::DeleteSpecific, GcTargets::Paths { paths, delete_referrers: false }) => GcAction::DeleteSpecific(paths),
        // Stock up to 2.34 takes a request to delete the dead among some paths for one to delete all that is dead.
        (Asked::DeleteDead, GcTargets::Paths { .. }) => {
            return Err(OpError::new("deleting only the dead among given paths is not supported"));
        }
        (Asked::DeleteSpecific, _) => {
            return Err(OpError::new("deleting the referrers of given paths is not supported"));
        }
    };
    let options = GcOptions {
        action,
        max_freed: asked.max_freed,
        keep_derivations: session.settings.keep_derivations,
        keep_outputs: session.settings.keep_outputs,
    };
    session
        .blocking(move |store| {
            let outcome = store.collect_garbage(&options)?;
            let display = |path: &StorePath| store.store_dir().display(path).into_bytes();
            Ok(Response::Collected {
                paths: outcome.paths.iter().map(display).collect(),
                bytes_freed: outcome.bytes_freed,
            })
        })
        .await
}

pub(super) async fn add_signatures(
    session: &Session,
    path: StorePath,
    signatures: BTreeSet<Signature>,
) -> Result<Response, OpError> {
    session
        .blocking(move |store| {
            store.add_signatures(&path, signatures)?;
            Ok(Response::One)
        })
        .await
}

/// AddBuildLog: a log that was made elsewhere.
pub(super) async fn add_build_log(
    session: &Session,
    input: &mut Input,
    path: StorePath,
    payload: Payload,
) -> Result<Response, OpError> {
    let refusal = if !session.is_trusted() {
        Some("you are not privileged to add logs")
    } else if !path.is_derivation() {
        Some("a build log belongs to a derivation, a path that ends in '.drv'")
    } else {
        None
    };
    if let Some(refusal) = refusal {
        payload::discard(session, input, payload).await?;
        return Err(OpError::new(refusal));
    }
    let log_dir = session.daemon.locations.log_dir.clone();
    payload::receive(session, input, payload, move |reader| {
        let failed = |e: std::io::Error| OpError::new(format!("cannot store the log of '{path}': {e}"));
        let mut log = ::build::log::LogFile::create(&log_dir, &path, true).map_err(failed)?;
        let mut rest = reader.take(MAX_LOG);
        let mut piece = vec![0; LOG_PIECE];
        loop {
            match rest.read(&mut piece).map_err(failed)? {
                0 => break,
                n => log.write(&piece[..n]).map_err(failed)?,
            }
        }
        log.finish().map_err(failed)
    })
    .await?;
    Ok(Response::One)
}

/// Contents are deduplicated as they come, so there is nothing to do.
pub(super) fn optimise(session: &Session) -> Response {
    session.events.log(Verbosity::Info, "the store is deduplicated as it is written: nothing to optimise");
    Response::One
}

pub(super) async fn verify(session: &Session, check_contents: bool, repair: bool) -> Result<Response, OpError> {
    if repair && !session.is_trusted() {
        return Err(OpError::new("you are not privileged to repair paths"));
    }
    let events = session.events.clone();
    events.log(Verbosity::Info, "checking path existence...");
    let damage = session
        .blocking(move |store| {
            // A client that left has dropped its events.
            let mut each = |path: &StorePath| {
                if check_contents {
                    let path = store.store_dir().display(path);
                    events.log(Verbosity::Talkative, format!("checking contents of '{path}'"));
                }
                if std::sync::Arc::strong_count(&events) > 1 {
                    ControlFlow::Continue(())
                } else {
                    ControlFlow::Break(())
                }
            };
            Ok(store.verify(check_contents, &mut each)?)
        })
        .await?;
    for found in &damage {
        session.events.log(Verbosity::Error, format!("error: {}", found.message));
    }
    if repair && !damage.is_empty() {
        session.events.log(Verbosity::Warn, "warning: repairing is not supported yet; the paths are left as they are");
    }
    Ok(Response::Bool(!damage.is_empty()))
}
