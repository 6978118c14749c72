//! Crashes by the hundred.

use std::fmt;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::check::check;
use crate::crash::{Loss, Replay, write_out};
use crate::disk::Disk;
use crate::ledger::Entries;
use crate::random::Random;

/// Where disks are written to: nothing here is about this machine's own disk.
const SCRATCH: [&str; 2] = ["/dev/shm", "/var/tmp"];
const THREADS: usize = 2;
/// How long a closed store may take to let go of its directory.
const PATIENCE: Duration = Duration::from_secs(30);

/// A disk whose store was not as it should be.
#[derive(Debug)]
#[expect(dead_code, reason = "read by who reads the failure")]
pub(crate) struct Failure {
    seed: u64,
    at: usize,
    loss: Loss,
    error: String,
}

/// What came of looking at many.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) images: usize,
    pub(crate) operations: usize,
    /// Paths that had to be there, over all images.
    pub(crate) held: usize,
    pub(crate) failures: Vec<Failure>,
    took: Duration,
}

impl Found {
    pub(crate) fn extend(&mut self, other: Found) {
        self.images += other.images;
        self.operations += other.operations;
        self.held += other.held;
        self.failures.extend(other.failures);
        self.took += other.took;
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Found { images, operations, held, failures, took } = self;
        let wrong = failures.len();
        write!(
            f,
            "{images} crashes among {operations} operations, {held} paths that had to be there, {wrong} wrong, {took:.1?}"
        )
    }
}

/// A directory for a disk; removed when dropped.
pub(crate) struct Scratch(tempfile::TempDir);

impl Scratch {
    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let began = Instant::now();
        // A thread of a store that was closed just now may still write.
        while std::fs::remove_dir_all(self.path()).is_err_and(|error| error.kind() != ErrorKind::NotFound)
            && began.elapsed() < PATIENCE
        {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

pub(crate) fn scratch() -> Scratch {
    let place = SCRATCH.into_iter().find(|place| Path::new(place).is_dir()).unwrap();
    Scratch(tempfile::Builder::new().prefix("castored-crash-").tempdir_in(place).unwrap())
}

/// Looks at `images` disks that crashes may leave: half of them right before or after an fsync, where acknowledgements
/// are.
pub(crate) fn examine(disk: &Disk, entries: &Entries, images: usize, seed: u64) -> Found {
    let began = Instant::now();
    let mut random = Random::new(seed ^ 0xe8a);
    let replay = Replay::new(disk, seed);
    let (start, length) = (entries.start, replay.length());
    let syncs: Vec<usize> = replay.syncs().into_iter().filter(|at| *at > start).collect();
    drop(replay);
    let mut points: Vec<(usize, u64)> = (0..images)
        .map(|number| {
            let at = match number % 4 {
                0 if !syncs.is_empty() => syncs[random.below(syncs.len())],
                1 if !syncs.is_empty() => syncs[random.below(syncs.len())] - 1,
                _ => start + random.below(length - start + 1),
            };
            (at, random.next())
        })
        .collect();
    points.sort_unstable();
    let (failures, held) = (Mutex::new(Vec::new()), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (points, failures, held) = (&points, &failures, &held);
            scope.spawn(move || {
                let mut replay = Replay::new(disk, seed);
                for &(at, image_seed) in points.iter().skip(thread).step_by(THREADS) {
                    replay.advance(at);
                    let mut random = Random::new(image_seed);
                    let loss = Loss::any(&mut random);
                    let dir = scratch();
                    write_out(&replay.image(loss, &mut random), dir.path());
                    let state = dir.path().join("state");
                    std::fs::create_dir_all(&state).unwrap();
                    if let Err(error) = check(&state, entries, at) {
                        failures.lock().unwrap().push(Failure { seed, at, loss, error });
                    }
                    let must = entries.paths.values().filter(|history| entries.must_be_there(history, at)).count();
                    held.fetch_add(must, Ordering::Relaxed);
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    Found { images, operations: length - start, held: held.into_inner(), failures, took: began.elapsed() }
}
