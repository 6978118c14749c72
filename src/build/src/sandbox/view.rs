//! What the builder sees of the filesystem.
//!
//! Runs in the builder's own mount namespace, still with the rights to mount. Directories that the builder may write
//! to are binds of directories of this one build; everything else is read-only or belongs to somebody else.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{AtFlags, OFlag, open, openat, readlinkat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, fstatat, mkdirat};
use nix::unistd::{Gid, Uid, chdir, chown, pivot_root, sethostname, symlinkat};

use super::spec::{HostView, Identity, SandboxView};
use super::sys::{self, MountAttributes};
use super::tree::{Root, c_path, kind};
use super::{SetupError, Step};

/// Devices that every sandbox has, bound from the host.
const DEVICES: [&str; 6] = ["full", "null", "random", "tty", "urandom", "zero"];

/// Links in `/dev` that programs expect.
const DEVICE_LINKS: [(&str, &str); 5] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/ptmx", "pts/ptmx"),
];

/// User and group id a builder has inside the sandbox.
const SANDBOX_IDS: (u32, u32) = (1000, 100);

/// The first user and group id of a builder inside the sandbox.
pub(super) fn ids_inside(identity: Identity) -> (u32, u32) {
    if identity.has_range() { (0, 0) } else { SANDBOX_IDS }
}

const HOSTS: &[u8] = b"127.0.0.1 localhost\n::1 localhost\n";
const NSSWITCH: &[u8] = b"hosts: files dns\nservices: files\n";

fn groups((_, gid): (u32, u32)) -> String {
    format!("root:x:0:\nnixbld:!:{gid}:\nnogroup:x:65534:\n")
}

fn passwd(home: &Path, (uid, gid): (u32, u32)) -> String {
    let home = home.display();
    format!(
        "root:x:0:0:Nix build user:{home}:/noshell\n\
         nixbld:x:{uid}:{gid}:Nix build user:{home}:/noshell\n\
         nobody:x:65534:65534:Nobody:/:/noshell\n"
    )
}

/// Nothing mounted from now on is seen outside this namespace.
pub(super) fn detach_from_host() -> Result<(), SetupError> {
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .step(|| "making the mount namespace private")
}

fn mount_fs(kind: &str, target: &Path, flags: MsFlags, options: &str) -> Result<(), SetupError> {
    mount(Some(kind), target, Some(kind), flags, Some(options))
        .step(|| format!("mounting {kind} on {}", target.display()))
}

fn mount_proc(target: &Path) -> Result<(), SetupError> {
    mount_fs("proc", target, MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC, "")
}

/// Assembles the sandbox's root and makes it this process's root.
pub(super) fn enter_sandbox(view: &SandboxView, host_network: bool, identity: Identity) -> Result<(), SetupError> {
    let root_path = view.root.as_path();
    mount_fs("tmpfs", root_path, MsFlags::MS_NOSUID | MsFlags::MS_NODEV, "mode=0755")?;
    let root = Root::open(root_path).step(|| "opening the sandbox root")?;

    make_devices(&root, &view.shm_size)?;
    make_etc(&root, view.build_dir_inside.as_path(), host_network, ids_inside(identity))?;
    root.directory(Path::new("/proc")).step(|| "making /proc")?;
    mount_proc(&root.host_path("/proc"))?;

    let store_dir = view.store_dir.as_path();
    for (source, inside) in [
        (view.scratch.as_path(), store_dir),
        (view.build_dir.as_path(), view.build_dir_inside.as_path()),
        (view.tmp.as_path(), Path::new("/tmp")),
    ] {
        root.bind_directory(source, inside, MountAttributes::INERT)
            .step(|| format!("binding {} to {}", source.display(), inside.display()))?;
    }
    let lower = open_directory(view.store_mount.as_path())?;
    let store = root.directory(store_dir).step(|| "opening the sandbox's store directory")?;
    show_inputs(&lower, &store, &view.inputs)?;

    for bind in &view.binds {
        let (source, target) = (bind.source.as_path(), bind.target.as_path());
        match root.bind(source, target) {
            Err(e) if bind.optional && e.kind() == io::ErrorKind::NotFound => {}
            other => other.step(|| format!("binding {} to {}", source.display(), target.display()))?,
        }
    }

    chdir(root_path).step(|| "entering the sandbox root")?;
    // Stacks the old root on the new one and takes it away again: no directory for it is needed.
    pivot_root(".", ".").step(|| "making the sandbox root the root")?;
    umount2(".", MntFlags::MNT_DETACH).step(|| "detaching the host's root")?;
    chdir("/").step(|| "entering the sandbox root")?;
    let root = open_directory(Path::new("/"))?;
    if let (true, Identity::BuildUser { uid, gid, .. }) = (identity.has_range(), identity) {
        // Its root may add to it what a system has.
        for path in ["/", "/etc"] {
            chown(path, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))).step(|| format!("giving {path} away"))?;
        }
    } else {
        sys::restrict_mount(root.as_fd(), MountAttributes::READ_ONLY, false).step(|| "making the root read-only")?;
    }
    sethostname("localhost").step(|| "setting the host name")?;
    // What the kernel starts with; the host's own says where the build runs.
    sys::set_domain_name(b"(none)").step(|| "setting the domain name")
}

pub(super) fn open_directory(path: &Path) -> Result<OwnedFd, SetupError> {
    open(path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
        .step(|| format!("opening {}", path.display()))
}

fn make_devices(root: &Root, shm_size: &str) -> Result<(), SetupError> {
    for name in DEVICES {
        let path = PathBuf::from(format!("/dev/{name}"));
        root.bind(&path, &path).step(|| format!("binding {}", path.display()))?;
    }
    for dir in ["/dev/pts", "/dev/shm"] {
        root.directory(Path::new(dir)).step(|| format!("making {dir}"))?;
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount_fs("tmpfs", &root.host_path("/dev/shm"), flags, &format!("mode=1777,size={shm_size}"))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount_fs("devpts", &root.host_path("/dev/pts"), flags, "newinstance,mode=0620,ptmxmode=0666")?;
    for (link, target) in DEVICE_LINKS {
        root.symlink(Path::new(link), Path::new(target)).step(|| format!("making {link}"))?;
    }
    Ok(())
}

fn make_etc(root: &Root, home: &Path, host_network: bool, ids: (u32, u32)) -> Result<(), SetupError> {
    let mut files: Vec<(&str, Vec<u8>)> =
        vec![("/etc/passwd", passwd(home, ids).into_bytes()), ("/etc/group", groups(ids).into_bytes())];
    if host_network {
        // The host's own hosts and resolv.conf come as binds.
        files.push(("/etc/nsswitch.conf", NSSWITCH.to_vec()));
    } else {
        files.push(("/etc/hosts", HOSTS.to_vec()));
    }
    for (path, contents) in files {
        root.file(Path::new(path), &contents).step(|| format!("writing {path}"))?;
    }
    Ok(())
}

/// Shows each input read-only in the directory `store`.
fn show_inputs(lower: &OwnedFd, store: &OwnedFd, inputs: &[String]) -> Result<(), SetupError> {
    for name in inputs {
        show_input(lower, store, name).step(|| format!("binding the input {name}"))?;
    }
    Ok(())
}

fn show_input(lower: &OwnedFd, store: &OwnedFd, name: &str) -> io::Result<()> {
    StoreObject::take(lower, name)?.show(store, name)
}

/// A store object, taken from where it is to be shown elsewhere.
pub(super) enum StoreObject {
    /// A symlink, with its target.
    Link(OsString),
    /// Anything else, as a mount of its own that is not attached yet.
    Tree { mount: OwnedFd, is_directory: bool },
}

impl StoreObject {
    /// Takes one from the directory `lower`, which is in a mount namespace where this process may mount.
    pub(super) fn take(lower: &OwnedFd, name: &str) -> io::Result<Self> {
        let is_directory = match kind(&fstatat(lower, name, AtFlags::AT_SYMLINK_NOFOLLOW)?) {
            SFlag::S_IFLNK => return Ok(Self::Link(readlinkat(lower, name)?)),
            kind => kind == SFlag::S_IFDIR,
        };
        let mount = sys::clone_mount(lower, &c_path(Path::new(name))?, false)?;
        sys::restrict_mount(mount.as_fd(), MountAttributes::READ_ONLY_INERT, false)?;
        Ok(Self::Tree { mount, is_directory })
    }

    /// Shows it in the directory `store`, where there must be nothing of this name.
    pub(super) fn show(&self, store: &OwnedFd, name: &str) -> io::Result<()> {
        let mount = match self {
            Self::Link(target) => return Ok(symlinkat(target.as_os_str(), store, name)?),
            Self::Tree { mount, is_directory: true } => {
                mkdirat(store, name, Mode::from_bits_truncate(0o555))?;
                mount
            }
            Self::Tree { mount, is_directory: false } => {
                let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
                openat(store, name, flags, Mode::from_bits_truncate(0o444))?;
                mount
            }
        };
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let target = openat(store, name, flags, Mode::empty())?;
        sys::attach_mount(mount.as_fd(), target.as_fd())
    }
}

/// Puts a writable layer over the store, hides the other build directories, and shows the right processes in `/proc`.
pub(super) fn enter_host_view(view: &HostView, in_user_namespace: bool) -> Result<(), SetupError> {
    let store = view.store_mount.as_path();
    let lower = open_directory(store)?;
    if overlay(view, in_user_namespace).is_err() {
        // The kernel has no overlayfs, or does not take these filesystems for one.
        let root = Root::open(Path::new("/")).step(|| "opening the root")?;
        root.bind_directory(view.scratch.as_path(), store, MountAttributes::INERT)
            .step(|| format!("binding {} to {}", view.scratch.as_path().display(), store.display()))?;
        show_inputs(&lower, &open_directory(store)?, &view.inputs)?;
    }

    let build_dir = MovedMount::take(view.build_dir.as_path())?;
    sys::restrict_mount(build_dir.mount.as_fd(), MountAttributes::INERT, false)
        .step(|| "restricting the build directory")?;
    let store_dir = MovedMount::take(store)?;
    let veils = veils(view);
    let mut hidden = Vec::new();
    for veil in &veils {
        mount_fs("tmpfs", veil, MsFlags::MS_NOSUID | MsFlags::MS_NODEV, "mode=0755")?;
        hidden.push(open_directory(veil)?);
    }
    build_dir.put_back()?;
    if veils.iter().any(|veil| store.starts_with(veil)) {
        store_dir.put_back()?;
    }
    for veil in hidden {
        sys::restrict_mount(veil.as_fd(), MountAttributes::READ_ONLY, false).step(|| "hiding other directories")?;
    }
    mount_proc(Path::new("/proc"))
}

/// Directories to cover before the builder starts: the one with all builds in it, and those on the way to its own
/// directories that its user may not enter. What else lies in these it could not have reached anyway.
fn veils(view: &HostView) -> Vec<PathBuf> {
    let build_dir = closed_ancestor(view.build_dir.as_path());
    let store = closed_ancestor(view.store_mount.as_path());
    let all = [Some(view.builds_dir.as_path()), build_dir, store];
    let below = |path: &Path, other: &Path| path != other && path.starts_with(other);
    let mut veils: Vec<PathBuf> = Vec::new();
    for veil in all.iter().flatten() {
        if !all.iter().flatten().any(|other| below(veil, other)) && !veils.iter().any(|known| known == veil) {
            veils.push(veil.to_path_buf());
        }
    }
    veils
}

/// The topmost directory on the way to `path` that only its owner or group may enter.
fn closed_ancestor(path: &Path) -> Option<&Path> {
    let mut closed = None;
    for ancestor in path.ancestors().skip(1) {
        if std::fs::metadata(ancestor).is_ok_and(|found| found.permissions().mode() & 0o001 == 0) {
            closed = Some(ancestor);
        }
    }
    closed
}

/// A directory's contents, kept while what leads to it is covered.
struct MovedMount<'a> {
    mount: OwnedFd,
    path: &'a Path,
}

impl<'a> MovedMount<'a> {
    fn take(path: &'a Path) -> Result<Self, SetupError> {
        let step = || format!("cloning {}", path.display());
        let mount =
            c_path(path).and_then(|name| sys::clone_mount(open(c"/", OFlag::O_PATH, Mode::empty())?, &name, false));
        Ok(Self { mount: mount.step(step)?, path })
    }

    /// Attaches it where it was; what leads there is made anew.
    fn put_back(self) -> Result<(), SetupError> {
        let step = || format!("mounting {}", self.path.display());
        std::fs::DirBuilder::new().recursive(true).mode(0o755).create(self.path).step(step)?;
        sys::attach_mount(self.mount.as_fd(), open_directory(self.path)?.as_fd()).step(step)
    }
}

fn overlay(view: &HostView, in_user_namespace: bool) -> io::Result<()> {
    let escape = |path: &Path| -> io::Result<String> {
        let text = path.to_str().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "path is not UTF-8"))?;
        Ok(text.replace('\\', "\\\\").replace(',', "\\,").replace(':', "\\:"))
    };
    let options = format!(
        "lowerdir={},upperdir={},workdir={}{}",
        escape(view.store_mount.as_path())?,
        escape(view.scratch.as_path())?,
        escape(view.overlay_work.as_path())?,
        if in_user_namespace { ",userxattr" } else { "" },
    );
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("overlay"), view.store_mount.as_path(), Some("overlay"), flags, Some(options.as_str()))?;
    Ok(())
}
