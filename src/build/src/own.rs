//! Entering what a builder made, where it took the right to enter from its own user.
//!
//! The owner may give the right back with a chmod, but never by name: whoever still holds a descriptor of the directory
//! could put a link in that place meanwhile. So the thing is opened first, without any access, and what was opened is
//! changed. Root needs no such right and changes nothing.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, open, openat};
use nix::sys::stat::{FchmodatFlags, FileStat, Mode, SFlag, fchmodat, fstat};
use nix::unistd::geteuid;

/// What kind of file a stat describes.
pub(crate) fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

/// Opens the directory `name` of `parent` for reading; a link is not followed.
pub(crate) fn open_directory(parent: BorrowedFd<'_>, name: &Path) -> Result<OwnedFd, Errno> {
    open_directory_as(parent, name, geteuid().is_root())
}

fn open_directory_as(parent: BorrowedFd<'_>, name: &Path, root: bool) -> Result<OwnedFd, Errno> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let dir = openat(parent, name, flags | OFlag::O_PATH, Mode::empty())?;
    if !root {
        permit(dir.as_fd(), Mode::S_IRWXU)?;
    }
    openat(&dir, ".", flags | OFlag::O_RDONLY, Mode::empty())
}

/// Opens the file `name` of `parent` for reading as its owner, who may lack the right to.
pub(crate) fn open_file(parent: BorrowedFd<'_>, name: &Path) -> Result<OwnedFd, Errno> {
    let file = openat(parent, name, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())?;
    if kind(&fstat(&file)?) != SFlag::S_IFREG {
        return Err(Errno::ESTALE);
    }
    permit(file.as_fd(), Mode::S_IRUSR)?;
    open(&itself(file.as_fd()), OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC, Mode::empty())
}

/// Gives an open file or directory (no link) these permissions, and no others.
pub(crate) fn set_mode(file: BorrowedFd<'_>, mode: Mode) -> Result<(), Errno> {
    fchmodat(AT_FDCWD, &itself(file), mode, FchmodatFlags::FollowSymlink)
}

/// Adds to the permissions of an open file or directory, when they are missing.
fn permit(file: BorrowedFd<'_>, wanted: Mode) -> Result<(), Errno> {
    let present = Mode::from_bits_truncate(fstat(file)?.st_mode & 0o777);
    if present.contains(wanted) { Ok(()) } else { set_mode(file, present | wanted) }
}

/// The one name of a descriptor that leads to what was opened, whatever has its old name by now.
fn itself(file: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::sync::atomic::{AtomicBool, Ordering};

    use nix::fcntl::{RenameFlags, renameat2};

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn the_owner_gets_in_and_root_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let parent = File::open(dir.path()).unwrap();
        let (closed, file) = (dir.path().join("closed"), dir.path().join("file"));
        fs::create_dir(&closed).unwrap();
        fs::write(&file, "x").unwrap();
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o040)).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o010)).unwrap();
        if geteuid().is_root() {
            open_directory(parent.as_fd(), Path::new("closed")).unwrap();
            assert_eq!(mode(&closed), 0o040);
        }
        open_directory_as(parent.as_fd(), Path::new("closed"), false).unwrap();
        open_file(parent.as_fd(), Path::new("file")).unwrap();
        assert_eq!((mode(&closed), mode(&file)), (0o740, 0o410));
    }

    #[test]
    fn a_link_that_takes_the_place_is_never_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (outside, made) = (dir.path().join("outside"), dir.path().join("made"));
        for path in [&outside, &made] {
            fs::create_dir(path).unwrap();
        }
        let (closed, link) = (made.join("closed"), made.join("link"));
        fs::create_dir(&closed).unwrap();
        symlink(&outside, &link).unwrap();
        fs::set_permissions(&outside, fs::Permissions::from_mode(0o050)).unwrap();
        let parent = File::open(&made).unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    renameat2(AT_FDCWD, &closed, AT_FDCWD, &link, RenameFlags::RENAME_EXCHANGE).unwrap();
                }
            });
            for _ in 0..20_000 {
                if let Ok(dir) = open_directory_as(parent.as_fd(), Path::new("closed"), false) {
                    set_mode(dir.as_fd(), Mode::empty()).unwrap();
                }
            }
            done.store(true, Ordering::Relaxed);
        });
        assert_eq!(mode(&outside), 0o050);
    }
}
