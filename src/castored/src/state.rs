//! The state directory as stock tools expect it, and the guard against those that would bypass the daemon.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use ::daemon::Locations;

use crate::failure::Failure;

/// What stock keeps in the store directory beside store paths: the files that equal ones are linked to.
///
/// Stock Nix run as root without a daemon opens the store itself, and makes this directory before anything else. Under
/// the mount it is a file of ours: as long as castored runs the mount is read-only, and while it does not, this name is
/// taken. Either way stock stops before it writes. (A schema number in `db` that no stock knows would stop it as well,
/// but also where it opens another store with this state directory, which harms nobody.)
const LINKS: &str = ".links";
/// What is in that file.
const GUARD: &str = "This store directory belongs to castored. Start its daemon, and use it with NIX_REMOTE=daemon.\n";

/// Makes the directories.
///
/// # Errors
/// [`Failure::StockDatabase`] when a stock store lives there. A database without paths, as `nix-store --init` makes it,
/// is none.
pub(crate) fn prepare(locations: &Locations) -> Result<(), Failure> {
    let state = &locations.state_dir;
    let database = state.join("db/db.sqlite");
    if database.exists() && !is_empty(Path::new(locations.store_dir.as_str())) {
        return Err(Failure::StockDatabase(database));
    }
    for dir in ["castored", "db", "daemon-socket", "gcroots/auto", "profiles", "temproots"] {
        make(&state.join(dir), 0o755)?;
    }
    make(&locations.log_dir.join("drvs"), 0o755)?;
    // Users keep their profiles and roots here, each their own.
    for dir in ["gcroots/per-user", "profiles/per-user"] {
        make(&state.join(dir), 0o1777)?;
    }
    set_mode(&state.join("castored"), 0o700)
}

/// Makes sure that nothing lies in the store directory that a mount would hide, and leaves the [guard](LINKS) there.
///
/// # Errors
/// [`Failure::StoreDirInUse`].
pub(crate) fn prepare_store_dir(store_dir: &Path) -> Result<(), Failure> {
    if !is_empty(store_dir) {
        return Err(Failure::StoreDirInUse(store_dir.to_owned()));
    }
    if fs::symlink_metadata(store_dir).is_err_and(|e| e.kind() == io::ErrorKind::NotFound) {
        fs::create_dir_all(store_dir).map_err(Failure::file("create", store_dir))?;
    }
    let guard = store_dir.join(LINKS);
    // Of a stock store that never held a path. With links in it, it stays, and there is no guard.
    let _ = fs::remove_dir(&guard);
    if !guard.exists()
        && let Err(error) = fs::write(&guard, GUARD)
    {
        // What a dead daemon left mounted cannot be written to, and has the guard below it.
        tracing::debug!(%error, guard = %guard.display(), "cannot leave a guard in the store directory");
    }
    Ok(())
}

/// Whether no path lies in a store directory. A mount that a dead daemon left behind cannot be read, and counts as empty:
/// mounting replaces it.
fn is_empty(store_dir: &Path) -> bool {
    let Ok(entries) = fs::read_dir(store_dir) else { return true };
    !entries.flatten().any(|entry| entry.file_name() != LINKS)
}

fn make(dir: &Path, mode: u32) -> Result<(), Failure> {
    if dir.is_dir() {
        return Ok(());
    }
    let missing: Vec<&Path> = dir.ancestors().take_while(|dir| !dir.exists()).collect();
    fs::create_dir_all(dir).map_err(Failure::file("create", dir))?;
    set_mode(dir, mode)?;
    // What is acknowledged later must not go with the name of a directory above it.
    for parent in missing.into_iter().filter_map(Path::parent) {
        File::open(parent).and_then(|parent| parent.sync_all()).map_err(Failure::file("sync", parent))?;
    }
    Ok(())
}

fn set_mode(dir: &Path, mode: u32) -> Result<(), Failure> {
    fs::set_permissions(dir, fs::Permissions::from_mode(mode)).map_err(Failure::file("set the mode of", dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stock_store_is_refused_and_an_initialised_one_without_paths_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let locations = Locations::below(dir.path()).unwrap();
        let store = Path::new(locations.store_dir.as_str());
        fs::create_dir_all(store.join(LINKS)).unwrap();
        fs::create_dir_all(locations.state_dir.join("db")).unwrap();
        fs::write(locations.state_dir.join("db/db.sqlite"), "").unwrap();
        for _ in 0..2 {
            prepare(&locations).unwrap();
            prepare_store_dir(store).unwrap();
            assert!(store.join(LINKS).is_file());
        }
        fs::write(store.join("a-path"), "").unwrap();
        assert!(matches!(prepare(&locations), Err(Failure::StockDatabase(_))));
        assert!(matches!(prepare_store_dir(store), Err(Failure::StoreDirInUse(_))));
    }
}
