//! `castored adopt` and `castored export-store`: moving in from a stock store, and out into one.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ::daemon::Locations;
use clap::Args;
use indicatif::HumanBytes;
use migrate::adopt::{self, LeftOut, Outcome};
use migrate::switch::{self, Note, StockLock};
use migrate::{StockPlaces, export};
use store::{Config, Store};

use crate::bar::Bar;
use crate::failure::Failure;
use crate::state;

/// The state and log directories of a store below another root.
const STATE_BELOW: &str = "nix/var/nix";
const LOG_BELOW: &str = "nix/var/log/nix";
/// How many of the paths that were left out are listed at the end.
const LISTED: usize = 100;

/// Take over an existing store of stock Nix: every path with all that is known of it, realisations, roots and logs.
///
/// It may be stopped at any time and started again, and it leaves the stock store as it is: stock Nix may go on using it
/// meanwhile. The last run is with --finish, while stock Nix is stopped.
#[derive(Debug, Args)]
pub(crate) struct AdoptArgs {
    /// The stock store below another root (as `nix --store DIR` has it) instead of the one in castored's own place.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["from_store", "from_state", "from_log"])]
    from: Option<PathBuf>,
    /// Where the stock store's files are, when not in the store directory.
    #[arg(long, value_name = "DIR")]
    from_store: Option<PathBuf>,
    /// Where the stock store's state is (`db`, `gcroots`, `profiles`), when not in castored's state directory.
    #[arg(long, value_name = "DIR")]
    from_state: Option<PathBuf>,
    /// Where the stock store's build logs are, when not in castored's log directory.
    #[arg(long, value_name = "DIR")]
    from_log: Option<PathBuf>,
    /// Paths that are read at a time (two for each processor).
    #[arg(long, value_name = "N")]
    jobs: Option<NonZeroUsize>,
    /// The last run: takes what is new, reads everything back from castored's store, and makes castored the successor.
    #[arg(long)]
    finish: bool,
    /// For want of room for two copies: as --finish, but with the old files of each path removed as soon as castored has
    /// it on disk and has read it back. What running programs and current profiles use is kept until --remove-old.
    #[arg(long)]
    in_place: bool,
    /// With --finish or --in-place: finish although paths had to be left out.
    #[arg(long)]
    without_damaged: bool,
    /// Remove the old files, below castored's mount, after --finish or --in-place. The daemon may run.
    #[arg(long, conflicts_with_all = ["finish", "in_place", "from", "from_store", "from_state"])]
    remove_old: bool,
}

/// Write a plain store of stock Nix, with its database, that needs no castored. The same command finishes one that was
/// interrupted.
#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// An empty or new directory: the store gets the layout of `nix --store DIR`.
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Store paths to export with all they refer to, and as roots; without any, the whole store with its own roots.
    #[arg(value_name = "PATH")]
    paths: Vec<String>,
    /// Make equal files hard links of each other.
    #[arg(long)]
    optimise: bool,
}

pub(crate) fn adopt(locations: &Locations, args: &AdoptArgs) -> Result<ExitCode, Failure> {
    let bar = Bar::default();
    let store_dir = Path::new(locations.store_dir.as_str());
    if args.remove_old {
        let removed = switch::remove_old(&locations.state_dir, store_dir, &bar)?;
        bar.end();
        println!("removed {removed} old entries of {}", store_dir.display());
        return Ok(ExitCode::SUCCESS);
    }
    let from = source(locations, args);
    let replaces = switch::replaces(&from, store_dir);
    let last = args.finish || args.in_place;
    if args.in_place && !replaces {
        return Err(Failure::Usage(
            "--in-place is for a stock store in castored's own place; that one lies elsewhere".into(),
        ));
    }
    if replaces && Note::read(&locations.state_dir)?.is_some_and(|note| note.finished) {
        println!("castored has taken over already; start its daemon");
        return Ok(ExitCode::SUCCESS);
    }
    state::make_directories(locations)?;
    // First of all: what stock adds after this would be lost.
    let lock = if last { Some(StockLock::take(&from)?) } else { None };
    let store = Store::open(Config::new(locations.store_dir.clone(), &locations.state_dir))?;
    if let (true, Some(lock)) = (args.in_place, &lock) {
        switch::retire(&from, &locations.state_dir, store_dir, lock)?;
    }
    let options = adopt::Options { in_place: args.in_place, ..adopt::Options::default() };
    let options = adopt::Options { threads: args.jobs.unwrap_or(options.threads), ..options };
    let outcome = adopt::adopt(&store, &from, &options, &bar)?;
    bar.end();
    switch::copy_roots_and_logs(&from, &locations.state_dir, &locations.log_dir)?;
    report(&outcome, args.in_place);
    if !outcome.left_out.is_empty() && !args.without_damaged {
        return Err(Failure::LeftOut { count: outcome.left_out.len(), last });
    }
    let Some(lock) = lock else {
        if replaces {
            println!(
                "the stock store is as it was. What it gets from now on, another run takes; the last one is\n\
                 `castored adopt --finish`, with nix-daemon stopped"
            );
        }
        return Ok(ExitCode::SUCCESS);
    };
    let unread = read_back(&store, &from, &options, &bar)?;
    if !unread.is_empty() {
        list(&unread);
        return Err(Failure::NotReadBack(unread.len()));
    }
    if replaces {
        switch::retire(&from, &locations.state_dir, store_dir, &lock)?;
        switch::finish(&locations.state_dir, store_dir, &outcome.left_out, &lock)?;
        println!(
            "castored has taken over. Start its daemon: it mounts its store over the old files, which\n\
             `castored adopt --remove-old` removes"
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// Where the stock store is.
fn source(locations: &Locations, args: &AdoptArgs) -> StockPlaces {
    let store_dir = Path::new(locations.store_dir.as_str());
    if let Some(root) = &args.from {
        let store = root.join(store_dir.strip_prefix("/").unwrap_or(store_dir));
        return StockPlaces { store, state: root.join(STATE_BELOW), log: root.join(LOG_BELOW) };
    }
    StockPlaces {
        store: args.from_store.clone().unwrap_or_else(|| store_dir.to_owned()),
        state: args.from_state.clone().unwrap_or_else(|| locations.state_dir.clone()),
        log: args.from_log.clone().unwrap_or_else(|| locations.log_dir.clone()),
    }
}

/// Reads from castored's store what stock still has files of. What --in-place removed was read back before.
fn read_back(store: &Store, from: &StockPlaces, options: &adopt::Options, bar: &Bar) -> Result<Vec<LeftOut>, Failure> {
    let mut paths: BTreeSet<_> = adopt::adopted_paths(store, from)?;
    if options.in_place {
        paths.retain(|path| from.store.join(path.base_name()).symlink_metadata().is_ok());
    }
    let wrong = adopt::verify(store, &paths, options.threads, bar)?;
    bar.end();
    Ok(wrong)
}

fn report(outcome: &Outcome, in_place: bool) {
    println!(
        "adopted {} paths ({}), {} were there already, {} realisations",
        outcome.adopted,
        HumanBytes(outcome.bytes),
        outcome.known,
        outcome.realisations
    );
    if outcome.linked > 0 {
        println!("{} files were hard links of others, and not read again", outcome.linked);
    }
    if in_place {
        println!("removed the old files of {} paths, kept those of {} that are in use", outcome.removed, outcome.kept);
    }
    list(&outcome.left_out);
}

fn list(left_out: &[LeftOut]) {
    for left in left_out.iter().take(LISTED) {
        eprintln!("left out: {}: {}", left.what, left.reason);
    }
    if left_out.len() > LISTED {
        eprintln!("… and {} more", left_out.len() - LISTED);
    }
}

pub(crate) fn export(locations: &Locations, args: &ExportArgs) -> Result<ExitCode, Failure> {
    state::prepare(locations)?;
    let store = Store::open(Config::new(locations.store_dir.clone(), &locations.state_dir))?;
    let mut paths = Vec::new();
    for path in &args.paths {
        let parsed = locations.store_dir.to_store_path(path);
        paths.push(parsed.map_err(|e| Failure::Usage(format!("'{path}' is no store path: {e}")))?.0);
    }
    let options = export::Options {
        paths,
        optimise: args.optimise,
        threads: std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
    };
    let bar = Bar::default();
    let exported = export::export(&store, &args.dir, &locations.log_dir, &options, &bar)?;
    bar.end();
    println!(
        "exported {} paths ({}) and {} realisations to {}",
        exported.paths,
        HumanBytes(exported.bytes),
        exported.realisations,
        args.dir.display()
    );
    if exported.kept > 0 {
        println!("{} of the paths had been written before it was interrupted", exported.kept);
    }
    println!("use it with `nix --store {}`, or move its `nix` to /nix", args.dir.display());
    Ok(ExitCode::SUCCESS)
}
