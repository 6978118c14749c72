//! A large tree of real files, taken from the machine's own `/usr`.

use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::path::Path;
use std::process::Command;

use crate::apt::run;
use crate::error::{Context, Error, Result};

/// What is taken from /usr, in this order, until it is enough: many small files first, then programs and libraries.
const CANDIDATES: [&str; 9] =
    ["include", "share/doc", "share/perl", "lib/python3", "lib/gcc", "bin", "lib/x86_64-linux-gnu", "share", "lib"];

/// Copies directories of /usr into `to` until it holds at least `bytes` bytes of file contents, readable by everybody.
/// Answers the tree's path. Each copy is shown.
pub fn from_usr(to: &Path, bytes: u64) -> Result<String> {
    fs::create_dir_all(to).doing("creating", to)?;
    for name in CANDIDATES {
        let (from, copy) = (Path::new("/usr").join(name), to.join(name.replace('/', "-")));
        if !from.is_dir() {
            continue;
        }
        println!("$ cp -r {} {}", from.display(), copy.display());
        run(Command::new("cp").args(["-r", "--no-dereference"]).arg(&from).arg(&copy))?;
        run(Command::new("chmod").args(["-R", "a+rX,u-s,g-s"]).arg(&copy))?;
        if contents(to)? >= bytes {
            return Ok(to.display().to_string());
        }
    }
    Err(Error::Wrong(format!("all of /usr has only {} bytes, {bytes} are needed", contents(to)?)))
}

/// The bytes in all regular files below a directory.
fn contents(dir: &Path) -> Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(dir).doing("listing", dir)? {
        let entry = entry.doing("listing", dir)?;
        let meta = entry.metadata().doing("looking at", entry.path())?;
        sum += match () {
            () if meta.is_dir() => contents(&entry.path())?,
            () if meta.is_file() => meta.len(),
            () => 0,
        };
    }
    Ok(sum)
}

/// What of /usr comes first: a compiler with all it needs, so that the tree can stand in for /usr.
const FIRST: [&str; 7] = ["bin", "include", "lib/gcc", "libexec", "lib/x86_64-linux-gnu", "lib64", "share"];
/// And then until it is enough.
const THEN: [&str; 3] = ["lib/python3", "lib/python3.11", "lib"];

/// Copies /usr, or as much of it as is needed for so many bytes and entries, to the directory `usr` in `to`, under the names
/// it has. Answers the number of entries and of bytes.
pub fn of_usr(to: &Path, bytes: u64, entries: u64) -> Result<(u64, u64)> {
    let mut counted = (0, 0);
    for (number, name) in FIRST.iter().chain(&THEN).enumerate() {
        let (from, copy) = (Path::new("/usr").join(name), to.join("usr").join(name));
        if !from.is_dir() || (number >= FIRST.len() && counted.0 >= entries && counted.1 >= bytes) {
            continue;
        }
        fs::create_dir_all(&copy).doing("creating", &copy)?;
        println!("$ cp -r {} {}", from.display(), copy.display());
        run(Command::new("cp").args(["-r", "--no-dereference"]).arg(from.join(".")).arg(&copy))?;
        run(Command::new("chmod").args(["-R", "a+rX,u-s,g-s"]).arg(&copy))?;
        counted = (count(to)?, contents(to)?);
    }
    if counted.0 < entries || counted.1 < bytes {
        return Err(Error::Wrong(format!("/usr has only {} entries and {} bytes", counted.0, counted.1)));
    }
    Ok(counted)
}

/// The files and directories below a directory.
///
/// # Errors
/// When one cannot be read.
pub fn count(dir: &Path) -> Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(dir).doing("listing", dir)? {
        let entry = entry.doing("listing", dir)?;
        sum += 1;
        if entry.file_type().doing("looking at", entry.path())?.is_dir() {
            sum += count(&entry.path())?;
        }
    }
    Ok(sum)
}

/// Divides a tree among directories `0` to `parts - 1` of `to`, of about as many bytes each: hard links of its files, under
/// the names they have.
pub fn divide(tree: &Path, to: &Path, parts: u64) -> Result<()> {
    let (whole, mut passed) = (contents(tree)?.max(1), 0);
    divide_below(tree, Path::new(""), to, &mut |length| {
        let part = (passed * parts / whole).min(parts - 1);
        passed += length;
        part
    })
}

fn divide_below(tree: &Path, below: &Path, to: &Path, part: &mut dyn FnMut(u64) -> u64) -> Result<()> {
    let dir = tree.join(below);
    let mut entries: Vec<_> = fs::read_dir(&dir).doing("listing", &dir)?.flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let meta = entry.metadata().doing("looking at", entry.path())?;
        let below = below.join(entry.file_name());
        if meta.is_dir() {
            divide_below(tree, &below, to, part)?;
        } else {
            let length = if meta.is_file() { meta.len() } else { 0 };
            let link = to.join(part(length).to_string()).join(&below);
            let parent = link.parent().unwrap_or(to);
            fs::create_dir_all(parent).doing("creating", parent)?;
            fs::hard_link(entry.path(), &link).doing("linking", &link)?;
        }
    }
    Ok(())
}

/// Writes a file of that length which compresses as real files do and shares nothing with them: the files of a tree one
/// after the other, every byte changed, and changed otherwise each time round.
pub fn large_file(tree: &Path, to: &Path, length: u64) -> Result<()> {
    let mut file = BufWriter::new(File::create(to).doing("creating", to)?);
    let (mut left, mut round) = (length, 0_u8);
    while left > 0 && round < u8::MAX {
        round += 1;
        append(tree, &mut file, &mut left, round)?;
    }
    file.flush().doing("writing", to)?;
    run(Command::new("chmod").arg("a+r").arg(to)).map(drop)
}

fn append(dir: &Path, to: &mut impl Write, left: &mut u64, change: u8) -> Result<()> {
    for entry in fs::read_dir(dir).doing("listing", dir)? {
        let path = entry.doing("listing", dir)?.path();
        let kind = fs::symlink_metadata(&path).doing("looking at", &path)?.file_type();
        if kind.is_dir() {
            append(&path, to, left, change)?;
        } else if kind.is_file() && *left > 0 {
            let mut bytes = Vec::new();
            File::open(&path).and_then(|file| file.take(*left).read_to_end(&mut bytes)).doing("reading", &path)?;
            bytes.iter_mut().for_each(|byte| *byte ^= change);
            to.write_all(&bytes).doing("writing", &path)?;
            *left -= bytes.len() as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_divided_evenly_and_completely() {
        let dir = tempfile::tempdir().unwrap();
        let (tree, to) = (dir.path().join("tree"), dir.path().join("to"));
        for n in 0..40 {
            let file = tree.join(format!("d{}/f{n}", n % 4));
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, vec![0; 100]).unwrap();
        }
        std::os::unix::fs::symlink("nowhere", tree.join("link")).unwrap();
        divide(&tree, &to, 8).unwrap();
        let parts: Vec<u64> = (0..8).map(|n| contents(&to.join(n.to_string())).unwrap()).collect();
        assert_eq!(parts, [500; 8]);
        assert_eq!(fs::read_dir(&to).unwrap().count(), 8);
        assert!(to.join("7/link").is_symlink());
    }
}
