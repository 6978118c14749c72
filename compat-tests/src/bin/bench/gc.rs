//! Garbage collections through castored beside those through stock's newest daemon: the same paths and roots in both, the
//! same client in turn, medians of the rounds.
//!
//! Paths come in runs that refer to each other, as the closures of a system's updates do; of the older ones three of four are
//! dead, of the newer ones one of four. For stock the space is back when the command returns. For castored it comes back in
//! the background, and is back when the state directory has stopped shrinking.
//!
//! castored gets its paths in AddMultipleToStore. Stock's daemon is too slow for as many, with a transaction for each: their
//! files are written into its store as it would write them, and `nix-store --load-db` makes them valid all at once.
//!
//! `CASTORED_BENCH_ROUNDS=n` measures each row so often.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use compat_tests::error::Context;
use compat_tests::load::{self, Offer};
use compat_tests::machine::Machine;
use compat_tests::nar::{self, Tree};
use compat_tests::{Call, Release, Result, Room, Who, memory};

use crate::build::{Figure, Target, figure, median, show, wrong};
use crate::sides::{Side, Sides};
use crate::usage::{settled, used};

/// How many times each row is measured.
const ROUNDS: usize = 3;
/// Dead paths of a round, and as many that live.
const DEAD: usize = 20_000;
/// Files of each.
const FILES: usize = 10;
/// Hashes in a file, which do not pack: 40,000 paths are some packs of castored's, not a part of one.
const NOISE: usize = 48;
/// Paths of a run.
const RUN: usize = 100;
/// Paths that are added before others have their turn.
const TURN: usize = 1000;
/// How many turns the dead and the living have one after the other: five times as the first says, five times as the second.
const TURNS: [(usize, usize); 2] = [(3, 1), (1, 3)];
/// Of what is in use before, at most so much may be in use when the space is back: half of it is dead, but only packs that
/// are mostly dead are given back at once.
const LEFT: f64 = 0.9;
/// Paths among which the dead are looked for; [`DEAD`] of them live.
const LOOKED_AT: usize = 100_000;
/// Paths sent in one request.
const BATCH: usize = 2_000;
/// Paths that stock's database gets in one command.
const LOADED: usize = 20_000;
/// A command may take this long.
const LIMIT: Duration = Duration::from_secs(600);
/// The space is back when nothing has come back for so long. A sweep looks at every object before it gives anything back.
const SETTLED: Duration = Duration::from_secs(20);
/// Between two requests of a client that watches how long they take.
const PAUSE: Duration = Duration::from_millis(2);
/// Mebibyte.
const MIB: f64 = 1024.0 * 1024.0;

/// Whether all targets are reached.
pub(crate) fn bench(machine: &Machine) -> Result<bool> {
    let sides = Sides::start(machine)?;
    let kept = compare(&sides, machine);
    sides.stop()?;
    kept
}

fn compare(sides: &Sides, machine: &Machine) -> Result<bool> {
    let rounds = crate::rounds(ROUNDS);
    let client = Arc::new(machine.newest().clone());
    println!("{:<50} {:>12} {:>14} {:>7} {:>9}", "garbage", "stock", "castored", "ratio", "at most");
    let both = [&sides.stock, &sides.castored];
    for side in both {
        let started = Instant::now();
        add_first(side, &client)?;
        println!(
            "40,000 paths added {} in {:.1?}",
            if side.stock { "to stock" } else { "to castored" },
            started.elapsed()
        );
    }
    let mut figures = [Vec::new(), Vec::new()];
    for round in 0..rounds {
        for (side, figures) in both.iter().zip(&mut figures) {
            figures.push(collect(side, &client, round)?);
        }
    }
    let mut kept = report(&figures);
    figures = [Vec::new(), Vec::new()];
    for (side, figures) in both.iter().zip(&mut figures) {
        figures.push(latency(side, &client)?);
    }
    kept &= report(&figures);
    for side in both {
        Runs::new("looked-at", 1).add(side, &client, 0..LOOKED_AT - DEAD)?;
    }
    figures = [Vec::new(), Vec::new()];
    for _ in 0..rounds {
        for (side, figures) in both.iter().zip(&mut figures) {
            figures.push(print_dead(side, &client)?);
        }
    }
    kept &= report(&figures);
    crate::show_load();
    Ok(kept)
}

fn report([stock, castored]: &[Vec<Vec<Figure>>; 2]) -> bool {
    let lines = (0..castored[0].len()).map(|n| show(&castored[0][n], median(stock, n), median(castored, n)));
    lines.fold(true, |kept, line| kept & line)
}

/// Paths in runs of [`RUN`], of which the last needs all the others.
#[derive(Clone)]
struct Runs {
    tag: String,
    files: usize,
}

impl Runs {
    fn new(tag: impl Into<String>, files: usize) -> Self {
        Self { tag: tag.into(), files }
    }

    fn path(&self, n: usize) -> String {
        load::made_up_path(&format!("{} {n}", self.tag), "a-path-of-a-closure-1.0")
    }

    fn references(&self, n: usize) -> Vec<String> {
        let at = n % RUN;
        let near = [1, 2, 4, 9, 16, 25].iter().filter(|back| **back <= at);
        let mut references: Vec<String> = near.map(|back| self.path(n - back)).collect();
        references.sort();
        references
    }

    fn files(&self, n: usize) -> Vec<(String, Vec<u8>)> {
        // Some text that packs as texts do, and some that does not.
        let file = |f: usize| {
            let line = format!("file {f} of path {n} of {}, and a line that is in each of them\n", self.tag);
            let noise = (0..NOISE).map(|n| nar::hex(&nar::sha256(format!("{n} {line}").as_bytes())));
            format!("{}{}", line.repeat(12), noise.collect::<String>()).into_bytes()
        };
        (0..self.files).map(|f| (format!("file-{f}"), file(f))).collect()
    }

    fn offer(&self, n: usize) -> Offer {
        let files =
            self.files(n).into_iter().map(|(name, contents)| (name.into_bytes(), Tree::File(contents))).collect();
        let archive = Tree::Directory(files).archive();
        Offer { path: self.path(n), references: self.references(n), archive, ..Offer::default() }
    }

    fn add(&self, side: &Side, client: &Arc<Release>, range: std::ops::Range<usize>) -> Result<()> {
        if side.stock {
            // Its first client has the store's directories made.
            drop(side.connect()?);
            let (runs, client) = (self.clone(), Arc::clone(client));
            return side.inside(move |room| {
                (range.clone().step_by(LOADED))
                    .try_for_each(|from| runs.load(room, &client, from..range.end.min(from + LOADED)))
            });
        }
        let mut connection = side.connect()?;
        for from in range.clone().step_by(BATCH) {
            let batch = from..range.end.min(from + BATCH);
            connection.call(&load::add_multiple(batch.map(|n| self.offer(n))))?;
        }
        Ok(())
    }

    /// Writes the files of paths into stock's store, and has their infos loaded into its database.
    fn load(&self, room: &Room, client: &Release, range: std::ops::Range<usize>) -> Result<()> {
        let mut infos = String::new();
        for n in range {
            let path = self.path(n);
            fs::create_dir(&path).doing("creating", &path)?;
            for (name, contents) in self.files(n) {
                let file = Path::new(&path).join(name);
                fs::write(&file, contents).doing("writing", &file)?;
                settle(&file, 0o444)?;
            }
            settle(Path::new(&path), 0o555)?;
            let archive = self.offer(n).archive;
            let references = self.references(n);
            infos.push_str(&format!(
                "{path}\n{}\n{}\n\n{}\n",
                nar::hex(&nar::sha256(&archive)),
                archive.len(),
                references.len()
            ));
            references.iter().for_each(|reference| infos.push_str(&format!("{reference}\n")));
        }
        let load = Call::nix(room, Who::Root, client, "nix-store").env("NIX_REMOTE", "local").input(infos);
        load.args(["--option", "build-users-group", "", "--load-db"]).limit(LIMIT).quiet().ok().map(drop)
    }

    /// Makes a root for each run.
    fn root(&self, side: &Side) -> Result<()> {
        let runs = self.clone();
        side.inside(move |_| {
            for run in 1..=DEAD / RUN {
                let link = format!("/nix/var/nix/gcroots/{}-{run}", runs.tag);
                symlink(runs.path(run * RUN - 1), &link).doing("linking", &link)?;
            }
            Ok(())
        })
    }
}

/// Mode and time as stock gives them to what is in its store.
fn settle(path: &Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).doing("setting the mode of", path)?;
    let times = fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH + Duration::from_secs(1));
    fs::File::open(path).and_then(|file| file.set_times(times)).doing("setting the time of", path)
}

/// What stays.
fn live() -> Runs {
    Runs::new("live", FILES)
}

/// Adds what stays, and what is deleted first: runs of the one and runs of the other in turn.
fn add_first(side: &Side, client: &Arc<Release>) -> Result<()> {
    let (live, dead) = (live(), Runs::new("dead 0", FILES));
    let (mut lived, mut died) = (0, 0);
    for (dying, living) in TURNS.into_iter().flat_map(|turns| [turns; DEAD / (4 * TURN)]) {
        dead.add(side, client, died..died + dying * TURN)?;
        live.add(side, client, lived..lived + living * TURN)?;
        (lived, died) = (lived + living * TURN, died + dying * TURN);
    }
    assert_eq!((lived, died), (DEAD, DEAD));
    live.root(side)
}

fn gc(room: &Room, client: &Release, args: &[&str]) -> Result<(f64, compat_tests::Output)> {
    let call = Call::nix(room, Who::User, client, "nix-store").arg("--gc").args(args).limit(LIMIT).quiet();
    let started = Instant::now();
    let output = call.ok()?;
    Ok((started.elapsed().as_secs_f64(), output))
}

fn collect_all(side: &Side, client: &Arc<Release>) -> Result<f64> {
    let client = Arc::clone(client);
    let (time, output) = side.inside(move |room| gc(room, &client, &[]))?;
    // Paths of the clients that measured how long their requests take are deleted as well.
    let deleted = output.stderr.lines().filter(|line| line.starts_with("deleting '")).count();
    if deleted < DEAD {
        return Err(wrong(format!("the client heard of {deleted} paths that were deleted")));
    }
    Ok(time)
}

fn collect(side: &Side, client: &Arc<Release>, round: usize) -> Result<Vec<Figure>> {
    if round > 0 {
        Runs::new(format!("dead {round}"), FILES).add(side, client, 0..DEAD)?;
    }
    // What was added is on disk on both sides, and nothing of it waits to be written while it is deleted.
    nix::unistd::sync();
    let before = side.inside(|_| used())?.bytes;
    let started = Instant::now();
    let time = collect_all(side, client)?;
    let (after, back) = side.inside(move |_| settled(SETTLED))?;
    let (after, back) = (after.bytes, back.duration_since(started).as_secs_f64().max(time));
    if after as f64 > LEFT * before as f64 {
        return Err(wrong(format!("of {before} bytes in use {after} stayed in use")));
    }
    Ok(vec![
        figure("--gc, 20,000 of 40,000 paths, 200,000 files", "s", time, Target::OfStock(0.1)),
        figure("  until the space is back", "s", back, Target::OfStock(3.0)),
        figure("  on disk before", "MiB", before as f64 / MIB, Target::None),
        figure("  on disk after", "MiB", after as f64 / MIB, Target::None),
    ])
}

/// How long other clients wait while 20,000 paths are deleted.
fn latency(side: &Side, client: &Arc<Release>) -> Result<Vec<Figure>> {
    Runs::new("dead again", FILES).add(side, client, 0..DEAD)?;
    let over = AtomicBool::new(false);
    let known = live();
    let (asked, added) = thread::scope(|scope| {
        let asking = scope.spawn(|| -> Result<f64> {
            let mut connection = side.connect()?;
            let mut n = 0;
            worst(&over, || {
                n += 1;
                connection.path_info(&load::path_info(&known.path(n * 7_919 % DEAD))).map(drop)
            })
        });
        let adding = scope.spawn(|| -> Result<f64> {
            let mut connection = side.connect()?;
            let mut n = 0;
            worst(&over, || {
                n += 1;
                let path = load::made_up_path(&format!("meanwhile {n}"), "a-small-path");
                let archive = Tree::File(format!("meanwhile {n}\n").into_bytes()).archive();
                connection.call(&Offer { path, archive, ..Offer::default() }.add_nar())
            })
        });
        let collected = collect_all(side, client);
        over.store(true, Ordering::Relaxed);
        let ended = |thread: thread::ScopedJoinHandle<'_, Result<f64>>| {
            thread.join().unwrap_or_else(|_| Err(wrong("a client panicked")))
        };
        let (asked, added) = (ended(asking)?, ended(adding)?);
        collected.map(|_| (asked, added))
    })?;
    Ok(vec![
        figure("  the longest QueryPathInfo meanwhile", "ms", asked, Target::None),
        figure("  the longest addition of a path meanwhile", "ms", added, Target::None),
    ])
}

/// Does it until it is over; the longest that it took, in milliseconds.
fn worst(over: &AtomicBool, mut act: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut worst = 0.0f64;
    while !over.load(Ordering::Relaxed) {
        let started = Instant::now();
        act()?;
        worst = worst.max(started.elapsed().as_secs_f64() * 1000.0);
        thread::sleep(PAUSE);
    }
    Ok(worst)
}

fn print_dead(side: &Side, client: &Arc<Release>) -> Result<Vec<Figure>> {
    memory::reset_peak(side.pid)?;
    let before = memory::rss(side.pid)?;
    let client = Arc::clone(client);
    let (time, output) = side.inside(move |room| gc(room, &client, &["--print-dead"]))?;
    let grown = memory::peak(side.pid)?.saturating_sub(before);
    let dead = output.lines().len();
    if dead < LOOKED_AT - DEAD {
        return Err(wrong(format!("{dead} paths were called dead")));
    }
    Ok(vec![
        figure("--gc --print-dead, 100,000 paths, 20,000 live", "s", time, Target::OfStock(0.2)),
        // Stock does it in a process that is gone by then.
        figure("  memory that takes in the daemon's process", "MiB", grown as f64 / MIB, Target::None),
    ])
}
