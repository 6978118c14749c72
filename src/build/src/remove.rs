//! Removing what a build left behind.
//!
//! A builder may leave a tree of any depth, with directories that nobody may enter. Removal by recursion would run out
//! of stack or descriptors, and removal by path could be led elsewhere; this one moves each directory it finds up to
//! the top, so that it never holds more than two descriptors and never follows a link.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, renameat};
use nix::sys::stat::{Mode, SFlag, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::own::{kind, open_directory};

/// Removes the directory `path` and all below it. Its absence is fine.
///
/// The processes that could write to it must be gone.
pub(crate) fn remove_tree(path: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a path that can be removed"));
    };
    let parent = match File::open(parent) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => OwnedFd::from(other?),
    };
    let top = match open_directory(parent.as_fd(), Path::new(name)) {
        Err(Errno::ENOENT) => return Ok(()),
        other => other?,
    };
    let mut moved = 0u64;
    loop {
        let subdirectories = unlink_files(top.as_fd())?;
        if subdirectories.is_empty() {
            break;
        }
        for name in subdirectories {
            empty_into(top.as_fd(), &name, &mut moved)?;
            unlinkat(&top, &name, UnlinkatFlags::RemoveDir)?;
        }
    }
    Ok(unlinkat(&parent, Path::new(name), UnlinkatFlags::RemoveDir)?)
}

/// Unlinks everything in `dir` that is no directory; gives the names of the directories.
fn unlink_files(dir: BorrowedFd<'_>) -> io::Result<Vec<PathBuf>> {
    use std::os::unix::ffi::OsStrExt;
    let mut subdirectories = Vec::new();
    let mut listing = Dir::openat(dir, ".", OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    for entry in listing.iter() {
        let entry = entry?;
        let bytes = entry.file_name().to_bytes();
        if bytes == b"." || bytes == b".." {
            continue;
        }
        let name = Path::new(std::ffi::OsStr::from_bytes(bytes));
        let is_directory = match entry.file_type() {
            Some(kind) => kind == Type::Directory,
            None => kind(&fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW)?) == SFlag::S_IFDIR,
        };
        if is_directory {
            subdirectories.push(name.to_owned());
        } else {
            unlinkat(dir, name, UnlinkatFlags::NoRemoveDir)?;
        }
    }
    Ok(subdirectories)
}

/// Empties the directory `name` of `top`, moving the directories in it to `top`.
fn empty_into(top: BorrowedFd<'_>, name: &Path, moved: &mut u64) -> io::Result<()> {
    let dir = open_directory(top, name)?;
    for subdirectory in unlink_files(dir.as_fd())? {
        // Moving a directory writes its "..".
        drop(open_directory(dir.as_fd(), &subdirectory)?);
        loop {
            *moved += 1;
            let free = format!(".castored-removing-{moved}");
            match renameat(&dir, &subdirectory, top, free.as_str()) {
                // The builder chose that very name.
                Err(Errno::ENOTEMPTY | Errno::EEXIST | Errno::ENOTDIR) => {}
                other => break other?,
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use nix::sys::stat::mkdirat;

    use super::*;

    #[test]
    fn removes_any_depth_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("kept"), "").unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir_all(tree.join(".castored-removing-1/x")).unwrap();
        symlink(&outside, tree.join("link")).unwrap();
        fs::create_dir_all(tree.join("closed/inside")).unwrap();
        fs::write(tree.join("closed/file"), "").unwrap();
        fs::set_permissions(tree.join("closed"), fs::Permissions::from_mode(0o000)).unwrap();
        // Deeper than a path can be long, or a process can have descriptors.
        let mut deep: OwnedFd = File::open(&tree).unwrap().into();
        for _ in 0..3000 {
            mkdirat(&deep, "deeper", Mode::S_IRWXU).unwrap();
            deep = open_directory(deep.as_fd(), Path::new("deeper")).unwrap();
        }
        remove_tree(&tree).unwrap();
        assert!(!tree.exists());
        assert!(outside.join("kept").exists());
        remove_tree(&tree).unwrap();
    }
}
