//! When to start a server again.

use std::time::Duration;

/// How patient a keeper is.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How many servers in a row may end before they are ready. Then the keeper gives up.
    pub failures: u32,
    /// The rest after the second failure in a row; it doubles with each further one.
    pub first_rest: Duration,
    /// The longest rest.
    pub longest_rest: Duration,
    /// How many servers in a row may die soon after they were ready without a rest for the next.
    pub free_deaths: u32,
    /// The longest rest after such deaths: programs that use the store wait for that long.
    pub longest_in_service: Duration,
    /// A server that has served for this long dies of something new.
    pub healthy: Duration,
    /// How long a server may take to end when it is asked to. Then it is killed.
    pub farewell: Duration,
}

impl Default for Limits {
    /// Twelve failures, which take nine seconds beside what the servers take. Deaths in service have no limit, since somebody
    /// uses the mount.
    fn default() -> Limits {
        Limits {
            failures: 12,
            first_rest: Duration::from_millis(10),
            longest_rest: Duration::from_secs(2),
            free_deaths: 8,
            longest_in_service: Duration::from_secs(1),
            healthy: Duration::from_secs(10),
            farewell: Duration::from_secs(60),
        }
    }
}

/// How servers have ended lately.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Deaths {
    /// In a row, before they were ready.
    pub(crate) failures: u32,
    /// In a row, soon after they were ready; those that never were are not counted.
    pub(crate) in_service: u32,
}

impl Deaths {
    /// A server has ended that had served for so long, if it had been ready at all.
    pub(crate) fn note(&mut self, served: Option<Duration>, limits: &Limits) {
        match served {
            None => self.failures += 1,
            Some(served) => {
                self.failures = 0;
                self.in_service = if served >= limits.healthy { 0 } else { self.in_service.saturating_add(1) };
            }
        }
    }

    /// How long to rest before the next is started; nothing when there were too many failures.
    pub(crate) fn rest(&self, limits: &Limits) -> Option<Duration> {
        let doubled = |times: u32| limits.first_rest.saturating_mul(1 << times.min(16));
        let failed = match self.failures {
            0 | 1 => Duration::ZERO,
            failures if failures >= limits.failures => return None,
            failures => doubled(failures - 2).min(limits.longest_rest),
        };
        let died = match self.in_service.checked_sub(limits.free_deaths) {
            None | Some(0) => Duration::ZERO,
            Some(more) => doubled(more - 1).min(limits.longest_in_service),
        };
        Some(failed.max(died))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rests(served: Option<Duration>, at_most: usize) -> Vec<u128> {
        let (limits, mut deaths) = (Limits::default(), Deaths::default());
        let mut next = || {
            deaths.note(served, &limits);
            deaths.rest(&limits).map(|rest| rest.as_millis())
        };
        std::iter::from_fn(&mut next).take(at_most).collect()
    }

    #[test]
    fn failures_cost_ever_more_time_until_it_is_given_up() {
        assert_eq!(rests(None, 100), [0, 10, 20, 40, 80, 160, 320, 640, 1280, 2000, 2000]);
    }

    #[test]
    fn some_deaths_in_service_cost_nothing_and_more_of_them_a_little_for_ever() {
        let soon = rests(Some(Duration::from_millis(9999)), 300);
        assert_eq!(soon[..18], [0, 0, 0, 0, 0, 0, 0, 0, 10, 20, 40, 80, 160, 320, 640, 1000, 1000, 1000]);
        assert_eq!((soon.len(), soon[299]), (300, 1000));
        assert!(rests(Some(Duration::from_secs(10)), 300).iter().all(|rest| *rest == 0));
    }

    #[test]
    fn a_time_of_health_forgives_and_a_failure_does_not() {
        let (limits, mut deaths) = (Limits::default(), Deaths::default());
        (0..20).for_each(|_| deaths.note(Some(Duration::ZERO), &limits));
        deaths.note(None, &limits);
        assert_eq!(deaths.rest(&limits), Some(limits.longest_in_service));
        deaths.note(Some(limits.healthy), &limits);
        assert_eq!((deaths, deaths.rest(&limits)), (Deaths::default(), Some(Duration::ZERO)));
    }
}
