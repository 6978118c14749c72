//! The helper's first process: starts the builder, waits for it, kills it when nobody wants it any more.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::signal::{Signal, kill};
use nix::sys::time::TimeVal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, getegid, geteuid};

use super::builder::{WANT_MAPS, become_builder};
use super::spec::{Identity, Report, Spec, View};
use super::window::Window;
use super::{SetupError, Step, sys, view};

/// Longest error text taken from the child.
const MAX_ERROR_BYTES: usize = 16 * 1024;

/// The sandbox helper: what the daemon's executable does when it is called [`HELPER_NAME`](super::HELPER_NAME).
///
/// Must be called before anything starts a thread. Reads the [`Spec`] from the socket that is its standard input;
/// standard output and error are the build's log.
pub fn sandbox_main() -> ! {
    crate::oom::expose();
    let code = match sys::inherited(0) {
        Ok(fd) => {
            let mut daemon = UnixStream::from(fd);
            let report = supervise(&mut daemon).unwrap_or_else(|e| Report::Failed { error: e.to_string() });
            send(&mut daemon, &report).map_or(1, |()| 0)
        }
        Err(e) => {
            eprintln!("castored-sandbox is started by the daemon, with a socket as standard input: {e}");
            2
        }
    };
    std::process::exit(code)
}

fn send(daemon: &mut UnixStream, report: &Report) -> io::Result<()> {
    let mut line = serde_json::to_vec(report)?;
    line.push(b'\n');
    daemon.write_all(&line)
}

fn supervise(daemon: &mut UnixStream) -> Result<Report, SetupError> {
    sys::close_all_on_exec().step(|| "closing inherited descriptors")?;
    let mut text = Vec::new();
    daemon.read_to_end(&mut text).step(|| "reading the build's description")?;
    let spec: Spec = serde_json::from_slice(&text).step(|| "decoding the build's description")?;
    drop(text);

    match spec.identity {
        Identity::BuildUser { uid: 0, .. } => return Err(refusal("the build user is root")),
        Identity::BuildUser { gid: 0, .. } => return Err(refusal("the build user's group is root's")),
        Identity::BuildUser { count: 2.., .. } if matches!(spec.view, View::Host(_)) => {
            return Err(refusal("only a sandbox can have a range of users"));
        }
        Identity::Caller if geteuid().is_root() => return Err(refusal("the daemon is root, but named no build user")),
        Identity::Caller => enter_user_namespace(&spec)?,
        Identity::BuildUser { .. } => {}
    }
    let window = Window::open(&spec)?;
    // Takes effect for the child: it becomes the first process of the new namespace.
    unshare(CloneFlags::CLONE_NEWPID).step(|| "making a pid namespace")?;
    let (mut ours, mut theirs) = UnixStream::pair().step(|| "making a socket pair")?;
    match sys::fork_single_threaded().step(|| "starting the builder's process")? {
        ForkResult::Child => {
            drop((ours, window));
            let Err(error) = become_builder(&spec, &mut theirs);
            let _ = theirs.write_all(error.to_string().as_bytes());
            std::process::exit(1);
        }
        ForkResult::Parent { child } => {
            drop(theirs);
            watch(&spec, daemon, &mut ours, child, window)
        }
    }
}

fn refusal(why: &str) -> SetupError {
    SetupError { step: "refusing to start the build".into(), source: io::Error::other(why) }
}

/// An ordinary user gets the right to mount only inside a user namespace of its own.
fn enter_user_namespace(spec: &Spec) -> Result<(), SetupError> {
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    let (inner_uid, inner_gid) = match spec.view {
        View::Sandbox(_) => view::ids_inside(spec.identity),
        View::Host(_) => (uid, gid),
    };
    unshare(CloneFlags::CLONE_NEWUSER).step(|| "making a user namespace")?;
    fs::write("/proc/self/setgroups", "deny").step(|| "forbidding setgroups")?;
    fs::write("/proc/self/uid_map", format!("{inner_uid} {uid} 1")).step(|| "writing the user map")?;
    fs::write("/proc/self/gid_map", format!("{inner_gid} {gid} 1")).step(|| "writing the group map")
}

fn write_maps(child: Pid, identity: Identity) -> Result<(), SetupError> {
    let Identity::BuildUser { uid, gid, count } = identity else {
        return Err(refusal("only a build user needs its maps written"));
    };
    let (inner_uid, inner_gid) = view::ids_inside(identity);
    fs::write(format!("/proc/{child}/uid_map"), format!("{inner_uid} {uid} {count}"))
        .step(|| "writing the user map")?;
    fs::write(format!("/proc/{child}/gid_map"), format!("{inner_gid} {gid} {count}")).step(|| "writing the group map")
}

/// Waits until the child and everything it started are gone.
fn watch(
    spec: &Spec,
    daemon: &UnixStream,
    link: &mut UnixStream,
    child: Pid,
    mut window: Option<Window>,
) -> Result<Report, SetupError> {
    let pidfd = sys::pidfd_open(child).step(|| "watching the builder")?;
    let mut error = Vec::new();
    let mut link_open = true;
    loop {
        let mut fds =
            vec![PollFd::new(pidfd.as_fd(), PollFlags::POLLIN), PollFd::new(daemon.as_fd(), PollFlags::empty())];
        // What is closed hangs up for ever: leave it out.
        let mut watch = |fd| {
            fds.push(PollFd::new(fd, PollFlags::POLLIN));
            fds.len() - 1
        };
        let link_at = link_open.then(|| watch(link.as_fd()));
        let window_at = window.as_ref().map(|window| watch(window.as_fd()));
        match poll(&mut fds, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => continue,
            other => other.step(|| "waiting for the builder")?,
        };
        let woken = |at: usize| fds[at].revents().is_some_and(|events| !events.is_empty());
        let (ended, hung_up) = (woken(0), woken(1));
        let (spoke, wanted) = (link_at.is_some_and(woken), window_at.is_some_and(woken));
        if hung_up {
            // Nobody will read a report.
            let _ = kill(child, Signal::SIGKILL);
        }
        if link_open && spoke {
            link_open = listen(spec, link, child, &mut error)?;
        }
        if ended && !(link_open && spoke) {
            break;
        }
        if let Some(open) = window.as_mut().filter(|_| wanted && !ended)
            && !open.serve(pidfd.as_fd())?
        {
            window = None;
        }
    }
    let status = waitpid(child, None).step(|| "waiting for the builder")?;
    if !error.is_empty() {
        return Ok(Report::Failed { error: String::from_utf8_lossy(&error).into_owned() });
    }
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).step(|| "reading the CPU times")?;
    let micros = |t: TimeVal| (t.tv_sec().max(0) as u64) * 1_000_000 + t.tv_usec().max(0) as u64;
    let (code, signal) = match status {
        WaitStatus::Exited(_, code) => (Some(code), None),
        WaitStatus::Signaled(_, signal, _) => (None, Some(signal as i32)),
        _ => (None, None),
    };
    Ok(Report::Ended { code, signal, cpu_user: micros(usage.user_time()), cpu_system: micros(usage.system_time()) })
}

/// Takes what the child has to say before it becomes the builder: a request for its maps, or why it failed. False at
/// the end, which is its exec or its death.
fn listen(spec: &Spec, link: &mut UnixStream, child: Pid, error: &mut Vec<u8>) -> Result<bool, SetupError> {
    let mut buffer = [0; 1024];
    let length = link.read(&mut buffer).step(|| "listening to the builder's process")?;
    match &buffer[..length] {
        [] => return Ok(false),
        [WANT_MAPS] => {
            write_maps(child, spec.identity)?;
            // Its death shows as the end of the child.
            let _ = link.write_all(&[1]);
        }
        text => error.extend_from_slice(&text[..text.len().min(MAX_ERROR_BYTES.saturating_sub(error.len()))]),
    }
    Ok(true)
}
