//! What the program under test was told, and when: what a crash may be held to.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix_compat::realisation::DrvOutput;
use nix_compat::store_path::StorePath;
use parking_lot::Mutex;

use crate::disk::Disk;

/// A moment of the load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    /// In the order of the program: what ended before something else began has the smaller one.
    pub(crate) tick: u64,
    /// In the order of the disk's log: how many operations there were.
    pub(crate) position: usize,
}

/// A call, from before it was made until after it was answered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) begin: Moment,
    pub(crate) end: Moment,
}

impl Span {
    /// Whether a disk with so many operations may have something of it.
    pub(crate) fn begun(&self, at: usize) -> bool {
        self.begin.position < at
    }

    /// Whether it had been answered when the disk had so many operations.
    pub(crate) fn answered(&self, at: usize) -> bool {
        self.end.position <= at
    }

    pub(crate) fn before(&self, other: &Span) -> bool {
        self.end.tick < other.begin.tick
    }
}

/// What happened to one path.
#[derive(Debug, Default)]
pub(crate) struct History {
    /// Each registration, with the path's number.
    pub(crate) added: Vec<(Span, u32)>,
    pub(crate) deleted: Vec<Span>,
}

/// A root that was made, and perhaps taken away.
#[derive(Debug)]
pub(crate) struct Root {
    pub(crate) link: String,
    pub(crate) path: StorePath,
    pub(crate) made: Span,
    /// Before it was taken away.
    pub(crate) removed: Option<Moment>,
}

#[derive(Debug, Default)]
pub(crate) struct Entries {
    pub(crate) paths: BTreeMap<StorePath, History>,
    pub(crate) realisations: Vec<(DrvOutput, StorePath, Span)>,
    pub(crate) roots: Vec<Root>,
    /// Durable points.
    pub(crate) syncs: Vec<Span>,
    /// Every registration is a durable point of its own.
    pub(crate) immediate: bool,
    /// Where the load begins, behind preparations that are not looked at.
    pub(crate) start: usize,
}

impl Entries {
    /// The position from which on what `span` did is durable: the end of a durable point that began after it ended.
    pub(crate) fn durable_from(&self, span: &Span) -> Option<usize> {
        if self.immediate {
            return Some(span.end.position);
        }
        self.syncs.iter().filter(|sync| span.before(sync)).map(|sync| sync.end.position).min()
    }

    /// Whether a crash at `at` must leave the path of `history` valid.
    pub(crate) fn must_be_there(&self, history: &History, at: usize) -> bool {
        history.added.iter().any(|(added, _)| {
            self.durable_from(added).is_some_and(|durable| durable <= at)
                && history.deleted.iter().all(|deleted| !deleted.begun(at) || deleted.before(added))
        })
    }

    /// Whether a crash at `at` may leave the path of `history` valid.
    pub(crate) fn may_be_there(&self, history: &History, at: usize) -> bool {
        history.added.iter().any(|(added, _)| {
            added.begun(at)
                && !history.deleted.iter().any(|deleted| {
                    added.before(deleted) && self.syncs.iter().any(|sync| deleted.before(sync) && sync.answered(at))
                })
        })
    }
}

/// Keeps the entries while the load runs.
pub(crate) struct Ledger {
    disk: Arc<Disk>,
    tick: AtomicU64,
    pub(crate) entries: Mutex<Entries>,
}

impl Ledger {
    pub(crate) fn new(disk: Arc<Disk>, immediate: bool) -> Self {
        let entries = Entries { immediate, ..Entries::default() };
        Self { disk, tick: AtomicU64::new(0), entries: Mutex::new(entries) }
    }

    pub(crate) fn now(&self) -> Moment {
        let position = self.disk.position();
        Moment { tick: self.tick.fetch_add(1, Ordering::AcqRel), position }
    }

    /// Calls `act`; its answer, and when it was called and answered.
    pub(crate) fn time<T>(&self, act: impl FnOnce() -> T) -> (T, Span) {
        let begin = self.now();
        let answer = act();
        let tick = self.tick.fetch_add(1, Ordering::AcqRel);
        (answer, Span { begin, end: Moment { tick, position: self.disk.position() } })
    }
}
