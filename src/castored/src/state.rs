//! The state directory as stock tools expect it, and the guard against those that would bypass the daemon.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use ::daemon::Locations;

use crate::failure::Failure;

/// What stands in `db/schema`. Stock Nix run as root would open the database itself; it stops at a schema newer
/// than any it knows, and says so.
const SCHEMA: &str = "9999";

/// What stock keeps in the store directory beside store paths: the files that equal ones are linked to.
const LINKS: &str = ".links";

/// Makes the directories and writes the guard.
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
    set_mode(&state.join("castored"), 0o700)?;
    let schema = state.join("db/schema");
    fs::write(&schema, SCHEMA).map_err(Failure::file("write", &schema))
}

/// Whether something lies in the store directory that a mount would hide.
///
/// # Errors
/// [`Failure::StoreDirInUse`].
pub(crate) fn check_store_dir(store_dir: &Path) -> Result<(), Failure> {
    if is_empty(store_dir) { Ok(()) } else { Err(Failure::StoreDirInUse(store_dir.to_owned())) }
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
    fs::create_dir_all(dir).map_err(Failure::file("create", dir))?;
    set_mode(dir, mode)
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
        prepare(&locations).unwrap();
        check_store_dir(store).unwrap();
        fs::write(store.join("a-path"), "").unwrap();
        assert!(matches!(prepare(&locations), Err(Failure::StockDatabase(_))));
        assert!(matches!(check_store_dir(store), Err(Failure::StoreDirInUse(_))));
    }
}
