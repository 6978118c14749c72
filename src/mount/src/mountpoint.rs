//! Making a mountpoint ready: there, a directory, and free of dead mounts.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::statvfs::statvfs;

use crate::MountError;
use crate::device;
use crate::mount_table::{MountEntry, mount_at};

/// How long a filesystem may take to show that it is alive.
const PROBE: Duration = Duration::from_secs(5);
/// How many dead mounts may lie on top of each other.
const MAX_STALE: usize = 64;

/// The absolute path of a mountpoint, which may be missing or dead, without symlinks above its last component.
pub(crate) fn resolve(mountpoint: &Path) -> Result<PathBuf, MountError> {
    let unusable = |source| MountError::Mountpoint { mountpoint: mountpoint.to_owned(), source };
    let (Some(parent), Some(name)) = (mountpoint.parent(), mountpoint.file_name()) else {
        return Err(unusable(io::Error::from(Errno::EINVAL)));
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    match parent.canonicalize() {
        Ok(parent) => Ok(parent.join(name)),
        // Nothing of it is there yet.
        Err(error) if error.kind() == io::ErrorKind::NotFound => std::path::absolute(mountpoint).map_err(unusable),
        Err(error) => Err(unusable(error)),
    }
}

/// Creates the mountpoint if it is missing, detaches dead mounts from it, and returns its path without symlinks.
pub(crate) fn prepare(mountpoint: &Path) -> Result<PathBuf, MountError> {
    let unusable = |source| MountError::Mountpoint { mountpoint: mountpoint.to_owned(), source };
    // The last component may be a dead mount, which cannot even be looked at: resolve only what is above it.
    let (Some(parent), Some(name)) = (mountpoint.parent(), mountpoint.file_name()) else {
        return Err(unusable(io::Error::from(Errno::EINVAL)));
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    fs::create_dir_all(parent).map_err(unusable)?;
    let path = parent.canonicalize().map_err(unusable)?.join(name);
    clear(&path)?;

    match fs::create_dir(&path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(unusable(error)),
    }
    let resolved = path.canonicalize().map_err(unusable)?;
    if resolved != path {
        clear(&resolved)?;
    }
    if !resolved.metadata().map_err(unusable)?.is_dir() {
        return Err(unusable(io::Error::from(Errno::ENOTDIR)));
    }
    Ok(resolved)
}

/// Detaches what a dead server left on `path`. Mounting over a FUSE filesystem that lives is an error; anything else,
/// such as the read-only bind mount some systems keep on the store directory, is simply covered.
fn clear(path: &Path) -> Result<(), MountError> {
    for _ in 0..MAX_STALE {
        let entry = mount_at(path).map_err(|source| MountError::MountTable { mountpoint: path.to_owned(), source })?;
        let Some(entry) = entry.filter(MountEntry::is_fuse) else { return Ok(()) };
        match probe(path) {
            Some(Err(Errno::ENOTCONN)) => {
                tracing::warn!(mountpoint = %path.display(), "detaching the mount a dead server left");
                device::detach(path)?;
            }
            Some(_) => return Err(MountError::Busy { mountpoint: path.to_owned(), filesystem: entry.kind }),
            None => return Err(MountError::Unresponsive { mountpoint: path.to_owned(), filesystem: entry.kind }),
        }
    }
    Err(MountError::Detach { mountpoint: path.to_owned(), source: io::Error::from(Errno::EBUSY) })
}

/// Asks the filesystem at `path` whether it is alive; `None` when there is no answer. The thread that asks may stay behind
/// for as long as the filesystem hangs.
fn probe(path: &Path) -> Option<Result<(), Errno>> {
    let (answer, answered) = mpsc::sync_channel(1);
    let path = path.to_owned();
    let asked = thread::Builder::new().name("mount-probe".into()).spawn(move || {
        // Nobody listens any more when it took too long.
        let _ = answer.send(statvfs(&path).map(drop));
    });
    asked.ok()?;
    answered.recv_timeout(PROBE).ok()
}
