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
    /// How long a server may take to end when it is asked to. Then it is killed.
    pub farewell: Duration,
}

impl Default for Limits {
    /// Twelve failures, which take nine seconds beside what the servers take.
    fn default() -> Limits {
        Limits {
            failures: 12,
            first_rest: Duration::from_millis(10),
            longest_rest: Duration::from_secs(2),
            farewell: Duration::from_secs(60),
        }
    }
}

impl Limits {
    /// How long to rest after so many failures in a row: not at all after none or one; nothing when there were too many.
    pub(crate) fn rest(&self, failures: u32) -> Option<Duration> {
        match failures {
            0 | 1 => Some(Duration::ZERO),
            _ if failures >= self.failures => None,
            _ => Some(self.first_rest.saturating_mul(1 << (failures - 2).min(16)).min(self.longest_rest)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_death_in_service_costs_no_time_and_failures_ever_more() {
        let limits = Limits::default();
        let rests: Vec<_> = (0..).map_while(|failures| limits.rest(failures)).map(|rest| rest.as_millis()).collect();
        assert_eq!(rests, [0, 0, 10, 20, 40, 80, 160, 320, 640, 1280, 2000, 2000]);
    }
}
