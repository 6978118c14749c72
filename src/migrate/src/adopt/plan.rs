//! In which order paths are adopted: each after everything it refers to.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use parking_lot::{Condvar, Mutex};

use crate::database::{Database, Listed};
use crate::error::Result;

/// All paths of the stock store and how they hang together, 24 bytes for each and 4 for each reference.
pub(crate) struct Plan {
    /// In the order of their ids.
    pub(crate) paths: Vec<Listed>,
    /// Where in `referrers` those of each path begin; one more at the end.
    begins: Vec<usize>,
    referrers: Vec<u32>,
    /// Paths each one still waits for.
    references: Vec<u32>,
    /// Paths that refer to rows which do not exist.
    pub(crate) dangling: Vec<usize>,
}

impl Plan {
    pub(crate) fn read(database: &Database) -> Result<Self> {
        let paths = database.list()?;
        let place = |id: i64| paths.binary_search_by_key(&id, |path| path.id);
        let mut pairs = Vec::new();
        let mut references = vec![0_u32; paths.len()];
        let mut dangling = Vec::new();
        database.for_each_reference(&mut |referrer, reference| match (place(referrer), place(reference)) {
            (Ok(referrer), Ok(reference)) => {
                references[referrer] += 1;
                pairs.push((reference as u32, referrer as u32));
            }
            (Ok(referrer), Err(_)) => dangling.push(referrer),
            (Err(_), _) => {}
        })?;
        pairs.sort_unstable();
        let mut begins = vec![0; paths.len() + 1];
        for (reference, _) in &pairs {
            begins[*reference as usize + 1] += 1;
        }
        for at in 1..begins.len() {
            begins[at] += begins[at - 1];
        }
        let referrers = pairs.into_iter().map(|(_, referrer)| referrer).collect();
        Ok(Self { paths, begins, referrers, references, dangling })
    }

    /// Those that refer to a path, but for itself.
    pub(crate) fn referrers(&self, path: usize) -> &[u32] {
        &self.referrers[self.begins[path]..self.begins[path + 1]]
    }
}

/// Hands paths out to threads, each when all it refers to is done.
pub(crate) struct Queue<'a> {
    plan: &'a Plan,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// The oldest first: what became valid together lies together on the disk.
    ready: BinaryHeap<Reverse<usize>>,
    waiting: Vec<u32>,
    /// Handed out and not done.
    running: usize,
    stopped: bool,
}

impl<'a> Queue<'a> {
    pub(crate) fn new(plan: &'a Plan) -> Self {
        let mut waiting = plan.references.clone();
        for path in &plan.dangling {
            // It will never be ready.
            waiting[*path] = u32::MAX;
        }
        let ready = waiting.iter().enumerate().filter(|(_, count)| **count == 0).map(|(at, _)| Reverse(at)).collect();
        let state = State { ready, waiting, running: 0, stopped: false };
        Self { plan, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// The next path; `None` when there will be none.
    pub(crate) fn take(&self) -> Option<usize> {
        let mut state = self.state.lock();
        loop {
            if state.stopped {
                return None;
            }
            if let Some(Reverse(path)) = state.ready.pop() {
                state.running += 1;
                return Some(path);
            }
            if state.running == 0 {
                return None;
            }
            self.changed.wait(&mut state);
        }
    }

    /// A path that was taken is there, or will not be: then nothing that refers to it is handed out.
    pub(crate) fn done(&self, path: usize, there: bool) {
        let mut state = self.state.lock();
        state.running -= 1;
        if there {
            for referrer in self.plan.referrers(path) {
                let waiting = &mut state.waiting[*referrer as usize];
                *waiting = waiting.saturating_sub(1);
                if *waiting == 0 {
                    state.ready.push(Reverse(*referrer as usize));
                }
            }
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Nothing more is handed out.
    pub(crate) fn stop(&self) {
        self.state.lock().stopped = true;
        self.changed.notify_all();
    }

    /// Those that were never handed out.
    pub(crate) fn left(&self) -> Vec<usize> {
        let state = self.state.lock();
        (0..self.plan.paths.len()).filter(|path| state.waiting[*path] > 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Paths 0 to `count` with those references.
    fn plan(count: usize, references: &[(u32, u32)]) -> Plan {
        let mut plan = Plan {
            paths: (0..count).map(|id| Listed { id: id as i64, nar_size: 0 }).collect(),
            begins: vec![0; count + 1],
            referrers: Vec::new(),
            references: vec![0; count],
            dangling: Vec::new(),
        };
        for path in 0..count {
            for (referrer, _) in references.iter().filter(|(_, reference)| *reference as usize == path) {
                plan.referrers.push(*referrer);
                plan.references[*referrer as usize] += 1;
            }
            plan.begins[path + 1] = plan.referrers.len();
        }
        plan
    }

    #[test]
    fn references_come_first_and_what_refers_to_a_failure_never() {
        let plan = plan(5, &[(0, 1), (0, 2), (1, 2), (3, 4)]);
        let queue = Queue::new(&plan);
        assert_eq!(queue.take(), Some(2));
        queue.done(2, true);
        assert_eq!(queue.take(), Some(1));
        assert_eq!(queue.take(), Some(4));
        queue.done(4, false);
        queue.done(1, true);
        assert_eq!(queue.take(), Some(0));
        queue.done(0, true);
        assert_eq!(queue.take(), None);
        assert_eq!(queue.left(), [3]);
    }

    #[test]
    fn a_circle_is_left_and_nobody_waits_for_it() {
        let plan = plan(3, &[(0, 1), (1, 0), (2, 0)]);
        let queue = Queue::new(&plan);
        assert_eq!(queue.take(), None);
        assert_eq!(queue.left(), [0, 1, 2]);
    }
}
