//! The system calls: getting a FUSE device mounted, and detaching a mount.
//!
//! fuser could mount by itself, but it unmounts by itself, too, by path and whatever is there by then. Here the mount and
//! the descriptor behind it are separate things, so that a mount can outlive the process that serves it.
#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, umount2};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::unistd::{geteuid, getgid, getuid};

use crate::MountError;

/// The device every FUSE server talks to the kernel through.
const DEVICE: &str = "/dev/fuse";
/// What the mount table shows as the device.
const SOURCE: &str = "castored";
/// What the mount table shows as the type, behind `fuse.`.
pub(crate) const SUBTYPE: &str = "castored";
/// Where the kernel lists the connections of all FUSE mounts, if it is mounted.
const CONNECTIONS: &str = "/sys/fs/fuse/connections";
/// The helper that mounts for ordinary users.
const HELPER: &str = "fusermount3";
/// Where the helper reads whether ordinary users may let others see their mounts.
const HELPER_CONFIG: &str = "/etc/fuse.conf";

/// A FUSE mount with nobody serving it yet.
pub(crate) struct Mounted {
    /// The kernel's side of the conversation; the first request waits in it.
    pub(crate) device: OwnedFd,
    /// Whether users other than the one who mounted it may use it.
    pub(crate) shared: bool,
}

/// Mounts a FUSE filesystem on `mountpoint`, an existing directory: by ourselves if we may, else through the helper.
pub(crate) fn mount(mountpoint: &Path) -> Result<Mounted, MountError> {
    if geteuid().is_root() {
        match mount_directly(mountpoint) {
            // Root without the right to mount, as in many containers: the helper may have it.
            Err(MountError::Mount { source, .. }) if source.raw_os_error() == Some(Errno::EPERM as i32) => {
                match mount_by_helper(mountpoint, true) {
                    Err(MountError::NoHelper) => Err(MountError::Mount { mountpoint: mountpoint.to_owned(), source }),
                    mounted => mounted,
                }
            }
            mounted => mounted,
        }
    } else {
        mount_by_helper(mountpoint, ordinary_users_may_share())
    }
}

fn mount_directly(mountpoint: &Path) -> Result<Mounted, MountError> {
    let device = OpenOptions::new().read(true).write(true).open(DEVICE).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => MountError::NoDevice,
        _ => MountError::Device(error),
    })?;
    // The kernel wants the type bits of the root (a directory), not its permissions.
    let data = format!(
        "fd={},rootmode=40000,user_id={},group_id={},allow_other,default_permissions",
        device.as_raw_fd(),
        getuid(),
        getgid()
    );
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
    let kind = kind();
    nix::mount::mount(Some(SOURCE), mountpoint, Some(kind.as_str()), flags, Some(data.as_str()))
        .map_err(|errno| MountError::Mount { mountpoint: mountpoint.to_owned(), source: errno.into() })?;
    Ok(Mounted { device: device.into(), shared: true })
}

/// The helper mounts and passes the device over the socket whose number `_FUSE_COMMFD` tells; we make it its standard
/// input, which spares clearing a close-on-exec flag in a process with threads.
fn mount_by_helper(mountpoint: &Path, shared: bool) -> Result<Mounted, MountError> {
    let failed = |message: String| MountError::Helper { mountpoint: mountpoint.to_owned(), message };
    let (ours, theirs) = UnixStream::pair().map_err(|error| failed(error.to_string()))?;
    let mut options = format!("ro,nosuid,nodev,noatime,default_permissions,fsname={SOURCE},subtype={SUBTYPE}");
    if shared {
        options.push_str(",allow_other");
    }
    let output = Command::new(HELPER)
        .args(["-o", &options, "--"])
        .arg(mountpoint)
        .env("_FUSE_COMMFD", "0")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .output()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => MountError::NoHelper,
            _ => failed(error.to_string()),
        })?;
    if !output.status.success() {
        return Err(if Path::new(DEVICE).exists() { failed(said(&output)) } else { MountError::NoDevice });
    }
    let device = receive_descriptor(&ours).map_err(|error| failed(format!("it passed no device: {error}")))?;
    Ok(Mounted { device, shared })
}

/// What a program said before it failed, on one line.
fn said(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    let text = text.trim().trim_start_matches("fusermount3: ").replace('\n', "; ");
    if text.is_empty() { output.status.to_string() } else { text }
}

fn receive_descriptor(socket: &UnixStream) -> io::Result<OwnedFd> {
    let mut byte = [0];
    let mut parts = [IoSliceMut::new(&mut byte)];
    let mut control = nix::cmsg_space!(RawFd);
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let descriptors = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let descriptor = descriptors.and_then(|all| all.first().copied()).ok_or(io::ErrorKind::InvalidData)?;
    // SAFETY: the kernel has just made this descriptor for us (SCM_RIGHTS); nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Whether the helper lets ordinary users give others access to their mounts.
fn ordinary_users_may_share() -> bool {
    let config = std::fs::read_to_string(HELPER_CONFIG).unwrap_or_default();
    config.lines().any(|line| line.trim() == "user_allow_other")
}

/// The type of our mounts, as the mount table shows it.
pub(crate) fn kind() -> String {
    format!("fuse.{SUBTYPE}")
}

/// Cuts a mount off from its server, `device` being its `major:minor`. Whoever waits for it, in whatever namespace, gets
/// an error. Without the kernel's switch (which is a filesystem of its own, and may not be mounted) nothing happens.
pub(crate) fn abort(device: &str) {
    let minor = device.split_once(':').map_or(device, |(_, minor)| minor);
    let switch = Path::new(CONNECTIONS).join(minor).join("abort");
    match std::fs::write(&switch, "1") {
        Ok(()) => tracing::info!(switch = %switch.display(), "the mount was cut off"),
        Err(error) => tracing::debug!(switch = %switch.display(), %error, "cannot cut the mount off by its switch"),
    }
}

/// Takes the mount away from `mountpoint` at once. Whoever still uses files in it keeps them until done.
pub(crate) fn detach(mountpoint: &Path) -> Result<(), MountError> {
    let failed = |source| MountError::Detach { mountpoint: mountpoint.to_owned(), source };
    match umount2(mountpoint, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(Errno::EPERM) => {
            let output = Command::new(HELPER).args(["-u", "-z", "--"]).arg(mountpoint).output().map_err(failed)?;
            if output.status.success() { Ok(()) } else { Err(failed(io::Error::other(said(&output)))) }
        }
        Err(errno) => Err(failed(errno.into())),
    }
}
