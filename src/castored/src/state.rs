//! The state directory as stock tools expect it, and the guard against those that would bypass the daemon.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use ::daemon::Locations;

use crate::failure::Failure;

/// What stands in `db/schema`. Stock Nix run as root would open the database itself; it stops at a schema newer
/// than any it knows, and says so.
const SCHEMA: &str = "9999";

/// Makes the directories and writes the guard.
///
/// # Errors
/// [`Failure::StockDatabase`] when a stock store lives there.
pub(crate) fn prepare(locations: &Locations) -> Result<(), Failure> {
    let state = &locations.state_dir;
    let database = state.join("db/db.sqlite");
    if database.exists() {
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
    match fs::read_dir(store_dir) {
        Ok(mut entries) => match entries.next() {
            Some(Ok(_)) => Err(Failure::StoreDirInUse(store_dir.to_owned())),
            // A mount that a dead daemon left behind fails here; mounting replaces it.
            _ => Ok(()),
        },
        Err(_) => Ok(()),
    }
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
