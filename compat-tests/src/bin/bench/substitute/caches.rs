//! The binary caches, as stock's `nix copy` writes them. Each is made when a row first asks for it, and kept for the next time.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use compat_tests::error::Context;
use compat_tests::machine::{CACHE, Machine};
use compat_tests::packages::{begin_cache, put_in_cache};
use compat_tests::{Call, Error, Release, Result, Room, Who, load, nar, tree};

/// Paths of the closure of small ones, the one that needs all others among them.
const CLOSURE: usize = 1_000;
/// Bytes of a small path's contents, which do not compress.
const SMALL: usize = 12_000;
/// Bytes of the large path's files, more or less by one of them.
const LARGE: u64 = 1_000_000_000;
/// Paths whose infos are asked for.
const ASKED: usize = 5_000;
/// Compressing may take so long.
const LIMIT: Duration = Duration::from_secs(3600);

/// Where they are made.
pub(super) struct Caches {
    pub(super) client: Release,
    dir: PathBuf,
    part: usize,
}

/// Some paths in a cache.
pub(super) struct Published {
    pub(super) dir: PathBuf,
    pub(super) paths: Vec<String>,
    /// What they are signed with.
    pub(super) key: String,
}

impl Caches {
    pub(super) fn new(machine: &Machine) -> Result<Self> {
        let part = crate::part();
        let dir = Path::new(CACHE).join(format!("caches-{part}"));
        fs::create_dir_all(&dir).doing("creating", &dir)?;
        Ok(Self { client: machine.newest().clone(), dir, part })
    }

    /// Many small paths. Each needs two that come before it, as libraries need others, and the last one those that nobody
    /// else needs: it takes ten steps to the first.
    pub(super) fn closure(&self) -> Result<Published> {
        self.published("closure", "compression=xz", |plain| {
            let mut paths: Vec<String> = Vec::new();
            let last = (CLOSURE / self.part).max(2) - 1;
            for number in 0..=last {
                let name = format!("small-{number}");
                let path = load::made_up_path(&name, &name);
                let mut needs: Vec<String> = match number {
                    number if number == last => paths[last / 2..].to_vec(),
                    number => [number / 2, number / 3].iter().filter_map(|n| paths.get(*n).cloned()).collect(),
                };
                needs.dedup();
                let contents = [noise(number as u64), needs.join("\n").into_bytes()].concat();
                put_in_cache(plain, &path, &needs, |out| {
                    out.extend(nar::Tree::File(contents).archive());
                    Ok(())
                })?;
                paths.push(path);
            }
            Ok(paths)
        })
    }

    /// One large path, compressed as the parameters of the cache's URL say.
    pub(super) fn large(&self, name: &str, parameters: &str) -> Result<Published> {
        self.published(name, parameters, |plain| {
            let dir = self.dir.join(".large");
            if dir.exists() {
                fs::remove_dir_all(&dir).doing("removing", &dir)?;
            }
            let mut left = LARGE / self.part as u64;
            tree::from_usr(&dir, left)?;
            keep(&dir, &mut left)?;
            let path = load::made_up_path("large", "large");
            put_in_cache(plain, &path, &[], |out| nar::write_path(&dir, out))?;
            fs::remove_dir_all(&dir).doing("removing", &dir)?;
            Ok(vec![path])
        })
    }

    /// Every second of the paths that are asked for, beginning with the first or the second.
    pub(super) fn half(&self, first: usize) -> Result<Published> {
        self.published(&format!("half-{first}"), "compression=xz", |plain| {
            let number = ASKED / self.part;
            let paths = (first..number).step_by(2).map(|n| load::made_up_path(&format!("asked-{n}"), "asked"));
            paths
                .map(|path| {
                    put_in_cache(plain, &path, &[], |out| {
                        out.extend(nar::Tree::File(path.clone().into_bytes()).archive());
                        Ok(())
                    })?;
                    Ok(path)
                })
                .collect()
        })
    }

    /// Finds a cache that was made before, or makes a plain one and has stock copy that, compressed and signed.
    fn published(
        &self,
        name: &str,
        parameters: &str,
        make: impl FnOnce(&Path) -> Result<Vec<String>>,
    ) -> Result<Published> {
        let (place, new) = (self.dir.join(name), self.dir.join(format!(".{name}")));
        if !place.is_dir() {
            println!("making the cache {name}");
            if new.exists() {
                fs::remove_dir_all(&new).doing("removing", &new)?;
            }
            let plain = new.join("plain");
            begin_cache(&plain)?;
            let paths = make(&plain)?;
            fs::write(new.join("paths"), paths.join("\n")).doing("writing", &new)?;
            self.sign(&new, &plain, parameters)?;
            fs::remove_dir_all(&plain).doing("removing", &plain)?;
            fs::rename(&new, &place).doing("moving into place", &place)?;
        }
        let read = |name: &str| fs::read_to_string(place.join(name)).doing("reading", place.join(name));
        let paths: Vec<String> = read("paths")?.lines().map(str::to_owned).collect();
        Ok(Published { dir: place.join("cache"), paths, key: read("public")?.trim().to_owned() })
    }

    fn sign(&self, new: &Path, plain: &Path, parameters: &str) -> Result<()> {
        let run = || -> Result<()> {
            // In a room of its own: stock looks into /nix.
            let room = Room::enter("bench-caches")?;
            let (secret, public) = (new.join("secret"), new.join("public"));
            let nix = |name: &str| Call::nix(&room, Who::Root, &self.client, name).env("NIX_REMOTE", "").quiet();
            nix("nix-store").args(["--generate-binary-cache-key", "bench-1"]).arg(&secret).arg(&public).ok()?;
            let to = format!("file://{}?secret-key={}&{parameters}", new.join("cache").display(), secret.display());
            let copy = nix("nix").args(["copy", "--all", "--no-check-sigs", "--from"]);
            copy.arg(format!("file://{}", plain.display())).args(["--to", &to]).limit(LIMIT).ok().map(drop)
        };
        // A room is for the thread that enters it.
        let outcome = std::thread::scope(|scope| scope.spawn(run).join());
        outcome.map_err(|_| Error::Wrong("making a cache panicked".into()))?
    }
}

/// Removes all files of a tree but the first, up to so many bytes.
fn keep(dir: &Path, left: &mut u64) -> Result<()> {
    let mut entries: Vec<_> = fs::read_dir(dir).doing("listing", dir)?.flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (path, meta) = (entry.path(), entry.metadata().doing("looking at", entry.path())?);
        if meta.is_dir() {
            keep(&path, left)?;
        } else if *left == 0 {
            fs::remove_file(&path).doing("removing", &path)?;
        } else {
            *left = left.saturating_sub(meta.len());
        }
    }
    Ok(())
}

/// Bytes that look like chance, and are the same ones each time.
fn noise(seed: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(SMALL);
    let mut counter = 0_u64;
    while bytes.len() < SMALL {
        bytes.extend(nar::sha256(&[seed.to_le_bytes(), counter.to_le_bytes()].concat()));
        counter += 1;
    }
    bytes
}
