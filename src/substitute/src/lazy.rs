//! Getting what lazy sources have promised: what somebody waits for first, and the rest of its path after it.
//!
//! ```text
//! a reader ──> castore: not here, promised ──> Filler::fill ──> flights (one for each blob, with all who wait for it)
//!                                                                  │ demand
//!            threads: demand, one blob each ── sources, in turn ───┤
//!            threads: background, a path each ── batches of it ────┘──> castore, waiting readers told
//!                          └─ nothing of it left: Store::settle, the NAR's hash
//! ```
//!
//! A blob is asked of the source whose path promised it, then of the other sources that lazy paths are from: whatever has
//! its digest is right. No source is left alone after a failure, since the next reader may find it back; each question
//! has a time limit of its own.

mod flights;
mod sources;

use std::collections::{HashSet, VecDeque};
use std::ops::ControlFlow;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use castore::Digest;
use castore::engine::{Filler, Promise, Then};
use fetch::DownloadOptions;
use nix_compat::conf::Settings;
use nix_compat::store_path::StorePath;
use parking_lot::{Condvar, Mutex};
use store::{Settled, Store};
use tokio::runtime::Handle;

use crate::error::Error;
use crate::pipe::Shared;
use flights::{Flights, Taken};
pub use sources::LazySource;
use sources::Sources;

/// Threads that fetch what somebody waits for.
const DEMAND_THREADS: usize = 8;
/// Threads that fetch the rest of paths.
const BACKGROUND_THREADS: usize = 2;
/// Paths whose rest is to be fetched. More come when they are read again.
const MAX_PATHS: usize = 4096;
/// Blobs of a path that are listed at once, some 80 bytes each.
const LISTED: usize = 65_536;
/// What is fetched of a path in one step: so many blobs, and of small ones so many bytes.
const BATCH: usize = 24;
const BATCH_BYTES: u64 = 1 << 20;
/// How often a thread without work looks whether the store is still there.
const TICK: Duration = Duration::from_secs(5);

/// Fetches what was promised, for as long as it lives.
pub struct Lazy {
    inner: Arc<Inner>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct Inner {
    store: Weak<Store>,
    sources: Sources,
    work: Mutex<Work>,
    /// There is something to do.
    wake: Condvar,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Work {
    flights: Flights,
    paths: VecDeque<Rest>,
    /// Those of the paths that wait or are being fetched.
    known: HashSet<[u8; 20]>,
}

/// A path of which the rest is to be fetched.
struct Rest {
    digest: [u8; 20],
    /// What was read of it.
    from: Digest,
}

/// How far the fetching of a path has come: blobs and bytes since the last call. Break to end it.
pub type OnProgress<'a> = &'a (dyn Fn(u64, u64) -> ControlFlow<()> + Sync);

impl Lazy {
    /// Begins to fetch what `store` expects, when somebody reads it. `settings` are the daemon's: how long to connect, how
    /// often to try, which certificates count. Must be called in a runtime, which does the talking.
    ///
    /// # Errors
    /// When threads cannot be started.
    pub fn start(store: &Arc<Store>, settings: &Settings) -> Result<Lazy, Error> {
        let sources = Sources::new(DownloadOptions::new(settings), settings.connect_timeout, Handle::current());
        let inner = Arc::new(Inner {
            store: Arc::downgrade(store),
            sources,
            work: Mutex::default(),
            wake: Condvar::new(),
            shared: Arc::default(),
        });
        let lazy = Lazy { inner: inner.clone(), threads: Mutex::default() };
        let demand = (0..DEMAND_THREADS).map(|n| (format!("lazy-{n}"), Inner::serve_readers as fn(&Inner)));
        let rest = (0..BACKGROUND_THREADS).map(|n| (format!("lazy-rest-{n}"), Inner::fetch_rests as fn(&Inner)));
        for (name, run) in demand.chain(rest) {
            let inner = inner.clone();
            let thread = std::thread::Builder::new().name(name).spawn(move || run(&inner));
            lazy.threads.lock().push(thread.map_err(|e| Error::Thread(e.to_string()))?);
        }
        store.engine().set_filler(inner);
        Ok(lazy)
    }

    /// Ends the fetching. Who waits is not answered: what the mount's readers asked for is asked again of the next server.
    /// Waits for what is under way, which ends soon.
    pub fn stop(&self) {
        self.inner.shared.cancelled.store(true, Ordering::Relaxed);
        let left = self.inner.work.lock().flights.close();
        // Not under the lock: who waits may look at others that do.
        drop(left);
        self.inner.wake.notify_all();
        for thread in self.threads.lock().drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread that fetches lazily panicked");
            }
        }
    }

    /// The sources of lazy paths, and how they fare.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn sources(&self) -> Result<Vec<LazySource>, Error> {
        self.inner.sources.told(&*self.inner.store()?)
    }

    /// Fetches all that is elsewhere of a path, then makes sure that it is what was signed. Blocks.
    ///
    /// # Errors
    /// What a source did or did not do, [`Error::NotSigned`], or that the store cannot be used.
    pub fn fetch_path(&self, path: &StorePath, progress: OnProgress<'_>) -> Result<(), Error> {
        self.inner.fetch_path(&*self.inner.store()?, path, None, progress)
    }
}

impl Drop for Lazy {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Filler for Inner {
    fn fill(&self, digest: Digest, promise: Promise, then: Then) {
        let refused = self.work.lock().flights.want(digest, promise, then);
        match refused {
            None => drop(self.wake.notify_all()),
            Some(then) => {
                let reason = "too many readers wait for contents already".to_owned();
                then(Err(castore::Error::NotFilled { digest, reason }));
            }
        }
    }
}

impl Inner {
    fn store(&self) -> Result<Arc<Store>, Error> {
        self.store.upgrade().ok_or(Error::Cancelled)
    }

    /// Waits for something that `take` finds to do; none at the end.
    fn next<T>(&self, take: impl Fn(&mut Work) -> Option<T>) -> Option<(Arc<Store>, T)> {
        let mut work = self.work.lock();
        loop {
            if self.shared.is_cancelled() {
                return None;
            }
            if let Some(taken) = take(&mut work) {
                return Some((self.store.upgrade()?, taken));
            }
            if self.wake.wait_for(&mut work, TICK).timed_out() && self.store.strong_count() == 0 {
                return None;
            }
        }
    }

    fn serve_readers(&self) {
        while let Some((store, Taken { digest, promise })) = self.next(|work| work.flights.take()) {
            let result = self.get(&store, &[(digest, promise.clone())]).remove(0);
            let came = result.is_ok();
            self.landed(digest, &result);
            if let (true, Ok(path)) = (came, <[u8; 20]>::try_from(&promise.note[..])) {
                self.fetch_rest(Rest { digest: path, from: digest });
            }
        }
    }

    /// Answers those who wait for a blob.
    fn landed(&self, digest: Digest, result: &Result<(), Error>) {
        let waiting = self.work.lock().flights.landed(&digest);
        if result.is_err() && self.shared.is_cancelled() {
            // It was not the source that failed. Whoever waits is not answered, see the end of `Lazy`.
            return;
        }
        for then in waiting {
            then(match result {
                Ok(()) => Ok(()),
                Err(error) => Err(castore::Error::NotFilled { digest, reason: store::causes(error) }),
            });
        }
    }

    /// Has the rest of a path fetched, some time.
    fn fetch_rest(&self, rest: Rest) {
        let mut work = self.work.lock();
        if work.paths.len() < MAX_PATHS && work.known.insert(rest.digest) {
            work.paths.push_back(rest);
            drop(work);
            self.wake.notify_all();
        }
    }

    fn fetch_rests(&self) {
        while let Some((store, Rest { digest, from })) = self.next(|work| work.paths.pop_front()) {
            let fetched = match store.path_from_hash_part(&digest) {
                Ok(Some(path)) => {
                    let go_on = |_, _| match self.shared.is_cancelled() {
                        true => ControlFlow::Break(()),
                        false => ControlFlow::Continue(()),
                    };
                    self.fetch_path(&store, &path, Some(from), &go_on)
                }
                Ok(None) => Ok(()),
                Err(error) => Err(error.into()),
            };
            if let Err(error) = fetched {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "cannot fetch the rest of a lazy path; the next read of it tries again");
            }
            self.work.lock().known.remove(&digest);
        }
    }

    /// Fetches what is missing of a path, that which follows `from` first.
    fn fetch_path(
        &self,
        store: &Store,
        path: &StorePath,
        from: Option<Digest>,
        progress: OnProgress<'_>,
    ) -> Result<(), Error> {
        loop {
            let Some(entry) = store.shared_entry(path)? else { return Ok(()) };
            let mut missing = Vec::new();
            let listed = store.engine().elsewhere(&entry.node, &mut |digest, promise| {
                missing.push((digest, promise));
                if missing.len() < LISTED { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            });
            listed.map_err(store::Error::from)?;
            if missing.is_empty() {
                break;
            }
            if let Some(from) = from {
                // It may be here already; then what comes after it is not known, and the order is that of the tree.
                let first = missing.iter().position(|(digest, _)| *digest == from).unwrap_or(0);
                missing.rotate_left(first);
            }
            let mut rest = &missing[..];
            while !rest.is_empty() {
                let (batch, after) = rest.split_at(batch_length(rest));
                rest = after;
                self.fetch_batch(store, batch)?;
                let bytes = batch.iter().map(|(_, promise)| promise.size).sum();
                if progress(batch.len() as u64, bytes).is_break() {
                    return Err(Error::Cancelled);
                }
            }
        }
        match store.settle(path)? {
            Settled::Whole | Settled::Partly => Ok(()),
            Settled::Refused(message) => {
                tracing::error!(message, "a lazy path is not what was signed; it is withheld");
                Err(Error::NotSigned(message))
            }
        }
    }

    /// Fetches blobs, and waits for those that others are fetching.
    fn fetch_batch(&self, store: &Store, batch: &[(Digest, Promise)]) -> Result<(), Error> {
        let own: Vec<_> = {
            let mut work = self.work.lock();
            batch.iter().filter(|(digest, _)| work.flights.begin(*digest)).cloned().collect()
        };
        let results = self.get(store, &own);
        let mut failed = None;
        for ((digest, _), result) in own.iter().zip(results) {
            self.landed(*digest, &result);
            failed = failed.or(result.err());
        }
        if let Some(error) = failed {
            return Err(error);
        }
        for (digest, promise) in batch.iter().filter(|blob| !own.contains(blob)) {
            let (done, answer) = crossbeam_channel::bounded(1);
            if store.engine().promised(digest).map_err(store::Error::from)?.is_some() {
                self.fill(*digest, promise.clone(), Box::new(move |result| drop(done.send(result))));
                answer.recv().map_err(|_| Error::Cancelled)?.map_err(store::Error::from)?;
            }
        }
        Ok(())
    }

    /// Gets blobs from the first source that has them.
    fn get(&self, store: &Store, blobs: &[(Digest, Promise)]) -> Vec<Result<(), Error>> {
        let mut results: Vec<Result<(), Error>> = blobs.iter().map(|_| Err(Error::NoLazySource)).collect();
        let Some((_, first)) = blobs.first() else { return results };
        let urls = match self.sources.urls(store, first) {
            Ok(urls) => urls,
            Err(error) => {
                results[0] = Err(error);
                return results;
            }
        };
        for url in urls {
            let left: Vec<usize> = (0..blobs.len()).filter(|n| results[*n].is_err()).collect();
            if left.is_empty() || self.shared.is_cancelled() {
                break;
            }
            let wanted: Vec<_> = left.iter().map(|n| (blobs[*n].0, blobs[*n].1.size)).collect();
            let got = match self.sources.open(&url, store) {
                Ok(source) => source.fetch(store, &wanted, &self.shared),
                Err(error) => {
                    self.sources.note(&url, Some(&error));
                    results[left[0]] = Err(error);
                    continue;
                }
            };
            self.sources.note(&url, got.iter().filter_map(|got| got.as_ref().err()).next());
            for (n, got) in left.into_iter().zip(got) {
                // What the source says whose path it is explains more than what others say.
                if got.is_ok() || matches!(results[n], Err(Error::NoLazySource)) {
                    results[n] = got;
                }
            }
        }
        let came: Vec<Digest> =
            blobs.iter().zip(&results).filter(|(_, result)| result.is_ok()).map(|((digest, _), _)| *digest).collect();
        if let Err(error) = store.engine().promise_kept(&came) {
            // The rows are passed over, and a collection drops them.
            tracing::debug!(%error, "rows of promises that were kept stay");
        }
        results
    }
}

/// How many of the first blobs make a batch.
fn batch_length(blobs: &[(Digest, Promise)]) -> usize {
    let mut bytes = 0_u64;
    let more = blobs.iter().take(BATCH).take_while(|(_, promise)| {
        bytes = bytes.saturating_add(promise.size);
        bytes <= BATCH_BYTES
    });
    more.count().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_of_many_small_or_one_large() {
        let blob = |size| (Digest::of(&u64::to_le_bytes(size)), Promise { size, note: Default::default() });
        assert_eq!(batch_length(&[blob(BATCH_BYTES + 1), blob(1)]), 1);
        assert_eq!(batch_length(&[blob(1), blob(BATCH_BYTES), blob(1)]), 1);
        assert_eq!(batch_length(&vec![blob(10); 100]), BATCH);
        assert_eq!(batch_length(&[blob(0), blob(5)]), 2);
    }
}
