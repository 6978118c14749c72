//! `castored export-store`: a plain stock store with its database, which stock Nix uses without castored.
//!
//! It is laid out below a directory as stock's store below another root (`--store DIR`) is, so the same files are a whole
//! `/nix` once they are moved there. Every path's NAR is hashed while its files are written; the database comes last, so
//! what was begun and not finished is no store. It is finished by exporting into the same directory again ([`resume`]).

mod resume;
mod tree;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::symlink;
use std::path::Path;

use nix_compat::store_path::StorePath;
use parking_lot::Mutex;
use store::Store;
use store::derivations::output_paths;

use crate::adopt::remove_tree;
use crate::error::{Error, Result};
use crate::links;
use crate::places::StockPlaces;
use crate::progress::{Progress, Stage};
use crate::schema::NewDatabase;
use resume::Unfinished;
use tree::TreeWriter;

/// How to export.
#[derive(Clone, Debug)]
pub struct Options {
    /// Paths whose closures are exported; the whole store, with its roots, when there are none.
    pub paths: Vec<StorePath>,
    /// Make equal files hard links of each other, as `nix-store --optimise` does.
    pub optimise: bool,
    /// Paths that are written at a time.
    pub threads: NonZeroUsize,
}

/// What was written.
#[derive(Clone, Copy, Debug, Default)]
pub struct Exported {
    /// Paths.
    pub paths: u64,
    /// Of these, paths that an export which was interrupted had written already.
    pub kept: u64,
    /// Bytes of their NARs.
    pub bytes: u64,
    /// Realisations.
    pub realisations: u64,
}

/// Where in `root` a store with these directories is exported to.
pub fn places(root: &Path, store_dir: &Path, state_dir: &Path, log_dir: &Path) -> StockPlaces {
    let below = |dir: &Path| root.join(dir.strip_prefix("/").unwrap_or(dir));
    StockPlaces { store: below(store_dir), state: below(state_dir), log: below(log_dir) }
}

/// Writes a stock store into `root`, which is empty or missing, or has the beginning of the same export.
///
/// # Errors
/// [`Error::NotEmpty`]; [`Error::OtherExport`]; [`Error::Export`] for a path that is not valid or is damaged; when something cannot be written.
pub fn export(
    store: &Store,
    root: &Path,
    log_dir: &Path,
    options: &Options,
    progress: &dyn Progress,
) -> Result<Exported> {
    let unfinished = Unfinished::begin(store, root, options)?;
    let to = places(root, Path::new(store.store_dir().as_str()), store.state_dir(), log_dir);
    let links = to.store.join(".links");
    let database = to.state.join("db");
    if unfinished.resumed && database.exists() {
        remove_tree(&database)?;
    }
    let per_user = ["profiles/per-user", "gcroots/per-user"].map(|dir| to.state.join(dir));
    for dir in [&links, &database, &to.state.join("temproots"), &to.log.join("drvs")].into_iter().chain(&per_user) {
        fs::create_dir_all(dir).map_err(Error::file("create", dir))?;
    }
    let paths = wanted(store, options)?;
    let mut exported = Exported { paths: paths.len() as u64, ..Exported::default() };
    for path in &paths {
        exported.bytes += store.valid_entry(path)?.info.nar_size;
    }
    let mut missing = paths.clone();
    if unfinished.resumed {
        let whole = resume::keep_whole(store, &to.store, &paths, options.threads, progress)?;
        missing.retain(|path| !whole.contains(path));
    }
    exported.kept = exported.paths - missing.len() as u64;
    let mut bytes = 0;
    for path in &missing {
        bytes += store.valid_entry(path)?.info.nar_size;
    }
    progress.begin(Stage::Exporting, missing.len() as u64, bytes);
    write_files(store, &to.store, options.optimise.then_some(links.as_path()), &missing, options.threads, progress)?;
    // The roots first: a store with a database may be collected.
    if options.paths.is_empty() {
        links::copy_roots(store.state_dir(), &to.state, store.state_dir(), store.state_dir())?;
    } else {
        for path in &options.paths {
            let root = to.state.join("gcroots").join(path.base_name());
            match symlink(store.store_dir().display(path), &root) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(Error::file("create", &root)(e)),
                _ => {}
            }
        }
    }
    links::copy_logs(log_dir, &to.log)?;
    exported.realisations = write_database(store, &database, &paths)?;
    sync(root)?;
    unfinished.finish()?;
    sync(root)?;
    Ok(exported)
}

fn wanted(store: &Store, options: &Options) -> Result<BTreeSet<StorePath>> {
    if options.paths.is_empty() {
        return Ok(store.all_valid_paths()?);
    }
    for path in &options.paths {
        store.valid_entry(path)?;
    }
    Ok(store.closure(&options.paths)?)
}

fn write_files(
    store: &Store,
    store_dir: &Path,
    links: Option<&Path>,
    paths: &BTreeSet<StorePath>,
    threads: NonZeroUsize,
    progress: &dyn Progress,
) -> Result<()> {
    in_parallel(paths, threads, |path| {
        let entry = store.valid_entry(path)?;
        let place = store_dir.join(path.base_name());
        let unfinished = resume::unfinished(&place);
        let facts = TreeWriter::new(store, progress, links).write(&entry.node, &unfinished)?;
        if facts.nar_hash != entry.info.nar_hash {
            let (path, expected) = (store.store_dir().display(path), entry.info.nar_hash.to_prefixed_nix32());
            let reason = format!("its NAR hash is {}, not {expected}", facts.nar_hash.to_prefixed_nix32());
            return Err(Error::Export { path, reason });
        }
        fs::rename(&unfinished, &place).map_err(Error::file("put in place", &place))?;
        progress.path();
        Ok(())
    })
}

/// Does something with each path, on several threads, until it fails on one.
fn in_parallel(
    paths: &BTreeSet<StorePath>,
    threads: NonZeroUsize,
    each: impl Fn(&StorePath) -> Result<()> + Sync,
) -> Result<()> {
    let waiting = Mutex::new(paths.iter());
    let work = || -> Result<()> {
        loop {
            let Some(path) = waiting.lock().next() else { return Ok(()) };
            if let Err(error) = each(path) {
                // Nobody takes another one.
                waiting.lock().by_ref().for_each(drop);
                return Err(error);
            }
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.get()).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| Error::Panicked)?)
    })
}

fn write_database(store: &Store, dir: &Path, paths: &BTreeSet<StorePath>) -> Result<u64> {
    let database = NewDatabase::create(dir, store.store_dir())?;
    for path in paths {
        database.add(&store.valid_entry(path)?.info)?;
    }
    for path in paths {
        database.refer(&store.valid_entry(path)?.info)?;
        if path.is_derivation() {
            for (name, output) in output_paths(&store.derivation(path)?.basic) {
                database.add_output(path, name.as_str(), &output)?;
            }
        }
    }
    let mut realisations = store.all_realisations()?;
    realisations.retain(|realisation| paths.contains(&realisation.out_path));
    database.add_realisations(&realisations)?;
    database.finish()?;
    Ok(realisations.len() as u64)
}

/// Everything to the disk: stock takes for granted what its database says.
fn sync(root: &Path) -> Result<()> {
    let dir = fs::File::open(root).map_err(Error::file("open", root))?;
    nix::unistd::syncfs(&dir).map_err(|errno| Error::file("sync", root)(errno.into()))
}
