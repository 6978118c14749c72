//! A large tree of real files, taken from the machine's own `/usr`.

use std::fs;
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
