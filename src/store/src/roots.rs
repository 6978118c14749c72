//! Garbage collection roots: what keeps paths alive.
//!
//! They are found where stock tools put them: symlinks below `<state>/gcroots` and `<state>/profiles` (direct,
//! or one step away through `gcroots/auto`), the temporary roots of connections, and what running processes
//! have open, mapped or in their environment ([`processes`]).

mod processes;

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix_compat::hash::{Algorithm, Hasher};
use nix_compat::store_path::{StoreDir, StorePath};

use crate::error::{Error, Result};
use crate::store::{Store, sync_dir};
use crate::temp_roots;

pub use processes::{FileId, Recognise};

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

/// What whoever looks for roots may want to know beside them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RootNote {
    /// A root that keeps nothing, since the path is not valid.
    Invalid {
        /// Where it was found.
        link: PathBuf,
        /// The path, in full.
        path: String,
    },
    /// A link in `gcroots/auto` to a root that is gone was removed.
    StaleLink {
        /// The link.
        link: PathBuf,
        /// Where it pointed to.
        target: PathBuf,
    },
    /// The temporary roots of a dead process were removed.
    StaleTemporary(PathBuf),
}

/// In stock's words.
impl fmt::Display for RootNote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid { link, path } => write!(f, "skipping invalid root from {link:?} to {path:?}"),
            Self::StaleLink { link, target } => write!(f, "removing stale link from {link:?} to {target:?}"),
            Self::StaleTemporary(file) => write!(f, "removing stale temporary roots file {file:?}"),
        }
    }
}

impl Store {
    /// All roots, with nobody to be told more.
    ///
    /// # Errors
    /// Those of [`Store::find_roots_noting`].
    pub fn find_roots(&self) -> Result<Vec<GcRoot>> {
        self.find_roots_noting(&mut |_| {})
    }

    /// All roots, in the order of their links: those of valid paths, and all temporary ones, which may come before their
    /// paths. Broken links in `gcroots/auto` are removed on the way.
    ///
    /// # Errors
    /// When a roots directory, or what a process uses, cannot be read for other reasons than that it went away or is
    /// closed to us: a collection must not go on without it.
    pub fn find_roots_noting(&self, note: &mut dyn FnMut(RootNote)) -> Result<Vec<GcRoot>> {
        let mut found = Vec::new();
        for dir in ["gcroots", "profiles"] {
            self.roots_below(self.state_dir().join(dir), &mut found, note)?;
        }
        let mut roots = Vec::with_capacity(found.len());
        for root in found {
            if self.is_valid(&root.path)? {
                roots.push(root);
            } else {
                let link = PathBuf::from(OsString::from_vec(root.link));
                note(RootNote::Invalid { link, path: self.store_dir().display(&root.path) });
            }
        }
        let mut used = Vec::new();
        processes::Search::new(self, &mut used).run()?;
        for root in used {
            if self.is_valid(&root.path)? {
                roots.push(root);
            }
        }
        let pid = std::process::id();
        for path in self.temp_roots.snapshot() {
            roots.push(GcRoot { link: format!("{{temp:{pid}}}").into_bytes(), path, private: true });
        }
        let mut stale = |file| note(RootNote::StaleTemporary(file));
        for (process, path) in temp_roots::others(self.temp_roots.dir(), self.store_dir(), &mut stale)? {
            roots.push(GcRoot { link: format!("{{temp:{process}}}").into_bytes(), path, private: true });
        }
        roots.sort();
        roots.dedup();
        Ok(roots)
    }

    /// Only real directories are entered, so there is no loop, and no depth at which roots would not count.
    fn roots_below(&self, top: PathBuf, roots: &mut Vec<GcRoot>, note: &mut dyn FnMut(RootNote)) -> Result<()> {
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
                    self.root_from_link(&path, roots, note)?;
                } else if kind.is_file()
                    && let Some(path_of_name) = path.file_name().and_then(base_name)
                {
                    roots.push(GcRoot { link: shown(&path), path: path_of_name, private: false });
                }
            }
        }
        Ok(())
    }

    fn root_from_link(&self, link: &Path, roots: &mut Vec<GcRoot>, note: &mut dyn FnMut(RootNote)) -> Result<()> {
        let target = match fs::read_link(link) {
            // It is no link any more.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return Ok(()),
            found => unless_hidden("read the link", link, found)?,
        };
        let Some(target) = target else { return Ok(()) };
        if let Some(path) = rooted(self.store_dir(), &target) {
            roots.push(GcRoot { link: shown(link), path, private: false });
            return Ok(());
        }
        let target = lexical(&link.parent().unwrap_or(link).join(target));
        match fs::symlink_metadata(&target) {
            Ok(meta) if meta.file_type().is_symlink() => {
                if let Ok(second) = fs::read_link(&target)
                    && let Some(path) = rooted(self.store_dir(), &second)
                {
                    roots.push(GcRoot { link: shown(&target), path, private: false });
                }
            }
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                if link.starts_with(self.auto_roots()) {
                    tracing::info!(link = %link.display(), "removing a stale link to a root that is gone");
                    note(RootNote::StaleLink { link: link.to_owned(), target });
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

    /// From now on, files that processes use are known by what `recognise` says of them, too.
    pub fn recognise_files(&self, recognise: Recognise) {
        *self.recognise.write() = Some(recognise);
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

/// An absolute path without `.` and `..`, as stock has it: by its text, whatever links there are on the way.
fn lexical(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => drop(plain.pop()),
            other => plain.push(other),
        }
    }
    plain
}

/// A path as clients see it.
fn shown(path: &Path) -> Vec<u8> {
    path.as_os_str().as_bytes().to_vec()
}

fn base_name(name: &OsStr) -> Option<StorePath> {
    StorePath::from_base_name(name.to_str()?).ok()
}

/// The store path that a link keeps by having this target: as stock, by what is written there. A target that comes to the
/// store by way of `..`, `.` or `//` keeps nothing; what comes after the path does not matter.
fn rooted(store_dir: &StoreDir, target: &Path) -> Option<StorePath> {
    let below = target.to_str()?.strip_prefix(store_dir.as_str())?.strip_prefix('/')?;
    StorePath::from_base_name(below.split('/').next()?).ok()
}

/// The store path that `path` is or lies below.
fn in_store(store_dir: &StoreDir, path: &OsStr) -> Option<StorePath> {
    store_dir.to_store_path(path.to_str()?).ok().map(|(path, _)| path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_taken_as_it_is_written() {
        const NAME: &str = "g1w7hy3qg1w7hy3qg1w7hy3qg1w7hy3q-a";
        let root = |target: &str| rooted(&StoreDir::default(), Path::new(&target.replace('@', NAME)));
        let path = StorePath::from_base_name(NAME).ok();
        assert!(path.is_some());
        for target in ["/nix/store/@", "/nix/store/@/", "/nix/store/@/bin/..", "/nix/store/@/../x", "/nix/store/@//bin"]
        {
            assert_eq!(root(target), path, "{target}");
        }
        for target in [
            "/nix/store/../store/@",
            "/nix/store/./@",
            "/nix/store//@",
            "/nix//store/@",
            "//nix/store/@",
            "/nix/store",
            "@",
            "",
        ] {
            assert_eq!(root(target), None, "{target}");
        }
    }
}
