//! How busy other machines are with our builds, whoever wants these, and which of them cannot be reached.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix_compat::machines::Machine;
use parking_lot::Mutex;
use tokio::sync::Notify;

/// How long a machine is left alone that could not be reached; twice as long after each further failure.
const FIRST_PAUSE: Duration = Duration::from_secs(60);
/// How long at most.
const LONGEST_PAUSE: Duration = Duration::from_secs(30 * 60);
/// Machines that are remembered although nothing is built on them, for having failed.
const MAX_REMEMBERED: usize = 10_000;

/// The machines in use. Two clients that name the same store share its slots.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    loads: Mutex<HashMap<String, Load>>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Load {
    running: u32,
    /// How often in a row it could not be reached.
    failures: u32,
    not_before: Option<Instant>,
    reason: String,
    upload: Arc<Mutex<()>>,
}

/// One build's place on a machine; dropped, it is free again.
#[derive(Debug)]
pub(crate) struct Slot {
    pool: Arc<Pool>,
    machine: String,
    /// Held while inputs are copied: two builds at once would copy what both need twice.
    pub(crate) upload: Arc<Mutex<()>>,
}

/// The outcome of looking for a place.
#[derive(Debug)]
pub(crate) enum Found {
    /// This one of the machines.
    Slot(usize, Slot),
    /// All that could be reached are busy.
    Busy,
    /// None could be reached lately, and why, or there is none.
    Unreachable(Vec<String>),
}

impl Pool {
    /// Takes a place on that machine with the least load for its speed; of equal ones the fastest, then the first.
    pub(crate) fn take(self: &Arc<Self>, machines: &[&Machine]) -> Found {
        let now = Instant::now();
        let mut loads = self.loads.lock();
        let mut best: Option<(usize, u32)> = None;
        let (mut busy, mut unreachable) = (false, Vec::new());
        for (i, machine) in machines.iter().enumerate() {
            let name = machine.store.to_string();
            let load = loads.get(&name);
            if let Some(load) = load.filter(|load| load.not_before.is_some_and(|time| time > now)) {
                unreachable
                    .push(format!("'{name}' is not used for a while, since it could not be reached: {}", load.reason));
                continue;
            }
            let running = load.map_or(0, |load| load.running);
            if running >= machine.max_jobs {
                busy |= machine.max_jobs > 0;
                continue;
            }
            let better = best.is_none_or(|(j, least)| {
                let other = machines[j];
                let (own, least) = (running as f32 / machine.speed_factor, least as f32 / other.speed_factor);
                own < least || (own == least && machine.speed_factor > other.speed_factor)
            });
            if better {
                best = Some((i, running));
            }
        }
        let Some((i, _)) = best else {
            return if busy { Found::Busy } else { Found::Unreachable(unreachable) };
        };
        let name = machines[i].store.to_string();
        let load = loads.entry(name.clone()).or_default();
        load.running += 1;
        Found::Slot(i, Slot { pool: self.clone(), machine: name, upload: load.upload.clone() })
    }

    /// Waits for a place to become free. To be created before it is looked for one.
    pub(crate) fn change(&self) -> impl Future<Output = ()> {
        self.changed.notified()
    }
}

impl Slot {
    /// The machine was reached.
    pub(crate) fn reached(&self) {
        if let Some(load) = self.pool.loads.lock().get_mut(&self.machine) {
            (load.failures, load.not_before) = (0, None);
        }
    }

    /// The machine cannot be reached: nothing is built on it for a while.
    pub(crate) fn unreachable(self, reason: String) {
        if let Some(load) = self.pool.loads.lock().get_mut(&self.machine) {
            let pause = FIRST_PAUSE * 2u32.saturating_pow(load.failures.min(16));
            load.failures += 1;
            load.not_before = Some(Instant::now() + pause.min(LONGEST_PAUSE));
            load.reason = reason;
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut loads = self.pool.loads.lock();
        let remembered = loads.len() <= MAX_REMEMBERED;
        if let Some(load) = loads.get_mut(&self.machine) {
            load.running -= 1;
            if load.running == 0 && !(load.failures > 0 && remembered) {
                loads.remove(&self.machine);
            }
        }
        drop(loads);
        self.pool.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machines(text: &str) -> Vec<Machine> {
        nix_compat::machines::parse(text, &["x".to_owned()].into(), &mut |_| Ok(None)).unwrap()
    }

    fn take(pool: &Arc<Pool>, machines: &[Machine]) -> Found {
        pool.take(&machines.iter().collect::<Vec<_>>())
    }

    /// Takes places until there are none, and says on which machines.
    fn take_all(machines: &[Machine]) -> (Vec<usize>, Vec<Slot>) {
        let pool = Arc::default();
        let (mut order, mut slots) = (Vec::new(), Vec::new());
        while let Found::Slot(i, slot) = take(&pool, machines) {
            order.push(i);
            slots.push(slot);
        }
        assert!(matches!(take(&pool, machines), Found::Busy));
        (order, slots)
    }

    #[test]
    fn the_least_load_for_its_speed_comes_first() {
        assert_eq!(take_all(&machines("a;b - - 2")).0, [0, 1, 1]);
        assert_eq!(take_all(&machines("a - - 2; b - - 4 2")).0, [1, 0, 1, 1, 0, 1]);
        assert_eq!(take_all(&machines("a - - 0; b - - 2 0.5")).0, [1, 1]);
    }

    #[test]
    fn a_place_that_is_left_is_free_again_and_nothing_is_remembered() {
        let list = machines("a");
        let pool = Arc::default();
        let Found::Slot(_, slot) = take(&pool, &list) else { panic!() };
        assert!(matches!(take(&pool, &list), Found::Busy));
        drop(slot);
        assert!(pool.loads.lock().is_empty());
        assert!(matches!(take(&pool, &list), Found::Slot(0, _)));
    }

    #[test]
    fn the_same_store_named_twice_has_its_places_once() {
        let list = machines("a - - 2; a - - 3");
        assert_eq!(take_all(&list).0.len(), 3);
    }

    #[test]
    fn what_cannot_be_reached_is_left_alone_longer_each_time() {
        let list = machines("a;b");
        let pool = Arc::default();
        let mut pauses = Vec::new();
        for _ in 0..8 {
            let Found::Slot(0, slot) = take(&pool, &list) else { panic!() };
            slot.unreachable("no route".into());
            let Found::Slot(1, _other) = take(&pool, &list) else { panic!() };
            let mut loads = pool.loads.lock();
            let until = loads.get_mut("ssh://a").unwrap().not_before.as_mut().unwrap();
            pauses.push(until.duration_since(Instant::now()).as_secs() / 50);
            *until = Instant::now();
        }
        assert_eq!(pauses, [1, 2, 4, 9, 19, 35, 35, 35]);
        let Found::Slot(0, slot) = take(&pool, &list) else { panic!() };
        slot.reached();
        drop(slot);
        assert!(pool.loads.lock().is_empty(), "a machine that answers is like any other");
    }

    #[test]
    fn without_any_that_can_be_reached_the_reasons_are_told() {
        let list = machines("a");
        let pool = Arc::default();
        let Found::Slot(_, slot) = take(&pool, &list) else { panic!() };
        slot.unreachable("no route".into());
        let Found::Unreachable(reasons) = take(&pool, &list) else { panic!() };
        assert_eq!(reasons, ["'ssh://a' is not used for a while, since it could not be reached: no route"]);
        assert!(matches!(take(&pool, &[]), Found::Unreachable(reasons) if reasons.is_empty()));
    }

    #[tokio::test]
    async fn who_waits_is_told() {
        let list = machines("a");
        let pool: Arc<Pool> = Arc::default();
        let Found::Slot(_, slot) = take(&pool, &list) else { panic!() };
        let change = pool.change();
        drop(slot);
        tokio::time::timeout(Duration::from_secs(5), change).await.unwrap();
    }
}
