//! Why a store cannot be mounted, with what to do about it.

use std::io;
use std::path::PathBuf;

/// Why a store cannot be mounted or unmounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The kernel has no FUSE, or its device is not visible here.
    #[error(
        "cannot open /dev/fuse: it does not exist; load the kernel module with `modprobe fuse`, or let the container \
         have the device"
    )]
    NoDevice,
    /// The device is there and cannot be opened.
    #[error("cannot open /dev/fuse: {0}; run as root, or make the device accessible (mode 0666 is usual)")]
    Device(#[source] io::Error),
    /// Mounting without being root needs the helper.
    #[error("cannot mount without root: fusermount3 is not installed; install the fuse3 package or run as root")]
    NoHelper,
    /// The helper refused.
    #[error("fusermount3 cannot mount on {}: {message}", .mountpoint.display())]
    Helper {
        /// Where.
        mountpoint: PathBuf,
        /// What it said.
        message: String,
    },
    /// The mount system call failed.
    #[error("cannot mount on {}: {source}", .mountpoint.display())]
    Mount {
        /// Where.
        mountpoint: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A FUSE filesystem is mounted there and alive.
    #[error(
        "cannot mount on {}: {filesystem} is mounted there and in use; stop the daemon that serves it, or detach it with \
         `umount -l {}`", .mountpoint.display(), .mountpoint.display()
    )]
    Busy {
        /// Where.
        mountpoint: PathBuf,
        /// The type of the filesystem, as the mount table shows it.
        filesystem: String,
    },
    /// A FUSE filesystem is mounted there whose server is alive but does not answer.
    #[error(
        "cannot mount on {}: {filesystem} is mounted there and does not answer; end the process that serves it, then \
         detach it with `umount -l {}`", .mountpoint.display(), .mountpoint.display()
    )]
    Unresponsive {
        /// Where.
        mountpoint: PathBuf,
        /// The type of the filesystem, as the mount table shows it.
        filesystem: String,
    },
    /// The mountpoint cannot be used.
    #[error("cannot use {} as a mountpoint: {source}", .mountpoint.display())]
    Mountpoint {
        /// Where.
        mountpoint: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something is in the directory, which a mount would hide.
    #[error("cannot mount on {}: it is not empty, and a mount would hide what it holds", .mountpoint.display())]
    NotEmpty {
        /// Where.
        mountpoint: PathBuf,
    },
    /// No filesystem of castored's is mounted there.
    #[error("cannot unmount {}: {}", .mountpoint.display(), match .filesystem {
        Some(filesystem) => format!("what is mounted there is not castored's but {filesystem}"),
        None => "nothing is mounted there".to_owned(),
    })]
    NotMounted {
        /// Where.
        mountpoint: PathBuf,
        /// The type of the filesystem that is mounted there instead, as the mount table shows it.
        filesystem: Option<String>,
    },
    /// A mount could not be detached.
    #[error("cannot detach the mount on {}: {source}", .mountpoint.display())]
    Detach {
        /// Where.
        mountpoint: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The mount table cannot be read or lacks the new mount.
    #[error("cannot find the mount on {} in /proc/self/mountinfo: {source}", .mountpoint.display())]
    MountTable {
        /// Where.
        mountpoint: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel and the server could not agree on how to talk, or its threads could not be started.
    #[error("cannot serve the mount on {}: {source}", .mountpoint.display())]
    Serve {
        /// Where.
        mountpoint: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A mount that an earlier server left cannot be taken over.
    #[error("cannot take over the mount of an earlier server: {0}")]
    Kept(#[source] io::Error),
}
