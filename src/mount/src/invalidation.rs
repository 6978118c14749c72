//! Taking back from the kernel what it remembers of the store directory.
//!
//! Below a store path nothing ever changes. The store directory does, and the kernel keeps two things of it for good:
//! names it found (lookups that failed are not kept), and, because the mount has no opendir, the listing. So:
//!
//! * **A path is added:** its name is found at once without our doing anything. The listing is taken back if one is under
//!   way or has been read since it was last taken back, so `ls` shows the path when the client hears that it was added.
//! * **A path is removed:** its name is taken back, then the listing.
//! * **The listing grew old**, because the store is elsewhere and nobody tells: it is taken back, too.
//!
//! A listing that was read from the view before a change can reach the kernel's memory after the change was handled. So
//! a listing counts as under way until its reply has been written, and before a listing is taken back the kernel is made
//! to wait for those whose replies it is still storing: taking a name back, even one that is not there, does that.
//!
//! # Why the caller waits, and why not for ever
//!
//! Events come on the thread that changed the store, before the client is answered. Waiting there makes "added" and
//! "removed" true for every process from the answer on; it costs 13 to 20 µs and mostly nothing, since listings are
//! rare. But taking a name back waits inside the kernel for every lookup and listing of the store directory that is under
//! way (it needs the directory's lock, which they hold until they are answered; that is also what makes it reliable: none
//! of them can bring the name back afterwards). Those are answered by the mount's own threads, which read the view. If the
//! caller held a lock the view needs, or a process stood still in the middle of a listing, the wait would not end. Hence
//! a thread of its own does the waiting in the kernel, never one that answers requests, and callers give up on it after
//! [`PATIENCE`]; the kernel still gets told, only later.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use store::view::StoreEvent;

/// How long a change of the store waits for the kernel to be told.
const PATIENCE: Duration = Duration::from_secs(1);
/// How many removed names may wait to be taken back. Further removals wait for room without a limit: at that point the
/// kernel has not let go of the directory for many [`PATIENCE`]s, and a name forgotten here would stay visible for good.
const MAX_REMOVED: usize = 4096;
/// A name no store path can have: taking it back only waits for the listings and lookups under way.
const NOBODY: &str = ".listings-under-way";

/// What the kernel can be told.
pub(crate) trait Kernel: Send {
    /// Forget the listing of the store directory.
    fn forget_listing(&self) -> io::Result<()>;
    /// Forget the entry of this name in the store directory.
    fn forget_name(&self, name: &str) -> io::Result<()>;
}

/// Passes changes of the store on to the kernel.
#[derive(Debug)]
pub(crate) struct Invalidations {
    /// Whether the kernel may hold a listing of the store directory.
    listed: AtomicBool,
    /// Listings of the store directory that are being read or answered.
    listings: AtomicUsize,
    queue: Mutex<Queue>,
    /// There is something to do, or it is over.
    work: Condvar,
    /// Something has been done.
    progress: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    removed: VecDeque<String>,
    /// Rounds of work asked for and finished. A round does everything that was queued before it was asked for.
    asked: u64,
    finished: u64,
    closed: bool,
}

impl Invalidations {
    pub(crate) fn new() -> Arc<Invalidations> {
        Arc::new(Invalidations {
            listed: AtomicBool::new(false),
            listings: AtomicUsize::new(0),
            queue: Mutex::default(),
            work: Condvar::new(),
            progress: Condvar::new(),
        })
    }

    /// Starts the thread that talks to the kernel. It ends after [`Invalidations::close`].
    pub(crate) fn start(self: &Arc<Self>, kernel: impl Kernel + 'static) -> io::Result<()> {
        let this = Arc::clone(self);
        thread::Builder::new().name("mount-notify".into()).spawn(move || this.run(&kernel))?;
        Ok(())
    }

    /// Must be held from before a listing of the store directory is read from the view until it has been answered.
    pub(crate) fn listing(&self) -> Listing<'_> {
        self.listings.fetch_add(1, Ordering::SeqCst);
        Listing { invalidations: self }
    }

    /// Whether the kernel holds a listing or is about to.
    fn may_be_listed(&self) -> bool {
        // In this order: a listing that ends in between has set the second before it left the first.
        self.listings.load(Ordering::SeqCst) > 0 || self.listed.load(Ordering::SeqCst)
    }

    /// Takes back what `events` made wrong, and returns when that is done or takes too long.
    pub(crate) fn handle(&self, events: &[StoreEvent]) {
        let mut queue = self.queue.lock();
        let mut removed = false;
        for event in events {
            let StoreEvent::Removed { name, .. } = event else { continue };
            removed = true;
            if queue.removed.len() >= MAX_REMOVED {
                tracing::error!(waiting = queue.removed.len(), "the kernel does not take back removed store paths");
            }
            while queue.removed.len() >= MAX_REMOVED && !queue.closed {
                // What was queued before is a round to be done, too, though nobody has asked for it yet.
                queue.asked += 1;
                self.work.notify_one();
                self.progress.wait(&mut queue);
            }
            queue.removed.push_back(name.clone());
        }
        // A round under way may have taken the listing back just before an added path could be seen: only rest when
        // nothing is going on and nothing is listed.
        if !removed && !self.may_be_listed() && queue.finished == queue.asked {
            return;
        }
        if !self.round(&mut queue) {
            tracing::warn!(first = ?events.first(), "the kernel is slow to take back store paths; going on without");
        }
    }

    /// Has done what is queued, and waits for it. Whether it was done in time, if it is to be done at all.
    fn round(&self, queue: &mut MutexGuard<'_, Queue>) -> bool {
        queue.asked += 1;
        let round = queue.asked;
        self.work.notify_one();
        let until = Instant::now() + PATIENCE;
        while queue.finished < round && !queue.closed {
            if self.progress.wait_until(queue, until).timed_out() {
                return false;
            }
        }
        true
    }

    /// Takes back names that may have changed while nobody served, and the listing with them; waits as
    /// [`Invalidations::handle`] does.
    pub(crate) fn forget(&self, names: impl IntoIterator<Item = String>) {
        // What the last server's kernel listed is not known.
        self.listed.store(true, Ordering::SeqCst);
        let mut queue = self.queue.lock();
        queue.removed.extend(names);
        if !self.round(&mut queue) {
            tracing::warn!("the kernel is slow to take back what the last server told it; going on without");
        }
    }

    /// Ends the thread and lets everybody who waits go.
    pub(crate) fn close(&self) {
        self.queue.lock().closed = true;
        self.work.notify_all();
        self.progress.notify_all();
    }

    fn run(&self, kernel: &dyn Kernel) {
        let mut queue = self.queue.lock();
        loop {
            while queue.finished == queue.asked && !queue.closed {
                self.work.wait(&mut queue);
            }
            if queue.closed {
                return;
            }
            let round = queue.asked;
            let removed = std::mem::take(&mut queue.removed);
            self.progress.notify_all();
            MutexGuard::unlocked(&mut queue, || self.tell(kernel, &removed));
            queue.finished = round;
            self.progress.notify_all();
        }
    }

    fn tell(&self, kernel: &dyn Kernel, removed: &VecDeque<String>) {
        if removed.is_empty() && !self.may_be_listed() {
            return;
        }
        // First: a listing that ends from here on may outlive this round and counts for the next.
        self.listed.store(false, Ordering::SeqCst);
        for name in removed {
            if let Err(error) = kernel.forget_name(name) {
                tracing::warn!(name, %error, "cannot make the kernel forget a removed store path");
            }
        }
        if removed.is_empty()
            && let Err(error) = kernel.forget_name(NOBODY)
        {
            tracing::warn!(%error, "cannot make the kernel wait for listings of the store directory");
        }
        // After the names: listings that still held one were waited for, so what they left behind goes as well.
        if let Err(error) = kernel.forget_listing() {
            tracing::warn!(%error, "cannot make the kernel forget the listing of the store directory");
        }
    }
}

/// A listing of the store directory that is being read or answered.
#[derive(Debug)]
pub(crate) struct Listing<'a> {
    invalidations: &'a Invalidations,
}

impl Drop for Listing<'_> {
    fn drop(&mut self) {
        self.invalidations.listed.store(true, Ordering::SeqCst);
        self.invalidations.listings.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Records what it is told; a closed gate makes it stand still.
    struct Recorder {
        told: Arc<Mutex<Vec<String>>>,
        gate: Arc<Mutex<()>>,
    }

    impl Kernel for Recorder {
        fn forget_listing(&self) -> io::Result<()> {
            let _open = self.gate.lock();
            self.told.lock().push("listing".into());
            Ok(())
        }

        fn forget_name(&self, name: &str) -> io::Result<()> {
            let _open = self.gate.lock();
            self.told.lock().push(name.into());
            Ok(())
        }
    }

    struct Setup {
        invalidations: Arc<Invalidations>,
        told: Arc<Mutex<Vec<String>>>,
        gate: Arc<Mutex<()>>,
    }

    impl Setup {
        fn new() -> Setup {
            let invalidations = Invalidations::new();
            let (told, gate) = (Arc::default(), Arc::default());
            invalidations.start(Recorder { told: Arc::clone(&told), gate: Arc::clone(&gate) }).unwrap();
            Setup { invalidations, told, gate }
        }

        fn told(&self) -> Vec<String> {
            std::mem::take(&mut *self.told.lock())
        }
    }

    impl Drop for Setup {
        fn drop(&mut self) {
            self.invalidations.close();
        }
    }

    fn added(name: &str) -> StoreEvent {
        StoreEvent::Added { name: name.into(), number: 2 }
    }

    fn removed(name: &str) -> StoreEvent {
        StoreEvent::Removed { name: name.into(), number: 2 }
    }

    #[test]
    fn an_unlisted_directory_needs_no_word() {
        let setup = Setup::new();
        setup.invalidations.handle(&[added("a")]);
        assert_eq!(setup.told(), [""; 0]);
    }

    #[test]
    fn a_listing_is_taken_back_once() {
        let setup = Setup::new();
        drop(setup.invalidations.listing());
        setup.invalidations.handle(&[added("a")]);
        assert_eq!(setup.told(), [NOBODY, "listing"]);
        setup.invalidations.handle(&[added("b")]);
        assert_eq!(setup.told(), [""; 0]);
    }

    #[test]
    fn a_listing_under_way_is_waited_for_each_time() {
        let setup = Setup::new();
        let listing = setup.invalidations.listing();
        setup.invalidations.handle(&[added("a")]);
        assert_eq!(setup.told(), [NOBODY, "listing"]);
        setup.invalidations.handle(&[added("b")]);
        assert_eq!(setup.told(), [NOBODY, "listing"]);
        drop(listing);
        setup.invalidations.handle(&[added("c")]);
        assert_eq!(setup.told(), [NOBODY, "listing"]);
        setup.invalidations.handle(&[added("d")]);
        assert_eq!(setup.told(), [""; 0]);
    }

    #[test]
    fn a_removed_name_goes_before_the_listing() {
        let setup = Setup::new();
        setup.invalidations.handle(&[removed("a")]);
        assert_eq!(setup.told(), ["a", "listing"]);
    }

    #[test]
    fn a_kernel_that_stands_still_stops_nobody_for_good() {
        let setup = Setup::new();
        let shut = setup.gate.lock();
        let begun = Instant::now();
        setup.invalidations.handle(&[removed("a")]);
        assert!(begun.elapsed() >= PATIENCE);
        drop(shut);
        setup.invalidations.handle(&[removed("b")]);
        assert_eq!(setup.told(), ["a", "listing", "b", "listing"]);
    }

    #[test]
    fn what_waits_together_is_told_together() {
        let setup = Setup::new();
        let shut = setup.gate.lock();
        thread::scope(|scope| {
            for name in ["a", "b", "c", "d"] {
                scope.spawn(|| setup.invalidations.handle(&[removed(name)]));
            }
            while setup.invalidations.queue.lock().asked < 4 {
                thread::yield_now();
            }
            drop(shut);
        });
        let told = setup.told();
        assert_eq!(told.iter().filter(|what| *what != "listing").count(), 4);
        assert!(told.iter().filter(|what| *what == "listing").count() <= 4, "{told:?}");
    }
}
