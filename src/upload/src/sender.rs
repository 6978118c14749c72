//! One destination's thread.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fetch::DownloadOptions;
use nix_compat::realisation::DrvOutput;
use nix_compat::store_path::StorePath;
use parking_lot::{Condvar, Mutex};
use remote::Stopper;
use store::{Signer, Store, UploadTarget};

use crate::destination::{Destination, Error};
use crate::realisations::wanted;

/// Paths taken from the queue at a time.
const BATCH: usize = 64;
/// How long to wait for news before looking all the same.
const LOOK: Duration = Duration::from_secs(60);
/// After a failure; doubles with each that follows.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// No pause is longer.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// How often a path is offered to a destination that takes others.
const MAX_REFUSALS: u32 = 8;
/// Paths of which is remembered that the destination has them; and realisations.
const MAX_KNOWN: usize = 100_000;
/// For how long: it may collect garbage.
const KNOWN_TIME: Duration = Duration::from_secs(600);

/// What a sender's thread shares with those who ask about it.
pub(crate) struct Shared {
    pub(crate) url: String,
    pub(crate) target: UploadTarget,
    state: Mutex<State>,
    stop: Condvar,
}

#[derive(Default)]
pub(crate) struct State {
    stopped: bool,
    stopper: Stopper,
    pub(crate) sent: u64,
    pub(crate) failure: Option<String>,
    pub(crate) again: Option<Instant>,
}

impl Shared {
    pub(crate) fn new(url: &str) -> Arc<Self> {
        let (url, target) = (url.to_owned(), UploadTarget::new(url));
        Arc::new(Self { url, target, state: Mutex::default(), stop: Condvar::new() })
    }

    pub(crate) fn state(&self) -> parking_lot::MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Has the thread end as soon as it can.
    pub(crate) fn stop(&self) {
        let mut state = self.state.lock();
        state.stopped = true;
        state.stopper.stop();
        self.stop.notify_all();
    }

    fn is_stopped(&self) -> bool {
        self.state.lock().stopped
    }

    /// Waits, but not beyond the end.
    fn pause(&self, pause: Duration) {
        let deadline = Instant::now() + pause;
        let mut state = self.state.lock();
        state.again = Some(deadline);
        while !state.stopped && !self.stop.wait_until(&mut state, deadline).timed_out() {}
        state.again = None;
    }
}

/// How a round went.
enum Round {
    /// There is nothing to send.
    Idle,
    /// There may be more.
    Done,
}

pub(crate) struct Sender {
    pub(crate) shared: Arc<Shared>,
    store: Arc<Store>,
    signer: Signer,
    downloads: DownloadOptions,
    destination: Option<Destination>,
    /// The last path that was looked at.
    at: Option<StorePath>,
    /// What the destination has, and since when this is gathered.
    known: BTreeSet<StorePath>,
    realised: BTreeSet<DrvOutput>,
    known_since: Instant,
    /// How often paths were refused.
    refusals: HashMap<StorePath, u32>,
    /// The last refusal since the queue was gone through from its beginning.
    refused: Option<Error>,
}

impl Sender {
    pub(crate) fn new(shared: Arc<Shared>, store: Arc<Store>, signer: Signer, downloads: DownloadOptions) -> Self {
        Self {
            shared,
            store,
            signer,
            downloads,
            destination: None,
            at: None,
            known: BTreeSet::new(),
            realised: BTreeSet::new(),
            known_since: Instant::now(),
            refusals: HashMap::new(),
            refused: None,
        }
    }

    /// Sends what is queued until it is told to stop.
    pub(crate) fn run(mut self) {
        let mut pause = FIRST_PAUSE;
        while !self.shared.is_stopped() {
            let seen = self.store.upload_generation();
            match self.round() {
                Ok(Round::Done) => pause = FIRST_PAUSE,
                Ok(Round::Idle) => {
                    pause = FIRST_PAUSE;
                    self.shared.state().failure = None;
                    // A connection is not kept for what may come in an hour.
                    self.destination = None;
                    self.store.wait_for_uploads(seen, LOOK);
                }
                Err(_) if self.shared.is_stopped() => return,
                Err(error) => {
                    let waiting = self.store.upload_count(self.shared.target);
                    tracing::warn!(%error, waiting, "cannot upload; trying again in {} s", pause.as_secs());
                    self.shared.state().failure = Some(error.to_string());
                    self.destination = None;
                    self.forget();
                    self.shared.pause(pause);
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    }

    /// Sends some paths. Fails when the destination takes nothing, or, at the queue's end, when it has refused something.
    fn round(&mut self) -> Result<Round, Error> {
        let target = self.shared.target;
        let paths = self.store.queued_uploads(target, self.at.as_ref(), BATCH)?;
        if paths.is_empty() {
            return match (self.at.take(), self.refused.take()) {
                (_, Some(refused)) => Err(refused),
                (Some(_), None) => Ok(Round::Done),
                (None, None) => Ok(Round::Idle),
            };
        }
        for path in paths {
            let since = self.store.upload_generation();
            match self.send(&path) {
                Ok(()) => {
                    self.refusals.remove(&path);
                    self.store.unqueue_upload(target, &path, since)?;
                }
                Err(error) if error.is_outage() || self.shared.is_stopped() => return Err(error),
                Err(error) => {
                    // After a refusal a connection may be of no use.
                    self.destination = None;
                    self.refuse(&path, error)?;
                }
            }
            self.at = Some(path);
        }
        Ok(Round::Done)
    }

    fn refuse(&mut self, path: &StorePath, error: Error) -> Result<(), Error> {
        let refusals = self.refusals.entry(path.clone()).or_default();
        *refusals += 1;
        if *refusals < MAX_REFUSALS {
            self.refused = Some(error);
            return Ok(());
        }
        tracing::error!(%error, %path, "giving up to upload a path");
        self.shared.state().failure = Some(error.to_string());
        self.refusals.remove(path);
        Ok(self.store.unqueue_upload(self.shared.target, path, self.store.upload_generation())?)
    }

    /// Forgets what the destination has.
    fn forget(&mut self) {
        self.known.clear();
        self.realised.clear();
    }

    /// Sends a path with all it needs that the destination lacks, and what is known to have become these.
    fn send(&mut self, path: &StorePath) -> Result<(), Error> {
        let store = self.store.clone();
        let roots = store.new_temp_roots();
        roots.add(path);
        if !store.is_valid(path)? {
            tracing::info!(%path, "not uploading a path that is not there any more");
            return Ok(());
        }
        if self.known_since.elapsed() > KNOWN_TIME {
            self.forget();
        }
        if self.known.is_empty() {
            self.known_since = Instant::now();
        }
        let closure = store.closure([path])?;
        let unknown: BTreeSet<StorePath> = closure.difference(&self.known).cloned().collect();
        let destination = match &mut self.destination {
            Some(destination) => destination,
            None => {
                let stopper = self.shared.state().stopper.clone();
                self.destination.insert(Destination::open(&self.shared.url, &store, &self.downloads, &stopper)?)
            }
        };
        let mut infos = BTreeMap::new();
        for path in destination.missing(&store, unknown)? {
            let mut info = store.valid_entry(&path)?.info;
            self.signer.sign(store.store_dir(), &mut info);
            infos.insert(path, info);
        }
        let sent = infos.len();
        let shared = &self.shared;
        destination.send(&store, infos, &|info, out| {
            let mut out = UntilStopped { out, shared };
            store.write_nar(&info.path, &mut out).map_err(io::Error::other)
        })?;
        for realisation in wanted(&store, &closure, &self.realised)? {
            let id = realisation.id.clone();
            destination.send_realisation(&store, &self.signer, realisation)?;
            self.realised.insert(id);
        }
        self.known.extend(closure);
        if self.known.len() > MAX_KNOWN || self.realised.len() > MAX_KNOWN {
            self.forget();
        }
        let mut state = self.shared.state();
        state.sent += sent as u64;
        state.failure = None;
        drop(state);
        tracing::info!(%path, paths = sent, to = fetch::without_password(&self.shared.url), "uploaded");
        Ok(())
    }
}

/// Breaks a NAR off when the sender is to end.
struct UntilStopped<'a> {
    out: &'a mut dyn io::Write,
    shared: &'a Shared,
}

impl io::Write for UntilStopped<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.shared.is_stopped() {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        self.out.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
