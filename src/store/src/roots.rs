//! Garbage collection roots: what keeps paths alive.
//!
//! They are found where stock tools put them: symlinks below `<state>/gcroots` and `<state>/profiles` (direct,
//! or one step away through `gcroots/auto`), the temporary roots of connections, and what running processes
//! have open, mapped or in their environment.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix_compat::hash::{Algorithm, Hasher};
use nix_compat::store_path::{StoreDir, StorePath};

use crate::error::{Error, Result};
use crate::store::{Store, sync_dir};
use crate::temp_roots;

/// Bytes read of one process's environment or maps.
const MAX_PROC_FILE: u64 = 16 << 20;

/// A root and what it keeps alive.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct GcRoot {
    /// Where it was found: a link in the file system, a file of /proc, or `{temp:PID}`. Not necessarily UTF-8.
    pub link: Vec<u8>,
    /// The store path it keeps. It need not be valid.
    pub path: StorePath,
    /// Whether only a trusted client may see `link`: it tells of other users' processes.
    pub private: bool,
}

impl Store {
    /// All roots, in the order of their links. Broken links in `gcroots/auto` are removed on the way.
    ///
    /// # Errors
    /// When a roots directory cannot be read for other reasons than that it went away or is closed to us: a collection
    /// must not go on without it.
    pub fn find_roots(&self) -> Result<Vec<GcRoot>> {
        let mut roots = Vec::new();
        for dir in ["gcroots", "profiles"] {
            self.roots_below(self.state_dir().join(dir), &mut roots)?;
        }
        let pid = std::process::id();
        for path in self.temp_roots.snapshot() {
            roots.push(GcRoot { link: format!("{{temp:{pid}}}").into_bytes(), path, private: true });
        }
        for (process, path) in temp_roots::others(self.temp_roots.dir(), self.store_dir())? {
            roots.push(GcRoot { link: format!("{{temp:{process}}}").into_bytes(), path, private: true });
        }
        runtime_roots(self.store_dir(), &mut roots);
        roots.sort();
        roots.dedup();
        Ok(roots)
    }

    /// Only real directories are entered, so there is no loop, and no depth at which roots would not count.
    fn roots_below(&self, top: PathBuf, roots: &mut Vec<GcRoot>) -> Result<()> {
        let mut waiting = vec![top];
        while let Some(dir) = waiting.pop() {
            let Some(entries) = unless_hidden("read", &dir, fs::read_dir(&dir))? else { continue };
            for entry in entries {
                let Some(entry) = unless_hidden("read", &dir, entry)? else { continue };
                let path = entry.path();
                let Some(kind) = unless_hidden("examine", &path, entry.file_type())? else { continue };
                if kind.is_dir() {
                    waiting.push(path);
                } else if kind.is_symlink() {
                    self.root_from_link(&path, roots)?;
                } else if let Some(path_of_name) = path.file_name().and_then(base_name) {
                    roots.push(GcRoot { link: shown(&path), path: path_of_name, private: false });
                }
            }
        }
        Ok(())
    }

    fn root_from_link(&self, link: &Path, roots: &mut Vec<GcRoot>) -> Result<()> {
        let target = match fs::read_link(link) {
            // It is no link any more.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return Ok(()),
            found => unless_hidden("read the link", link, found)?,
        };
        let Some(target) = target else { return Ok(()) };
        if let Some(path) = in_store(self.store_dir(), target.as_os_str()) {
            roots.push(GcRoot { link: shown(link), path, private: false });
            return Ok(());
        }
        let target = link.parent().unwrap_or(link).join(target);
        match fs::symlink_metadata(&target) {
            Ok(meta) if meta.file_type().is_symlink() => {
                if let Ok(second) = fs::read_link(&target)
                    && let Some(path) = in_store(self.store_dir(), second.as_os_str())
                {
                    roots.push(GcRoot { link: shown(&target), path, private: false });
                }
            }
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                if link.starts_with(self.auto_roots()) {
                    tracing::info!(link = %link.display(), "removing a stale link to a root that is gone");
                    let _ = fs::remove_file(link);
                }
            }
            // E.g. a home directory we may not look into: what it holds cannot be known, so the link stays.
            Err(error) => tracing::warn!(link = %link.display(), %error, "cannot look at the target of a root"),
        }
        Ok(())
    }

    fn auto_roots(&self) -> PathBuf {
        self.state_dir().join("gcroots/auto")
    }

    /// Registers `link`, a symlink into the store that a client made (or is about to make), as an indirect
    /// root, by the rule of stock Nix: `gcroots/auto/<nix32 of the SHA-1 of the link's path>` points to it.
    /// Everything visible becomes durable first.
    ///
    /// # Errors
    /// When the link cannot be made.
    pub fn add_indirect_root(&self, link: &Path) -> Result<()> {
        // A collection that runs may have looked here already; that it meets the target as a temporary root while it
        // runs keeps the target from it.
        let held = self.new_temp_roots();
        if let Ok(target) = fs::read_link(link)
            && let Some(path) = in_store(self.store_dir(), target.as_os_str())
        {
            held.add(&path);
        }
        self.sync()?;
        let dir = self.auto_roots();
        fs::create_dir_all(&dir).map_err(|e| Error::file("create", &dir, e))?;
        let mut sha1 = Hasher::new(Algorithm::Sha1);
        sha1.update(link.as_os_str().as_bytes());
        replace_link(&dir.join(sha1.finalize().to_nix32()), link)
    }

    /// Makes `link` point to `path` and registers it as a root. Gives the link's absolute path.
    ///
    /// # Errors
    /// [`Error::File`] when `link` lies in the store or is something else than a link into it.
    pub fn add_permanent_root(&self, path: &StorePath, link: &Path) -> Result<()> {
        let refused = |why: &str| Error::file("make the root", link, io::Error::new(io::ErrorKind::InvalidInput, why));
        if in_store(self.store_dir(), link.as_os_str()).is_some() {
            return Err(refused("a root must not lie in the store"));
        }
        match fs::read_link(link) {
            Ok(target) if in_store(self.store_dir(), target.as_os_str()).is_none() => {
                return Err(refused("there is a link to something outside of the store"));
            }
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(refused("there is something else")),
            _ => {}
        }
        // As in `add_indirect_root`.
        let held = self.new_temp_roots();
        held.add(path);
        self.sync()?;
        replace_link(link, Path::new(&self.store_dir().display(path)))?;
        if link.starts_with(self.state_dir().join("gcroots")) || link.starts_with(self.state_dir().join("profiles")) {
            return Ok(());
        }
        self.add_indirect_root(link)
    }
}

/// What was found, or nothing (as stock) where something went away, is replaced meanwhile, or is closed to us.
fn unless_hidden<T>(action: &'static str, path: &Path, found: io::Result<T>) -> Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) => match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ENOENT) => Ok(None),
            Some(Errno::EACCES | Errno::ENOTDIR) => {
                tracing::warn!(path = %path.display(), %error, "cannot {action} a potential root");
                Ok(None)
            }
            _ => Err(Error::file(action, path, error)),
        },
    }
}

/// Makes `link` point to `target` in one step, whatever was there.
fn replace_link(link: &Path, target: &Path) -> Result<()> {
    let mut temporary = link.as_os_str().to_owned();
    temporary.push(format!(".tmp-{}-{:?}", std::process::id(), std::thread::current().id()));
    let temporary = PathBuf::from(temporary);
    let _ = fs::remove_file(&temporary);
    std::os::unix::fs::symlink(target, &temporary).map_err(|e| Error::file("create", &temporary, e))?;
    fs::rename(&temporary, link).map_err(|e| Error::file("create", link, e))?;
    // A root that was acknowledged is there after a crash, as what it keeps is.
    link.parent().map_or(Ok(()), sync_dir)
}

/// A path as clients see it.
fn shown(path: &Path) -> Vec<u8> {
    path.as_os_str().as_bytes().to_vec()
}

fn base_name(name: &OsStr) -> Option<StorePath> {
    StorePath::from_base_name(name.to_str()?).ok()
}

/// The store path that `path` is or lies below.
fn in_store(store_dir: &StoreDir, path: &OsStr) -> Option<StorePath> {
    store_dir.to_store_path(path.to_str()?).ok().map(|(path, _)| path)
}

/// What running processes use. Processes that go away or may not be looked at are passed over.
fn runtime_roots(store_dir: &StoreDir, roots: &mut Vec<GcRoot>) {
    let Ok(processes) = fs::read_dir("/proc") else { return };
    for process in processes.flatten() {
        if !process.file_name().as_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        let dir = process.path();
        for name in ["exe", "cwd", "root"] {
            link_root(store_dir, &dir.join(name), roots);
        }
        for fd in fs::read_dir(dir.join("fd")).into_iter().flatten().flatten() {
            link_root(store_dir, &fd.path(), roots);
        }
        for name in ["maps", "environ"] {
            text_roots(store_dir, &dir.join(name), roots);
        }
    }
    for name in ["modprobe", "fbsplash", "poweroff_cmd"] {
        text_roots(store_dir, &Path::new("/proc/sys/kernel").join(name), roots);
    }
}

fn link_root(store_dir: &StoreDir, link: &Path, roots: &mut Vec<GcRoot>) {
    if let Ok(target) = fs::read_link(link)
        && let Some(path) = in_store(store_dir, target.as_os_str())
    {
        roots.push(GcRoot { link: shown(link), path, private: true });
    }
}

/// Store paths that stand in a text, e.g. in a process's environment.
fn text_roots(store_dir: &StoreDir, file: &Path, roots: &mut Vec<GcRoot>) {
    let mut text = Vec::new();
    if fs::File::open(file).and_then(|f| f.take(MAX_PROC_FILE).read_to_end(&mut text)).is_err() {
        return;
    }
    let prefix = format!("{}/", store_dir.as_str()).into_bytes();
    let mut rest = &text[..];
    while let Some(at) = rest.windows(prefix.len()).position(|window| window == prefix) {
        rest = &rest[at + prefix.len()..];
        let end = rest.iter().position(|b| !b.is_ascii_alphanumeric() && !b"+-._?=".contains(b)).unwrap_or(rest.len());
        if let Some(path) = base_name(&std::ffi::OsString::from_vec(rest[..end].to_vec())) {
            roots.push(GcRoot { link: shown(file), path, private: true });
        }
    }
}
