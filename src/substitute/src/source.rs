//! A source that clients share: what is known of it, what it was asked lately, and whether it answers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nix_compat::conf::Settings;
use nix_compat::narinfo::NarInfo;
use nix_compat::realisation::{DrvOutput, Realisation};
use nix_compat::store_path::{StoreDir, StorePath};
use parking_lot::Mutex;
use quick_cache::sync::Cache;
use tokio::sync::Semaphore;

use crate::error::Error;
use crate::health::Health;
use crate::location::Location;
use crate::origin::{Origin, SourceInfo};
use crate::remembered::{Dated, Remembered};

/// Narinfos, and the lack of them, that are remembered of one source.
const MAX_REMEMBERED: usize = 20_000;
/// Questions to one source at once where the settings set no limit of their own.
const MAX_LOOKUPS: usize = 100;
/// `http-connections` by default, which nobody has chosen.
const STOCK_CONNECTIONS: u64 = 25;
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
    info: Mutex<Option<Dated<SourceInfo>>>,
    /// Whoever finds out what it says of itself.
    opening: tokio::sync::Mutex<()>,
    known: Cache<StorePath, Known>,
    /// The same on disk, for those that have a name there.
    disk: Option<(Arc<Remembered>, String)>,
    lookups: Arc<Semaphore>,
}

/// The answer to a question.
type Known = Dated<Option<Arc<NarInfo>>>;

impl Source {
    /// `connections` is how many questions may be asked at once; 0 and stock's default mean as many as is usual. What it
    /// answers is kept on `disk` under a name, if it has one.
    pub(crate) fn new(
        location: Location,
        origin: Box<dyn Origin>,
        store_dir: &StoreDir,
        connections: u64,
        disk: Option<(Arc<Remembered>, String)>,
    ) -> Self {
        let lookups = match connections {
            0 | STOCK_CONNECTIONS => MAX_LOOKUPS,
            chosen => usize::try_from(chosen).unwrap_or(usize::MAX).min(MAX_LOOKUPS),
        };
        Self {
            origin,
            store_dir: location.store_dir.clone().unwrap_or_else(|| store_dir.clone()),
            location,
            health: Health::default(),
            info: Mutex::default(),
            opening: tokio::sync::Mutex::default(),
            known: Cache::new(MAX_REMEMBERED),
            disk,
            lookups: Arc::new(Semaphore::new(lookups)),
        }
    }

    pub(crate) fn uri(&self) -> &str {
        &self.location.uri
    }

    /// Smaller ones are asked first. Known after [`Source::open`].
    pub(crate) fn priority(&self) -> u64 {
        self.location.priority.or_else(|| self.says().map(|info| info.priority)).unwrap_or(u64::MAX)
    }

    /// Whether it wants to be asked for many paths at once.
    pub(crate) fn wants_mass_query(&self) -> bool {
        self.location.want_mass_query.unwrap_or_else(|| self.says().is_some_and(|info| info.want_mass_query))
    }

    fn says(&self) -> Option<SourceInfo> {
        self.info.lock().as_ref().map(|dated| dated.answer.clone())
    }

    /// Makes sure that it is a cache for the right store, unless it said so not long ago.
    pub(crate) async fn open(self: &Arc<Self>, settings: &Settings) -> Result<(), Error> {
        let ttl = Duration::from_secs(settings.narinfo_cache_meta_ttl);
        let is_known =
            || self.info.lock().as_ref().is_some_and(|dated| self.origin.is_local() || dated.is_younger(ttl));
        if is_known() {
            return Ok(());
        }
        let _turn = self.opening.lock().await;
        if is_known() {
            return Ok(());
        }
        let found = match self.on_disk(|disk, name| disk.info(name)).await? {
            Some(dated) if dated.is_younger(ttl) => dated,
            _ => {
                let source = self.clone();
                let ask = move || {
                    let info = source.origin.info(&source.store_dir)?;
                    if let Some((disk, name)) = &source.disk {
                        disk.keep_info(name, &info);
                    }
                    Ok(info)
                };
                Dated::now(self.ask(ask).await?)
            }
        };
        *self.info.lock() = Some(found);
        Ok(())
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
            self.ask(move || source.ask_for_narinfo(&path))
        };
        if self.origin.is_local() {
            return ask().await;
        }
        loop {
            match self.known.get_value_or_guard_async(path).await {
                Ok(known) if known.is_younger(ttl(&known, settings, explicit)) => return Ok(known.answer),
                Ok(_) => {
                    self.known.remove(path);
                }
                Err(guard) => {
                    let (source, hash) = (self.clone(), path.hash_part().to_owned());
                    let kept = self.on_disk(move |disk, name| source.kept_narinfo(disk, name, &hash)).await?;
                    let known = match kept {
                        Some(kept) if kept.is_younger(ttl(&kept, settings, explicit)) => kept,
                        _ => Dated::now(ask().await?),
                    };
                    // Refused when it was removed meanwhile, which does no harm.
                    let _ = guard.insert(known.clone());
                    return Ok(known.answer);
                }
            }
        }
    }

    /// Asks the source itself, and remembers what it says. Blocks.
    fn ask_for_narinfo(&self, path: &StorePath) -> Result<Option<Arc<NarInfo>>, Error> {
        let narinfo = self.origin.narinfo(&self.store_dir, path)?;
        if let Some((disk, name)) = &self.disk {
            let text = narinfo.as_ref().map(|narinfo| narinfo.to_text(&self.store_dir));
            disk.keep_narinfo(name, path.hash_part(), text.as_deref());
        }
        Ok(narinfo.map(Arc::new))
    }

    /// What it said in an earlier life of the daemon. Blocks.
    fn kept_narinfo(&self, disk: &Remembered, name: &str, hash: &str) -> Option<Known> {
        let kept = disk.narinfo(name, hash)?;
        let answer = match kept.answer {
            Some(text) => Some(Arc::new(NarInfo::parse(&self.store_dir, &text).ok()?)),
            None => None,
        };
        Some(Dated { answer, since: kept.since })
    }

    /// Looks at what is on disk, beside the async code.
    async fn on_disk<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Remembered, &str) -> Option<T> + Send + 'static,
    ) -> Result<Option<T>, Error> {
        let Some((disk, name)) = self.disk.clone() else { return Ok(None) };
        tokio::task::spawn_blocking(move || look(&disk, &name)).await.map_err(|e| Error::Thread(e.to_string()))
    }

    /// Forgets what it said of a path: it has proved to be wrong.
    pub(crate) async fn forget(&self, path: &StorePath) {
        self.known.remove(path);
        let hash = path.hash_part().to_owned();
        // Nothing is lost when it cannot be forgotten: whoever fetches it again finds out again.
        let _ = self.on_disk(move |disk, name| Some(disk.forget(name, &hash))).await;
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
        self.note(&result, None);
        result
    }

    /// Has a file of it downloaded by `transfer`, which blocks, unless it has not answered lately.
    pub(crate) async fn download<T: Send + 'static>(
        &self,
        transfer: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        if !self.health.is_open() {
            return Err(Error::Disabled(self.uri().to_owned()));
        }
        let begun = Instant::now();
        let result = tokio::task::spawn_blocking(transfer).await.unwrap_or_else(|e| Err(Error::Thread(e.to_string())));
        self.note(&result, Some(begun));
        result
    }

    /// Whether it is to be left alone follows from how it went. What was `begun` long ago may have failed for reasons of its
    /// own.
    fn note<T>(&self, result: &Result<T, Error>, begun: Option<Instant>) {
        let pause = match result {
            Ok(_) => {
                self.health.succeeded();
                None
            }
            Err(error) if error.is_outage() => {
                begun.map_or_else(|| self.health.failed(), |begun| self.health.failed_since(begun))
            }
            Err(_) => None,
        };
        if let (Some(pause), Err(error)) = (pause, result) {
            tracing::warn!("disabling substituter '{}' for {} seconds: {error}", self.uri(), pause.as_secs());
        }
    }
}

fn ttl(known: &Known, settings: &Settings, explicit: bool) -> Duration {
    let negative = match settings.narinfo_cache_negative_ttl {
        STOCK_NEGATIVE_TTL => NEGATIVE_TTL,
        seconds => Duration::from_secs(seconds),
    };
    match &known.answer {
        Some(_) => Duration::from_secs(settings.narinfo_cache_positive_ttl),
        None if explicit => negative.min(EXPLICIT_TTL),
        None => negative,
    }
}
