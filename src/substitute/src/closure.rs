//! A path with all that it refers to: found out first, fetched in parallel, registered in order.
//!
//! What two clients want at once is fetched once, by the [`Landings`]: whoever comes second waits for the contents, and
//! registers them with what its own source says of them. Nobody ever waits for another one's *registration*, which could
//! in turn wait for one's own.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use nix_compat::store_path::StorePath;
use nix_compat::worker::stderr::Verbosity;
use parking_lot::Mutex;
use store::{NewPath, Store};
use tokio::sync::{OnceCell, Semaphore};

use crate::error::Error;
use crate::offers::{Excluded, Offer};
use crate::pipe::Shared;
use crate::substituters::{MAX_TRANSFERS, Substituters};
use crate::transfer::transfer;
use crate::watch::Copying;
use crate::{Client, Outcome, Wanted};

/// Paths of a closure that are looked for at once.
const LOOKUPS: usize = 256;
/// `max-substitution-jobs` by default, which nobody has chosen: paths that are far away are fetched faster more at a time.
const STOCK_JOBS: u64 = 16;
/// Paths that a closure may have.
const MAX_CLOSURE: usize = 200_000;
/// Times that a closure is looked for again without what could not be fetched.
const MAX_ROUNDS: usize = 100;

/// Contents on their way, or there but not registered by all who wait for them.
pub(crate) type Landing = OnceCell<NewPath>;

/// All of them, by what is claimed of them.
#[derive(Default)]
pub(crate) struct Landings(Mutex<HashMap<String, Weak<Landing>>>);

impl Landings {
    fn of(&self, offer: &Offer) -> Arc<Landing> {
        let info = &offer.info;
        let refers_to_itself = info.references.contains(&info.path);
        let ca = info.ca.as_ref().map(ToString::to_string).unwrap_or_default();
        let lazy = offer.may_be_lazy();
        let key = format!("{} {} {} {ca} {refers_to_itself} {lazy}", info.path, info.nar_hash, info.nar_size);
        let mut all = self.0.lock();
        if let Some(landing) = all.get(&key).and_then(Weak::upgrade) {
            return landing;
        }
        if all.len() == all.capacity() {
            all.retain(|_, landing| landing.strong_count() > 0);
        }
        let landing = Arc::default();
        all.insert(key, Arc::downgrade(&landing));
        landing
    }
}

/// What is to be fetched, by path.
type Offers = BTreeMap<StorePath, Offer>;

/// What a look for a closure gives.
enum Found {
    Complete(Offers),
    /// This one nobody has; whether it is the one that was wanted.
    Missing {
        path: StorePath,
        wanted: bool,
    },
    /// It cannot be registered in any order, or is larger than any.
    Impossible,
}

impl Client {
    /// Says why something could not be fetched.
    pub(crate) fn tell_error(&self, what: &str, error: &Error) {
        self.watch.log(Verbosity::Error, format!("error: cannot fetch {what}: {}", store::causes(error)));
    }
}

impl Substituters {
    /// Makes a path valid with all that it refers to.
    pub(crate) async fn fetch(&self, client: &Client, wanted: Wanted) -> Outcome {
        client.roots.add(&wanted.path);
        if self.is_valid(&wanted.path) {
            return Outcome::AlreadyValid;
        }
        if self.sources(client).await.is_empty() {
            return Outcome::Unavailable;
        }
        let mut excluded = Excluded::new();
        // Held until the end: what has landed need not be fetched again.
        let mut landed = Vec::new();
        for _ in 0..MAX_ROUNDS {
            let offers = match self.find_closure(client, &wanted, &excluded).await {
                Found::Complete(offers) => offers,
                Found::Missing { wanted, .. } if wanted || !excluded.is_empty() => break,
                Found::Missing { path, .. } => {
                    let dir = self.store.store_dir();
                    client.warn_once(format!(
                        "no substituter has '{}', to which '{}' refers",
                        dir.display(&path),
                        dir.display(&wanted.path)
                    ));
                    break;
                }
                Found::Impossible => break,
            };
            let failed = self.fetch_all(client, &offers, &mut landed).await;
            if failed.is_empty() {
                return Outcome::Substituted;
            }
            excluded.extend(failed);
        }
        if excluded.is_empty() { Outcome::Unavailable } else { Outcome::Failed }
    }

    fn is_valid(&self, path: &StorePath) -> bool {
        self.store.is_valid(path).unwrap_or(false)
    }

    /// Finds out who has what of a closure is not here.
    async fn find_closure(&self, client: &Client, wanted: &Wanted, excluded: &Excluded) -> Found {
        let mut offers = Offers::new();
        let mut seen = HashSet::from([wanted.path.clone()]);
        let mut todo = VecDeque::from([wanted.clone()]);
        let mut asked = FuturesUnordered::new();
        loop {
            while asked.len() < LOOKUPS
                && let Some(next) = todo.pop_front()
            {
                client.roots.add(&next.path);
                if !self.is_valid(&next.path) {
                    asked.push(async move { (self.offer(client, &next, excluded, true, false).await, next.path) });
                }
            }
            let Some((offer, path)) = asked.next().await else { break };
            let Some(offer) = offer else { return Found::Missing { wanted: path == wanted.path, path } };
            for reference in &offer.info.references {
                if seen.insert(reference.clone()) {
                    todo.push_back(reference.clone().into());
                }
            }
            if seen.len() > MAX_CLOSURE {
                return Found::Impossible;
            }
            offers.insert(path, offer);
        }
        if has_cycle(&offers) { Found::Impossible } else { Found::Complete(offers) }
    }

    /// Fetches and registers; gives what could not be, and from where.
    async fn fetch_all(&self, client: &Client, offers: &Offers, landed: &mut Vec<Arc<Landing>>) -> Excluded {
        let file_size = |offer: &Offer| offer.narinfo.file_size.unwrap_or(0);
        let (paths, nar) = (offers.len() as u64, offers.values().map(|offer| offer.info.nar_size));
        client.watch.expect(paths, offers.values().map(file_size).sum(), nar.fold(0, u64::saturating_add));
        let limit = match client.settings.max_substitution_jobs {
            STOCK_JOBS => MAX_TRANSFERS,
            chosen => usize::try_from(chosen).unwrap_or(usize::MAX),
        };
        let jobs = Arc::new(Semaphore::new(limit.clamp(1, Semaphore::MAX_PERMITS)));
        let mut coming: FuturesUnordered<_> = offers
            .iter()
            .map(|(path, offer)| {
                let (landing, jobs) = (self.landings.of(offer), jobs.clone());
                landed.push(landing.clone());
                async move { (path, offer, self.land(client, offer, &landing, &jobs, offer.may_be_lazy()).await) }
            })
            .collect();

        let mut order = Order::new(offers);
        let mut failed = Excluded::new();
        while let Some((path, offer, result)) = coming.next().await {
            let result = match result {
                Ok(new) => self.register(order.landed(path, new)).await,
                Err(error) => Err(error),
            };
            if let Err(error) = &result {
                if matches!(error, Error::Disabled(_)) {
                    client.warn_of(&offer.source, error);
                } else {
                    let what = format!("'{}' from '{}'", self.store.store_dir().display(path), offer.source.uri());
                    client.tell_error(&what, error);
                    offer.source.forget(&offer.there).await;
                }
                failed.insert((offer.source.uri().to_owned(), path.clone()));
            }
            client.watch.done(result.is_ok(), file_size(offer), offer.info.nar_size);
        }
        failed
    }

    pub(crate) async fn land(
        &self,
        client: &Client,
        offer: &Offer,
        landing: &Landing,
        jobs: &Semaphore,
        lazy: bool,
    ) -> Result<NewPath, Error> {
        let _own = jobs.acquire().await.map_err(|_| Error::Cancelled)?;
        let new = landing
            .get_or_try_init(|| async {
                let turn = self.transfers.clone().acquire_owned().await.map_err(|_| Error::Cancelled)?;
                let dir = self.store.store_dir();
                let copying = Copying {
                    number: Copying::next_number(),
                    path: dir.display(&offer.info.path),
                    source: offer.source.uri().to_owned(),
                    file: offer.source.origin.file(offer.narinfo.url()),
                    nar_size: offer.info.nar_size,
                };
                let shared = CancelOnDrop(Arc::default());
                let source = offer.source.clone();
                let (store, offer, control, watch) =
                    (self.store.clone(), offer.clone(), shared.0.clone(), client.watch.clone());
                let work = move || {
                    watch.began(&copying);
                    let promised = if lazy { promise(&store, &offer) } else { None };
                    let result =
                        promised.unwrap_or_else(|| transfer(&store, &offer, &control, &*watch, &copying, turn));
                    watch.ended(&copying);
                    result
                };
                source.download(work).await
            })
            .await?;
        // The contents are the same; what else is said of the path is this client's source's.
        Ok(NewPath { info: offer.info.clone(), node: new.node.clone(), pin: new.pin.clone() })
    }

    async fn register(&self, paths: Vec<NewPath>) -> Result<(), Error> {
        if paths.is_empty() {
            return Ok(());
        }
        let store: Arc<Store> = self.store.clone();
        let register = move || store.register(paths);
        Ok(tokio::task::spawn_blocking(register).await.map_err(|e| Error::Thread(e.to_string()))??)
    }
}

/// A path of a lazy source without its contents; none where they have to be fetched as well.
fn promise(store: &Store, offer: &Offer) -> Option<Result<NewPath, Error>> {
    match offer.source.origin.promise(store, &offer.info) {
        Ok(new) => new.map(Ok),
        Err(error) if error.is_outage() => Some(Err(error)),
        Err(error) => {
            let path = &offer.info.path;
            tracing::warn!(%path, error = &error as &dyn std::error::Error, "a path cannot be had lazily; fetching all of it");
            None
        }
    }
}

struct CancelOnDrop(Arc<Shared>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancelled.store(true, Ordering::Relaxed);
    }
}

/// Which paths wait for which, until all are registered.
struct Order<'a> {
    /// How many of the references of a path are to be registered before it.
    waits_for: HashMap<&'a StorePath, usize>,
    referrers: HashMap<&'a StorePath, Vec<&'a StorePath>>,
    /// Here, but not to be registered yet.
    here: HashMap<&'a StorePath, NewPath>,
}

impl<'a> Order<'a> {
    fn new(offers: &'a Offers) -> Self {
        let mut order = Self { waits_for: HashMap::new(), referrers: HashMap::new(), here: HashMap::new() };
        for (path, offer) in offers {
            let references = offer.info.references.iter().filter(|reference| *reference != path);
            let mut count = 0;
            for reference in references.filter(|reference| offers.contains_key(*reference)) {
                order.referrers.entry(reference).or_default().push(path);
                count += 1;
            }
            order.waits_for.insert(path, count);
        }
        order
    }

    /// Takes one that has come; gives those that can be registered now, together.
    fn landed(&mut self, path: &'a StorePath, new: NewPath) -> Vec<NewPath> {
        self.here.insert(path, new);
        let mut ready = Vec::new();
        let mut todo = vec![path];
        while let Some(path) = todo.pop() {
            if self.waits_for.get(path) != Some(&0) {
                continue;
            }
            let Some(new) = self.here.remove(path) else { continue };
            ready.push(new);
            for referrer in self.referrers.remove(path).unwrap_or_default() {
                if let Some(count) = self.waits_for.get_mut(referrer) {
                    *count -= 1;
                    todo.push(referrer);
                }
            }
        }
        ready
    }
}

/// Whether paths refer to each other in a circle: whoever made such narinfos did not build them.
fn has_cycle(offers: &Offers) -> bool {
    let mut order = Order::new(offers);
    let mut todo: Vec<&StorePath> = order.waits_for.iter().filter(|(_, n)| **n == 0).map(|(path, _)| *path).collect();
    let mut done = 0;
    while let Some(path) = todo.pop() {
        done += 1;
        for referrer in order.referrers.remove(path).unwrap_or_default() {
            if let Some(count) = order.waits_for.get_mut(referrer) {
                *count -= 1;
                if *count == 0 {
                    todo.push(referrer);
                }
            }
        }
    }
    done < offers.len()
}
