//! A C compiler with all it needs, and a program to compile with it, taken from Debian: what an ordinary build is made of.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::apt::{PrivateApt, remove_left, run};
use crate::error::{Context, Error, Result};
use crate::machine::{CACHE, lock};

/// The suite both come from.
const SUITE: &str = "bookworm";
/// The package that depends on a compiler, and what is so much needed that no package depends on it.
const PACKAGES: [&str; 10] =
    ["build-essential", "bash", "coreutils", "dash", "diffutils", "findutils", "grep", "gzip", "mawk", "sed"];
/// The program.
const PROGRAM: &str = "hello";
/// What no build needs, below the root.
const UNUSED: [&str; 4] = ["usr/share/doc", "usr/share/man", "usr/share/locale", "var"];
/// What makes a root out of `/usr`.
const LINKS: [(&str, &str); 4] = [("bin", "usr/bin"), ("sbin", "usr/sbin"), ("lib", "usr/lib"), ("lib64", "usr/lib64")];

/// Both, on disk.
#[derive(Debug, Clone)]
pub struct Toolchain {
    /// The root of a file system with a compiler in it; whoever wants to run it binds its directories to `/`.
    pub root: PathBuf,
    /// The source archive of GNU hello.
    pub hello: PathBuf,
}

impl Toolchain {
    /// Fetches what is missing of it.
    pub fn fetch() -> Result<Self> {
        let cache = Path::new(CACHE);
        let _turn = lock(cache)?;
        let place = cache.join("toolchain");
        if !place.is_dir() {
            println!("fetching a compiler and the source of {PROGRAM} from Debian {SUITE}");
            fetch(cache, &place)?;
        }
        Ok(Self { root: place.join("root"), hello: place.join("hello.tar.gz") })
    }
}

/// Unpacks beside the final place, then renames.
fn fetch(cache: &Path, place: &Path) -> Result<()> {
    let work = cache.join(".apt/toolchain");
    remove_left(&[&work])?;
    let root = work.join("place/root");
    for (link, target) in LINKS {
        let directory = root.join(target);
        fs::create_dir_all(&directory).doing("creating", &directory)?;
        symlink(target, root.join(link)).doing("linking", root.join(link))?;
    }
    for package in PrivateApt::new(&work.join("deb"), "deb", SUITE)?.download_closure(&PACKAGES)? {
        // Packages of this suite still have files in /bin and /lib.
        let script = "dpkg-deb --fsys-tarfile \"$1\" | tar --extract --keep-directory-symlink --directory \"$2\"";
        run(Command::new("/bin/sh").args(["-euc", script, "sh"]).arg(package).arg(&root))?;
    }
    // Otherwise chosen when a package is configured.
    symlink("mawk", root.join("usr/bin/awk")).doing("linking", root.join("usr/bin/awk"))?;
    for unused in UNUSED {
        let unused = root.join(unused);
        fs::remove_dir_all(&unused).doing("removing", &unused)?;
    }
    let files =
        PrivateApt::new(&work.join("source"), "deb-src", SUITE)?.download_source(PROGRAM, &work.join("hello"))?;
    let archive = files.iter().find(|file| file.to_string_lossy().ends_with(".orig.tar.gz"));
    let archive = archive.ok_or_else(|| Error::Wrong(format!("Debian {SUITE} has no source of {PROGRAM}")))?;
    let copy = work.join("place/hello.tar.gz");
    fs::copy(archive, &copy).doing("copying", archive)?;
    fs::rename(work.join("place"), place).doing("moving to", place)?;
    fs::remove_dir_all(&work).doing("removing", &work)
}
