//! The directories one build has for itself.
//!
//! Each build has a directory that only the daemon may enter (so nobody outside reaches what is in it, whatever its
//! permissions), and in it those that the sandbox shows to the builder.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::remove::remove_tree;
use crate::sandbox::Identity;

/// Prefix of directories that are removed with their build, or at the next start.
const RUNNING: &str = "run-";
/// Prefix of directories that a client wanted to be kept.
const KEPT: &str = "kept-";

static NEXT: AtomicU64 = AtomicU64::new(1);

/// The directories of a running build; removed when dropped.
#[derive(Debug)]
pub(crate) struct Room {
    path: PathBuf,
    /// The directory where outputs appear, opened before the builder could do anything.
    pub(crate) scratch: OwnedFd,
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

impl Room {
    /// Makes the directories for a build that runs as `identity`.
    pub(crate) fn create(builds_dir: &Path, identity: Identity) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o755).create(builds_dir)?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = builds_dir.join(format!("{RUNNING}{}-{number}", std::process::id()));
        let make = |path: &Path, mode: u32, user: bool| -> io::Result<()> {
            DirBuilder::new().mode(0o700).create(path)?;
            if let Identity::BuildUser { uid, gid } = identity {
                chown(path, user.then_some(uid), Some(gid))?;
            }
            // Explicitly, because the umask has had its say.
            fs::set_permissions(path, Permissions::from_mode(mode))
        };
        DirBuilder::new().mode(0o700).create(&path)?;
        make(&path.join("build"), 0o700, true)?;
        make(&path.join("tmp"), 0o1777, false)?;
        // Sticky: what the daemon puts there (mount points) is not the builder's to remove.
        make(&path.join("store"), 0o1775, false)?;
        make(&path.join("work"), 0o700, false)?;
        make(&path.join("root"), 0o700, false)?;
        let scratch = File::open(path.join("store"))?.into();
        Ok(Self { path, scratch })
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
        if let Identity::BuildUser { uid, gid } = identity {
            std::os::unix::fs::fchown(&file, Some(uid), Some(gid))?;
        }
        Ok(())
    }

    /// Keeps the build directory for somebody to look at, and says where it is.
    pub(crate) fn keep(self) -> io::Result<PathBuf> {
        for other in [self.tmp(), self.store(), self.overlay_work(), self.root()] {
            remove_tree(&other)?;
        }
        let name = self.path.file_name().map(|name| name.to_string_lossy().replacen(RUNNING, KEPT, 1));
        let kept = self.path.with_file_name(name.unwrap_or_default());
        fs::rename(&self.path, &kept)?;
        fs::set_permissions(&kept, Permissions::from_mode(0o755))?;
        Ok(kept.join("build"))
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if let Err(error) = remove_tree(&self.path) {
            tracing::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}
