//! Closures of real contents, made of Debian packages: two releases of the same packages, and one of them once more as a
//! rebuild leaves it, with other store hashes inside.
//!
//! Each package is unpacked as a store path. As its files know nothing of a store, its programs are made to look for
//! interpreters and libraries in store paths, as those of nixpkgs do. A closure is a binary cache in a directory, without
//! compression, that `nix copy --from file://...` reads.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::apt::{Available, PrivateApt, remove_left, run};
use crate::error::{Context, Error, Result};
use crate::machine::{CACHE, lock};
use crate::{load, nar};

/// Testing, and what is about to come into it: the versions differ by a few weeks' updates.
const SUITES: [&str; 2] = ["forky", "sid"];
/// The names of the closures' directories.
const NAMES: [&str; 3] = ["first", "second", "rebuilt"];
/// Of packages that take less or more than this, in KiB, none is taken.
const SIZES: std::ops::RangeInclusive<u64> = 256..=60_000;
/// What is not like a program or a library, by parts of names.
const LEFT_OUT: [&str; 6] = ["-doc", "-dbg", "-data", "-l10n", "-testsuite", "-examples"];
/// Where a store path begins.
const STORE: &[u8] = b"/nix/store/";
/// The length of a store hash.
const HASH: usize = 32;
/// Below a path's own name: where Debian's libraries are.
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// A binary cache that holds one path with all it needs.
#[derive(Debug, Clone)]
pub struct Closure {
    /// Its directory.
    pub dir: PathBuf,
    /// The path that needs all the others.
    pub top: String,
    /// All paths, with the sizes of their archives in bytes.
    pub paths: Vec<(String, u64)>,
}

/// The closures of so many paths.
#[derive(Debug, Clone)]
pub struct Closures {
    /// One release of the packages.
    pub first: Closure,
    /// The next one.
    pub second: Closure,
    /// The second with every store hash replaced by another.
    pub rebuilt: Closure,
}

/// Makes closures of `count` paths, at least two, or finds those that were made before.
pub fn closures(count: usize) -> Result<Closures> {
    // With a lock of its own: it takes minutes, and nobody else waits for it.
    let cache = Path::new(CACHE).join("closures");
    fs::create_dir_all(&cache).doing("creating", &cache)?;
    let _turn = lock(&cache)?;
    let place = cache.join(count.to_string());
    if !place.is_dir() {
        make(&cache, &place, count)?;
    }
    let [first, second, rebuilt] = NAMES.map(|name| Closure::read(place.join(name)));
    Ok(Closures { first: first?, second: second?, rebuilt: rebuilt? })
}

impl Closure {
    fn read(dir: PathBuf) -> Result<Self> {
        let (mut top, mut paths) = (None, Vec::new());
        for entry in fs::read_dir(&dir).doing("listing", &dir)?.flatten() {
            if entry.path().extension().is_none_or(|e| e != "narinfo") {
                continue;
            }
            let text = fs::read_to_string(entry.path()).doing("reading", entry.path())?;
            let field = |name: &str| text.lines().find_map(|l| l.strip_prefix(name)).unwrap_or_default();
            let path = field("StorePath: ").to_owned();
            let size = field("NarSize: ").parse().map_err(|_| Error::Wrong(format!("no size of {path}")))?;
            if path.ends_with(TOP) {
                top = Some(path.clone());
            }
            paths.push((path, size));
        }
        paths.sort();
        let top = top.ok_or_else(|| Error::Wrong(format!("{} has no path that needs all others", dir.display())))?;
        Ok(Self { dir, top, paths })
    }

    /// The bytes of all archives.
    pub fn nar_bytes(&self) -> u64 {
        self.paths.iter().map(|(_, size)| size).sum()
    }

    /// For `nix copy --from`.
    pub fn url(&self) -> String {
        format!("file://{}", self.dir.display())
    }
}

/// The end of the name of the path that needs all others.
const TOP: &str = "-all-packages";

/// Makes the closures beside their final place, then renames.
fn make(cache: &Path, place: &Path, count: usize) -> Result<()> {
    let (work, new) = (cache.join(".apt"), cache.join(".new"));
    remove_left(&[&work, &new])?;
    println!("making closures of {count} Debian packages from {} and {}", SUITES[0], SUITES[1]);
    let mut apts = Vec::new();
    for suite in SUITES {
        apts.push(PrivateApt::new(&work.join(suite), "deb", suite)?);
    }
    let chosen = choose(&apts[0].available()?, &apts[1].available()?, count.saturating_sub(1))?;
    let (first, second): (Vec<Available>, Vec<Available>) = chosen.into_iter().unzip();
    for ((packages, apt), name) in [first, second].iter().zip(&apts).zip(NAMES) {
        make_release(packages, apt, &work.join(name), &new.join(name))?;
    }
    rebuild(&new.join(NAMES[1]), &new.join(NAMES[2]))?;
    fs::rename(&new, place).doing("moving into place", place)?;
    fs::remove_dir_all(&work).doing("removing", &work)
}

/// Packages whose versions differ, one of each source, in an order that has to do neither with names nor with sizes.
fn choose(first: &[Available], second: &[Available], count: usize) -> Result<Vec<(Available, Available)>> {
    let next: HashMap<&str, &Available> = second.iter().map(|package| (package.name.as_str(), package)).collect();
    let mut candidates: Vec<(&Available, &Available)> = first
        .iter()
        .filter_map(|package| Some((package, *next.get(package.name.as_str())?)))
        .filter(|(a, b)| a.version != b.version && SIZES.contains(&a.installed))
        .filter(|(a, _)| !LEFT_OUT.iter().any(|part| a.name.contains(part)))
        .collect();
    candidates.sort_by_key(|(package, _)| nar::sha256(package.name.as_bytes()));
    let mut sources = std::collections::HashSet::new();
    candidates.retain(|(package, _)| sources.insert(package.source.as_str()));
    candidates.truncate(count);
    if candidates.len() < count {
        return Err(Error::Wrong(format!("only {} packages differ, {count} are needed", candidates.len())));
    }
    Ok(candidates.into_iter().map(|(a, b)| (a.clone(), b.clone())).collect())
}

/// The store path of a package, a different one for each version.
fn store_path(package: &Available) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "+-._".contains(c) { c } else { '-' };
    let name: String = format!("{}-{}", package.name, package.version).chars().map(plain).collect();
    load::made_up_path(&name, &name)
}

/// Downloads, unpacks and archives the packages of a release into the binary cache `to`.
fn make_release(packages: &[Available], apt: &PrivateApt, work: &Path, to: &Path) -> Result<()> {
    begin_cache(to)?;
    let names: Vec<&str> = packages.iter().map(|package| package.name.as_str()).collect();
    let files = apt.download(&names, &work.join("files"))?;
    let paths: Vec<String> = packages.iter().map(store_path).collect();
    let unpacked = work.join("unpacked");
    for (number, package) in packages.iter().enumerate() {
        let prefix = format!("{}_", package.name);
        let named = |f: &&PathBuf| f.file_name().is_some_and(|n| n.to_string_lossy().starts_with(&prefix));
        let file = files
            .iter()
            .find(named)
            .ok_or_else(|| Error::Wrong(format!("the package {} was not downloaded", package.name)))?;
        run(Command::new("dpkg-deb").arg("-x").arg(file).arg(&unpacked))?;
        // Each needs two that come before it and itself, as a library needs others.
        let mut needs = vec![paths[number].clone()];
        needs.extend([number / 2, number / 3].into_iter().filter(|n| *n != number).map(|n| paths[n].clone()));
        needs.dedup();
        if needs.len() > 1 {
            look_in_store(&unpacked, &needs)?;
        }
        put_in_cache(to, &paths[number], &needs, |out| nar::write_path(&unpacked, out))?;
        fs::remove_dir_all(&unpacked).doing("removing", &unpacked)?;
    }
    let list = nar::Tree::File(paths.join("\n").into_bytes()).archive();
    let name = TOP.trim_start_matches('-');
    put_in_cache(to, &load::made_up_path(&paths.concat(), name), &paths, |out| {
        out.extend_from_slice(&list);
        Ok(())
    })
}

/// Begins a binary cache of plain files.
pub fn begin_cache(to: &Path) -> Result<()> {
    fs::create_dir_all(to.join("nar")).doing("creating", to)?;
    fs::write(to.join("nix-cache-info"), "StoreDir: /nix/store\n").doing("writing", to)
}

fn base_name(path: &str) -> &str {
    path.get(STORE.len()..).unwrap_or_default()
}

fn hash_part(path: &str) -> &str {
    base_name(path).get(..HASH).unwrap_or_default()
}

/// Puts a path into such a cache: its name, what it refers to, and its archive.
pub fn put_in_cache(
    to: &Path,
    path: &str,
    needs: &[String],
    archive: impl FnOnce(&mut Vec<u8>) -> Result<()>,
) -> Result<()> {
    let mut bytes = Vec::new();
    archive(&mut bytes)?;
    let (hash, size) = (nar::hex(&nar::sha256(&bytes)), bytes.len());
    let mut references: Vec<&str> = needs.iter().map(|need| base_name(need)).collect();
    references.sort_unstable();
    let file = format!("nar/{}.nar", hash_part(path));
    fs::write(to.join(&file), &bytes).doing("writing", to.join(&file))?;
    let info = format!(
        "StorePath: {path}\nURL: {file}\nCompression: none\nFileHash: sha256:{hash}\nFileSize: {size}\nNarHash: \
         sha256:{hash}\nNarSize: {size}\nReferences: {}\n",
        references.join(" ")
    );
    let place = to.join(format!("{}.narinfo", hash_part(path)));
    fs::write(&place, info).doing("writing", place)
}

/// Makes scripts name their interpreter, and programs and libraries their libraries, in store paths.
fn look_in_store(dir: &Path, needs: &[String]) -> Result<()> {
    for entry in fs::read_dir(dir).doing("listing", dir)? {
        let path = entry.doing("listing", dir)?.path();
        let kind = fs::symlink_metadata(&path).doing("looking at", &path)?.file_type();
        if kind.is_dir() {
            look_in_store(&path, needs)?;
        } else if kind.is_file() {
            let mut start = [0; 18];
            let mut file = File::open(&path).doing("opening", &path)?;
            // Whoever is shorter is neither.
            let read = file.read(&mut start).doing("reading", &path)?;
            if start.starts_with(b"#!/") {
                let text = fs::read(&path).doing("reading", &path)?;
                let text = [b"#!", needs[1].as_bytes(), &text[2..]].concat();
                fs::write(&path, text).doing("writing", &path)?;
            } else if read == start.len() && start.starts_with(b"\x7fELF") && [2, 3].contains(&start[16]) {
                bind(&path, needs);
            }
        }
    }
    Ok(())
}

/// Changes a program or a library. One that cannot be changed, which has no libraries, stays as it is.
fn bind(file: &Path, needs: &[String]) {
    let libraries: Vec<String> = needs.iter().map(|need| format!("{need}/{LIBRARIES}")).collect();
    let patch = |arguments: &[&str]| run(Command::new("patchelf").args(arguments).arg(file)).is_ok();
    let (path, loader) = (libraries.join(":"), format!("{}/lib64/ld-linux-x86-64.so.2", needs[1]));
    let _ = patch(&["--set-interpreter", &loader, "--set-rpath", &path]) || patch(&["--set-rpath", &path]);
}

/// Copies a binary cache with every store hash of its paths replaced by another one.
fn rebuild(from: &Path, to: &Path) -> Result<()> {
    begin_cache(to)?;
    let closure = Closure::read(from.to_owned())?;
    let other = |path: &str| load::made_up_path(&format!("rebuilt {path}"), &base_name(path)[HASH + 1..]);
    let others: HashMap<String, String> = closure.paths.iter().map(|(path, _)| (path.clone(), other(path))).collect();
    let hashes: HashMap<&[u8], &[u8]> =
        others.iter().map(|(old, new)| (hash_part(old).as_bytes(), hash_part(new).as_bytes())).collect();
    for (old, new) in &others {
        let info = from.join(format!("{}.narinfo", hash_part(old)));
        let text = fs::read_to_string(&info).doing("reading", &info)?;
        let references = text.lines().find_map(|l| l.strip_prefix("References: ")).unwrap_or_default();
        let needs: Vec<String> = references
            .split_whitespace()
            .filter_map(|name| others.get(&format!("/nix/store/{name}")).cloned())
            .collect();
        let archive = from.join(format!("nar/{}.nar", hash_part(old)));
        put_in_cache(to, new, &needs, |out| {
            *out = fs::read(&archive).doing("reading", &archive)?;
            replace(out, &hashes);
            Ok(())
        })?;
    }
    Ok(())
}

/// Replaces store hashes by others.
fn replace(bytes: &mut [u8], hashes: &HashMap<&[u8], &[u8]>) {
    let length = STORE.len() + HASH;
    let mut at = 0;
    while at + length <= bytes.len() {
        if bytes[at] == STORE[0] && bytes[at..].starts_with(STORE) {
            let hash = at + STORE.len()..at + length;
            if let Some(other) = hashes.get(&bytes[hash.clone()]) {
                bytes[hash].copy_from_slice(other);
            }
        }
        at += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, version: &str, source: &str) -> Available {
        Available { name: name.into(), version: version.into(), source: source.into(), installed: 1000 }
    }

    #[test]
    fn what_differs_is_chosen_once_for_each_source() {
        let first =
            [package("a", "1", "s"), package("b", "1", "s"), package("c", "1", "t"), package("x-doc", "1", "x")];
        let second =
            [package("a", "2", "s"), package("b", "2", "s"), package("c", "1", "t"), package("x-doc", "2", "x")];
        let chosen = choose(&first, &second, 1).unwrap();
        assert_eq!((chosen[0].0.source.as_str(), chosen[0].1.version.as_str()), ("s", "2"));
        choose(&first, &second, 2).unwrap_err();
    }

    #[test]
    fn a_rebuild_has_other_hashes_of_the_same_length() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        begin_cache(&from).unwrap();
        let (a, b) = (store_path(&package("a", "1:2~3", "a")), load::made_up_path("all", TOP.trim_start_matches('-')));
        let tree = nar::Tree::Directory(vec![
            (b"elsewhere".to_vec(), nar::Tree::Link(format!("{a}/usr").into_bytes())),
            (b"other".to_vec(), nar::Tree::File(b"/nix/store/00000000000000000000000000000000-x".to_vec())),
        ]);
        for (path, needs) in [(&a, vec![]), (&b, vec![a.clone()])] {
            put_in_cache(&from, path, &needs, |out| {
                out.extend(tree.archive());
                Ok(())
            })
            .unwrap();
        }
        rebuild(&from, &to).unwrap();
        let (before, after) = (Closure::read(from).unwrap(), Closure::read(to).unwrap());
        assert_eq!(before.nar_bytes(), after.nar_bytes());
        assert!(after.paths.iter().all(|(path, _)| !before.paths.iter().any(|(old, _)| old == path)));
        let archive = fs::read(after.dir.join(format!("nar/{}.nar", hash_part(&after.top)))).unwrap();
        let text = String::from_utf8_lossy(&archive);
        assert!(!text.contains(hash_part(&a)) && text.contains("/nix/store/00000000000000000000000000000000-x"));
        assert!(after.paths.iter().any(|(path, _)| text.contains(&format!("{path}/usr"))));
    }
}
