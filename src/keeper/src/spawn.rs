//! Starting a server with descriptors at the numbers where it looks for them.
//!
//! The standard library's `Command` can neither place descriptors nor tell a child its own process id, which
//! `LISTEN_PID` has to be.
#![allow(unsafe_code)]

use std::convert::Infallible;
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::fcntl::{AtFlags, FcntlArg, fcntl};
use nix::sys::signal::SigSet;
use nix::unistd::{ForkResult, Pid, dup2_raw, execveat, fork, getpid};

use crate::image;

/// The first descriptor that is handed over.
const FIRST: RawFd = 3;
/// What a server is told by its manager, and must not hear from ours.
const VARIABLES: [&str; 6] =
    ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID", "FDSTORE", "NOTIFY_SOCKET"];
/// Exit code of a server that could not be executed.
pub(crate) const NOT_EXECUTED: i32 = 127;

/// Starts the program with these descriptors, and no others but the standard three. The caller has one thread.
pub(crate) fn spawn(
    program: BorrowedFd<'_>,
    arguments: &[CString],
    descriptors: &[(&str, BorrowedFd<'_>)],
) -> nix::Result<Pid> {
    // SAFETY: this process has one thread, so the child may do whatever the parent may.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            let Err(error) = become_server(program, arguments, descriptors);
            tracing::error!(%error, "cannot execute the server");
            std::process::exit(NOT_EXECUTED)
        }
    }
}

fn become_server(
    program: BorrowedFd<'_>,
    arguments: &[CString],
    descriptors: &[(&str, BorrowedFd<'_>)],
) -> nix::Result<Infallible> {
    let end = FIRST + descriptors.len() as RawFd;
    // First all out of the way, so that none is covered before it has been placed.
    let aside = |descriptor: BorrowedFd<'_>| -> nix::Result<OwnedFd> {
        let number = fcntl(descriptor, FcntlArg::F_DUPFD_CLOEXEC(end))?;
        // SAFETY: the kernel has just made it.
        Ok(unsafe { OwnedFd::from_raw_fd(number) })
    };
    let program = aside(program)?;
    let moved = descriptors.iter().map(|(_, descriptor)| aside(*descriptor)).collect::<nix::Result<Vec<_>>>()?;
    for (number, descriptor) in (FIRST..end).zip(&moved) {
        // SAFETY: the number may belong to something of this process that is still open. It is not used any more: this
        // process executes another program or exits, and runs no destructors.
        std::mem::forget(unsafe { dup2_raw(descriptor, number) }?);
    }
    let names: Vec<&str> = descriptors.iter().map(|(name, _)| *name).collect();
    let mut environment = image::environment(&VARIABLES);
    let told = [
        format!("LISTEN_PID={}", getpid()),
        format!("LISTEN_FDS={}", descriptors.len()),
        format!("LISTEN_FDNAMES={}", names.join(":")),
    ];
    environment.extend(told.into_iter().filter_map(|line| CString::new(line).ok()));
    SigSet::empty().thread_set_mask()?;
    execveat(program.as_fd(), c"", arguments, &environment, AtFlags::AT_EMPTY_PATH)
}
