//! The first words between the kernel and a server, spoken once and repeated to each successor.
//!
//! fuser wants to be asked by the kernel before it serves. The kernel asks once, so its request is read from the device
//! and kept, and every server is asked with it over a pair of sockets. Then the device takes the socket's place.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use fuser::{Config, Filesystem, Session, SessionACL};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::dup3;

/// The least room the kernel wants for a request is 8 KiB.
const REQUEST_ROOM: usize = 64 * 1024;
/// The longest answer to the first request.
const REPLY_ROOM: usize = 4096;
/// Where in the first request the second word of the kernel's capabilities lies: header, version, readahead, first word.
const CAPABILITIES: std::ops::Range<usize> = 56..60;
/// In it: the kernel repeats requests when it is asked to (Linux 6.9).
const HAS_RESEND: u32 = 1 << (39 - 32);
/// Notifications to the kernel: repeat what was not answered; take all names for outdated (Linux 6.16).
const RESEND: i32 = 7;
const NEW_EPOCH: i32 = 8;

/// Reads the kernel's first request from a new mount's device.
pub(crate) fn first_request(device: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let mut request = vec![0; REQUEST_ROOM];
    loop {
        match nix::unistd::read(device, &mut request) {
            Ok(length) => {
                request.truncate(length);
                return Ok(request);
            }
            Err(Errno::EINTR | Errno::EAGAIN | Errno::ENOENT) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Whether this kernel repeats requests, so that a successor can answer what its predecessor did not.
pub(crate) fn can_resend(init: &[u8]) -> bool {
    let word = init.get(CAPABILITIES).and_then(|bytes| bytes.try_into().ok());
    word.is_some_and(|bytes| u32::from_ne_bytes(bytes) & HAS_RESEND != 0)
}

/// A session that was asked the kernel's first request and has answered, but not to the kernel.
pub(crate) struct Asked<F: Filesystem> {
    session: Session<F>,
    /// The answer.
    pub(crate) reply: Vec<u8>,
}

impl<F: Filesystem> Asked<F> {
    pub(crate) fn new(filesystem: F, init: &[u8], acl: SessionACL, config: Config) -> io::Result<Asked<F>> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let mut ours = File::from(ours);
        ours.write_all(init)?;
        let session = Session::from_fd(filesystem, theirs, acl, config)?;
        let mut reply = vec![0; REPLY_ROOM];
        let length = ours.read(&mut reply)?;
        reply.truncate(length);
        Ok(Asked { session, reply })
    }

    /// Puts the device under the session and gives the kernel its answer, which it may have had already.
    pub(crate) fn connect(self, device: BorrowedFd<'_>, reply: &[u8]) -> io::Result<Session<F>> {
        match nix::unistd::write(device, reply) {
            // ENOENT: an earlier server gave it.
            Ok(_) | Err(Errno::ENOENT) => {}
            Err(errno) => return Err(errno.into()),
        }
        let number = self.session.as_fd().as_raw_fd();
        // SAFETY: the descriptor belongs to the session and stays its own: it is never dropped here, and `dup3` only lets
        // it lead to something else.
        let mut descriptor = std::mem::ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(number) });
        dup3(device, &mut descriptor, OFlag::O_CLOEXEC)?;
        Ok(self.session)
    }
}

/// Asks the kernel for what earlier servers did not answer.
pub(crate) fn ask_for_the_rest(device: BorrowedFd<'_>) -> io::Result<()> {
    notify(device, RESEND)
}

/// Makes the kernel look up every name again when it is used next. An error where it does not know that.
pub(crate) fn outdate_all_names(device: BorrowedFd<'_>) -> io::Result<()> {
    notify(device, NEW_EPOCH)
}

/// A notification without a body: length, what it is in the place of an error, and no request's number.
fn notify(device: BorrowedFd<'_>, what: i32) -> io::Result<()> {
    let mut message = [0; 16];
    message[..4].copy_from_slice(&16_u32.to_ne_bytes());
    message[4..8].copy_from_slice(&what.to_ne_bytes());
    nix::unistd::write(device, &message)?;
    Ok(())
}
