//! Roots, garbage, signatures, logs, and the health of the store.

use std::collections::BTreeSet;
use std::io::Read;
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, PathBuf};
use std::sync::Arc;

use castore::repack::Repacked;
use nix_compat::signature::Signature;
use nix_compat::store_path::{StoreDir, StorePath};
use nix_compat::worker::stderr::{ActivityKind, Field, Message, ResultKind, Verbosity};
use nix_compat::worker::{CollectGarbage, Features, GcAction as Asked, GcTargets, Payload, Response};
use store::{GcAction, GcOptions, GcScope, GcStep, GcWatch};
use tokio_util::sync::CancellationToken;

use crate::connection::Input;
use crate::context::Session;
use crate::error::OpError;
use crate::events::Events;
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

/// A path in the file system as stock takes it: made absolute against the daemon's own directory, without `.` and `..`.
fn absolute(bytes: Vec<u8>) -> Result<PathBuf, OpError> {
    let given = path_buf(bytes);
    let failed = |e: std::io::Error| OpError::new(format!("cannot tell where '{}' is: {e}", given.display()));
    let base = std::env::current_dir().map_err(failed)?;
    let mut path = PathBuf::new();
    for component in base.join(&given).components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => drop(path.pop()),
            other => path.push(other),
        }
    }
    Ok(path)
}

pub(super) async fn add_indirect_root(session: &Session, link: Vec<u8>) -> Result<Response, OpError> {
    session
        .blocking(move |store| {
            store.add_indirect_root(&absolute(link)?)?;
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
            let link = absolute(link)?;
            store.add_permanent_root(&path, &link)?;
            Ok(Response::Bytes(link.into_os_string().into_vec()))
        })
        .await
}

pub(super) async fn find_roots(session: &Session) -> Result<Response, OpError> {
    let trusted = session.is_trusted();
    let events = session.events.clone();
    session
        .blocking(move |store| {
            let roots = store.find_roots_noting(&mut |note| events.log(Verbosity::Info, note.to_string()))?;
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
    let action = match asked.action {
        Asked::ReturnLive => GcAction::ReturnLive,
        Asked::ReturnDead => GcAction::ReturnDead,
        Asked::DeleteDead => GcAction::DeleteDead,
        Asked::DeleteSpecific => GcAction::DeleteSpecific,
    };
    let scope = match asked.targets {
        GcTargets::WholeStore if action == GcAction::DeleteSpecific => {
            return Err(OpError::new("deleting given paths, but no paths are given"));
        }
        GcTargets::WholeStore => GcScope::WholeStore,
        // Stock up to 2.34 takes this for a request to delete all that is dead. Whoever means that gives no paths.
        GcTargets::Paths { .. }
            if action == GcAction::DeleteDead && !session.protocol.has(Features::DELETE_REFERRERS) =>
        {
            return Err(OpError::new(
                "deleting only the dead among given paths needs the protocol feature 'delete-dead-specific-referrers'",
            ));
        }
        GcTargets::Paths { paths, delete_referrers } => GcScope::Paths { paths, with_referrers: delete_referrers },
    };
    let options = GcOptions {
        action,
        scope,
        max_freed: asked.max_freed,
        keep_derivations: session.settings.keep_derivations,
        keep_outputs: session.settings.keep_outputs,
    };
    // When this is dropped, because the client is gone, the collection ends where the store is whole.
    let stop = CancellationToken::new();
    let _stop_with_us = stop.clone().drop_guard();
    let store_dir = session.store().store_dir().clone();
    let watch = Watch { events: session.events.clone(), store_dir, max_freed: asked.max_freed, stop };
    // Whoever waits for its turn holds no thread.
    let turns = session.daemon.collections.clone();
    let turn = match turns.clone().try_lock_owned() {
        Ok(turn) => turn,
        Err(_) => {
            watch.step(GcStep::Waiting);
            turns.lock_owned().await
        }
    };
    session
        .blocking(move |store| {
            let _turn = turn;
            let outcome = store.collect_garbage_watched(&options, &watch)?;
            let display = |path: &StorePath| store.store_dir().display(path).into_bytes();
            Ok(Response::Collected {
                paths: outcome.paths.iter().map(display).collect(),
                bytes_freed: outcome.bytes_freed,
            })
        })
        .await
}

/// Tells a client how its collection goes on, in stock's words, and the collection whether the client is still there.
struct Watch {
    events: Arc<Events>,
    store_dir: StoreDir,
    max_freed: u64,
    stop: CancellationToken,
}

impl GcWatch for Watch {
    fn step(&self, step: GcStep<'_>) {
        let line = match step {
            GcStep::Waiting => "waiting for the big garbage collector lock...".to_owned(),
            GcStep::FindingRoots => "finding garbage collector roots...".to_owned(),
            GcStep::Noted(note) => note.to_string(),
            GcStep::Determining => "determining live/dead paths...".to_owned(),
            GcStep::Deleting => "deleting garbage...".to_owned(),
            GcStep::Deleted(path) => format!("deleting '{}'", self.store_dir.display(path)),
            GcStep::Enough => format!("deleted more than {} bytes; stopping", self.max_freed),
        };
        self.events.log(Verbosity::Info, line);
    }

    fn go_on(&self) -> bool {
        !self.stop.is_cancelled()
    }
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

/// OptimiseStore: contents are deduplicated as they come, so what is left is to pack them more densely. The client waits,
/// as with stock, and sees how far it is; it may leave, and what was done by then stays.
pub(super) async fn optimise(session: &Session) -> Result<Response, OpError> {
    let activity = Activity::start(session.events.clone(), ActivityKind::OptimiseStore);
    let done = session
        .blocking(move |store| {
            let mut shown = 0;
            let done = store.optimise(&mut |done: &Repacked| {
                if done.done_packs > shown {
                    shown = done.done_packs;
                    activity.progress(done.done_packs, done.expected_packs);
                }
                if activity.has_audience() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            });
            Ok(done?)
        })
        .await?;
    session.events.log(
        Verbosity::Info,
        format!(
            "{:.1} MiB freed by packing {} files more densely",
            done.saved_bytes() as f64 / (1 << 20) as f64,
            done.deleted_packs
        ),
    );
    Ok(Response::One)
}

/// An activity without text, until it is dropped.
struct Activity {
    id: u64,
    events: Arc<Events>,
}

impl Activity {
    fn start(events: Arc<Events>, kind: ActivityKind) -> Self {
        let id = ::build::activity_id();
        events.push(Message::StartActivity {
            id,
            level: Verbosity::Error,
            kind,
            text: Vec::new(),
            fields: Vec::new(),
            parent: 0,
        });
        Self { id, events }
    }

    fn progress(&self, done: u64, expected: u64) {
        let fields = [done, expected, 0, 0].map(Field::Int).to_vec();
        self.events.push(Message::Result { id: self.id, kind: ResultKind::Progress, fields });
    }

    /// Whether the client is still there: one that left has dropped its events.
    fn has_audience(&self) -> bool {
        Arc::strong_count(&self.events) > 1
    }
}

impl Drop for Activity {
    fn drop(&mut self) {
        self.events.push(Message::StopActivity(self.id));
    }
}
