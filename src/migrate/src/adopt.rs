//! `castored adopt`: every path of a stock store, its info and its realisations, into castored's.
//!
//! ```text
//! database ─> Plan ─> Queue ──> threads: tree ─> NAR ─> Store::import ─> claims checked ─> Store::register
//!                       ^                                                      │
//!                       └───────────── what refers to it is ready ─────────────┘
//! ```
//!
//! A path is registered as soon as it is imported and all it refers to is there, so a run that is killed loses what was
//! under way and the last 100 ms; the next one goes over what is there (one look at each) and continues. A second run
//! finds what stock added since. **Nothing is registered whose NAR has not the hash and size that stock recorded.** What
//! has not is named and left out, and so is what refers to it.

mod in_place;
mod in_use;
mod linked;
mod plan;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use nix_compat::path_info::PathInfo;
use nix_compat::store_path::StorePath;
use parking_lot::Mutex;
use store::{NewPath, SignaturePolicy, Store};

use crate::database::Database;
use crate::error::{Error, Result};
use crate::places::StockPlaces;
use crate::progress::{Progress, Stage};
use in_place::Freeing;
pub(crate) use in_place::remove_tree;
use linked::{Dumping, Linked};
use plan::{Plan, Queue};

/// NARs up to this many bytes are read into memory, which is quicker than a thread for each.
const SMALL: u64 = 256 * 1024;
/// Paths that are read at a time for each processor: one of them waits for the disk while another is hashed.
const PER_PROCESSOR: NonZeroUsize = NonZeroUsize::MIN.saturating_add(1);
/// Progress is told in steps of so many bytes.
const STEP: u64 = 256 * 1024;

/// How to adopt.
#[derive(Clone, Debug)]
pub struct Options {
    /// Paths that are read at a time.
    pub threads: NonZeroUsize,
    /// Remove the old files of each path as soon as castored's are durable and have been read back.
    pub in_place: bool,
}

impl Default for Options {
    fn default() -> Self {
        let processors = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        Self { threads: processors.saturating_mul(PER_PROCESSOR), in_place: false }
    }
}

/// A path (or something else of the stock store) that castored does not have after the move.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LeftOut {
    /// What: a full path.
    pub what: String,
    /// Why.
    pub reason: String,
}

/// What a run did.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Paths that were taken over.
    pub adopted: u64,
    /// Bytes of their NARs.
    pub bytes: u64,
    /// Paths that were there already.
    pub known: u64,
    /// Files that were not read, since they had been under another name (hard links, as stock's optimising makes them).
    pub linked: u64,
    /// Realisations that stock has.
    pub realisations: u64,
    /// Old paths whose files were removed.
    pub removed: u64,
    /// Old paths whose files were kept, since something uses them.
    pub kept: u64,
    /// What castored does not have now, in order.
    pub left_out: Vec<LeftOut>,
}

/// What came of one path.
enum Adopted {
    /// With so many bytes, and so many files that were not read.
    New(u64, u64),
    Known,
    LeftOut(LeftOut),
}

struct Run<'a> {
    store: &'a Arc<Store>,
    database: Database,
    source: File,
    linked: Linked,
    progress: &'a dyn Progress,
    outcome: Mutex<Outcome>,
    freeing: Option<Freeing<'a>>,
}

/// Adopts what the stock store has now. Roots and logs are another matter: [`crate::switch`].
///
/// # Errors
/// When either store cannot be read or written. That a single path cannot be taken over is told in the outcome.
pub fn adopt(store: &Arc<Store>, from: &StockPlaces, options: &Options, progress: &dyn Progress) -> Result<Outcome> {
    let directory = crate::switch::database_of(from);
    let database = Database::open(&directory, store.store_dir(), &store.state_dir().join("castored"))?;
    if options.in_place {
        crate::switch::make_writable(&from.store)?;
    }
    let source = File::open(&from.store).map_err(Error::file("open", &from.store))?;
    let plan = Plan::read(&database)?;
    progress.begin(Stage::Adopting, plan.paths.len() as u64, plan.paths.iter().map(|path| path.nar_size).sum());
    let freeing = if options.in_place { Some(Freeing::new(store, from, progress)?) } else { None };
    let linked = Linked::new(&from.store, options.in_place);
    let run = Run { store, database, source, linked, progress, outcome: Mutex::default(), freeing };
    let queue = Queue::new(&plan);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..options.threads.get())
            .map(|_| {
                scope.spawn(|| {
                    let worked = run.work(&plan, &queue);
                    if worked.is_err() {
                        queue.stop();
                    }
                    worked
                })
            })
            .collect();
        workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| Error::Panicked)?)
    })?;
    run.finish(&plan, &queue)
}

impl Run<'_> {
    fn work(&self, plan: &Plan, queue: &Queue<'_>) -> Result<()> {
        while let Some(at) = queue.take() {
            let path = &plan.paths[at];
            let adopted = self.one(path.id)?;
            queue.done(at, !matches!(adopted, Adopted::LeftOut(_)));
            if !matches!(adopted, Adopted::New(..)) {
                self.progress.bytes(path.nar_size);
            }
            self.progress.path();
            let mut outcome = self.outcome.lock();
            match adopted {
                Adopted::New(bytes, linked) => {
                    outcome.adopted += 1;
                    outcome.bytes += bytes;
                    outcome.linked += linked;
                }
                Adopted::Known => outcome.known += 1,
                Adopted::LeftOut(what) => {
                    self.progress.note(&format!("left out: '{}': {}", what.what, what.reason));
                    outcome.left_out.push(what);
                }
            }
        }
        Ok(())
    }

    fn one(&self, id: i64) -> Result<Adopted> {
        let info = match self.database.info(id)? {
            Ok(info) => info,
            Err(row) => return Ok(Adopted::LeftOut(LeftOut { what: row.path, reason: row.reason })),
        };
        let path = info.path.clone();
        let adopted = match self.store.entry(&path)? {
            Some(known) if known.info.nar_hash == info.nar_hash => {
                if adds_something(&known.info, &info) {
                    self.store.register(vec![NewPath { info, node: known.node, pin: None }])?;
                }
                Adopted::Known
            }
            Some(_) => {
                let reason = "castored has this path with other contents".to_owned();
                return Ok(Adopted::LeftOut(LeftOut { what: self.store.store_dir().display(&path), reason }));
            }
            None => match self.import_and_register(info) {
                Ok((bytes, linked)) => Adopted::New(bytes, linked),
                Err(error) if is_about_the_path(&error) => {
                    let what = self.store.store_dir().display(&path);
                    return Ok(Adopted::LeftOut(LeftOut { what, reason: error.to_string() }));
                }
                Err(error) => return Err(error.into()),
            },
        };
        if let Some(freeing) = &self.freeing {
            freeing.adopted(&path)?;
        }
        Ok(adopted)
    }

    /// Answers how many bytes it has, and how many of its files were not read.
    fn import_and_register(&self, info: PathInfo) -> Result<(u64, u64), store::Error> {
        let mut dumping = self.linked.of_a_path(self.store);
        let new = self.import(info, &mut dumping)?;
        let (bytes, node) = (new.info.nar_size, new.node.clone());
        self.store.register(vec![new])?;
        Ok((bytes, dumping.registered(&node)?))
    }

    /// Reads each file once.
    fn import(&self, info: PathInfo, dumping: &mut Dumping<'_>) -> Result<NewPath, store::Error> {
        let name = info.path.base_name().to_owned();
        let mut dump = |out: &mut dyn Write| {
            let mut out = Counting::new(out, self.progress);
            build::dump_tree_knowing(self.source.as_fd(), Path::new(&name), dumping, &mut out)
        };
        if (1..=SMALL).contains(&info.nar_size) {
            // No more than was announced: it would be refused anyway.
            let mut nar = Bounded { bytes: Vec::new(), limit: info.nar_size as usize };
            let read = |source| store::Error::Stream {
                action: "read",
                what: self.store.store_dir().display(&info.path),
                source,
            };
            dump(&mut nar).map_err(read)?;
            return self.store.import_with_info(info, &mut nar.bytes.as_slice());
        }
        self.store.import_dump_with_info(info, dump)
    }

    fn finish(self, plan: &Plan, queue: &Queue<'_>) -> Result<Outcome> {
        let mut outcome = std::mem::take(&mut *self.outcome.lock());
        for at in queue.left() {
            let reason = if plan.dangling.contains(&at) {
                "refers to a path that the stock database does not have"
            } else {
                "refers to what was left out"
            };
            outcome.left_out.push(LeftOut { what: self.database.path(plan.paths[at].id)?, reason: reason.to_owned() });
        }
        let (realisations, unreadable) = self.database.realisations()?;
        outcome.left_out.extend(unreadable.into_iter().map(|what| LeftOut { what, reason: "cannot be read".into() }));
        for realisation in realisations {
            match self.store.register_realisation(&realisation, SignaturePolicy::DontCheck) {
                Ok(()) => outcome.realisations += 1,
                Err(error) if is_about_the_path(&error) => {
                    let what = format!("realisation {}", realisation.id);
                    outcome.left_out.push(LeftOut { what, reason: error.to_string() });
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.store.sync()?;
        if let Some(freeing) = self.freeing {
            (outcome.removed, outcome.kept) = freeing.finish()?;
        }
        outcome.left_out.sort();
        Ok(outcome)
    }
}

/// Whether stock knows more of a path than castored.
fn adds_something(known: &PathInfo, stock: &PathInfo) -> bool {
    !stock.signatures.is_subset(&known.signatures)
        || (stock.ultimate && !known.ultimate)
        || (stock.deriver.is_some() && known.deriver.is_none())
        || (stock.ca.is_some() && known.ca.is_none())
}

/// Whether another path may fare better. What castored's own store cannot do, or the index, stops the whole run.
fn is_about_the_path(error: &store::Error) -> bool {
    use store::Error as E;
    !matches!(
        error,
        E::Castore(_) | E::Index(_) | E::File { .. } | E::InUse { .. } | E::Record { .. } | E::NumbersExhausted
    )
}

/// Paths of castored's that stock's database lists as valid.
///
/// # Errors
/// When either cannot be read.
pub fn adopted_paths(store: &Store, from: &StockPlaces) -> Result<BTreeSet<StorePath>> {
    let directory = crate::switch::database_of(from);
    let database = Database::open(&directory, store.store_dir(), &store.state_dir().join("castored"))?;
    let mut paths = BTreeSet::new();
    for listed in database.list()? {
        if let Ok(path) = store.store_dir().parse(&database.path(listed.id)?)
            && store.is_valid(&path)?
        {
            paths.insert(path);
        }
    }
    Ok(paths)
}

/// Reads paths back from castored's store and compares them with their hashes, on several threads. Answers what is wrong.
///
/// # Errors
/// When the index cannot be read.
pub fn verify(
    store: &Store,
    paths: &BTreeSet<StorePath>,
    threads: NonZeroUsize,
    progress: &dyn Progress,
) -> Result<Vec<LeftOut>> {
    let mut bytes = 0;
    for path in paths {
        bytes += store.path_info(path)?.map_or(0, |info| info.nar_size);
    }
    progress.begin(Stage::Verifying, paths.len() as u64, bytes);
    let waiting = Mutex::new(paths.iter());
    let wrong = Mutex::new(Vec::new());
    let work = || -> Result<()> {
        loop {
            let Some(path) = waiting.lock().next() else { return Ok(()) };
            if let Some(reason) = store.verify_path(path, true)? {
                wrong.lock().push(LeftOut { what: store.store_dir().display(path), reason });
            }
            progress.bytes(store.path_info(path)?.map_or(0, |info| info.nar_size));
            progress.path();
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.get()).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| Error::Panicked)?)
    })?;
    Ok(wrong.into_inner())
}

/// Tells how much has been written, in large steps.
struct Counting<'a> {
    out: &'a mut dyn Write,
    progress: &'a dyn Progress,
    untold: u64,
}

impl<'a> Counting<'a> {
    fn new(out: &'a mut dyn Write, progress: &'a dyn Progress) -> Self {
        Self { out, progress, untold: 0 }
    }
}

impl Drop for Counting<'_> {
    fn drop(&mut self) {
        self.progress.bytes(self.untold);
    }
}

impl Write for Counting<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.out.write(buf)?;
        self.untold += n as u64;
        if self.untold >= STEP {
            self.progress.bytes(std::mem::take(&mut self.untold));
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Keeps what is written, up to a limit.
struct Bounded {
    bytes: Vec<u8>,
    limit: usize,
}

impl Write for Bounded {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + buf.len() > self.limit {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is larger than its database entry says"));
        }
        self.bytes.extend_from_slice(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
