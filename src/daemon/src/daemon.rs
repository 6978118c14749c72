//! What all clients share.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use build::Scheduler;
use nix_compat::conf::Settings;
use nix_compat::signature::{self, PublicKey};
use parking_lot::Mutex;
use store::Store;
use tokio::sync::Semaphore;

use crate::config::Locations;
use crate::peer::{Peer, Trust};
use crate::record::Recorder;
use crate::recursive::ForBuilds;
use crate::shares::{Shares, max_clients, max_clients_of_user};
use crate::streams::{MAX_STREAMS, Streams};

/// Requests of one user who is not trusted that are large and have not arrived in full. Each is up to 64 MiB.
const LARGE_REQUESTS_OF_USER: usize = 8;

/// A daemon: its store, its builds, its configuration and its clients.
pub struct Daemon {
    pub(crate) store: Arc<Store>,
    pub(crate) scheduler: Arc<Scheduler>,
    pub(crate) settings: Arc<Settings>,
    pub(crate) locations: Locations,
    /// `trusted-public-keys`, read.
    pub(crate) keys: Arc<[PublicKey]>,
    pub(crate) streams: Streams,
    /// Held by the client whose collection runs: others wait for it here, and not on a thread.
    pub(crate) collections: Arc<tokio::sync::Mutex<()>>,
    pub(crate) recorder: Option<Recorder>,
    /// What every client is taken for, whoever it is.
    pub(crate) forced_trust: Option<Trust>,
    pub(crate) large_requests: Shares,
    /// Clients there may be at once.
    pub(crate) max_clients: usize,
    /// One for each of them.
    pub(crate) places: Arc<Semaphore>,
    clients: Mutex<Clients>,
    next_client: AtomicU64,
}

/// What only some daemons do.
#[derive(Debug, Default)]
pub struct Extras {
    /// Records every session.
    pub recorder: Option<Recorder>,
    /// Takes every client for trusted or untrusted, whoever it is (stock's `daemon-trust-override`).
    pub forced_trust: Option<Trust>,
    /// How many payloads and NARs may be under way at once; [`MAX_STREAMS`] unless told otherwise.
    pub streams: Option<usize>,
}

#[derive(Default)]
struct Clients {
    all: BTreeMap<u64, Client>,
    /// How many of them each user has.
    of_user: HashMap<u32, usize>,
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
        let max_clients = max_clients();
        let daemon = Arc::new(Self {
            keys: settings.public_keys()?.into(),
            streams: Streams::new(extras.streams.unwrap_or(MAX_STREAMS)),
            collections: Arc::default(),
            recorder: extras.recorder,
            forced_trust: extras.forced_trust,
            large_requests: Shares::new(LARGE_REQUESTS_OF_USER),
            max_clients,
            places: Arc::new(Semaphore::new(max_clients)),
            store,
            scheduler,
            settings: Arc::new(settings),
            locations,
            clients: Mutex::default(),
            next_client: AtomicU64::new(1),
        });
        daemon.scheduler.serve_builds(Arc::new(ForBuilds(Arc::downgrade(&daemon))));
        Ok(daemon)
    }

    /// Payloads and NARs that are under way now.
    pub fn streams(&self) -> usize {
        self.streams.running()
    }

    /// How many clients there have been.
    pub fn visits(&self) -> u64 {
        self.next_client.load(Ordering::Relaxed)
    }

    /// The clients that are connected now.
    pub fn clients(&self) -> Vec<Client> {
        self.clients.lock().all.values().cloned().collect()
    }

    /// Puts a client on the list for as long as the answer lives; none when its user, not being trusted, has as many
    /// as one may have.
    pub(crate) fn enter(self: &Arc<Self>, peer: Peer, trust: Trust) -> Option<Entered> {
        let uid = peer.uid;
        let mut clients = self.clients.lock();
        let own = clients.of_user.entry(uid).or_default();
        if trust == Trust::Untrusted && *own >= max_clients_of_user(self.max_clients) {
            return None;
        }
        *own += 1;
        let number = self.next_client.fetch_add(1, Ordering::Relaxed);
        clients.all.insert(number, Client { peer, since: SystemTime::now() });
        Some(Entered { daemon: self.clone(), number, uid })
    }
}

/// Takes a client off the list, however its session ends.
pub(crate) struct Entered {
    daemon: Arc<Daemon>,
    number: u64,
    uid: u32,
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut clients = self.daemon.clients.lock();
        clients.all.remove(&self.number);
        if let Some(own) = clients.of_user.get_mut(&self.uid) {
            *own -= 1;
            if *own == 0 {
                clients.of_user.remove(&self.uid);
            }
        }
    }
}
