//! The state directory as stock tools expect it, and the guard against those that would bypass the daemon.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use ::daemon::Locations;
use migrate::switch::Note;
use migrate::tripwire;

use crate::failure::Failure;

/// What stock keeps in the store directory beside store paths: the files that equal ones are linked to.
///
/// It is there, also in the mount, so that stock run without the daemon gets as far as castored's database
/// ([`tripwire`]), whose error says what to do. A file in its place would stop stock earlier, but say nothing.
const LINKS: &str = ".links";

/// Makes the directories and the [`tripwire`].
///
/// # Errors
/// [`Failure::StockDatabase`] when a stock store lives there and was not adopted. A database without paths, as
/// `nix-store --init` makes it, is none. [`Failure::MoveUnfinished`] when one was adopted in part.
pub(crate) fn prepare(locations: &Locations) -> Result<(), Failure> {
    let covers = covers(locations)?;
    let database = locations.state_dir.join("db/db.sqlite");
    let store_dir = Path::new(locations.store_dir.as_str());
    if !covers && database.exists() && !tripwire::is_ours(&database) && !is_empty(store_dir) {
        return Err(Failure::StockDatabase(database));
    }
    make_directories(locations)?;
    match tripwire::install(&locations.state_dir) {
        Ok(true) => {}
        Ok(false) => {
            tracing::warn!(database = %database.display(), "a stock database with paths is in the way of castored's guard");
        }
        // It only warns those who make a mistake.
        Err(error) => tracing::warn!(%error, "cannot guard the store against clients without the daemon"),
    }
    Ok(())
}

/// Makes the directories that stock tools expect.
///
/// # Errors
/// When one cannot be made.
pub(crate) fn make_directories(locations: &Locations) -> Result<(), Failure> {
    let state = &locations.state_dir;
    for dir in ["castored", "db", "daemon-socket", "gcroots/auto", "profiles", "temproots"] {
        make(&state.join(dir), 0o755)?;
    }
    make(&locations.log_dir.join("drvs"), 0o755)?;
    // Users keep their profiles and roots here, each their own. Stock takes that away when it is run as root.
    for dir in ["gcroots/per-user", "profiles/per-user"] {
        make(&state.join(dir), 0o1777)?;
    }
    set_mode(&state.join("castored"), 0o700)
}

/// Whether castored has taken the place of a stock store, so that its mount may cover that one's files.
fn covers(locations: &Locations) -> Result<bool, Failure> {
    match Note::read(&locations.state_dir)? {
        Some(note) if !note.finished => Err(Failure::MoveUnfinished),
        note => Ok(note.is_some_and(|note| note.store == Path::new(locations.store_dir.as_str()))),
    }
}

/// Makes sure that nothing lies in the store directory that a mount would hide, but for a stock store that was adopted.
///
/// # Errors
/// [`Failure::StoreDirInUse`].
pub(crate) fn prepare_store_dir(locations: &Locations) -> Result<(), Failure> {
    let store_dir = Path::new(locations.store_dir.as_str());
    if !is_empty(store_dir) && !covers(locations)? {
        return Err(Failure::StoreDirInUse(store_dir.to_owned()));
    }
    if fs::symlink_metadata(store_dir).is_err_and(|e| e.kind() == io::ErrorKind::NotFound) {
        fs::create_dir_all(store_dir).map_err(Failure::file("create", store_dir))?;
    }
    let links = store_dir.join(LINKS);
    // The guard of earlier versions.
    let _ = fs::remove_file(&links);
    if let Err(error) = fs::create_dir_all(&links) {
        // What a dead daemon left mounted cannot be written to, and has the directory below it.
        tracing::debug!(%error, links = %links.display(), "cannot make a directory that stock expects");
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
        let database = locations.state_dir.join("db/db.sqlite");
        fs::write(&database, "").unwrap();
        for _ in 0..2 {
            prepare(&locations).unwrap();
            prepare_store_dir(&locations).unwrap();
            assert!(store.join(LINKS).is_dir() && tripwire::is_ours(&database));
        }
        fs::write(store.join("a-path"), "").unwrap();
        assert!(matches!(prepare_store_dir(&locations), Err(Failure::StoreDirInUse(_))));
        fs::remove_file(&database).unwrap();
        fs::write(&database, "").unwrap();
        assert!(matches!(prepare(&locations), Err(Failure::StockDatabase(_))));
    }
}
