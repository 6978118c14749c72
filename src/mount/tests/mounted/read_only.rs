//! Nobody writes.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};

use nix::errno::Errno;
use nix::unistd::{AccessFlags, access};

use crate::fixture::mounted;

fn refused<T: std::fmt::Debug>(what: &str, result: io::Result<T>) {
    assert_eq!(result.unwrap_err().raw_os_error(), Some(Errno::EROFS as i32), "{what}");
}

#[test]
fn everything_that_writes_is_refused() {
    let Some(store) = mounted() else { return };
    let view = &store.view;
    let base = view.add("tree", view.directory([("file", view.executable("text")), ("link", view.symlink("file"))]));
    let (dir, file) = (store.path(&base), store.path(&base).join("file"));
    for dir in [store.root(), &dir] {
        refused("create", File::create(dir.join("new")));
        refused("mkdir", fs::create_dir(dir.join("new")));
        refused("symlink", symlink("a", dir.join("new")));
        refused("chmod of a directory", fs::set_permissions(dir, Permissions::from_mode(0o755)));
    }
    refused("open for writing", OpenOptions::new().write(true).open(&file));
    refused("truncate", OpenOptions::new().write(true).truncate(true).open(&file));
    refused("unlink", fs::remove_file(&file));
    refused("unlink a link", fs::remove_file(dir.join("link")));
    refused("remove a path", fs::remove_dir(&dir));
    refused("rename", fs::rename(&file, dir.join("other")));
    refused("link", fs::hard_link(&file, dir.join("other")));
    refused("chmod", fs::set_permissions(&file, Permissions::from_mode(0o644)));
    refused("chown", std::os::unix::fs::chown(&file, Some(1), None));
    let now = std::time::SystemTime::now();
    refused("utimes", File::open(&file).unwrap().set_modified(now));
    assert_eq!(access(&file, AccessFlags::W_OK), Err(Errno::EROFS));
    assert_eq!(access(store.root(), AccessFlags::W_OK), Err(Errno::EROFS));
    assert_eq!(access(&file, AccessFlags::R_OK | AccessFlags::X_OK), Ok(()));
    assert_eq!(fs::read(&file).unwrap(), b"text");
}
