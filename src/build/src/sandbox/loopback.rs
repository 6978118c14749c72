//! The network of a sandboxed build: a loopback interface that is up, and nothing else.

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use std::os::fd::AsFd;

use super::{SetupError, Step, sys};

/// Brings up `lo` in this network namespace.
pub(super) fn bring_up() -> Result<(), SetupError> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
        .step(|| "opening a socket for the loopback interface")?;
    sys::set_interface_up(socket.as_fd(), b"lo").step(|| "bringing up the loopback interface")
}
