//! A source that clients share: what is known of it, what it was asked lately, and whether it answers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nix_compat::conf::Settings;
use nix_compat::narinfo::NarInfo;
use nix_compat::realisation::{DrvOutput, Realisation};
use nix_compat::store_path::{StoreDir, StorePath};
use quick_cache::sync::Cache;
use tokio::sync::{OnceCell, Semaphore};

use crate::error::Error;
use crate::health::Health;
use crate::location::Location;
use crate::origin::{Origin, SourceInfo};

/// Narinfos, and the lack of them, that are remembered of one source.
const MAX_REMEMBERED: usize = 20_000;
/// Questions to one source at once where the settings set no limit.
const MAX_LOOKUPS: usize = 100;
/// Time for which it is remembered that a source lacks a path, unless a client has a setting of its own. Stock's hour
/// is more than anybody wants to wait for what has just been uploaded.
const NEGATIVE_TTL: Duration = Duration::from_secs(60);
/// The same for a path that is asked for itself: a client asks what it would have to fetch first, and then for it.
const EXPLICIT_TTL: Duration = Duration::from_secs(3);
/// The setting's default, in seconds.
const STOCK_NEGATIVE_TTL: u64 = 3600;

/// A source.
pub(crate) struct Source {
    pub(crate) origin: Box<dyn Origin>,
    pub(crate) location: Location,
    /// Its paths are below this.
    pub(crate) store_dir: StoreDir,
    health: Health,
    info: OnceCell<SourceInfo>,
    known: Cache<StorePath, Known>,
    lookups: Arc<Semaphore>,
}

/// The answer to a question, and when it was given.
#[derive(Clone)]
struct Known {
    narinfo: Option<Arc<NarInfo>>,
    since: Instant,
}

impl Source {
    /// `connections` is how many questions may be asked at once; 0 means as many as is usual.
    pub(crate) fn new(location: Location, origin: Box<dyn Origin>, store_dir: &StoreDir, connections: u64) -> Self {
        let limit = usize::try_from(connections).unwrap_or(usize::MAX);
        let lookups = if limit == 0 { MAX_LOOKUPS } else { limit.min(MAX_LOOKUPS) };
        Self {
            origin,
            store_dir: location.store_dir.clone().unwrap_or_else(|| store_dir.clone()),
            location,
            health: Health::default(),
            info: OnceCell::new(),
            known: Cache::new(MAX_REMEMBERED),
            lookups: Arc::new(Semaphore::new(lookups)),
        }
    }

    pub(crate) fn uri(&self) -> &str {
        &self.location.uri
    }

    /// Smaller ones are asked first. Known after [`Source::open`].
    pub(crate) fn priority(&self) -> u64 {
        self.location.priority.or_else(|| self.info.get().map(|info| info.priority)).unwrap_or(u64::MAX)
    }

    /// Whether it wants to be asked for many paths at once.
    pub(crate) fn wants_mass_query(&self) -> bool {
        let says = || self.info.get().is_some_and(|info| info.want_mass_query);
        self.location.want_mass_query.unwrap_or_else(says)
    }

    /// Makes sure that it is a cache for the right store.
    pub(crate) async fn open(self: &Arc<Self>) -> Result<(), Error> {
        let ask = || {
            let source = self.clone();
            self.ask(move || source.origin.info(&source.store_dir))
        };
        self.info.get_or_try_init(ask).await.map(drop)
    }

    /// Its description of a path. Where it is `explicit`, that it was not there is not remembered for long.
    pub(crate) async fn narinfo(
        self: &Arc<Self>,
        path: &StorePath,
        settings: &Settings,
        explicit: bool,
    ) -> Result<Option<Arc<NarInfo>>, Error> {
        let ask = || {
            let (source, path) = (self.clone(), path.clone());
            self.ask(move || Ok(source.origin.narinfo(&source.store_dir, &path)?.map(Arc::new)))
        };
        if self.origin.is_local() {
            return ask().await;
        }
        loop {
            match self.known.get_value_or_guard_async(path).await {
                Ok(known) if known.since.elapsed() < ttl(&known, settings, explicit) => return Ok(known.narinfo),
                Ok(_) => {
                    self.known.remove(path);
                }
                Err(guard) => {
                    let narinfo = ask().await?;
                    // Refused when it was removed meanwhile, which does no harm.
                    let _ = guard.insert(Known { narinfo: narinfo.clone(), since: Instant::now() });
                    return Ok(narinfo);
                }
            }
        }
    }

    /// Forgets what it said of a path: it has proved to be wrong.
    pub(crate) fn forget(&self, path: &StorePath) {
        self.known.remove(path);
    }

    /// What an output turned out to be there.
    pub(crate) async fn realisation(self: &Arc<Self>, id: &DrvOutput) -> Result<Option<Realisation>, Error> {
        let (source, id) = (self.clone(), id.clone());
        self.ask(move || source.origin.realisation(&id)).await
    }

    /// Asks beside the async code, unless it has not answered lately.
    async fn ask<T: Send + 'static>(
        self: &Arc<Self>,
        question: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let closed = |_| Error::Cancelled;
        let turn = self.lookups.clone().acquire_owned().await.map_err(closed)?;
        if !self.health.is_open() {
            return Err(Error::Disabled(self.uri().to_owned()));
        }
        let (answer, answered) = tokio::sync::oneshot::channel();
        let ask = move || {
            let _held = turn;
            let _ = answer.send(question());
        };
        if self.origin.is_local() {
            tokio::task::spawn_blocking(ask);
        } else {
            // A thread of its own, for which nobody waits at the end: servers take their time.
            let thread = std::thread::Builder::new().name("lookup".to_owned()).spawn(ask);
            thread.map_err(|e| Error::Thread(e.to_string()))?;
        }
        let result = answered.await.unwrap_or_else(|_| Err(Error::Thread("it panicked".to_owned())));
        match &result {
            Ok(_) => self.health.succeeded(),
            Err(error) if error.is_outage() => {
                if let Some(pause) = self.health.failed() {
                    tracing::warn!("disabling substituter '{}' for {} seconds: {error}", self.uri(), pause.as_secs());
                }
            }
            Err(_) => {}
        }
        result
    }
}

fn ttl(known: &Known, settings: &Settings, explicit: bool) -> Duration {
    let negative = match settings.narinfo_cache_negative_ttl {
        STOCK_NEGATIVE_TTL => NEGATIVE_TTL,
        seconds => Duration::from_secs(seconds),
    };
    match &known.narinfo {
        Some(_) => Duration::from_secs(settings.narinfo_cache_positive_ttl),
        None if explicit => negative.min(EXPLICIT_TTL),
        None => negative,
    }
}
