//! Collecting garbage without being asked: the water marks `min-free` and `max-free`.
//!
//! As in stock Nix, whoever adds to the store or builds has the free space looked at, at most every
//! `min-free-check-interval` seconds. When it is below `min-free`, an ordinary collection begins in the background, which
//! is to bring it to `max-free`; whoever adds waits for it, builds go on. A collection that did not help is not repeated
//! before the space has shrunk further.
//!
//! Unlike stock's, the marks are set by default: a full disk breaks builds in the middle, while what is dead can be had
//! again. The low one leaves room for a build to go on while the collection runs, the high one is twice that, so that the
//! next collection is not due at once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nix_compat::conf::Settings;
use parking_lot::Mutex;

use super::Space;
use crate::error::Result;
use crate::gc::{GcAction, GcOptions, GcScope};
use crate::store::Store;

/// The low water mark unless set: this part of the filesystem,
const LOW_PART: u64 = 20;
/// but no more than this many bytes.
const LOW_LIMIT: u64 = 4 << 30;
/// The high water mark, unless set, is so many times the low one.
const HIGH_TO_LOW: u64 = 2;
/// A collection waits for the sweep that gives the space back at most this long: that may have to wait for imports.
const LONGEST_SWEEP: Duration = Duration::from_secs(120);
/// A collection estimates what has to be deleted for the space that is wanted; when that was too little, it goes on at
/// most this many times.
const PASSES: usize = 5;
/// A collection that left less space than wanted is not repeated while there is still this share of it, in hundredths.
const STILL_THERE: u64 = 97;

/// The settings of automatic collections, from `nix.conf` or from a trusted client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AutoGc {
    min_free: Option<u64>,
    max_free: Option<u64>,
    check_interval: Duration,
    keep_derivations: bool,
    keep_outputs: bool,
}

impl From<&Settings> for AutoGc {
    fn from(settings: &Settings) -> Self {
        Self {
            min_free: settings.min_free,
            max_free: settings.max_free,
            check_interval: Duration::from_secs(settings.min_free_check_interval),
            keep_derivations: settings.keep_derivations,
            keep_outputs: settings.keep_outputs,
        }
    }
}

impl AutoGc {
    /// How often to look.
    #[must_use]
    pub fn check_interval(&self) -> Duration {
        self.check_interval
    }

    /// The water marks for a filesystem of `total` bytes: the low and the high one, in bytes; none when switched off.
    fn marks(&self, total: u64) -> Option<(u64, u64)> {
        let low = self.min_free.unwrap_or((total / LOW_PART).min(LOW_LIMIT));
        let high = match (self.min_free, self.max_free) {
            (_, Some(high)) => high,
            (None, None) => low.saturating_mul(HIGH_TO_LOW),
            // As stock: everything dead goes.
            (Some(_), None) => u64::MAX,
        };
        (low > 0).then_some((low, high))
    }
}

/// Whether an automatic collection runs, and when it was last looked whether one should.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    running: bool,
    looked: Option<Instant>,
    /// What was available after the last collection.
    available_after: Option<u64>,
}

impl State {
    fn is_due(&self, options: &AutoGc) -> bool {
        options.min_free != Some(0) && self.looked.is_none_or(|looked| looked.elapsed() >= options.check_interval)
    }
}

impl Store {
    /// Whether it is time to [look](Self::keep_room), or a collection runs. Costs next to nothing.
    #[must_use]
    pub fn may_lack_room(&self, options: &AutoGc) -> bool {
        let state = self.watch.state.lock();
        state.running || state.is_due(options)
    }

    /// Whether a collection runs because space is short.
    #[must_use]
    pub fn is_making_room(&self) -> bool {
        self.watch.state.lock().running
    }

    /// Looks whether space is short, if that has not been done lately, and starts a collection if so.
    pub fn keep_room(self: &Arc<Self>, options: &AutoGc) {
        let mut state = self.watch.state.lock();
        if state.running || !state.is_due(options) {
            return;
        }
        state.looked = Some(Instant::now());
        let Some(high) = self.short_of(options, &state) else { return };
        let (store, options) = (Arc::clone(self), options.clone());
        let work = move || {
            let _end = End(&store);
            store.collect_until(&options, high);
        };
        state.running = true;
        if let Err(error) = std::thread::Builder::new().name("auto-gc".into()).spawn(work) {
            tracing::error!(%error, "cannot start a collection although space is short");
            state.running = false;
        }
    }

    /// The mark that is to be reached, if space is short.
    fn short_of(&self, options: &AutoGc, state: &State) -> Option<u64> {
        let Space { total, available, .. } =
            self.space().inspect_err(|error| tracing::warn!(%error, "cannot tell how full the disk is")).ok()?;
        let (low, high) = options.marks(total)?;
        let shrunk = state.available_after.is_none_or(|after| available <= after / 100 * STILL_THERE);
        (available < low && available < high && shrunk).then_some(high)
    }

    fn collect_until(&self, options: &AutoGc, high: u64) {
        for _ in 0..PASSES {
            match self.collect_pass(options, high) {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    tracing::error!(%error, "a collection because of little space failed");
                    break;
                }
            }
        }
    }

    /// Collects about what is missing; whether it is worth going on.
    fn collect_pass(&self, options: &AutoGc, high: u64) -> Result<bool> {
        let before = self.space()?.available;
        if before >= high {
            return Ok(false);
        }
        let max_freed = self.contents_in(high - before)?;
        tracing::info!(available = before, wanted = high, max_freed, "collecting garbage because space is short");
        let outcome = self.collect_garbage(&GcOptions {
            action: GcAction::DeleteDead,
            scope: GcScope::WholeStore,
            max_freed,
            keep_derivations: options.keep_derivations,
            keep_outputs: options.keep_outputs,
        })?;
        self.sweeper.sweep_for_space(LONGEST_SWEEP);
        let after = self.space()?.available;
        tracing::info!(paths = outcome.paths.len(), available = after, "collected garbage because space was short");
        Ok(after < high && !outcome.paths.is_empty())
    }

    /// How many bytes of NARs take `stored` bytes on disk, by the experience of the whole store.
    fn contents_in(&self, stored: u64) -> Result<u64> {
        let mut nars = 0_u64;
        self.for_each(&mut |entry| {
            nars = nars.saturating_add(entry.info.nar_size);
            std::ops::ControlFlow::Continue(())
        })?;
        let packs = self.engine.stats().stored_bytes.max(1);
        let contents = u128::from(stored) * u128::from(nars) / u128::from(packs);
        Ok(u64::try_from(contents).unwrap_or(u64::MAX).max(stored))
    }
}

/// The end of a collection, however it ends.
struct End<'a>(&'a Store);

impl Drop for End<'_> {
    fn drop(&mut self) {
        let available = self.0.space().ok().map(|space| space.available);
        let mut state = self.0.watch.state.lock();
        state.running = false;
        state.looked = Some(Instant::now());
        state.available_after = available;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn auto(settings: &[(&str, &str)]) -> AutoGc {
        let mut all = Settings::default();
        for (name, value) in settings {
            all.set(name, value).unwrap();
        }
        AutoGc::from(&all)
    }

    #[test]
    fn the_marks_are_those_set_or_follow_the_filesystem() {
        let disk = 100 << 30;
        assert_eq!(auto(&[]).marks(disk), Some((4 << 30, 8 << 30)));
        assert_eq!(auto(&[]).marks(2 << 30), Some(((2 << 30) / 20, (2 << 30) / 20 * 2)));
        assert_eq!(auto(&[("min-free", "0")]).marks(disk), None);
        assert_eq!(auto(&[("min-free", "1K"), ("max-free", "2K")]).marks(disk), Some((1024, 2048)));
        assert_eq!(auto(&[("min-free", "1K")]).marks(disk), Some((1024, u64::MAX)));
        assert_eq!(auto(&[("max-free", "9G")]).marks(disk), Some((4 << 30, 9 << 30)));
    }
}
