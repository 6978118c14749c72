//! A private room for one test: its own mount namespace with an empty `/nix` and extra users, on the machine's disk.
//!
//! The machine itself is not touched: `/nix` is not created there, and the users exist only in the room's copies of
//! `/etc/passwd` and `/etc/group`. Mount namespaces belong to a thread, so a room is entered by the calling thread and
//! by whatever it starts from then on; tests in other threads are not affected.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chdir, pivot_root};

use crate::error::{Context, Error, Result};
use crate::machine::CACHE;

/// A user of a room. Its group has the same name and number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    /// The name.
    pub name: &'static str,
    /// User and group id, outside the ranges that Debian hands out.
    pub id: u32,
    /// The home directory's name in the room.
    pub home: &'static str,
}

/// The unprivileged user that clients run as.
pub const USER: User = User { name: "castored-test", id: 61_880, home: "home-user" };
/// A user for `trusted-users` to name.
pub const TRUSTED: User = User { name: "castored-trusted", id: 61_881, home: "home-trusted" };
/// A user who is a member of [`MEMBERS`].
pub const MEMBER: User = User { name: "castored-member", id: 61_882, home: "home-member" };
/// A user whom no list names.
pub const STRANGER: User = User { name: "castored-stranger", id: 61_883, home: "home-stranger" };
/// A group for the lists to name.
pub const MEMBERS: &str = "castored-members";
/// Its group id.
const MEMBERS_ID: u32 = 61_884;
/// All of them.
const USERS: [User; 4] = [USER, TRUSTED, MEMBER, STRANGER];
/// The group whose members builds run as.
pub const BUILD_GROUP: &str = "castored-build";
/// Group id of the builders of the first room; the builders' user ids follow it.
const FIRST_BUILD_ID: u32 = 62_000;
/// How many builds can run at once in a room.
const BUILDERS: u32 = 8;
/// Rooms at the same time on this machine.
const MAX_ROOMS: u32 = 64;

/// The room that the calling thread has entered. Its directory is removed when this is dropped; the daemon in it must
/// have been stopped before.
#[derive(Debug)]
pub struct Room {
    dir: PathBuf,
    builders: Builders,
}

/// Users for builds that no other room has: stock's daemon kills every process of a build's user when that is done.
#[derive(Debug)]
struct Builders {
    /// Their group; their own ids follow it.
    id: u32,
    /// Locked for as long as they are taken.
    _lock: File,
}

impl Builders {
    fn take() -> Result<Self> {
        fs::create_dir_all(CACHE).doing("creating", CACHE)?;
        for number in 0..MAX_ROOMS {
            let path = Path::new(CACHE).join(format!(".builders-{number}.lock"));
            let lock = File::options().create(true).append(true).open(&path).doing("opening", &path)?;
            if lock.try_lock().is_ok() {
                return Ok(Self { id: FIRST_BUILD_ID + number * (BUILDERS + 1), _lock: lock });
            }
        }
        Err(Error::Wrong(format!("there are {MAX_ROOMS} rooms already")))
    }
}

impl Room {
    /// Makes a room and moves the calling thread into it, for good.
    pub fn enter(name: &str) -> Result<Self> {
        let prefix = format!("castored-room-{}-{name}-", std::process::id());
        let dir =
            tempfile::Builder::new().prefix(&prefix).tempdir_in("/var/tmp").doing("creating a room in", "/var/tmp")?;
        let room = Self { dir: dir.keep(), builders: Builders::take()? };
        let d = &room.dir;
        fs::set_permissions(d, Permissions::from_mode(0o755)).doing("opening to all", d)?;
        for sub in ["nix", "root", "etc", "bin", "tmp", "home-root"] {
            fs::create_dir(d.join(sub)).doing("creating", d.join(sub))?;
        }
        fs::set_permissions(d.join("tmp"), Permissions::from_mode(0o1777)).doing("opening to all", d.join("tmp"))?;
        for user in USERS {
            let home = d.join(user.home);
            fs::create_dir(&home).doing("creating", &home)?;
            chown(&home, Some(user.id), Some(user.id)).doing("giving away", &home)?;
        }
        room.write_users()?;
        room.pivot()?;
        Ok(room)
    }

    /// The room's directory on disk, readable by everybody; the same path inside and outside.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A path in the room's scratch directory, which everybody may write to.
    pub fn tmp(&self, name: &str) -> PathBuf {
        self.dir.join("tmp").join(name)
    }

    /// Makes a directory of the room's disk that has this short path as well, for the room alone: a socket's path has
    /// at most 107 bytes.
    pub fn short(&self, path: &str) -> Result<PathBuf> {
        let (from, to) = (self.tmp(path.trim_start_matches('/')), PathBuf::from(path));
        for dir in [&from, &to] {
            fs::create_dir(dir).doing("creating", dir)?;
        }
        remount(Some(&from), &to, MsFlags::MS_BIND)?;
        Ok(to)
    }

    /// Writes a scratch file that everybody may read.
    pub fn write(&self, name: &str, contents: impl AsRef<[u8]>) -> Result<PathBuf> {
        let path = self.tmp(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).doing("creating", parent)?;
        }
        fs::write(&path, contents).doing("writing", &path)?;
        Ok(path)
    }

    /// Copies of the user and group tables with the users and the builders added.
    fn write_users(&self) -> Result<()> {
        let mut passwd = fs::read_to_string("/etc/passwd").doing("reading", "/etc/passwd")?;
        let mut group = fs::read_to_string("/etc/group").doing("reading", "/etc/group")?;
        for User { name, id, home } in USERS {
            passwd.push_str(&format!("{name}:x:{id}:{id}::{}:/bin/sh\n", self.dir.join(home).display()));
            group.push_str(&format!("{name}:x:{id}:\n"));
        }
        // What OpenSSH's server wants to find.
        if !passwd.lines().any(|line| line.starts_with("sshd:")) {
            passwd.push_str("sshd:x:61879:65534::/run/sshd:/usr/sbin/nologin\n");
        }
        group.push_str(&format!("{MEMBERS}:x:{MEMBERS_ID}:{}\n", MEMBER.name));
        let mut members = Vec::new();
        let group_id = self.builders.id;
        for n in 1..=BUILDERS {
            let (name, id) = (format!("{BUILD_GROUP}{n}"), group_id + n);
            passwd.push_str(&format!("{name}:x:{id}:{group_id}::/var/empty:/usr/sbin/nologin\n"));
            members.push(name);
        }
        group.push_str(&format!("{BUILD_GROUP}:x:{group_id}:{}\n", members.join(",")));
        fs::write(self.dir.join("etc/passwd"), passwd).doing("writing", self.dir.join("etc/passwd"))?;
        fs::write(self.dir.join("etc/group"), group).doing("writing", self.dir.join("etc/group"))
    }

    /// A tmpfs root with every top-level entry of the machine bound into it, but for `/nix`. The root is pivoted to
    /// rather than chrooted to, because the kernel refuses user namespaces, which sandboxes need, in a chroot.
    fn pivot(&self) -> Result<()> {
        let root = self.dir.join("root");
        unshare(CloneFlags::CLONE_NEWNS).doing("unsharing the mount namespace of", &self.dir)?;
        remount(None, Path::new("/"), MsFlags::MS_REC | MsFlags::MS_PRIVATE)?;
        mount(Some("tmpfs"), &root, Some("tmpfs"), MsFlags::empty(), Some("mode=755")).doing("mounting", &root)?;
        let mut entries: Vec<_> = fs::read_dir("/").doing("listing", "/")?.flatten().collect();
        // /var holds this very root: bound first, it does not bring the other binds along a second time.
        entries.sort_by_key(|e| e.file_name() != "var");
        for entry in entries {
            let (from, to) = (entry.path(), root.join(entry.file_name()));
            let kind = entry.file_type().doing("looking at", &from)?;
            if entry.file_name() == "nix" {
                continue;
            } else if kind.is_symlink() {
                symlink(fs::read_link(&from).doing("reading", &from)?, &to).doing("linking", &to)?;
            } else if kind.is_dir() {
                fs::create_dir(&to).doing("creating", &to)?;
                remount(Some(&from), &to, MsFlags::MS_BIND | MsFlags::MS_REC)?;
            }
        }
        for (from, to) in [("etc/passwd", "etc/passwd"), ("etc/group", "etc/group")] {
            remount(Some(&self.dir.join(from)), &root.join(to), MsFlags::MS_BIND)?;
        }
        let nix = root.join("nix");
        fs::create_dir(&nix).doing("creating", &nix)?;
        remount(Some(&self.dir.join("nix")), &nix, MsFlags::MS_BIND)?;
        let old = root.join(".old");
        fs::create_dir(&old).doing("creating", &old)?;
        pivot_root(&root, &old).doing("pivoting to", &root)?;
        chdir("/").doing("entering", "/")?;
        umount2("/.old", MntFlags::MNT_DETACH).doing("detaching", "/.old")?;
        fs::remove_dir("/.old").doing("removing", "/.old")?;
        // The root as seen through /var: not needed, and in the way when the room is removed.
        umount2(&root, MntFlags::MNT_DETACH).doing("detaching", &root)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // A dead daemon's mount would make everything below it unreadable; nothing mounted is no problem either.
        while umount2("/nix/store", MntFlags::MNT_DETACH).is_ok() {}
        if std::env::var_os("CASTORED_KEEP_ROOMS").is_some() {
            println!("kept: {}", self.dir.display());
        } else {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

/// A bind or propagation change, which have neither a type nor data.
fn remount(from: Option<&Path>, to: &Path, flags: MsFlags) -> Result<()> {
    mount(from, to, None::<&str>, flags, None::<&str>).doing("mounting", to)
}
