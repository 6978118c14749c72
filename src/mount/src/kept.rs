//! What of a mount outlives the process that serves it: the device, and a file in memory.
//!
//! Whoever keeps these two open keeps the mount. Programs that use it wait while nobody serves it, and the next server
//! goes on where the last one stopped. The file begins with a page of fixed fields and then has what [`Head`] says;
//! behind that lies the [`Journal`](crate::journal::Journal). All numbers are little-endian:
//!
//! | offset | bytes | |
//! |---|---|---|
//! | 0 | 16 | [`MAGIC`]: which format this is |
//! | 16 | 8 | unique number of the repeated request that is being answered, or 0 |
//! | 24 | 8 | unique number of the repeated request that the last server died of, or 0 |
//! | 32 | 8 | how many servers in a row died of it |
//! | 4096 | | fields of the head, each a length (4 bytes) and so many bytes |
//! | 65536 | | the journal |

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::{MountError, mount_table};

/// The format, with its version.
const MAGIC: &[u8; 16] = b"castored mount 1";
/// Where the numbers of [`Resent`](crate::resent::Resent) are.
pub(crate) const IN_HAND: u64 = 16;
pub(crate) const SUSPECT: u64 = 24;
pub(crate) const DEATHS: u64 = 32;
/// Where the head's fields begin.
const HEAD: u64 = 4096;
/// Where the journal begins.
pub(crate) const JOURNAL: u64 = 64 * 1024;
/// The longest field, in bytes.
const MAX_FIELD: usize = 8192;

/// A mount without a server: its device and what a server needs to know to go on serving it.
///
/// Made by a server for whoever keeps it ([`Mount::kept`](crate::Mount::kept)), and given to the next
/// ([`Mount::take_over`](crate::Mount::take_over)).
#[derive(Debug)]
pub struct Kept {
    pub(crate) device: OwnedFd,
    pub(crate) state: State,
    pub(crate) head: Head,
}

/// What does not change while the mount lasts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    /// An absolute path without symlinks.
    pub(crate) mountpoint: PathBuf,
    /// The filesystem's device, `major:minor`.
    pub(crate) device: String,
    /// Whether users other than the one who mounted it may use it.
    pub(crate) shared: bool,
    /// The kernel's first request.
    pub(crate) init: Vec<u8>,
    /// The answer to it, which stays in force for all servers.
    pub(crate) reply: Vec<u8>,
    /// The mounter's own.
    pub(crate) note: Vec<u8>,
}

/// The file in memory.
#[derive(Debug)]
pub(crate) struct State(pub(crate) File);

impl Kept {
    /// A mount from its two descriptors.
    ///
    /// # Errors
    /// [`MountError::Kept`] when the second is not what [`Kept::state`] gave.
    pub fn new(device: OwnedFd, state: OwnedFd) -> Result<Kept, MountError> {
        let state = State(File::from(state));
        let head = state.head().map_err(MountError::Kept)?;
        Ok(Kept { device, state, head })
    }

    /// Whether there is a mount left to take over: the kernel has not let go of the device, and it is still mounted where
    /// it was.
    pub fn is_alive(&self) -> bool {
        let mut device = [PollFd::new(self.device.as_fd(), PollFlags::empty())];
        let connected = poll(&mut device, PollTimeout::ZERO).is_ok()
            && !device[0].revents().is_some_and(|events| events.contains(PollFlags::POLLERR));
        connected && mount_table::is_mounted(&self.head.mountpoint, &self.head.device).unwrap_or(true)
    }

    /// Where it is mounted.
    pub fn mountpoint(&self) -> &std::path::Path {
        &self.head.mountpoint
    }

    /// The device, to be kept open.
    pub fn device(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }

    /// The file with everything else, to be kept open.
    pub fn state(&self) -> BorrowedFd<'_> {
        self.state.0.as_fd()
    }

    /// What the mounter noted for its successors.
    pub fn note(&self) -> &[u8] {
        &self.head.note
    }
}

impl State {
    /// A file with nothing in it but the head.
    pub(crate) fn new(head: &Head) -> io::Result<State> {
        let state = State(memfd_create(c"castored-mount", MFdFlags::MFD_CLOEXEC)?.into());
        let mut text = Vec::new();
        let shared = [u8::from(head.shared)];
        let mountpoint = head.mountpoint.as_os_str().as_bytes();
        for field in [mountpoint, head.device.as_bytes(), &shared, &head.init, &head.reply, &head.note] {
            if field.len() > MAX_FIELD {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            text.extend((field.len() as u32).to_le_bytes());
            text.extend(field);
        }
        state.0.write_all_at(&text, HEAD)?;
        // Last: a server that is killed before has left nothing that looks whole.
        state.0.write_all_at(MAGIC, 0)?;
        Ok(state)
    }

    fn head(&self) -> io::Result<Head> {
        let mut magic = [0; MAGIC.len()];
        self.0.read_exact_at(&mut magic, 0)?;
        if magic != *MAGIC {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it was made by another version"));
        }
        let mut at = HEAD;
        let mut field = || -> io::Result<Vec<u8>> {
            let mut length = [0; 4];
            self.0.read_exact_at(&mut length, at)?;
            let length = u32::from_le_bytes(length) as usize;
            if length > MAX_FIELD {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a field is too long"));
            }
            let mut bytes = vec![0; length];
            self.0.read_exact_at(&mut bytes, at + 4)?;
            at += 4 + length as u64;
            Ok(bytes)
        };
        let text = |bytes| String::from_utf8(bytes).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e));
        Ok(Head {
            mountpoint: PathBuf::from(std::ffi::OsStr::from_bytes(&field()?)),
            device: text(field()?)?,
            shared: field()? == [1],
            init: field()?,
            reply: field()?,
            note: field()?,
        })
    }

    pub(crate) fn number(&self, at: u64) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.0.read_exact_at(&mut bytes, at)?;
        Ok(u64::from_le_bytes(bytes))
    }

    pub(crate) fn set_number(&self, at: u64, value: u64) -> io::Result<()> {
        self.0.write_all_at(&value.to_le_bytes(), at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_read_back() {
        let head = Head {
            mountpoint: "/a b".into(),
            device: "0:70".into(),
            shared: true,
            init: vec![1; 104],
            reply: vec![2; 80],
            note: Vec::new(),
        };
        let state = State::new(&head).unwrap();
        assert_eq!(state.head().unwrap(), head);
        state.set_number(DEATHS, 3).unwrap();
        assert_eq!((state.number(DEATHS).unwrap(), state.number(SUSPECT).unwrap()), (3, 0));
        assert_eq!(state.head().unwrap(), head);
        state.0.write_all_at(b"castored mount 9", 0).unwrap();
        assert!(state.head().unwrap_err().to_string().contains("another version"));
    }
}
