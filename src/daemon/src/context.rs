//! What one client's requests have in common.

use std::sync::Arc;
use std::time::{Duration, Instant};

use build::Gate;
use nix_compat::conf::Settings;
use nix_compat::signature::PublicKey;
use nix_compat::store_path::StorePath;
use nix_compat::worker::Protocol;
use store::{AutoGc, Store, TempRoots};

use crate::daemon::Daemon;
use crate::error::OpError;
use crate::events::Events;
use crate::peer::{Peer, Trust};

/// Who adds to the store waits for a collection that makes room at most this long: it may have to wait for others'
/// imports, and there may be room enough already.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// How often such a wait looks.
const WAIT_STEP: Duration = Duration::from_millis(20);

/// What the work on a request may use.
pub(crate) struct Session {
    pub(crate) daemon: Arc<Daemon>,
    pub(crate) peer: Peer,
    pub(crate) trust: Trust,
    /// The daemon's settings with what this client was allowed to change.
    pub(crate) settings: Arc<Settings>,
    /// The keys of these settings, whose signatures count for what this client adds.
    pub(crate) keys: Arc<[PublicKey]>,
    pub(crate) temp_roots: Arc<TempRoots>,
    pub(crate) events: Arc<Events>,
    pub(crate) protocol: Protocol,
    /// For a client that is part of a running build: what that may see.
    pub(crate) gate: Option<Arc<Gate>>,
}

impl Session {
    pub(crate) fn store(&self) -> &Arc<Store> {
        &self.daemon.store
    }

    pub(crate) fn is_trusted(&self) -> bool {
        self.trust == Trust::Trusted
    }

    /// Whether this client may know that a path is valid.
    pub(crate) fn may_see(&self, path: &StorePath) -> bool {
        self.gate.as_ref().is_none_or(|gate| gate.allows(path))
    }

    /// The user whose share this client lives on; none when it is trusted.
    pub(crate) fn share_of(&self) -> Option<u32> {
        (!self.is_trusted()).then_some(self.peer.uid)
    }

    /// Before something is added: when space is short, waits for a collection, for a while.
    pub(crate) async fn make_room(&self) {
        let options = AutoGc::from(&*self.settings);
        if !self.store().may_lack_room(&options) {
            return;
        }
        let store = self.store().clone();
        // The collection has a thread of its own; should this one have failed, the addition tells what is wrong.
        let _ = tokio::task::spawn_blocking(move || store.keep_room(&options)).await;
        let deadline = Instant::now() + LONGEST_WAIT;
        while self.store().is_making_room() && Instant::now() < deadline {
            tokio::time::sleep(WAIT_STEP).await;
        }
    }

    /// Runs work that reads the disk or hashes on a worker thread.
    pub(crate) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T, OpError> + Send + 'static,
    ) -> Result<T, OpError> {
        let store = self.store().clone();
        tokio::task::spawn_blocking(move || work(&store))
            .await
            .unwrap_or_else(|e| Err(OpError::internal(format!("a worker thread failed: {e}"))))
    }
}
