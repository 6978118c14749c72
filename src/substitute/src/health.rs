//! Sources that do not answer are left alone for a while.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Time for which a source is left alone at first; it doubles with each failure after that.
const FIRST_PAUSE: Duration = Duration::from_secs(10);
/// No pause is longer.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// The state of a source.
#[derive(Debug, Default)]
pub(crate) struct Health(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Pauses one after the other.
    failures: u32,
    until: Option<Instant>,
    answered: Option<Instant>,
}

impl Health {
    /// Whether it may be asked.
    pub(crate) fn is_open(&self) -> bool {
        self.is_open_at(Instant::now())
    }

    fn is_open_at(&self, now: Instant) -> bool {
        self.0.lock().until.is_none_or(|until| until <= now)
    }

    /// It did not answer. Gives the pause that begins; `None` when others have begun it already.
    pub(crate) fn failed(&self) -> Option<Duration> {
        self.failed_at(Instant::now())
    }

    fn failed_at(&self, now: Instant) -> Option<Duration> {
        let mut state = self.0.lock();
        if state.until.is_some_and(|until| until > now) {
            return None;
        }
        let pause = FIRST_PAUSE.saturating_mul(1 << state.failures.min(16)).min(LONGEST_PAUSE);
        state.failures = state.failures.saturating_add(1);
        state.until = Some(now + pause);
        Some(pause)
    }

    /// Something that was begun at `since` has failed at last. Where it has answered anything meanwhile, it is that one file
    /// that is in trouble.
    pub(crate) fn failed_since(&self, since: Instant) -> Option<Duration> {
        if self.0.lock().answered.is_some_and(|answered| answered > since) { None } else { self.failed() }
    }

    /// It has answered.
    pub(crate) fn succeeded(&self) {
        *self.0.lock() = State { answered: Some(Instant::now()), ..State::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_until_it_answers() {
        let health = Health::default();
        let start = Instant::now();
        assert_eq!(health.failed_at(start), Some(FIRST_PAUSE));
        // Those who had asked before are not counted.
        assert_eq!(health.failed_at(start), None);
        assert!(!health.is_open_at(start + FIRST_PAUSE / 2));
        let later = start + FIRST_PAUSE;
        assert!(health.is_open_at(later));
        assert_eq!(health.failed_at(later), Some(2 * FIRST_PAUSE));
        let mut at = later;
        for _ in 0..40 {
            at += LONGEST_PAUSE;
            health.failed_at(at);
        }
        assert_eq!(health.failed_at(at + LONGEST_PAUSE), Some(LONGEST_PAUSE));
        health.succeeded();
        assert!(health.is_open_at(start));
        assert_eq!(health.failed_at(start), Some(FIRST_PAUSE));
    }

    #[test]
    fn one_file_in_trouble_is_not_its_source() {
        let (health, before) = (Health::default(), Instant::now());
        std::thread::sleep(Duration::from_millis(1));
        health.succeeded();
        assert_eq!(health.failed_since(before), None);
        assert!(health.is_open());
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!(health.failed_since(Instant::now()), Some(FIRST_PAUSE));
        assert!(!health.is_open());
    }
}
