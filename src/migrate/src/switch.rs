//! castored takes the place of stock Nix in the same directories.
//!
//! The steps, each of which leaves a state that the next run understands:
//!
//! 1. [`StockLock`]: nobody has the stock store open, and nobody can open it until the end.
//! 2. `<state>/db` becomes `<state>/db.stock`, in one rename, with whatever SQLite keeps beside the database.
//! 3. `<state>/db` is made anew with the [`tripwire`]: from here on stock stops wherever it would touch a path.
//! 4. [`Note`] says so: from here on castored's daemon mounts over the old files.
//!
//! The old files stay below the mount until [`remove_old`]. Going back before that: stop the daemon, remove
//! `<state>/db` and `<state>/castored/adopted`, rename `<state>/db.stock` to `<state>/db`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::statvfs::{FsFlags, statvfs};
use serde::{Deserialize, Serialize};

use crate::adopt::{LeftOut, remove_tree};
use crate::database::FILE;
use crate::error::{Error, Result};
use crate::places::{StockPlaces, same};
use crate::progress::{Progress, Stage};
use crate::{links, tripwire};

/// What stock locks, shared, for as long as it has the store open.
const BIG_LOCK: &str = "big-lock";
/// The note's file name in `<state>/castored`.
const NOTE: &str = "adopted";
/// Where stock keeps the files that equal ones are linked to.
const LINKS: &str = ".links";
/// How many mounts may lie on a store directory.
const MAX_MOUNTS: usize = 64;

/// That stock Nix has been replaced here, and how far that is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// The store directory, whose old files castored's mount may cover.
    pub store: PathBuf,
    /// Whether castored has everything. Until then it must not be started: something would be missing.
    pub finished: bool,
    /// Paths of stock's that castored does not have, by the user's decision. Their files stay.
    pub left_out: Vec<String>,
}

impl Note {
    fn path(state_dir: &Path) -> PathBuf {
        state_dir.join("castored").join(NOTE)
    }

    /// Reads the note of a state directory, if there is one.
    ///
    /// # Errors
    /// When there is one that cannot be read.
    pub fn read(state_dir: &Path) -> Result<Option<Self>> {
        let path = Self::path(state_dir);
        let text = match fs::read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => text.map_err(Error::file("read", &path))?,
        };
        serde_json::from_slice(&text).map(Some).map_err(|e| Error::Note { path, reason: e.to_string() })
    }

    /// Writes it, durably.
    fn write(&self, state_dir: &Path) -> Result<()> {
        let path = Self::path(state_dir);
        let text =
            serde_json::to_vec_pretty(self).map_err(|e| Error::Note { path: path.clone(), reason: e.to_string() })?;
        let new = path.with_extension("new");
        let write = || -> io::Result<()> {
            let mut file = File::create(&new)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&new, &path)
        };
        write().map_err(Error::file("write", &path))?;
        sync_directory(&state_dir.join("castored"))
    }
}

/// Where stock's database is: in its place, or where [`retire`] put it.
pub(crate) fn database_of(from: &StockPlaces) -> PathBuf {
    let retired = from.retired_database_dir();
    let current = from.database_dir();
    if retired.join(FILE).exists() && (!current.join(FILE).exists() || tripwire::is_ours(&current.join(FILE))) {
        retired
    } else {
        current
    }
}

/// Whether castored would take the place of that stock store, rather than be another store beside it.
pub fn replaces(from: &StockPlaces, store_dir: &Path) -> bool {
    same(&from.store, store_dir)
}

/// Keeps stock Nix from opening its store.
#[derive(Debug)]
pub struct StockLock(#[expect(dead_code, reason = "held for its lifetime only")] Flock<File>);

impl StockLock {
    /// Takes the lock that stock takes to change its database's layout.
    ///
    /// # Errors
    /// [`Error::StockRuns`] when somebody has the store open.
    pub fn take(from: &StockPlaces) -> Result<Self> {
        let path = database_of(from).join(BIG_LOCK);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(Error::file("open", &path))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self(lock)),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Err(Error::StockRuns(path)),
            Err((_, errno)) => Err(Error::file("lock", path)(errno.into())),
        }
    }
}

/// Takes stock's database out of stock's sight (steps 2 and 3), and notes that the move is under way.
///
/// # Errors
/// When files cannot be renamed or written.
pub fn retire(from: &StockPlaces, state_dir: &Path, store_dir: &Path, _lock: &StockLock) -> Result<()> {
    if Note::read(state_dir)?.is_none_or(|note| !note.finished) {
        Note { store: store_dir.to_owned(), finished: false, left_out: Vec::new() }.write(state_dir)?;
    }
    let (current, retired) = (from.database_dir(), from.retired_database_dir());
    if database_of(from) == current && current.join(FILE).exists() {
        fs::rename(&current, &retired).map_err(Error::file("rename", &current))?;
    }
    fs::create_dir_all(&current).map_err(Error::file("create", &current))?;
    tripwire::install(&from.state)?;
    sync_directory(&from.state)
}

/// Notes that castored has everything but what is left out (step 4).
///
/// # Errors
/// When the note cannot be written.
pub fn finish(state_dir: &Path, store_dir: &Path, left_out: &[LeftOut], _lock: &StockLock) -> Result<()> {
    let left_out = left_out.iter().map(|left| left.what.clone()).collect();
    Note { store: store_dir.to_owned(), finished: true, left_out }.write(state_dir)
}

/// Copies roots and build logs, where castored's directories are not stock's own.
///
/// # Errors
/// When something cannot be read or written.
pub fn copy_roots_and_logs(from: &StockPlaces, state_dir: &Path, log_dir: &Path) -> Result<()> {
    if !same(&from.state, state_dir) {
        links::copy_roots(&from.state, state_dir, &from.state, state_dir)?;
    }
    if !same(&from.log, log_dir) {
        links::copy_logs(&from.log, log_dir)?;
    }
    Ok(())
}

/// Removes the old files of a store directory that castored has taken over, below castored's mount if that is there,
/// and stock's old database. What was left out stays. Answers how many entries of the store directory were removed.
///
/// The calling thread gets a mount namespace of its own, for good.
///
/// # Errors
/// [`Error::NotFinished`] before castored has everything; else when something cannot be removed.
pub fn remove_old(state_dir: &Path, store_dir: &Path, progress: &dyn Progress) -> Result<u64> {
    let note = Note::read(state_dir)?.filter(|note| note.finished && same(&note.store, store_dir));
    let Some(note) = note else { return Err(Error::NotFinished(Note::path(state_dir))) };
    uncover(store_dir)?;
    let mut names = Vec::new();
    for entry in fs::read_dir(store_dir).map_err(Error::file("read", store_dir))? {
        let entry = entry.map_err(Error::file("read", store_dir))?.path();
        if !note.left_out.iter().any(|left| Path::new(left) == entry) && !entry.ends_with(LINKS) {
            names.push(entry);
        }
    }
    progress.begin(Stage::Removing, names.len() as u64, 0);
    for name in &names {
        remove_tree(name)?;
        progress.path();
    }
    // The directory itself is part of the tripwire.
    let linked = store_dir.join(LINKS);
    for entry in fs::read_dir(&linked).into_iter().flatten().flatten() {
        remove_tree(&entry.path())?;
    }
    let retired = state_dir.join("db.stock");
    if note.left_out.is_empty() && retired.exists() {
        fs::remove_dir_all(&retired).map_err(Error::file("remove", &retired))?;
    }
    Ok(names.len() as u64)
}

/// Makes old files removable where the store directory is a read-only mount, for the calling thread and those it starts.
pub(crate) fn make_writable(store_dir: &Path) -> Result<()> {
    let found = statvfs(store_dir).map_err(|errno| Error::file("examine", store_dir)(errno.into()))?;
    if found.flags().contains(FsFlags::ST_RDONLY) { uncover(store_dir) } else { Ok(()) }
}

/// Takes off, for the calling thread alone, the FUSE mounts on the store directory, and makes what is below them writable.
fn uncover(store_dir: &Path) -> Result<()> {
    let failed = |action: &'static str| move |errno: nix::errno::Errno| Error::file(action, store_dir)(errno.into());
    unshare(CloneFlags::CLONE_NEWNS).map_err(failed("get a mount namespace to uncover"))?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .map_err(failed("keep to ourselves the mounts of"))?;
    let resolved = store_dir.canonicalize().map_err(Error::file("resolve", store_dir))?;
    for _ in 0..MAX_MOUNTS {
        match top_mount(&resolved)? {
            Some(top) if top.starts_with("fuse") => {
                umount2(&resolved, MntFlags::MNT_DETACH).map_err(failed("uncover"))?;
            }
            // Some systems have a read-only bind mount there.
            Some(_) => {
                let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND;
                return mount(None::<&str>, &resolved, None::<&str>, flags, None::<&str>)
                    .map_err(failed("make writable"));
            }
            None => return Ok(()),
        }
    }
    Err(failed("uncover")(nix::errno::Errno::EBUSY))
}

/// The file system type of the topmost mount exactly at `dir`.
fn top_mount(dir: &Path) -> Result<Option<String>> {
    let table = Path::new("/proc/self/mountinfo");
    let text = fs::read_to_string(table).map_err(Error::file("read", table))?;
    // 36 35 98:0 /root /mount/point options - type source superoptions
    let mut here = text.lines().filter_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let point = left.split(' ').nth(4)?;
        (unescaped(point) == dir.as_os_str().to_string_lossy()).then(|| right.split(' ').next().map(str::to_owned))?
    });
    Ok(here.next_back())
}

/// The table writes space, tab, newline and backslash in octal.
fn unescaped(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(text.to_owned(), |text, (escaped, plain)| text.replace(escaped, plain))
}

fn sync_directory(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(Error::file("sync", dir))
}
