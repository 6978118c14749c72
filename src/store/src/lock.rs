//! One process per state directory.
//!
//! The lock is an exclusive `flock` on `<state>/castored/lock`; the file holds the owner's pid, so that the
//! second comer can name the first. The kernel drops it with the process, so it is never stale.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::fcntl::{Flock, FlockArg};

use crate::error::{Error, Result};

/// Holds the state directory for as long as it lives.
#[derive(Debug)]
pub(crate) struct StateLock {
    _file: Flock<File>,
}

impl StateLock {
    /// Takes the lock in `dir`, which exists.
    ///
    /// # Errors
    /// [`Error::InUse`] names the owner's pid.
    pub(crate) fn acquire(dir: &Path) -> Result<Self> {
        let path = dir.join("lock");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|e| Error::file("open", &path, e))?;
        let mut file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => file,
            Err((mut file, nix::errno::Errno::EWOULDBLOCK)) => {
                let mut pid = String::new();
                // A pid is at most ten digits; whatever else stands there is not worth reading.
                let _ = (&mut file).take(16).read_to_string(&mut pid);
                return Err(Error::InUse { path: dir.to_owned(), pid: pid.trim().to_owned() });
            }
            Err((_, errno)) => return Err(Error::file("lock", &path, errno)),
        };
        let write = |file: &mut File| -> std::io::Result<()> {
            file.set_len(0)?;
            file.seek(SeekFrom::Start(0))?;
            writeln!(file, "{}", std::process::id())
        };
        match write(&mut file) {
            // The lock holds without the number in it.
            Err(error) if error.kind() == std::io::ErrorKind::StorageFull => {}
            written => written.map_err(|e| Error::file("write", &path, e))?,
        }
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_owner_is_told_of_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let first = StateLock::acquire(dir.path()).unwrap();
        match StateLock::acquire(dir.path()) {
            Err(Error::InUse { pid, .. }) => assert_eq!(pid, std::process::id().to_string()),
            other => panic!("{other:?}"),
        }
        drop(first);
        StateLock::acquire(dir.path()).unwrap();
    }
}
