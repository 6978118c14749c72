//! Accepting clients.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use build::Scheduler;
use nix_compat::conf::Settings;
use nix_compat::signature::{self, PublicKey};
use parking_lot::Mutex;
use store::Store;
use tokio::net::{UnixListener, UnixStream};

use crate::config::Locations;
use crate::peer::Peer;
use crate::session;

/// How long accepting rests when the process has run out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What all sessions share.
pub struct Daemon {
    pub(crate) store: Arc<Store>,
    pub(crate) scheduler: Arc<Scheduler>,
    pub(crate) settings: Arc<Settings>,
    pub(crate) locations: Locations,
    /// `trusted-public-keys`, read.
    pub(crate) keys: Arc<[PublicKey]>,
    clients: Mutex<BTreeMap<u64, Client>>,
    next_client: AtomicU64,
}

/// A connected client, for `castored status`.
#[derive(Clone, Debug)]
pub struct Client {
    /// Who it is.
    pub peer: Peer,
    /// Since when.
    pub since: SystemTime,
}

impl Daemon {
    /// A daemon over an open store.
    ///
    /// # Errors
    /// When one of `trusted-public-keys` is not a key.
    pub fn new(
        store: Arc<Store>,
        scheduler: Arc<Scheduler>,
        settings: Settings,
        locations: Locations,
    ) -> Result<Arc<Self>, signature::Error> {
        Ok(Arc::new(Self {
            keys: settings.public_keys()?.into(),
            store,
            scheduler,
            settings: Arc::new(settings),
            locations,
            clients: Mutex::default(),
            next_client: AtomicU64::new(1),
        }))
    }

    /// The clients that are connected now.
    pub fn clients(&self) -> Vec<Client> {
        self.clients.lock().values().cloned().collect()
    }

    /// Serves clients until `shutdown` is done. Sessions that are still running then end with the runtime.
    pub async fn run(self: &Arc<Self>, listener: UnixListener, shutdown: impl Future<Output = ()>) {
        tokio::pin!(shutdown);
        loop {
            tokio::select! {
                () = &mut shutdown => return,
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => self.admit(stream),
                    Err(error) => {
                        // Most likely EMFILE: others will leave.
                        tracing::warn!(%error, "cannot accept a client; trying again");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
    }

    fn admit(self: &Arc<Self>, stream: UnixStream) {
        let peer = match Peer::of(&stream) {
            Ok(peer) => peer,
            Err(error) => {
                tracing::warn!(%error, "refused a client whose identity is not known");
                return;
            }
        };
        let Some(trust) = peer.trust(&self.settings) else {
            tracing::warn!(user = peer.user, pid = peer.pid, "refused a user who is not in allowed-users");
            return;
        };
        let daemon = self.clone();
        tokio::spawn(async move {
            let number = daemon.next_client.fetch_add(1, Ordering::Relaxed);
            daemon.clients.lock().insert(number, Client { peer: peer.clone(), since: SystemTime::now() });
            let _registered = Registered { daemon: daemon.clone(), number };
            tracing::debug!(user = peer.user, pid = peer.pid, ?trust, "accepted a client");
            if let Err(error) = session::serve(daemon, stream, peer.clone(), trust).await {
                tracing::debug!(user = peer.user, pid = peer.pid, %error, "a connection ended early");
            }
        });
    }
}

/// Takes a client off the list, however its session ends.
struct Registered {
    daemon: Arc<Daemon>,
    number: u64,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.daemon.clients.lock().remove(&self.number);
    }
}
