//! What is left of a build that failed, for somebody to look at.
//!
//! Kept directories are where users look for those of stock Nix, under the name they know, and belong to the user who
//! asked for the build. Ours is a read-only store, so what a check found to differ is kept there too, beside the build
//! directory, and not (as stock does) in the store under a name that is no store path.

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::{ffi::OsStr, io};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::unistd::{Gid, Uid, User, fchownat, geteuid};

use crate::failure::{Differing, Failure};
use crate::hooks::{Difference, show_difference};
use crate::own::{kind, open_directory, set_mode};
use crate::room::Room;
use crate::run::{Control, Job};
use crate::sandbox::Identity;
use crate::scheduler::feed::Feed;

impl Job {
    /// Keeps what settings say should be kept, and shows the diff hook what it is for. Gives the failure back, which
    /// may have more to say now.
    pub(crate) fn look_after(&self, mut failure: Failure, mut room: Room, control: &Control, feed: &Feed) -> Failure {
        let hook = self.options.hooks.diff.as_deref().filter(|_| failure.differs.is_some());
        if !self.options.keep_failed && hook.is_none() {
            return failure;
        }
        let parent = self.options.build_dir.as_ref().unwrap_or(&self.config.kept_dir);
        let rebuilt = match &failure.differs {
            Some(differing) => room.set_aside(differing.made.base_name()).map(Some),
            None => Ok(None),
        };
        let rebuilt = rebuilt.and_then(|rebuilt| {
            room.publish(parent, self.drv_path.name())?;
            Ok(rebuilt)
        });
        let rebuilt = match rebuilt {
            Ok(rebuilt) => rebuilt.map(|name| room.path().join(name)),
            Err(error) => {
                feed.note(&format!("cannot keep the build directory in '{}': {error}", parent.display()));
                return failure;
            }
        };
        if let (Some(hook), Some(Differing { valid, .. }), Some(rebuilt)) = (hook, &failure.differs, &rebuilt) {
            let files = Difference {
                valid: &self.config.store_mount.join(valid.base_name()),
                rebuilt,
                drv: &self.name(),
                build_dir: &room.build_dir(),
            };
            show_difference(hook, &files, self.user.identity(), control, feed);
        }
        if !self.options.keep_failed {
            return failure;
        }
        if let Some(rebuilt) = rebuilt {
            failure.message.push_str(&format!(" from \"{}\"", rebuilt.display()));
        }
        if let Identity::BuildUser { uid, count, .. } = self.user.identity()
            && let Err(error) = give_away(room.path(), uid..uid.saturating_add(count), self.options.client_uid)
        {
            feed.note(&format!("cannot make the build directory yours: {error}"));
        }
        let kept: PathBuf = room.leave();
        feed.note(&format!("note: keeping build directory \"{}\"", kept.display()));
        failure
    }
}

/// Makes everything in the directory `path` that belongs to one of the users `from` belong to `to`, and the directory
/// itself. Programs that run as another user than who starts them are made ordinary ones; without `to` that is all.
///
/// Only what the builder made is touched: it may have made hard links to other users' files. Nothing is changed by name
/// after it was looked at, and no more than a few descriptors are held, however deep the tree is.
fn give_away(path: &Path, from: Range<u32>, to: Option<u32>) -> io::Result<()> {
    if !geteuid().is_root() {
        return Ok(());
    }
    // Root can do all it wants with them as they are.
    let to = to.map(Uid::from_raw).filter(|to| !to.is_root());
    let group = to.map(User::from_uid).transpose()?.flatten().map(|user| user.gid);
    let owner = Owner { from, to, group };
    let top = OwnedFd::from(File::open(path)?);
    let mut waiting = vec![owner.take_entries(top.as_fd())?];
    let mut current = top.try_clone()?;
    while let Some(directories) = waiting.last_mut() {
        let Some(name) = directories.pop() else {
            waiting.pop();
            if !waiting.is_empty() {
                current = openat(&current, "..", OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
            }
            continue;
        };
        current = open_directory(current.as_fd(), &name)?;
        waiting.push(owner.take_entries(current.as_fd())?);
    }
    fchownat(&top, "", owner.to, owner.group, AtFlags::AT_EMPTY_PATH)?;
    Ok(())
}

struct Owner {
    from: Range<u32>,
    to: Option<Uid>,
    group: Option<Gid>,
}

impl Owner {
    /// Changes what is in one directory; gives the names of directories in it.
    fn take_entries(&self, dir: BorrowedFd<'_>) -> io::Result<Vec<PathBuf>> {
        let mut directories = Vec::new();
        let mut listing =
            Dir::openat(dir, ".", OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
        for entry in listing.iter() {
            let entry = entry?;
            let name = Path::new(OsStr::from_bytes(entry.file_name().to_bytes()));
            if name == Path::new(".") || name == Path::new("..") {
                continue;
            }
            let file = match openat(dir, name, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty()) {
                Err(Errno::ENOENT) => continue,
                other => other?,
            };
            let found = fstat(&file)?;
            if self.from.contains(&found.st_uid) {
                let mode = Mode::from_bits_truncate(found.st_mode);
                if kind(&found) == SFlag::S_IFREG && mode.intersects(Mode::S_ISUID | Mode::S_ISGID) {
                    set_mode(file.as_fd(), mode & !(Mode::S_ISUID | Mode::S_ISGID))?;
                }
                fchownat(&file, "", self.to, self.group, AtFlags::AT_EMPTY_PATH)?;
            }
            if kind(&found) == SFlag::S_IFDIR {
                directories.push(name.to_owned());
            }
        }
        Ok(directories)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink};

    use nix::sys::stat::mkdirat;

    use super::*;

    #[test]
    fn only_what_the_builder_made_is_given_away() {
        if !geteuid().is_root() {
            println!("SKIPPED: needs root");
            return;
        }
        const BUILDER: u32 = 872_415_232;
        const CLIENT: u32 = 54_321;
        let dir = tempfile::tempdir().unwrap();
        let (room, outside) = (dir.path().join("room"), dir.path().join("outside"));
        fs::create_dir_all(room.join("build/sub")).unwrap();
        fs::write(&outside, "").unwrap();
        fs::hard_link(&outside, room.join("build/theirs")).unwrap();
        fs::write(room.join("build/sub/file"), "").unwrap();
        symlink(&outside, room.join("build/link")).unwrap();
        for name in ["build", "build/sub", "build/sub/file", "build/link"] {
            lchown(room.join(name), Some(BUILDER), Some(BUILDER)).unwrap();
        }
        // Deeper than a path can be long, or a process can have descriptors.
        let mut deep = OwnedFd::from(File::open(room.join("build/sub")).unwrap());
        for _ in 0..3000 {
            mkdirat(&deep, "deeper", Mode::S_IRWXU).unwrap();
            deep = open_directory(deep.as_fd(), Path::new("deeper")).unwrap();
            fchownat(&deep, "", Some(Uid::from_raw(BUILDER)), None, AtFlags::AT_EMPTY_PATH).unwrap();
        }
        let program = room.join("build/sub/file");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o6755)).unwrap();
        give_away(&room, BUILDER..BUILDER + 1, None).unwrap();
        assert_eq!(fs::metadata(&program).unwrap().mode() & 0o7777, 0o755);
        give_away(&room, BUILDER - 5..BUILDER + 5, Some(CLIENT)).unwrap();
        let owner = |path: &Path| fs::symlink_metadata(path).unwrap().uid();
        for name in ["", "build", "build/sub", "build/sub/file", "build/link"] {
            assert_eq!(owner(&room.join(name)), CLIENT, "{name}");
        }
        assert_eq!(fstat(&deep).unwrap().st_uid, CLIENT);
        assert_eq!(owner(&outside), 0);
        chown(room.join("build/sub/file"), Some(BUILDER), None).unwrap();
        give_away(&room, BUILDER..BUILDER + 1, Some(0)).unwrap();
        assert_eq!(owner(&room.join("build/sub/file")), BUILDER);
    }
}
