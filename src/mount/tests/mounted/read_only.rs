//! Nobody writes.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, OFlag, fallocate};
use nix::libc;
use nix::mount::MsFlags;
use nix::sys::stat::{Mode, SFlag, mknod};
use nix::unistd::{AccessFlags, access};

use crate::fixture::{Mounted, mounted};

fn refused<T: std::fmt::Debug>(what: &str, result: io::Result<T>) {
    assert_eq!(result.unwrap_err().raw_os_error(), Some(Errno::EROFS as i32), "{what}");
}

fn set_attribute(path: &Path, name: &CStr) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: both strings end in NUL, and the value is one byte long.
    let done = unsafe { libc::lsetxattr(path.as_ptr(), name.as_ptr(), b"1".as_ptr().cast(), 1, 0) };
    Ok(Errno::result(done).map(drop)?)
}

fn remove_attribute(path: &Path, name: &CStr) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: both strings end in NUL.
    let done = unsafe { libc::lremovexattr(path.as_ptr(), name.as_ptr()) };
    Ok(Errno::result(done).map(drop)?)
}

/// A directory with a file that root may execute, and the directory's path.
fn tree(store: &Mounted) -> std::path::PathBuf {
    let view = &store.view;
    let base = view.add("tree", view.directory([("file", view.executable("text")), ("link", view.symlink("file"))]));
    store.path(base)
}

/// Everything that changes names or attributes; none of it needs a file that is open for writing.
fn changes_are_refused(store: &Mounted, dir: &Path) {
    let file = dir.join("file");
    for dir in [store.root(), dir] {
        refused("create", File::create(dir.join("new")));
        refused("create a name that must be new", File::create_new(dir.join("new")));
        refused("mkdir", fs::create_dir(dir.join("new")));
        refused("symlink", symlink("a", dir.join("new")));
        refused("chmod of a directory", fs::set_permissions(dir, Permissions::from_mode(0o755)));
        for kind in [SFlag::S_IFIFO, SFlag::S_IFREG, SFlag::S_IFCHR, SFlag::S_IFSOCK] {
            refused("mknod", mknod(&dir.join("new"), kind, Mode::S_IRUSR, 0).map_err(io::Error::from));
        }
    }
    refused("unlink", fs::remove_file(&file));
    refused("unlink a link", fs::remove_file(dir.join("link")));
    refused("remove a path", fs::remove_dir(dir));
    refused("rename", fs::rename(&file, dir.join("other")));
    refused("rename onto another", fs::rename(&file, dir.join("link")));
    refused("link", fs::hard_link(&file, dir.join("other")));
    refused("chmod", fs::set_permissions(&file, Permissions::from_mode(0o644)));
    refused("chown", std::os::unix::fs::chown(&file, Some(1), None));
    refused("chown of a link", std::os::unix::fs::lchown(dir.join("link"), None, Some(1)));
    let now = std::time::SystemTime::now();
    refused("utimes", File::open(&file).unwrap().set_modified(now));
    refused("setxattr", set_attribute(&file, c"user.note"));
    refused("setxattr of a digest", set_attribute(&file, c"user.tvix.castore.blob.digest"));
    refused("removexattr", remove_attribute(&file, c"user.tvix.castore.blob.digest"));
}

#[test]
fn everything_that_writes_is_refused() {
    let Some(store) = mounted() else { return };
    let dir = tree(&store);
    let file = dir.join("file");
    changes_are_refused(&store, &dir);
    refused("open for writing", OpenOptions::new().write(true).open(&file));
    refused("open for both", OpenOptions::new().read(true).write(true).open(&file));
    refused("open for appending", OpenOptions::new().append(true).open(&file));
    refused("truncate", OpenOptions::new().write(true).truncate(true).open(&file));
    refused("truncate by name", nix::unistd::truncate(&file, 0).map_err(io::Error::from));
    let unnamed = OpenOptions::new().write(true).custom_flags(OFlag::O_TMPFILE.bits()).open(&dir);
    refused("a file without a name", unnamed);
    assert_eq!(access(&file, AccessFlags::W_OK), Err(Errno::EROFS));
    assert_eq!(access(store.root(), AccessFlags::W_OK), Err(Errno::EROFS));
    assert_eq!(access(&file, AccessFlags::R_OK | AccessFlags::X_OK), Ok(()));
    // An open file that was not opened for writing is no way in either.
    let open = File::open(&file).unwrap();
    assert_eq!((&open).write(b"x").unwrap_err().raw_os_error(), Some(Errno::EBADF as i32));
    assert_eq!(open.set_len(0).unwrap_err().raw_os_error(), Some(Errno::EINVAL as i32));
    assert_eq!(fs::read(&file).unwrap(), b"text");
    // Neither are files from elsewhere.
    let elsewhere = tempfile::NamedTempFile::new().unwrap();
    let moved_in = fs::rename(elsewhere.path(), dir.join("new")).unwrap_err().raw_os_error();
    assert!([Errno::EXDEV as i32, Errno::EROFS as i32].map(Some).contains(&moved_in), "{moved_in:?}");
}

/// Somebody makes the mount writable again; what it says no to then is up to the server.
#[test]
fn a_mount_made_writable_again_refuses_as_well() {
    let Some(store) = mounted() else { return };
    let dir = tree(&store);
    let file = dir.join("file");
    // Not by the command, which would ask the helper of FUSE filesystems.
    nix::mount::mount(None::<&str>, store.root(), None::<&str>, MsFlags::MS_REMOUNT, None::<&str>).unwrap();
    changes_are_refused(&store, &dir);
    refused("truncate", OpenOptions::new().write(true).truncate(true).open(&file));
    refused("truncate by name", nix::unistd::truncate(&file, 0).map_err(io::Error::from));
    // Opening needs no answer of the server's, writing does.
    let mut open = OpenOptions::new().write(true).open(&file).unwrap();
    refused("write", open.write(b"x"));
    refused("truncate an open file", open.set_len(0));
    refused("fallocate", fallocate(&open, FallocateFlags::empty(), 0, 4096).map_err(io::Error::from));
    drop(open);
    assert_eq!(fs::read(&file).unwrap(), b"text");
    assert_eq!(fs::symlink_metadata(&file).unwrap().permissions().mode() & 0o7777, 0o555);
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 2);
}
