//! Data of stock Nix's own unit tests, taken from Debian's source package. It is used where it is, never copied here.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::apt::{PrivateApt, run};
use crate::error::{Context, Error, Result};

/// The release whose data it is, and the Debian suite that has its source.
const RELEASE: (&str, &str) = ("2.26.3", "trixie");

/// Where the data is in the source. Below it is a directory for each format.
const DATA: &str = "src/libstore-tests/data";

/// What symlinks in the data point to.
const LINKED: &str = "tests/functional/derivation";

/// A directory that is there when all of the data is.
const SAMPLE: &str = "worker-protocol";

/// Fetches the data if it is missing below `cache`; answers its directory. The caller holds the cache's lock.
pub(crate) fn fetch_unit_data(cache: &Path) -> Result<PathBuf> {
    let (version, suite) = RELEASE;
    let place = cache.join(format!("unit-data-{version}"));
    if !place.join(SAMPLE).is_dir() {
        println!("fetching the unit test data of nix {version} from Debian {suite}");
        fetch(cache, &place, version, suite)?;
    }
    Ok(place)
}

/// Downloads and unpacks beside the final place, then renames.
fn fetch(cache: &Path, place: &Path, version: &str, suite: &str) -> Result<()> {
    let work = cache.join(".apt").join(format!("source-{version}"));
    for dir in [work.as_path(), place] {
        if dir.exists() {
            fs::remove_dir_all(dir).doing("removing", dir)?;
        }
    }
    let root = work.join("root");
    fs::create_dir_all(&root).doing("creating", &root)?;
    let files = PrivateApt::new(&work, "deb-src", suite)?.download_source("nix", &work.join("source"))?;
    let name = |file: &Path| file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let archive = files
        .iter()
        .find(|file| name(file).starts_with(&format!("nix_{version}")) && name(file).contains(".orig.tar."))
        .ok_or_else(|| Error::Wrong(format!("Debian {suite} has no source of nix {version}")))?;
    run(Command::new("tar")
        .args(["--no-same-owner", "--strip-components=1", "--wildcards", "--extract", "--file"])
        .arg(archive)
        .arg("--directory")
        .arg(&root)
        .args([format!("*/{DATA}/*"), format!("*/{LINKED}/*")]))?;
    let data = work.join("data");
    run(Command::new("cp").args(["--recursive", "--dereference"]).arg(root.join(DATA)).arg(&data))?;
    run(Command::new("chmod").args(["--recursive", "a+rX,go-w"]).arg(&data))?;
    fs::rename(&data, place).doing("moving into place", place)?;
    fs::remove_dir_all(&work).doing("removing", &work)
}
