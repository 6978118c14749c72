//! Answers for processes that are dying and cannot, because they wait for a mount that nobody serves.
//!
//! A process that is killed while a server has its request waits for the answer all the same. If it is the server itself, or
//! holds what the next server needs (a lock, in a child that was just forked), there would never be one. Nobody is left to
//! see the answer, so an error will do.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::fuse::MAX_READ;
use crate::handshake;

/// Room for a request: the kernel wants enough for the largest write it was told of, and a header.
const ROOM: usize = MAX_READ as usize + 64 * 1024;
/// The most requests looked at.
const MAX_REQUESTS: usize = 65_536;
/// Where in a request its header has what it is, its number, and the thread that asks.
const OPERATION: std::ops::Range<usize> = 4..8;
const UNIQUE: std::ops::Range<usize> = 8..16;
const THREAD: std::ops::Range<usize> = 32..36;
/// Operations that want no answer: forget, interrupt, batch forget.
const SILENT: [u32; 3] = [2, 36, 42];

/// Answers, with an error, what these threads have asked of a mount. Nobody may serve it at the moment. What others have
/// asked stays unanswered until the next server asks the kernel for it. Tells how many were answered.
///
/// # Errors
/// When the device cannot be read or written.
pub fn answer_for(device: BorrowedFd<'_>, threads: &[u32]) -> io::Result<usize> {
    handshake::ask_for_the_rest(device)?;
    let mut request = vec![0; ROOM];
    let mut answered = 0;
    for _ in 0..MAX_REQUESTS {
        let mut waiting = [PollFd::new(device.as_fd(), PollFlags::POLLIN)];
        poll(&mut waiting, PollTimeout::ZERO)?;
        if !waiting[0].revents().is_some_and(|events| events.contains(PollFlags::POLLIN)) {
            break;
        }
        let length = match nix::unistd::read(device, &mut request) {
            Ok(length) => length,
            Err(Errno::EINTR | Errno::ENOENT) => continue,
            Err(Errno::EAGAIN) => break,
            Err(errno) => return Err(errno.into()),
        };
        let header = &request[..length];
        let word = |at| header.get(at).and_then(|bytes: &[u8]| bytes.try_into().ok()).map(u32::from_ne_bytes);
        let (Some(operation), Some(thread), Some(unique)) = (word(OPERATION), word(THREAD), header.get(UNIQUE)) else {
            continue;
        };
        if !SILENT.contains(&operation) && threads.contains(&thread) {
            let mut answer = [0; 16];
            answer[..4].copy_from_slice(&16_u32.to_ne_bytes());
            answer[4..8].copy_from_slice(&(-(Errno::EIO as i32)).to_ne_bytes());
            answer[8..].copy_from_slice(unique);
            match nix::unistd::write(device, &answer) {
                Ok(_) => answered += 1,
                // It needs none any more.
                Err(Errno::ENOENT) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
    Ok(answered)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use fuser::{Config, Filesystem, KernelConfig, Request, SessionACL};

    use super::*;
    use crate::device;
    use crate::handshake::Asked;

    struct Nothing;

    impl Filesystem for Nothing {
        fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
            let _previous = config.set_max_write(MAX_READ);
            Ok(())
        }
    }

    #[test]
    fn who_is_killed_while_nobody_serves_can_die() {
        let dir = tempfile::tempdir().unwrap();
        let mounted = device::mount(dir.path()).unwrap();
        let kernel = mounted.device.as_fd();
        let init = handshake::first_request(kernel).unwrap();
        let asked = Asked::new(Nothing, &init, SessionACL::All, Config::default()).unwrap();
        nix::unistd::write(kernel, &asked.reply).unwrap();
        let read = || {
            let mut request = vec![0; ROOM];
            nix::unistd::read(kernel, &mut request).unwrap()
        };
        let ask = || Command::new("stat").arg(dir.path().join("x")).stderr(Stdio::null()).stdout(Stdio::null()).spawn();
        let (mut dying, mut waiting) = (ask().unwrap(), ask().unwrap());
        // A server takes their requests and dies.
        read();
        read();
        dying.kill().unwrap();
        std::thread::sleep(Duration::from_millis(100));
        assert!(dying.try_wait().unwrap().is_none(), "it can die without an answer");
        assert!(answer_for(kernel, &[dying.id()]).unwrap() >= 1);
        let start = Instant::now();
        while dying.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < Duration::from_secs(5), "it cannot die");
            std::thread::sleep(Duration::from_millis(5));
        }
        // The other one has had no answer, and the next server is asked again.
        assert!(waiting.try_wait().unwrap().is_none());
        handshake::ask_for_the_rest(kernel).unwrap();
        assert!(answer_for(kernel, &[waiting.id()]).unwrap() >= 1);
        assert!(!waiting.wait().unwrap().success());
        device::detach(dir.path()).unwrap();
    }
}
