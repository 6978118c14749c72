//! Requests that running builds make, and whether one of them waits for its own end.
//!
//! A build that uses the store waits for what it asks for. That may wait in turn, over other builds that use the store,
//! for the first one: then none of them would ever end, and whoever closed the circle is refused.

use std::collections::HashSet;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::graph::Goal;
use super::session::Session;

/// The requests of all running builds.
#[derive(Default)]
pub(crate) struct Nested(Mutex<Vec<Wait>>);

/// A request, and a goal that it waits for.
struct Wait {
    session: Weak<Session>,
    goal: Weak<Goal>,
}

impl Nested {
    /// A request that a running build makes waits for a goal from now on.
    pub(crate) fn wants(&self, session: &Arc<Session>, goal: &Arc<Goal>) {
        let mut waits = self.0.lock();
        waits.retain(|wait| wait.session.upgrade().is_some_and(|session| session.is_open()));
        waits.push(Wait { session: Arc::downgrade(session), goal: Arc::downgrade(goal) });
        refuse_circles(&mut waits);
    }

    /// A goal needs another one from now on, and has been told so.
    pub(crate) fn needs(&self, goal: &Goal, need: &Arc<Goal>) {
        let mut waits = self.0.lock();
        // A new circle goes through the new need, which mostly needs nothing itself yet.
        if !waits.is_empty() && reaches(&waits, need.clone(), &|reached| std::ptr::eq(reached, goal)) {
            refuse_circles(&mut waits);
        }
    }
}

/// Ends requests that wait for the build they belong to, the latest first: it has closed the circle. Each is ended by
/// itself, for with it others may be in no circle any more.
fn refuse_circles(waits: &mut Vec<Wait>) {
    let mut left = waits.len();
    while left > 0 {
        left -= 1;
        let both = (waits[left].session.upgrade(), waits[left].goal.upgrade());
        if let (Some(session), Some(goal)) = both
            && reaches(waits, goal, &|reached| session.enclosing().contains(&reached.key.drv))
        {
            session.entangle();
            waits.retain(|wait| !std::ptr::eq(wait.session.as_ptr(), Arc::as_ptr(&session)));
            left = waits.len();
        }
    }
}

/// Whether a goal is one of those `wanted`, or waits for one.
fn reaches(waits: &[Wait], goal: Arc<Goal>, wanted: &dyn Fn(&Goal) -> bool) -> bool {
    let (mut todo, mut seen) = (vec![goal], HashSet::new());
    while let Some(goal) = todo.pop() {
        if goal.is_done() || !seen.insert(Arc::as_ptr(&goal)) {
            continue;
        }
        if wanted(&goal) {
            return true;
        }
        todo.extend(goal.unfinished_needs());
        // The innermost build around a request is the one that makes it.
        let within = |wait: &Wait| {
            let session = wait.session.upgrade()?;
            let own = session.is_open() && session.enclosing().last() == Some(&goal.key.drv);
            if own { wait.goal.upgrade() } else { None }
        };
        todo.extend(waits.iter().filter_map(within));
    }
    false
}
