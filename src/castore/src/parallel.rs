//! The same work on many things, by a few threads.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Calls `work` with each of `items`, on at most `threads` threads of which this one is one, until it breaks. What is
/// under way on another thread by then is still finished.
pub fn for_each<T: Sync>(items: &[T], threads: usize, work: impl Fn(&T) -> ControlFlow<()> + Sync) -> ControlFlow<()> {
    let (next, ended) = (AtomicUsize::new(0), AtomicBool::new(false));
    let run = || {
        while !ended.load(Ordering::Acquire)
            && let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed))
        {
            if work(item).is_break() {
                ended.store(true, Ordering::Release);
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(threads);
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(run);
        }
        run();
    });
    if ended.into_inner() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_comes_once_and_none_after_a_break() {
        let items: Vec<usize> = (0..1000).collect();
        let seen: Vec<AtomicUsize> = items.iter().map(|_| AtomicUsize::new(0)).collect();
        let all = for_each(&items, 3, |&item| {
            seen[item].fetch_add(1, Ordering::Relaxed);
            ControlFlow::Continue(())
        });
        assert!(all.is_continue() && seen.iter().all(|count| count.load(Ordering::Relaxed) == 1));
        let calls = AtomicUsize::new(0);
        let broken = for_each(&items, 3, |_| {
            calls.fetch_add(1, Ordering::Relaxed);
            ControlFlow::Break(())
        });
        assert!(broken.is_break() && calls.into_inner() <= 3);
    }
}
