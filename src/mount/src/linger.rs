//! Staying awake for the next request.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How long.
const AWAKE: Duration = Duration::from_micros(50);

#[derive(Debug)]
pub(crate) struct Linger {
    device: OwnedFd,
    taken: AtomicBool,
    awake: Duration,
}

impl Linger {
    pub(crate) fn new(device: BorrowedFd<'_>) -> io::Result<Linger> {
        let awake = std::fs::read_to_string("/var/tmp/linger-us").ok().and_then(|v| v.trim().parse().ok()).map_or(AWAKE, Duration::from_micros);
        Ok(Linger { device: device.try_clone_to_owned()?, taken: AtomicBool::new(false), awake })
    }

    /// Returns when the next request is there, or it has taken too long to come.
    pub(crate) fn wait(&self) {
        if self.awake.is_zero() || self.taken.swap(true, Ordering::Relaxed) {
            return;
        }
        let until = Instant::now() + self.awake;
        while Instant::now() < until {
            let mut fds = [PollFd::new(self.device.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, PollTimeout::ZERO) != Ok(0) {
                break;
            }
            std::hint::spin_loop();
        }
        self.taken.store(false, Ordering::Relaxed);
    }
}
