//! What all clients share.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use build::Scheduler;
use nix_compat::conf::Settings;
use nix_compat::signature::{self, PublicKey};
use parking_lot::Mutex;
use store::Store;

use crate::config::Locations;
use crate::peer::{Peer, Trust};
use crate::record::Recorder;
use crate::streams::Streams;

/// A daemon: its store, its builds, its configuration and its clients.
pub struct Daemon {
    pub(crate) store: Arc<Store>,
    pub(crate) scheduler: Arc<Scheduler>,
    pub(crate) settings: Arc<Settings>,
    pub(crate) locations: Locations,
    /// `trusted-public-keys`, read.
    pub(crate) keys: Arc<[PublicKey]>,
    pub(crate) streams: Streams,
    pub(crate) recorder: Option<Recorder>,
    /// What every client is taken for, whoever it is.
    pub(crate) forced_trust: Option<Trust>,
    clients: Mutex<BTreeMap<u64, Client>>,
    next_client: AtomicU64,
}

/// What only some daemons do.
#[derive(Debug, Default)]
pub struct Extras {
    /// Records every session.
    pub recorder: Option<Recorder>,
    /// Takes every client for trusted or untrusted, whoever it is (stock's `daemon-trust-override`).
    pub forced_trust: Option<Trust>,
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
        extras: Extras,
    ) -> Result<Arc<Self>, signature::Error> {
        Ok(Arc::new(Self {
            keys: settings.public_keys()?.into(),
            streams: Streams::new(),
            recorder: extras.recorder,
            forced_trust: extras.forced_trust,
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

    /// Puts a client on the list for as long as the answer lives.
    pub(crate) fn enter(self: &Arc<Self>, peer: Peer) -> Entered {
        let number = self.next_client.fetch_add(1, Ordering::Relaxed);
        self.clients.lock().insert(number, Client { peer, since: SystemTime::now() });
        Entered { daemon: self.clone(), number }
    }
}

/// Takes a client off the list, however its session ends.
pub(crate) struct Entered {
    daemon: Arc<Daemon>,
    number: u64,
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.daemon.clients.lock().remove(&self.number);
    }
}
