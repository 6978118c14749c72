//! Messages of `sd_notify` with descriptors, over a socket that keeps messages apart.
#![allow(unsafe_code)]

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

/// The longest message, in bytes.
const MAX_MESSAGE: usize = 4096;
/// The most descriptors of one message.
const MAX_DESCRIPTORS: usize = 4;

/// What a message says, as far as a keeper cares.
#[derive(Debug)]
pub(crate) enum Message {
    /// The server serves.
    Ready,
    /// Keep these open under that name.
    Store(String, Vec<OwnedFd>),
    /// Keep what has that name no longer.
    Remove(String),
    /// Something else. Descriptors that came with it are closed, which is what `BARRIER=1` waits for.
    Other,
}

/// Sends one message.
pub(crate) fn send(socket: BorrowedFd<'_>, text: &str, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let numbers: Vec<RawFd> = descriptor.iter().map(AsRawFd::as_raw_fd).collect();
    let control = [ControlMessage::ScmRights(&numbers)];
    let control = if numbers.is_empty() { &control[..0] } else { &control[..] };
    let part = [IoSlice::new(text.as_bytes())];
    sendmsg::<()>(socket.as_raw_fd(), &part, control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Takes one message that is there; nothing at the end.
pub(crate) fn receive(socket: BorrowedFd<'_>) -> io::Result<Option<(String, Vec<OwnedFd>)>> {
    let mut text = [0; MAX_MESSAGE];
    let mut control = nix::cmsg_space!([RawFd; MAX_DESCRIPTORS]);
    let (length, descriptors) = {
        let mut parts = [IoSliceMut::new(&mut text)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
        let mut descriptors = Vec::new();
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(numbers) = control {
                // SAFETY: the kernel has just made them for us; nobody else knows their numbers.
                descriptors.extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
            }
        }
        (message.bytes, descriptors)
    };
    if length == 0 {
        return Ok(None);
    }
    Ok(Some((String::from_utf8_lossy(&text[..length]).into_owned(), descriptors)))
}

impl Message {
    pub(crate) fn parse(text: &str, descriptors: Vec<OwnedFd>) -> Message {
        let has = |line: &str| text.lines().any(|other| other == line);
        let name = || {
            let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or("stored");
            // What separates names in the variable that hands them on.
            name.replace(':', "_")
        };
        if has("FDSTORE=1") {
            Message::Store(name(), descriptors)
        } else if has("FDSTOREREMOVE=1") {
            Message::Remove(name())
        } else if has("READY=1") {
            Message::Ready
        } else {
            Message::Other
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;

    #[test]
    fn messages_arrive_with_their_descriptors() {
        let (a, b) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        send(a.as_fd(), "FDSTORE=1\nFDNAME=x:y", Some(a.as_fd())).unwrap();
        send(a.as_fd(), "FDSTOREREMOVE=1\nFDNAME=x", None).unwrap();
        send(a.as_fd(), "STATUS=fine\nREADY=1", None).unwrap();
        drop(a);
        let next = || receive(b.as_fd()).unwrap().map(|(text, descriptors)| Message::parse(&text, descriptors));
        assert!(matches!(next(), Some(Message::Store(name, all)) if name == "x_y" && all.len() == 1));
        assert!(matches!(next(), Some(Message::Remove(name)) if name == "x"));
        assert!(matches!(next(), Some(Message::Ready)));
        assert!(next().is_none());
    }
}
