//! The goals of the whole daemon, and who wants them.
//!
//! A goal exists as long as somebody holds an [`Interest`] in it: a client's request, or the goal of a derivation that
//! depends on it. The last one to let go ends it, and with it its own interests: cancellation runs down the graph by
//! itself. Goals are tasks, so a chain of any length costs neither stack nor threads.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use nix_compat::derivation::{BasicDerivation, Derivation};
use nix_compat::hash::sha256;
use nix_compat::store_path::{StoreDir, StorePath};
use nix_compat::worker::{BuildMode, BuildResult};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::feed::Feed;
use super::nested::Nested;
use super::session::Session;

/// What makes two wishes the same goal.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct GoalKey {
    pub(crate) drv: StorePath,
    check: bool,
    repair: bool,
    /// SHA-256 of a derivation that a client sent along. Its path is the client's word, so it is never taken for the
    /// derivation that is stored there, nor for another one that was sent under that name.
    inline: Option<[u8; 32]>,
}

impl GoalKey {
    /// The derivation that is stored at `drv`.
    pub(crate) fn stored(drv: StorePath, mode: BuildMode) -> Self {
        Self { drv, check: mode == BuildMode::Check, repair: mode == BuildMode::Repair, inline: None }
    }

    /// A derivation that a client sent and calls `drv`.
    pub(crate) fn inline(dir: &StoreDir, drv: StorePath, derivation: &BasicDerivation, mode: BuildMode) -> Self {
        let text = Derivation::from(derivation.clone()).to_aterm(dir);
        Self { inline: Some(sha256(&text)), ..Self::stored(drv, mode) }
    }
}

/// A derivation whose outputs somebody wants.
pub(crate) struct Goal {
    pub(crate) key: GoalKey,
    pub(crate) feed: Feed,
    /// Whose settings are in force.
    owner: Weak<Session>,
    by_settings: AtomicBool,
    links: Mutex<Links>,
    nested: Arc<Nested>,
    result: watch::Sender<Option<Arc<BuildResult>>>,
}

#[derive(Default)]
struct Links {
    /// Goals this one waits for.
    needs: Vec<Need>,
    /// What must not be collected for as long as a watcher is connected.
    roots: Vec<StorePath>,
}

/// A goal that another waits for.
#[derive(Clone)]
struct Need {
    goal: Arc<Goal>,
    /// Whether it is done in the place of the one that waits: who asked for that one asked for this.
    instead: bool,
}

impl Goal {
    fn new(key: GoalKey, session: &Arc<Session>, nested: Arc<Nested>) -> Arc<Self> {
        let (result, _) = watch::channel(None);
        let (owner, by_settings) = (Arc::downgrade(session), AtomicBool::new(false));
        Arc::new(Self { key, feed: Feed::default(), owner, by_settings, links: Mutex::default(), nested, result })
    }

    /// Notes, before the end, that the settings of the goal's owner are why it fails.
    pub(crate) fn blame_settings(&self) {
        self.by_settings.store(true, Ordering::Relaxed);
    }

    /// Whether it failed because of its owner's settings.
    pub(crate) fn failed_by_settings(&self) -> bool {
        self.by_settings.load(Ordering::Relaxed)
    }

    /// Whether these settings are a session's own.
    pub(crate) fn is_owned_by(&self, session: &Arc<Session>) -> bool {
        std::ptr::eq(self.owner.as_ptr(), Arc::as_ptr(session))
    }

    /// Lets a session that asked for this goal watch it and all that it needs, now or later.
    pub(crate) fn attach(self: &Arc<Self>, session: &Arc<Session>) {
        spread(session, self.clone(), true);
        if session.gate.is_some() {
            self.nested.wants(session, self);
        }
    }

    /// This goal waits for another, so its watchers watch that one too.
    pub(crate) fn add_need(&self, need: &Arc<Goal>) {
        self.link(Need { goal: need.clone(), instead: false });
    }

    /// The same for a goal that is done in the place of this one.
    pub(crate) fn add_resolved(&self, need: &Arc<Goal>) {
        self.link(Need { goal: need.clone(), instead: true });
    }

    fn link(&self, need: Need) {
        let watchers = {
            let mut links = self.links.lock();
            links.needs.push(need.clone());
            self.feed.watchers()
        };
        for (session, asked) in watchers {
            spread(&session, need.goal.clone(), asked && need.instead);
        }
        self.nested.needs(self, &need.goal);
    }

    /// Keeps paths from being collected while a watcher is connected.
    pub(crate) fn add_roots(&self, paths: impl IntoIterator<Item = StorePath>) {
        let mut links = self.links.lock();
        let watchers = self.feed.watchers();
        for path in paths {
            watchers.iter().for_each(|(session, _)| session.temp_roots.add(&path));
            links.roots.push(path);
        }
    }

    /// Whom it waits for.
    pub(crate) fn needs(&self) -> Vec<StorePath> {
        self.unfinished_needs().iter().map(|goal| goal.key.drv.clone()).collect()
    }

    /// The goals it waits for.
    pub(crate) fn unfinished_needs(&self) -> Vec<Arc<Goal>> {
        self.links.lock().needs.iter().filter(|need| !need.goal.is_done()).map(|need| need.goal.clone()).collect()
    }

    pub(crate) fn is_done(&self) -> bool {
        self.result.borrow().is_some()
    }

    /// Ends the goal; the first result counts.
    pub(crate) fn finish(&self, result: BuildResult) {
        self.result.send_if_modified(|present| {
            let first = present.is_none();
            if first {
                *present = Some(Arc::new(result));
            }
            first
        });
        // A finished goal needs nobody; a chain of them would otherwise be freed by recursion.
        self.links.lock().needs.clear();
    }

    /// Waits for the result.
    pub(crate) async fn result(&self) -> Option<Arc<BuildResult>> {
        let mut receiver = self.result.subscribe();
        receiver.wait_for(Option::is_some).await.ok()?.clone()
    }
}

/// Makes a session watch a goal and, on from there, what it needs.
fn spread(session: &Arc<Session>, goal: Arc<Goal>, asked: bool) {
    let mut todo = vec![(goal, asked)];
    while let Some((goal, asked)) = todo.pop() {
        // Locked over both, so that a need added meanwhile is seen either here or by `add_need`.
        let links = goal.links.lock();
        session.will_watch(&goal.key.drv);
        if goal.feed.attach(session, asked) {
            links.roots.iter().for_each(|path| session.temp_roots.add(path));
            todo.extend(links.needs.iter().map(|need| (need.goal.clone(), asked && need.instead)));
        }
    }
}

struct Slot {
    goal: Arc<Goal>,
    interests: usize,
    task: Option<AbortHandle>,
}

/// All goals that are not done.
#[derive(Default)]
pub(crate) struct Graph {
    slots: Mutex<HashMap<GoalKey, Slot>>,
    nested: Arc<Nested>,
}

/// Keeps a goal going.
pub(crate) struct Interest {
    graph: Arc<Graph>,
    pub(crate) goal: Arc<Goal>,
}

impl Graph {
    /// Joins the goal of this key, or starts it.
    pub(crate) fn want(
        self: &Arc<Self>,
        key: &GoalKey,
        session: &Arc<Session>,
        start: impl FnOnce(Arc<Goal>) -> AbortHandle,
    ) -> Interest {
        let mut slots = self.slots.lock();
        let slot = slots.entry(key.clone()).or_insert_with(|| Slot {
            goal: Goal::new(key.clone(), session, self.nested.clone()),
            interests: 0,
            task: None,
        });
        slot.interests += 1;
        let goal = slot.goal.clone();
        if slot.task.is_none() {
            slot.task = Some(start(goal.clone()));
        }
        Interest { graph: self.clone(), goal }
    }

    /// Forgets a goal that is done: who wants it again looks at the store first.
    pub(crate) fn forget(&self, goal: &Arc<Goal>) {
        let mut slots = self.slots.lock();
        if slots.get(&goal.key).is_some_and(|slot| Arc::ptr_eq(&slot.goal, goal)) {
            slots.remove(&goal.key);
        }
    }

    /// Every goal that is not done, with the number of those interested.
    pub(crate) fn goals(&self) -> Vec<(Arc<Goal>, usize)> {
        self.slots.lock().values().map(|slot| (slot.goal.clone(), slot.interests)).collect()
    }
}

impl Drop for Interest {
    fn drop(&mut self) {
        let unwanted = {
            let mut slots = self.graph.slots.lock();
            match slots.get_mut(&self.goal.key) {
                Some(slot) if Arc::ptr_eq(&slot.goal, &self.goal) => {
                    slot.interests -= 1;
                    if slot.interests == 0 { slots.remove(&self.goal.key) } else { None }
                }
                _ => None,
            }
        };
        // Outside the lock: dropping the task drops interests of its own.
        if let Some(Slot { task: Some(task), goal, .. }) = unwanted {
            task.abort();
            goal.links.lock().needs.clear();
        }
    }
}
