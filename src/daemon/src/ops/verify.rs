//! VerifyStore: the health of the store, and what can be done for it.

use std::ops::ControlFlow;
use std::sync::Arc;

use nix_compat::store_path::StorePath;
use nix_compat::worker::Response;
use nix_compat::worker::stderr::Verbosity;
use store::fsck::{Report, Stage, Watch};
use tokio::runtime::Handle;

use super::build;
use crate::context::Session;
use crate::error::OpError;
use crate::events::Events;

/// Tells the client what is looked at, as long as it is there.
struct ToClient {
    events: Arc<Events>,
    store_dir: nix_compat::store_path::StoreDir,
}

impl Watch for ToClient {
    fn stage(&self, stage: Stage, _: u64) {
        let text = match stage {
            Stage::Objects => "checking the objects of the store...",
            Stage::Tables | Stage::Paths => "checking path existence...",
            Stage::Contents => "checking link hashes...",
            Stage::Repair => "repairing...",
        };
        self.events.log(Verbosity::Info, text);
    }

    fn advance(&self, _: u64) -> ControlFlow<()> {
        // A client that left has dropped its events.
        if Arc::strong_count(&self.events) > 1 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }

    fn path(&self, path: &StorePath) {
        let path = self.store_dir.display(path);
        self.events.log(Verbosity::Talkative, format!("checking contents of '{path}'"));
    }
}

/// As stock: whether there are errors that were not repaired.
pub(super) async fn verify(session: &Session, check_contents: bool, repair: bool) -> Result<Response, OpError> {
    if repair && !session.is_trusted() {
        return Err(OpError::new("you are not privileged to repair paths"));
    }
    let watch = Arc::new(ToClient { events: session.events.clone(), store_dir: session.store().store_dir().clone() });
    let watching = watch.clone();
    let report = session
        .blocking(move |store| match check_contents {
            true => Ok(store.fsck(repair, &*watching)?),
            false => Ok(store.fsck_references(&*watching)?),
        })
        .await?;
    for message in report.problems().chain(report.affected.values().map(|damage| damage.message.clone())) {
        session.events.log(Verbosity::Error, format!("error: {message}"));
    }
    if report.is_sound() || !repair {
        return Ok(Response::Bool(!report.is_sound()));
    }
    self::repair(session, report, watch).await
}

async fn repair(session: &Session, report: Report, watch: Arc<ToClient>) -> Result<Response, OpError> {
    let (scheduler, settings) = (session.daemon.scheduler.clone(), session.settings.clone());
    let clients = ClientParts::of(session);
    let runtime = Handle::current();
    let events = session.events.clone();
    session
        .blocking(move |store| {
            let mut mend = |path: &StorePath| {
                runtime.block_on(scheduler.repair_path(path.clone(), settings.clone(), clients.client()))
            };
            let repair = store.repair(&report, &mut mend, &*watch)?;
            for path in &repair.mended {
                events.log(Verbosity::Info, format!("repaired path '{}'", store.store_dir().display(path)));
            }
            for quarantined in &repair.quarantined {
                events.log(Verbosity::Error, format!("error: {}", quarantined.reason));
            }
            let stays = report.tables.iter().any(|problem| !problem.repaired);
            Ok(Response::Bool(stays || !repair.quarantined.is_empty()))
        })
        .await
}

/// What a client of the scheduler is made of, for several requests in turn.
struct ClientParts {
    events: Arc<Events>,
    temp_roots: Arc<store::TempRoots>,
    uid: u32,
}

impl ClientParts {
    fn of(session: &Session) -> Self {
        Self { events: session.events.clone(), temp_roots: session.temp_roots.clone(), uid: session.peer.uid }
    }

    fn client(&self) -> ::build::Client {
        build::plain_client(self.events.clone(), self.temp_roots.clone(), self.uid)
    }
}
