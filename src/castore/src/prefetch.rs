//! Blocks that a sequential reader will want next, decoded before it asks.
//!
//! What was imported together stands together, so who reads a large file or a tree in order takes a pack's blocks one after
//! the other. The kernel asks for the next piece of a file only when the one before it is used up; without this all
//! decoding would be done by one thread, while that reader waits.
//!
//! A *stream* is a place in a pack up to which somebody has read in order. From its second block on, threads keep a little
//! more than it has read decoded in the block cache. Finding where the next block begins takes its predecessor's header,
//! so jobs form a chain: each looks up its block's length, starts the next job, and decodes.

use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender};
use parking_lot::Mutex;

use crate::cache::BlockCache;
use crate::pack::{Packs, Place};

/// Streams that are followed at the same time; of more the one that rests longest is forgotten.
const STREAMS: usize = 16;
/// Threads that decode ahead.
const THREADS: usize = 2;
/// Blocks that may wait for a thread.
const QUEUE: usize = 2 * STREAMS;
/// Bytes that one who reads in order may pass over: blocks of directories, and of what was imported at the same time.
const GAP: u64 = 256 << 10;
/// How far ahead of its reader a stream is kept, in bytes of the pack: one block or two at first, which doubles with each
/// block that is read, up to some eight. Small paths are read to their ends and no further.
const FIRST_AHEAD: u64 = 64 << 10;
const AHEAD: u64 = 512 << 10;

/// One reader's way through a pack.
#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    pack: u32,
    /// Where the block begins that comes next.
    next: u64,
    /// Up to where blocks are decoded or about to be; not before `next`.
    scheduled: u64,
    /// How far ahead of `next` that is to be, in bytes.
    ahead: u64,
    /// Its reader has gone on from one block to a later one before.
    moves: bool,
    /// When it was last read from, by the count of advances.
    used: u64,
    /// A job is under way that will see to the rest.
    running: bool,
}

/// A block to decode, the first that is not scheduled.
#[derive(Clone, Copy, Debug)]
struct Job {
    /// Whose: it is not forgotten as long as its job runs.
    stream: usize,
    pack: u32,
    offset: u64,
}

#[derive(Debug, Default)]
struct Streams {
    all: [Stream; STREAMS],
    count: u64,
}

impl Streams {
    /// Notes that a reader takes the block at `place`. Answers whether it reads in order, and what is to be decoded next.
    fn advance(&mut self, place: Place) -> (bool, Option<Job>) {
        self.count += 1;
        let end = place.offset + u64::from(place.length);
        let followed = |stream: &Stream| {
            stream.pack == place.pack
                && (stream.next == end || (stream.next..=stream.next + GAP).contains(&place.offset))
        };
        let Some((number, stream)) = self.all.iter_mut().enumerate().find(|(_, stream)| followed(stream)) else {
            // Perhaps the beginning of one.
            if let Some(oldest) = self.all.iter_mut().filter(|stream| !stream.running).min_by_key(|stream| stream.used)
            {
                let (pack, used) = (place.pack, self.count);
                *oldest = Stream { pack, next: end, scheduled: end, used, ..Stream::default() };
            }
            return (false, None);
        };
        stream.used = self.count;
        if stream.next == end {
            // Another object of the block it is at.
            return (true, None);
        }
        // Once may be chance, unless it is the very next block.
        let in_order = stream.next == place.offset || stream.moves;
        stream.moves = true;
        stream.next = end;
        if !in_order {
            stream.scheduled = stream.scheduled.max(end);
            return (false, None);
        }
        stream.scheduled = stream.scheduled.max(end);
        stream.ahead = (stream.ahead * 2).clamp(FIRST_AHEAD, AHEAD);
        if stream.running || stream.scheduled >= end + stream.ahead {
            return (true, None);
        }
        stream.running = true;
        (true, Some(Job { stream: number, pack: stream.pack, offset: stream.scheduled }))
    }

    /// Notes that the block of `job` ends at `end`, or that there is none. Answers what is to be decoded after it.
    fn scheduled(&mut self, job: Job, end: Option<u64>) -> Option<Job> {
        let stream = &mut self.all[job.stream];
        stream.running = false;
        // After the last block of a pack nothing more is looked for. The reader may have overtaken the job.
        stream.scheduled = stream.scheduled.max(end.unwrap_or(u64::MAX - AHEAD));
        if stream.scheduled >= stream.next + stream.ahead {
            return None;
        }
        stream.running = true;
        Some(Job { offset: stream.scheduled, ..job })
    }

    /// Notes that a job could not be started.
    fn dropped(&mut self, job: Job) {
        self.all[job.stream].running = false;
    }
}

/// Follows readers and decodes ahead of them.
pub(crate) struct Prefetcher {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    streams: Mutex<Streams>,
    packs: Arc<Packs>,
    cache: Arc<BlockCache>,
    /// `None` ends the thread that takes it.
    queue: Sender<Option<Job>>,
}

impl Prefetcher {
    /// Starts the threads. Where none can be had, nothing is decoded ahead.
    pub(crate) fn start(packs: &Arc<Packs>, cache: &Arc<BlockCache>) -> Prefetcher {
        let (queue, jobs) = crossbeam_channel::bounded(QUEUE);
        let (packs, cache) = (Arc::clone(packs), Arc::clone(cache));
        let shared = Arc::new(Shared { streams: Mutex::default(), packs, cache, queue });
        let mut threads = Vec::new();
        for number in 0..THREADS {
            let (shared, jobs) = (Arc::clone(&shared), jobs.clone());
            let thread = std::thread::Builder::new().name(format!("prefetch-{number}"));
            match thread.spawn(move || shared.run(&jobs)) {
                Ok(thread) => threads.push(thread),
                Err(error) => tracing::warn!(%error, "cannot start a thread that decodes ahead of readers"),
            }
        }
        Prefetcher { shared, threads }
    }

    /// Notes that a reader takes the block at `place`. Answers whether it reads in order: it will want what stands behind
    /// that too.
    pub(crate) fn note(&self, place: Place) -> bool {
        let (in_order, next) = self.shared.streams.lock().advance(place);
        if let Some(job) = next.filter(|_| !self.threads.is_empty()) {
            self.shared.start(job);
        }
        in_order
    }
}

impl Drop for Prefetcher {
    fn drop(&mut self) {
        for _ in &self.threads {
            // Waits for room. The threads are there: they end only by this.
            let _ = self.shared.queue.send(None);
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread that decodes ahead of readers panicked");
            }
        }
    }
}

impl Shared {
    fn start(&self, job: Job) {
        if self.queue.try_send(Some(job)).is_err() {
            self.streams.lock().dropped(job);
        }
    }

    fn run(&self, jobs: &Receiver<Option<Job>>) {
        while let Ok(Some(job)) = jobs.recv() {
            let place = self.packs.place_at(job.pack, job.offset);
            let next = self.streams.lock().scheduled(job, place.map(|place| place.offset + u64::from(place.length)));
            if let Some(next) = next {
                self.start(next);
            }
            if let Some(place) = place {
                // What is wrong with it, whoever wants it is told.
                let _ = self.cache.load(&self.packs, place);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTH: u32 = 60_000;

    fn block(pack: u32, number: u64) -> Place {
        Place { pack, offset: 32 + number * u64::from(LENGTH), length: LENGTH }
    }

    /// Runs a chain of jobs to its end; answers the offsets of the blocks it decodes.
    fn run(streams: &mut Streams, mut job: Option<Job>) -> Vec<u64> {
        let mut decoded = Vec::new();
        while let Some(now) = job {
            decoded.push(now.offset);
            job = streams.scheduled(now, Some(now.offset + u64::from(LENGTH)));
        }
        decoded
    }

    #[test]
    fn a_reader_in_order_is_kept_ahead_of() {
        let mut streams = Streams::default();
        assert!(matches!(streams.advance(block(1, 0)), (false, None)), "one block is no order");
        // A block has many objects.
        assert!(matches!(streams.advance(block(1, 0)), (true, None)));
        let (in_order, job) = streams.advance(block(1, 1));
        assert!(in_order);
        let decoded = run(&mut streams, job);
        assert_eq!(decoded, [block(1, 2).offset, block(1, 3).offset]);
        let mut known = 4;
        for number in 2..100 {
            let (_, job) = streams.advance(block(1, number));
            let decoded = run(&mut streams, job);
            let ahead = (FIRST_AHEAD << (number - 1).min(10)).min(AHEAD).div_ceil(u64::from(LENGTH));
            let expected = known.max(number + 1)..number + 1 + ahead;
            assert_eq!(decoded, expected.clone().map(|number| block(1, number).offset).collect::<Vec<_>>());
            known = expected.end;
        }
    }

    #[test]
    fn who_overtakes_the_threads_is_still_followed() {
        let mut streams = Streams::default();
        streams.advance(block(1, 0));
        let late = streams.advance(block(1, 1)).1.unwrap();
        for number in 2..6 {
            assert!(matches!(streams.advance(block(1, number)), (true, None)), "a job is under way");
        }
        let next = streams.scheduled(late, Some(block(1, 3).offset)).unwrap();
        assert_eq!(next.offset, block(1, 6).offset, "what has been read needs no decoding");
        run(&mut streams, Some(next));
        assert!(streams.all.iter().all(|stream| !stream.running));
        assert!(streams.advance(block(1, 6)).1.is_some());
    }

    #[test]
    fn who_jumps_about_is_left_alone() {
        let mut streams = Streams::default();
        for number in [9, 4, 20, 2, 31, 7, 25] {
            assert!(matches!(streams.advance(block(1, number)), (false, None)));
        }
    }

    #[test]
    fn who_passes_over_a_few_blocks_reads_in_order_all_the_same() {
        let mut streams = Streams::default();
        streams.advance(block(1, 0));
        assert!(matches!(streams.advance(block(1, 2)), (false, None)), "it may be chance");
        let (in_order, job) = streams.advance(block(1, 5));
        assert!(in_order);
        assert_eq!(run(&mut streams, job)[0], block(1, 6).offset);
        let (in_order, job) = streams.advance(block(1, 8));
        assert!(in_order && job.is_some());
        assert!(matches!(streams.advance(block(1, 20)), (false, None)), "that is too far");
    }

    #[test]
    fn readers_do_not_disturb_each_other_until_there_are_too_many() {
        let mut streams = Streams::default();
        for number in 0..3 {
            for pack in 0..STREAMS as u32 {
                let (_, job) = streams.advance(block(pack, number));
                assert_eq!(job.is_some(), number > 0, "block {number} of pack {pack}");
                run(&mut streams, job);
            }
        }
        for number in 3..6 {
            for pack in 0..2 * STREAMS as u32 {
                let (_, job) = streams.advance(block(pack, number));
                run(&mut streams, job);
            }
        }
        assert_eq!(streams.all.len(), STREAMS);
    }

    #[test]
    fn nothing_is_behind_the_last_block() {
        let mut streams = Streams::default();
        streams.advance(block(1, 0));
        let job = streams.advance(block(1, 1)).1.unwrap();
        assert!(streams.scheduled(job, None).is_none());
        assert!(streams.advance(block(1, 2)).1.is_none());
        assert!(streams.all.iter().all(|stream| !stream.running));
    }

    #[test]
    fn a_job_that_found_no_room_is_tried_again_later() {
        let mut streams = Streams::default();
        streams.advance(block(1, 0));
        let job = streams.advance(block(1, 1)).1.unwrap();
        streams.dropped(job);
        let again = streams.advance(block(1, 2)).1.unwrap();
        assert_eq!(again.offset, block(1, 3).offset);
    }
}
