//! Taking away a mount that some other process serves, or served.

use std::io;
use std::path::Path;

use nix::errno::Errno;

use crate::device;
use crate::mount_table::{MountEntry, mount_at};
use crate::{MountError, mountpoint};

/// Detaches the castored filesystem that is mounted on `mountpoint`, whether its server lives or not. Whoever uses files
/// in it keeps them until done.
///
/// # Errors
/// [`MountError::NotMounted`] when something else is mounted there, or nothing.
pub fn unmount(mountpoint: &Path) -> Result<(), MountError> {
    let path = mountpoint::resolve(mountpoint)?;
    let table = |source| MountError::MountTable { mountpoint: path.clone(), source };
    match mount_at(&path).map_err(table)? {
        Some(entry) if is_ours(&entry) => device::detach(&path),
        entry => Err(MountError::NotMounted { mountpoint: path, filesystem: entry.map(|entry| entry.kind) }),
    }
}

fn is_ours(entry: &MountEntry) -> bool {
    entry.kind.strip_prefix("fuse.") == Some(device::SUBTYPE)
}

/// Refuses a directory that is not empty: a mount would hide what it holds.
///
/// # Errors
/// [`MountError::NotEmpty`], or when the directory cannot be read. One that is missing is as good as an empty one, and so
/// is one on which a FUSE filesystem is mounted, which [`Mount::new`](crate::Mount::new) judges.
pub fn require_empty(mountpoint: &Path) -> Result<(), MountError> {
    let path = mountpoint::resolve(mountpoint)?;
    let table = |source| MountError::MountTable { mountpoint: path.clone(), source };
    if mount_at(&path).map_err(table)?.is_some_and(|entry| entry.is_fuse()) {
        return Ok(());
    }
    match std::fs::read_dir(&path).map(|mut entries| entries.next().is_some()) {
        Ok(false) => Ok(()),
        Ok(true) => Err(MountError::NotEmpty { mountpoint: path }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.raw_os_error() == Some(Errno::ENOTCONN as i32) => Ok(()),
        Err(source) => Err(MountError::Mountpoint { mountpoint: path, source }),
    }
}
