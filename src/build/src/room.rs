//! The directories one build has for itself.
//!
//! Each build has a directory that only the daemon may enter (so nobody outside reaches what is in it, whatever its
//! permissions), and in it those that the sandbox shows to the builder.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, RenameFlags, openat, renameat2};
use nix::sys::stat::Mode;
use nix::unistd::geteuid;
use parking_lot::Mutex;

use crate::own::set_mode;
use crate::remove::remove_tree;
use crate::sandbox::Identity;

/// Prefix of directories that are removed with their build, or at the next start.
const RUNNING: &str = "run-";
/// Prefix of directories that a client wanted to be kept: what users of stock Nix look for.
const KEPT: &str = "nix-build-";
/// Most directories of one derivation that are kept.
const MAX_KEPT: u32 = 10_000;
/// What is added to the name of an output that differs from the valid one.
const DIFFERING: &str = ".check";

/// What is kept is for everybody to read.
const READABLE: Mode = Mode::from_bits_truncate(0o755);
/// How the directory of a build user is opened by name.
const DIRECTORY: OFlag = OFlag::O_PATH.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

static NEXT: AtomicU64 = AtomicU64::new(1);

/// The directories of a running build; removed when dropped.
#[derive(Debug)]
pub(crate) struct Room {
    path: PathBuf,
    /// The directory where outputs appear, opened before the builder could do anything.
    pub(crate) scratch: OwnedFd,
    kept: bool,
}

/// Removes what builds of an earlier process left behind.
pub(crate) fn remove_leftovers(builds_dir: &Path) {
    let Ok(entries) = fs::read_dir(builds_dir) else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(RUNNING)
            && let Err(error) = remove_tree(&entry.path())
        {
            tracing::warn!("cannot remove {}: {error}", entry.path().display());
        }
    }
}

/// Where builds are made below a directory that somebody has set, and that may be for everybody, as `/tmp` is.
const OWN_NAME: &str = "castored-builds";

/// Our own directory in the one of the setting `build-dir`. What an earlier process left in it is removed when it is
/// used for the first time.
pub(crate) fn own_builds_dir(build_dir: &Path) -> io::Result<PathBuf> {
    static USED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
    let path = build_dir.join(OWN_NAME);
    match DirBuilder::new().recursive(false).mode(0o755).create(&path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        other => other?,
    }
    let found = fs::symlink_metadata(&path)?;
    if !found.is_dir() || found.uid() != geteuid().as_raw() || found.mode() & 0o022 != 0 {
        let text = format!("'{}' is not a directory that only the daemon can write to", path.display());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    if USED.lock().insert(path.clone()) {
        remove_leftovers(&path);
    }
    Ok(path)
}

impl Room {
    /// Makes the directories for a build that runs as `identity`.
    pub(crate) fn create(builds_dir: &Path, identity: Identity) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o755).create(builds_dir)?;
        let path = loop {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = builds_dir.join(format!("{RUNNING}{}-{number}", std::process::id()));
            match DirBuilder::new().mode(0o700).create(&path) {
                // A daemon in another pid namespace may share the directory, and have our number.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                other => break other.map(|()| path)?,
            }
        };
        let make = |path: &Path, mode: u32, user: bool| -> io::Result<()> {
            DirBuilder::new().mode(0o700).create(path)?;
            if let Identity::BuildUser { uid, gid, .. } = identity {
                chown(path, user.then_some(uid), Some(gid))?;
            }
            // Explicitly, because the umask has had its say.
            fs::set_permissions(path, Permissions::from_mode(mode))
        };
        make(&path.join("build"), 0o700, true)?;
        make(&path.join("tmp"), 0o1777, false)?;
        // Sticky: what the daemon puts there (mount points) is not the builder's to remove.
        make(&path.join("store"), 0o1775, false)?;
        make(&path.join("work"), 0o700, false)?;
        make(&path.join("root"), 0o700, false)?;
        let scratch = File::open(path.join("store"))?.into();
        Ok(Self { path, scratch, kept: false })
    }

    /// The directory that has all the others.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The build directory.
    pub(crate) fn build_dir(&self) -> PathBuf {
        self.path.join("build")
    }

    /// What becomes `/tmp`.
    pub(crate) fn tmp(&self) -> PathBuf {
        self.path.join("tmp")
    }

    /// What becomes the store directory.
    pub(crate) fn store(&self) -> PathBuf {
        self.path.join("store")
    }

    /// The work directory of an overlay.
    pub(crate) fn overlay_work(&self) -> PathBuf {
        self.path.join("work")
    }

    /// Where the sandbox's root is mounted.
    pub(crate) fn root(&self) -> PathBuf {
        self.path.join("root")
    }

    /// Puts a file into the build directory. The builder has not started yet.
    pub(crate) fn add_file(&self, name: &str, contents: &[u8], identity: Identity) -> io::Result<()> {
        let path = self.build_dir().join(name);
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o644).open(&path)?;
        io::Write::write_all(&mut file, contents)?;
        if let Identity::BuildUser { uid, gid, .. } = identity {
            std::os::unix::fs::fchown(&file, Some(uid), Some(gid))?;
        }
        Ok(())
    }

    /// Takes an output out of the store directory, as what a check has found to differ; gives its new name in the room.
    pub(crate) fn set_aside(&self, base_name: &str) -> io::Result<String> {
        let whole = File::open(&self.path)?;
        let name = format!("{base_name}{DIFFERING}");
        renameat2(&self.scratch, base_name, &whole, name.as_str(), RenameFlags::RENAME_NOREPLACE)?;
        Ok(name)
    }

    /// Moves the room into the directory `parent` (on the same filesystem), where users can read it.
    pub(crate) fn publish(&mut self, parent: &Path, drv_name: &str) -> io::Result<()> {
        for other in [self.tmp(), self.store(), self.overlay_work(), self.root()] {
            remove_tree(&other)?;
        }
        // By descriptor: the build directory is its user's, and so may be what has its name.
        let whole = File::open(&self.path)?;
        let build = openat(&whole, "build", DIRECTORY, Mode::empty())?;
        set_mode(build.as_fd(), READABLE)?;
        DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
        for number in 0..MAX_KEPT {
            let public = parent.join(format!("{KEPT}{drv_name}-{number}"));
            match renameat2(AT_FDCWD, &self.path, AT_FDCWD, &public, RenameFlags::RENAME_NOREPLACE) {
                Err(Errno::EEXIST) => {}
                other => {
                    other?;
                    self.path = public;
                    set_mode(whole.as_fd(), READABLE)?;
                    return Ok(());
                }
            }
        }
        Err(io::Error::new(io::ErrorKind::AlreadyExists, format!("{MAX_KEPT} of this name are there already")))
    }

    /// Leaves the directories as they are; gives the build directory.
    pub(crate) fn leave(mut self) -> PathBuf {
        self.kept = true;
        self.build_dir()
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if let Err(error) = remove_tree(&self.path) {
            tracing::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_can_be_read_and_replaces_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let builds = dir.path().join("builds");
        let mut kept = Vec::new();
        for text in ["first", "second"] {
            let mut room = Room::create(&builds, Identity::Caller).unwrap();
            fs::write(room.build_dir().join("file"), text).unwrap();
            fs::write(room.store().join("output"), text).unwrap();
            assert_eq!(room.set_aside("output").unwrap(), "output.check");
            room.publish(dir.path(), "x.drv").unwrap();
            kept.push(room.leave());
        }
        assert_eq!(kept[1], dir.path().join("nix-build-x.drv-1/build"));
        assert_eq!(fs::read_to_string(dir.path().join("nix-build-x.drv-1/output.check")).unwrap(), "second");
        let mut room = Room::create(&builds, Identity::Caller).unwrap();
        room.publish(dir.path(), "x.drv").unwrap();
        drop(room);
        assert!(!dir.path().join("nix-build-x.drv-2").exists() && fs::read_dir(&builds).unwrap().count() == 0);
        for (path, text) in kept.iter().zip(["first", "second"]) {
            assert_eq!(fs::read_to_string(path.join("file")).unwrap(), text);
            for path in [path, path.parent().unwrap()] {
                assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o755);
            }
        }
        remove_leftovers(dir.path());
        assert!(kept[0].exists());
    }

    #[test]
    fn a_build_dir_for_everybody_has_a_directory_of_ours() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join(OWN_NAME);
        fs::create_dir_all(own.join("run-1-1")).unwrap();
        assert_eq!(own_builds_dir(dir.path()).unwrap(), own);
        assert_eq!(fs::read_dir(&own).unwrap().count(), 0, "leftovers");
        fs::create_dir(own.join("run-2-2")).unwrap();
        own_builds_dir(dir.path()).unwrap();
        assert!(own.join("run-2-2").exists(), "a running build was removed");
        for number in 1..100 {
            fs::create_dir(own.join(format!("run-{}-{number}", std::process::id()))).unwrap();
        }
        NEXT.store(1, Ordering::Relaxed);
        Room::create(&own, Identity::Caller).unwrap();

        fs::set_permissions(&own, Permissions::from_mode(0o775)).unwrap();
        assert!(own_builds_dir(dir.path()).is_err());
        fs::rename(&own, dir.path().join("elsewhere")).unwrap();
        std::os::unix::fs::symlink("elsewhere", &own).unwrap();
        fs::set_permissions(dir.path().join("elsewhere"), Permissions::from_mode(0o755)).unwrap();
        assert!(own_builds_dir(dir.path()).is_err());
    }
}
