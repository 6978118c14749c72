//! `builtin:buildenv`: what the packages of a profile have, linked together in one directory.
//!
//! A directory that only one package has is a link to it, and becomes a directory of links when a second package has
//! one there too. Of two files at the same place the one of the package with the lower priority number is there; with
//! the same priority it is an error. Packages propagate others by naming them in
//! `nix-support/propagated-user-env-packages`; these come last.

use std::collections::{BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::error::{Error, On};
use super::{Attributes, Task};

/// Names that are left out wherever they stand: two packages may well both have them, and nobody needs them in a
/// profile. The manifests would collide with the profile's own.
const LEFT_OUT: [&str; 6] =
    ["propagated-build-inputs", "nix-support", "perllocal.pod", "log", "manifest.nix", "manifest.json"];

/// Likewise, the directory of info pages.
const INFO_DIR: &str = "info/dir";

/// What the first propagated package has for its priority. Every further one has one more.
const PROPAGATED_PRIORITY: i64 = 1000;

/// Largest list of propagated packages, in bytes.
const MAX_PROPAGATED: u64 = 1 << 20;

/// A package of the profile.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Package {
    /// Lower numbers win.
    priority: i64,
    path: PathBuf,
    active: bool,
}

pub(super) fn build(task: &Task) -> Result<(), Error> {
    let out = task.output("out")?;
    fs::create_dir(&out).on("make the directory", &out)?;
    let mut packages = packages(&task.attributes)?;
    packages.sort();

    let mut profile = Profile::default();
    for package in packages.iter().filter(|package| package.active) {
        profile.add(&package.path, &out, package.priority)?;
    }
    let mut priority = PROPAGATED_PRIORITY;
    while !profile.propagated.is_empty() {
        for path in std::mem::take(&mut profile.propagated) {
            profile.add(&path, &out, priority)?;
            priority += 1;
        }
    }

    let manifest = out.join("manifest.nix");
    symlink(task.attributes.path("manifest")?, &manifest).on("make the link", &manifest)
}

/// Reads `derivations`: for each package whether it is active, its priority, the number of its outputs, and these.
fn packages(attributes: &Attributes) -> Result<Vec<Package>, Error> {
    let text = attributes.get("derivations")?;
    let mut words = text.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
    let number = |word: Option<&[u8]>, expected| -> Result<i64, Error> {
        let word = String::from_utf8_lossy(word.unwrap_or_default());
        word.parse().map_err(|_| Error::Packages { word: word.into_owned(), expected })
    };
    let mut packages = Vec::new();
    while let Some(active) = words.next() {
        let priority = number(words.next(), "a priority")?;
        for _ in 0..number(words.next(), "a number of outputs")? {
            let Some(path) = words.next() else {
                return Err(Error::Packages { word: String::new(), expected: "the path of an output" });
            };
            packages.push(Package { priority, path: OsStr::from_bytes(path).into(), active: active != b"false" });
        }
    }
    Ok(packages)
}

/// A profile while it is put together.
#[derive(Default)]
struct Profile {
    /// Packages that are in it.
    added: BTreeSet<PathBuf>,
    /// Packages that others want in it.
    propagated: BTreeSet<PathBuf>,
    /// The priority that each link was made with.
    priorities: HashMap<PathBuf, i64>,
}

impl Profile {
    fn add(&mut self, package: &Path, out: &Path, priority: i64) -> Result<(), Error> {
        if !self.added.insert(package.to_owned()) {
            return Ok(());
        }
        self.link_all(package, out, priority)?;
        for path in propagated(&package.join("nix-support/propagated-user-env-packages"))? {
            if !self.added.contains(&path) {
                self.propagated.insert(path);
            }
        }
        Ok(())
    }

    /// Links what is in the directory `source` into the directory `target`.
    fn link_all(&mut self, source: &Path, target: &Path, priority: i64) -> Result<(), Error> {
        let entries = match fs::read_dir(source) {
            Err(e) if e.kind() == io::ErrorKind::NotADirectory => {
                eprintln!(
                    "warning: not including \"{}\" in the user environment because it's not a directory",
                    source.display()
                );
                return Ok(());
            }
            other => other.on("read the directory", source)?,
        };
        let mut names = Vec::new();
        for entry in entries {
            names.push(entry.on("read the directory", source)?.file_name());
        }
        // Which of two errors is told, and what a log says first, is then no accident.
        names.sort();
        for name in names.iter().filter(|name| !is_left_out(source, name)) {
            self.link(&source.join(name), &target.join(name), priority)?;
        }
        Ok(())
    }

    /// Puts the file or directory `source` at `target`.
    fn link(&mut self, source: &Path, target: &Path, priority: i64) -> Result<(), Error> {
        let is_directory = match fs::metadata(source) {
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                eprintln!("warning: skipping dangling symlink '{}'", target.display());
                return Ok(());
            }
            other => other.on("look at", source)?.is_dir(),
        };
        let present = match fs::symlink_metadata(target) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            other => Some(other.on("look at", target)?.file_type()),
        };
        match present {
            Some(kind) if is_directory && kind.is_dir() => return self.link_all(source, target, priority),
            Some(kind) if is_directory && kind.is_symlink() => return self.merge(source, target, priority),
            Some(kind) if kind.is_dir() => {
                return Err(Error::FileOverDirectory { other: source.to_owned(), directory: target.to_owned() });
            }
            Some(kind) if kind.is_symlink() => {
                let before = self.priorities.get(target).copied().unwrap_or_default();
                if before == priority {
                    let first = fs::read_link(target).on("read the link", target)?;
                    return Err(Error::Conflict { first, second: source.to_owned() });
                }
                if before < priority {
                    return Ok(());
                }
                fs::remove_file(target).on("remove the link", target)?;
            }
            _ => {}
        }
        symlink(source, target).on("make the link", target)?;
        self.priorities.insert(target.to_owned(), priority);
        Ok(())
    }

    /// Makes the link to a directory at `target` a directory, with what it links to and with what is in `source`.
    fn merge(&mut self, source: &Path, target: &Path, priority: i64) -> Result<(), Error> {
        let first = fs::canonicalize(target).on("follow the link", target)?;
        if !fs::metadata(&first).on("look at", &first)?.is_dir() {
            return Err(Error::DirectoryOverFile { directory: source.to_owned(), other: first });
        }
        fs::remove_file(target).on("remove the link", target)?;
        fs::create_dir(target).on("make the directory", target)?;
        let first_priority = self.priorities.get(target).copied().unwrap_or_default();
        self.link_all(&first, target, first_priority)?;
        self.link_all(source, target, priority)
    }
}

fn is_left_out(directory: &Path, name: &OsString) -> bool {
    name.as_bytes().starts_with(b".")
        || LEFT_OUT.iter().any(|left_out| *left_out == name)
        || directory.join(name).ends_with(INFO_DIR)
}

/// The packages that a package wants in every profile that it is in.
fn propagated(list: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut text = Vec::new();
    let file = match File::open(list) {
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(Vec::new()),
        other => other.on("open", list)?,
    };
    file.take(MAX_PROPAGATED + 1).read_to_end(&mut text).on("read", list)?;
    if text.len() as u64 > MAX_PROPAGATED {
        return Err(Error::TooLong { path: list.to_owned(), limit: MAX_PROPAGATED });
    }
    let words = text.split(|byte| matches!(byte, b' ' | b'\n')).filter(|word| !word.is_empty());
    Ok(words.map(|word| OsStr::from_bytes(word).into()).collect())
}
