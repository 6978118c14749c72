//! Parts of stock Nix's source packages, taken from Debian: the data of its unit tests, and its functional suite. They are
//! used where they are unpacked, never copied into this repository.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::apt::{PrivateApt, run};
use crate::error::{Context, Error, Result};

/// A release, the Debian suite that has its source, and what is taken from it.
type Source = (&'static str, &'static str, &'static [&'static str]);

/// The sources that can be had.
const SOURCES: [Source; 2] = [
    ("2.26.3", "trixie", &["src/libstore-tests/data", "tests/functional", "scripts"]),
    ("2.8.0", "bookworm", &["tests", "scripts", "src/nix-channel"]),
];

/// The release whose unit test data is used.
pub(crate) const UNIT_DATA_RELEASE: &str = "2.26.3";

/// Where the data is in the source. Below it is a directory for each format.
pub(crate) const UNIT_DATA: &str = "src/libstore-tests/data";

/// Fetches the source of a release if it is missing below `cache`; answers its directory. The caller holds the cache's
/// lock.
pub(crate) fn fetch(cache: &Path, version: &str) -> Result<PathBuf> {
    let source = SOURCES.iter().find(|(v, ..)| *v == version);
    let source = source.ok_or_else(|| Error::Wrong(format!("the source of nix {version} is not to be had")))?;
    let place = cache.join(format!("source-{version}"));
    if !place.is_dir() {
        println!("fetching the source of nix {version} from Debian {}", source.1);
        unpack(cache, &place, source)?;
    }
    Ok(place)
}

/// Downloads and unpacks beside the final place, then renames.
fn unpack(cache: &Path, place: &Path, (version, suite, parts): &Source) -> Result<()> {
    let work = cache.join(".apt").join(format!("source-{version}"));
    if work.exists() {
        fs::remove_dir_all(&work).doing("removing", &work)?;
    }
    let root = work.join("root");
    fs::create_dir_all(&root).doing("creating", &root)?;
    let files = PrivateApt::new(&work, "deb-src", suite)?.download_source("nix", &work.join("source"))?;
    let name = |file: &Path| file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let archive = files
        .iter()
        .find(|file| name(file).starts_with(&format!("nix_{version}")) && name(file).contains(".orig.tar."))
        .ok_or_else(|| Error::Wrong(format!("Debian {suite} has no source of nix {version}")))?;
    // A pattern that names a directory takes all that is below it.
    run(Command::new("tar")
        .args(["--no-same-owner", "--strip-components=1", "--wildcards", "--no-wildcards-match-slash"])
        .arg("--extract")
        .arg("--file")
        .arg(archive)
        .arg("--directory")
        .arg(&root)
        .args(parts.iter().map(|part| format!("*/{part}"))))?;
    run(Command::new("chmod").args(["--recursive", "a+rX,go-w"]).arg(&root))?;
    fs::rename(&root, place).doing("moving into place", place)?;
    fs::remove_dir_all(&work).doing("removing", &work)
}
