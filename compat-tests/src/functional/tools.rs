//! What the tests need beyond Debian's packages: a `jq` of 1.7 or later, whose language 1.6 lacks, and a busybox that may
//! have any name.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::apt::{PrivateApt, remove_left, run};
use crate::error::{Context, Result};
use crate::releases::{bind_to, copy, copy_libraries};

/// The Debian suite whose jq is taken.
const SUITE: &str = "trixie";
/// The source of the busybox with any name.
const BUSYBOX: &str = include_str!("../../suites/busybox.c");

/// Fetches and makes the tools if they are missing below `cache`; answers their directory, which has a `bin`. The caller
/// holds the cache's lock.
pub(super) fn fetch(cache: &Path) -> Result<PathBuf> {
    let place = cache.join("functional-tools");
    if place.is_dir() {
        return Ok(place);
    }
    println!("fetching jq from Debian {SUITE}");
    let (work, new) = (cache.join(".apt/functional-tools"), cache.join(".new-functional-tools"));
    remove_left(&[&work, &new])?;
    let root = work.join("root");
    for dir in [&root, &new.join("bin"), &new.join("lib")] {
        fs::create_dir_all(dir).doing("creating", dir)?;
    }
    let is_wanted = |name: &str| name.starts_with("jq") || name.starts_with("lib");
    PrivateApt::new(&work, "deb", SUITE)?.unpack_closure(&["jq"], &root, is_wanted)?;
    copy_libraries(&root, &root.join("usr/bin/jq"), &new.join("lib"))?;
    copy(&root.join("usr/bin/jq"), &new.join("bin/jq"))?;
    bind_to(&new.join("bin/jq"), &place.join("lib"))?;
    make_busybox(&work, &new.join("bin/busybox"))?;
    fs::rename(&new, &place).doing("moving into place", &place)?;
    fs::remove_dir_all(&work).doing("removing", &work)?;
    Ok(place)
}

/// Compiles the busybox with any name around the machine's own.
fn make_busybox(work: &Path, to: &Path) -> Result<()> {
    let source = work.join("busybox.c");
    fs::write(&source, BUSYBOX).doing("writing", &source)?;
    let inner = if Path::new("/usr/bin/busybox").exists() { "/usr/bin/busybox" } else { "/bin/busybox" };
    let mut cc = Command::new("cc");
    cc.args(["-O1", "-static"]).arg(format!("-DBUSYBOX=\"\\\"{inner}\\\"\"")).arg("-o").arg(to).arg(source);
    run(&mut cc).map(drop)
}
