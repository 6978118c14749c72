//! System calls that have no safe wrapper, each behind a function that is safe to call.

#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::libc;
use nix::unistd::{ForkResult, fork};

/// Attributes given to a new mount.
#[derive(Clone, Copy, Default)]
pub(super) struct MountAttributes(u64);

impl MountAttributes {
    pub(super) const READ_ONLY: Self = Self(libc::MOUNT_ATTR_RDONLY);
    /// For what builders write to: no setuid programs, no devices.
    pub(super) const INERT: Self = Self(libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV);
    pub(super) const READ_ONLY_INERT: Self = Self(Self::READ_ONLY.0 | Self::INERT.0);
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Forks. The helper has a single thread, so the child may go on running ordinary code.
pub(super) fn fork_single_threaded() -> io::Result<ForkResult> {
    // SAFETY: the helper never starts a thread, so no lock can be held by a thread that is missing in the child.
    Ok(unsafe { fork() }?)
}

/// Takes over a descriptor that this process inherited by number.
pub(super) fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC takes no pointer; a number that is no open descriptor is an error.
    let new = check(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) }.into())?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(new as RawFd) })
}

/// Marks every descriptor above the three standard ones to be closed by exec.
pub(super) fn close_all_on_exec() -> io::Result<()> {
    // SAFETY: no pointers; CLOSE_RANGE_CLOEXEC closes nothing now.
    check(unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) })?;
    Ok(())
}

/// Closes every descriptor above the three standard ones, whoever owns it: for a process that from now on does nothing
/// but what a program that was just executed could do as well.
pub(super) fn close_all_but_standard() -> io::Result<()> {
    // SAFETY: no pointers. Owners of the descriptors are on the stack of a caller that is never returned to.
    check(unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, 0) })?;
    Ok(())
}

/// A detached copy of the mount (or of the part of it) at `path`; a symlink is not followed.
pub(super) fn clone_mount(dir: impl AsFd, path: &CStr, recursive: bool) -> io::Result<OwnedFd> {
    let flags = libc::OPEN_TREE_CLONE
        | libc::OPEN_TREE_CLOEXEC
        | libc::AT_SYMLINK_NOFOLLOW as u32
        | if recursive { libc::AT_RECURSIVE as u32 } else { 0 };
    // SAFETY: `path` is a terminated string that outlives the call.
    let fd = check(unsafe { libc::syscall(libc::SYS_open_tree, dir.as_fd().as_raw_fd(), path.as_ptr(), flags) })?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Adds attributes to a mount (never takes one away, so it works on mounts locked by a user namespace).
pub(super) fn restrict_mount(mount: BorrowedFd<'_>, attributes: MountAttributes, recursive: bool) -> io::Result<()> {
    let attr = libc::mount_attr { attr_set: attributes.0, attr_clr: 0, propagation: 0, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the empty string is terminated, and `attr` is of the size given; both outlive the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    })?;
    Ok(())
}

/// Attaches a detached mount on what `target` refers to.
pub(super) fn attach_mount(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH;
    // SAFETY: both strings are empty and terminated.
    check(unsafe {
        libc::syscall(libc::SYS_move_mount, mount.as_raw_fd(), c"".as_ptr(), target.as_raw_fd(), c"".as_ptr(), flags)
    })?;
    Ok(())
}

/// A descriptor that becomes readable when the process ends.
pub(super) fn pidfd_open(pid: nix::unistd::Pid) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) })?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Sets the flags of a network interface of this network namespace.
pub(super) fn set_interface_up(socket: BorrowedFd<'_>, name: &[u8]) -> io::Result<()> {
    // SAFETY: ifreq is plain data for which all-zero bytes are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name[..libc::IFNAMSIZ - 1].iter_mut().zip(name) {
        *to = *from as c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_LOOPBACK | libc::IFF_RUNNING) as i16;
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which outlives the call.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) }.into())?;
    Ok(())
}

/// Gives every signal its default action and unblocks all of them: what a program expects to start with.
pub(super) fn default_signals() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: SIG_DFL is a valid action; for the few signals that cannot be set the call fails without effect.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: an all-zero set is made into a proper empty one before it is used.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

/// Gives up every capability, and, unless they are to be `regained`, those that exec could give back.
pub(super) fn drop_capabilities(regained: bool) -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: c_int,
    }
    const VERSION_3: u32 = 0x2008_0522;
    /// Above every capability the kernel will ever number; it says EINVAL at the first it does not know.
    const LAST: libc::c_ulong = 63;
    for capability in (0..=LAST).take_while(|_| !regained) {
        // SAFETY: PR_CAPBSET_DROP takes no pointer.
        let dropped = check(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) }.into());
        match dropped {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => break,
            // Not permitted: then there is no CAP_SETPCAP, nor will there be one to raise anything from the bounding set.
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => break,
            Err(e) => return Err(e),
            Ok(_) => {}
        }
    }
    // SAFETY: PR_CAP_AMBIENT_CLEAR_ALL takes no pointer.
    check(
        unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as libc::c_ulong, 0, 0, 0) }.into(),
    )?;
    let header = Header { version: VERSION_3, pid: 0 };
    // Effective, permitted and inheritable, low and high half.
    let none = [0u32; 6];
    // SAFETY: version 3 reads a header and two records of three words each; both outlive the call.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()) })?;
    Ok(())
}

/// Installs a system call filter without giving up new privileges, which needs CAP_SYS_ADMIN.
pub(super) fn install_filter(program: &[seccompiler::sock_filter]) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
    // The kernel does not write to it.
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut().cast() };
    // SAFETY: seccompiler's instructions have the layout of the kernel's, there are `len` of them, and they outlive the
    // call, as does the structure that points to them.
    check(unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) })?;
    Ok(())
}

/// Forbids this process and its children to connect to abstract sockets made outside, where the kernel can do that
/// (Landlock 6, Linux 6.12). Says whether it could.
pub(super) fn scope_abstract_sockets() -> bool {
    #[repr(C)]
    struct Attributes {
        handled_access_fs: u64,
        handled_access_net: u64,
        scoped: u64,
    }
    const SCOPE_ABSTRACT_UNIX_SOCKET: u64 = 1;
    let attributes = Attributes { handled_access_fs: 0, handled_access_net: 0, scoped: SCOPE_ABSTRACT_UNIX_SOCKET };
    // SAFETY: the kernel reads one structure of the size given, which outlives the call.
    let ruleset = check(unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, &raw const attributes, size_of::<Attributes>(), 0u32)
    });
    let Ok(ruleset) = ruleset else { return false };
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    let ruleset = unsafe { OwnedFd::from_raw_fd(ruleset as RawFd) };
    // SAFETY: no pointers.
    check(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0u32) }).is_ok()
}

/// Leaves the session keyring of whoever started the daemon for an empty one. A kernel without keyrings has none to leave.
pub(super) fn join_new_session_keyring() -> io::Result<()> {
    // SAFETY: the null pointer asks for a keyring without a name.
    let joined = check(unsafe {
        libc::syscall(libc::SYS_keyctl, libc::KEYCTL_JOIN_SESSION_KEYRING, std::ptr::null::<c_char>())
    });
    match joined {
        Err(e) if e.raw_os_error() != Some(libc::ENOSYS) => Err(e),
        _ => Ok(()),
    }
}

/// Sets the NIS domain name of this UTS namespace.
pub(super) fn set_domain_name(name: &[u8]) -> io::Result<()> {
    // SAFETY: the kernel reads as many bytes as said from a slice that outlives the call.
    check(unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) }.into())?;
    Ok(())
}

/// Replaces this process. Returns only with the reason why it could not.
pub(super) fn exec(program: &CStr, args: &[CString], env: &[CString]) -> io::Error {
    let pointers = |list: &[CString]| -> Vec<*const c_char> {
        list.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (args, env) = (pointers(args), pointers(env));
    // SAFETY: both arrays end with a null pointer, and the strings they point to outlive the call.
    unsafe { libc::execve(program.as_ptr(), args.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}
