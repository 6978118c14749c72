//! The forked child: becomes the builder.
//!
//! The order of the steps is the security of it: mounts while there is the right to mount, then the user, then every
//! restriction, then exec (or the builder that is part of this program). Each step either succeeds or ends the process; nothing is best effort except the Landlock
//! scope, which older kernels lack.

use std::convert::Infallible;
use std::ffi::CString;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use nix::fcntl::{OFlag, open};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::personality::{self, Persona};
use nix::sys::prctl::{set_no_new_privs, set_pdeathsig};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Uid, chdir, dup2_stdin, getresgid, getresuid, setgroups, setresgid, setresuid, setsid};

use super::spec::{Executable, Identity, Program, Raw, Spec, View};
use super::{SetupError, Step, loopback, restrict, sys, view};

/// What the child writes to the supervisor when its user namespace waits for its maps.
pub(super) const WANT_MAPS: u8 = 0;

/// Open files a builder starts with: what a login shell has.
const OPEN_FILES: u64 = 1024;
/// Open files it can ask for.
const MAX_OPEN_FILES: u64 = 524_288;

/// `PER_LINUX32` of linux/personality.h: `uname` says `i686` and the like.
const PER_LINUX32: Persona = Persona::from_bits_retain(8);
/// `UNAME26` of linux/personality.h: `uname` says `2.6.x`.
const UNAME26: Persona = Persona::from_bits_retain(0x0002_0000);

/// Becomes the builder; returns only when it could not.
pub(super) fn become_builder(spec: &Spec, link: &mut UnixStream) -> Result<Infallible, SetupError> {
    // The supervisor's death is ours, from the first moment.
    set_pdeathsig(Signal::SIGKILL).step(|| "asking for the death signal")?;
    setsid().step(|| "starting a session")?;
    umask(Mode::from_bits_truncate(0o022));
    if let Some(group) = &spec.cgroup {
        // Zero stands for who writes it.
        std::fs::write(group.as_path().join("cgroup.procs"), "0").step(|| "entering the build's cgroup")?;
    }

    let mut namespaces = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC;
    if matches!(spec.view, View::Sandbox(_)) {
        namespaces |= CloneFlags::CLONE_NEWUTS | own_cgroups(spec);
    }
    if !spec.host_network {
        namespaces |= CloneFlags::CLONE_NEWNET;
    }
    unshare(namespaces).step(|| "making new namespaces")?;
    view::detach_from_host()?;
    match &spec.view {
        View::Sandbox(sandbox) => view::enter_sandbox(sandbox, spec.host_network, spec.identity)?,
        View::Host(host) => view::enter_host_view(host, spec.identity == Identity::Caller)?,
    }
    if !spec.host_network {
        loopback::bring_up()?;
    }
    let null = open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).step(|| "opening /dev/null")?;
    dup2_stdin(&null).step(|| "redirecting the standard input")?;

    if spec.new_privileges && spec.filter_system_calls {
        // Only who may administer the namespace can have a filter without giving up new privileges.
        restrict::filter_system_calls_of_privileged()?;
    }
    become_user(spec, link)?;
    if spec.identity.has_range() {
        own_namespaces(spec)?;
    } else {
        sys::drop_capabilities(spec.new_privileges).step(|| "giving up capabilities")?;
    }
    // Becoming another user has cleared it.
    set_pdeathsig(Signal::SIGKILL).step(|| "asking for the death signal again")?;
    check_supervisor_lives(link)?;

    if !spec.new_privileges {
        set_no_new_privs().step(|| "forbidding new privileges")?;
    }
    if spec.host_network {
        // Without a network namespace of its own, a build could meet its accomplices at abstract sockets.
        sys::scope_abstract_sockets();
    }
    if spec.filter_system_calls && !spec.new_privileges {
        restrict::filter_system_calls()?;
    }

    // Else the builder could use, and hand on, keys of the daemon's session.
    sys::join_new_session_keyring().step(|| "joining a session keyring of its own")?;
    // The daemon's own limit is raised; programs that close or poll all descriptors suffer from that.
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).step(|| "reading the limit of open files")?;
    let hard = hard.min(MAX_OPEN_FILES);
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(OPEN_FILES), hard).step(|| "limiting open files")?;
    let (_, hard) = getrlimit(Resource::RLIMIT_CORE).step(|| "reading the core size limit")?;
    setrlimit(Resource::RLIMIT_CORE, 0, hard).step(|| "limiting core files")?;
    // The same addresses in every run: one source less of outputs that differ.
    if let Ok(persona) = personality::get() {
        let machine = if spec.personality_32 { PER_LINUX32 } else { Persona::empty() };
        let kernel = if spec.linux_26 { UNAME26 } else { Persona::empty() };
        let _ = personality::set(persona | Persona::ADDR_NO_RANDOMIZE | machine | kernel);
    }
    let work_dir = spec.work_dir.as_path();
    chdir(work_dir).step(|| format!("entering {}", work_dir.display()))?;
    sys::default_signals();
    match &spec.program {
        Program::Executable(executable) => exec(executable),
        Program::Builtin(task) => {
            // Exec would have closed them: the helper's sockets are none of the builder's business.
            sys::close_all_but_standard().step(|| "closing descriptors")?;
            std::process::exit(task.run())
        }
    }
}

/// Turns into the build user and makes sure of it.
fn become_user(spec: &Spec, link: &mut UnixStream) -> Result<(), SetupError> {
    let (uid, gid, count) = match spec.identity {
        // The supervisor has put us into a user namespace where there is nobody else.
        Identity::Caller => return Ok(()),
        Identity::BuildUser { uid, gid, count } => (uid, gid, count),
    };
    let root_inside = spec.identity.has_range();
    setgroups(&[]).step(|| "leaving all groups")?;
    let (uid, gid) = if matches!(spec.view, View::Sandbox(_)) {
        unshare(CloneFlags::CLONE_NEWUSER).step(|| "making a user namespace")?;
        link.write_all(&[WANT_MAPS]).step(|| "asking for the user map")?;
        link.read_exact(&mut [0]).step(|| "waiting for the user map")?;
        let (inner_uid, inner_gid) = view::ids_inside(spec.identity);
        check_mapped_away_from_root("/proc/self/uid_map", [inner_uid, uid, count])?;
        check_mapped_away_from_root("/proc/self/gid_map", [inner_gid, gid, count])?;
        (Uid::from_raw(inner_uid), Gid::from_raw(inner_gid))
    } else {
        (Uid::from_raw(uid), Gid::from_raw(gid))
    };
    setresgid(gid, gid, gid).step(|| format!("becoming group {gid}"))?;
    setresuid(uid, uid, uid).step(|| format!("becoming user {uid}"))?;
    let (users, groups) = (getresuid().step(|| "reading the user ids")?, getresgid().step(|| "reading the group ids")?);
    let changed =
        [users.real, users.effective, users.saved].iter().all(|&id| id == uid && (root_inside || !id.is_root()))
            && [groups.real, groups.effective, groups.saved].iter().all(|&id| id == gid);
    if changed { Ok(()) } else { Err(refusal("the build would not run as the build user")) }
}

/// Namespaces that belong to the build's user namespace, so that the build's root can do with them what root does: a
/// container needs mounts and interfaces of its own.
fn own_namespaces(spec: &Spec) -> Result<(), SetupError> {
    let mut namespaces = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    if !spec.host_network {
        namespaces |= CloneFlags::CLONE_NEWNET;
    }
    unshare(namespaces | own_cgroups(spec)).step(|| "making namespaces of the build's root")?;
    if spec.host_network { Ok(()) } else { loopback::bring_up() }
}

/// A namespace in which the build's cgroup is the root of all, if it has one.
fn own_cgroups(spec: &Spec) -> CloneFlags {
    if spec.cgroup.is_some() { CloneFlags::CLONE_NEWCGROUP } else { CloneFlags::empty() }
}

/// The only users of our namespace must be these (first inside, first outside, how many), and none of them root. Root
/// by mistake must never run a builder.
fn check_mapped_away_from_root(map: &str, wanted: [u32; 3]) -> Result<(), SetupError> {
    let map = std::fs::read_to_string(map).step(|| format!("reading {map}"))?;
    let numbers: Vec<u32> = map.split_whitespace().filter_map(|n| n.parse().ok()).collect();
    let [_, outside, count] = wanted;
    if outside != 0 && outside.checked_add(count).is_some() && numbers == wanted {
        return Ok(());
    }
    Err(refusal("the user namespace does not map to the build user"))
}

/// The death signal is not sent for a death that came before it was asked for.
fn check_supervisor_lives(link: &UnixStream) -> Result<(), SetupError> {
    let mut fds = [PollFd::new(link.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO).step(|| "looking for the supervisor")?;
    if fds[0].revents().is_some_and(|r| r.intersects(PollFlags::POLLHUP | PollFlags::POLLERR)) {
        return Err(refusal("the supervisor is gone"));
    }
    Ok(())
}

fn refusal(why: &str) -> SetupError {
    SetupError { step: "refusing to start the builder".into(), source: io::Error::other(why) }
}

fn exec(executable: &Executable) -> Result<Infallible, SetupError> {
    let c = |bytes: Vec<u8>| CString::new(bytes).step(|| "passing a string with a zero byte to the builder");
    let list = |raw: &[Raw]| raw.iter().map(|r| c(r.as_bytes().to_vec())).collect::<Result<Vec<_>, _>>();
    let program = c(executable.path.as_bytes().to_vec())?;
    let args = list(&executable.args)?;
    let env = executable
        .env
        .iter()
        .map(|(name, value)| c([name.as_bytes(), b"=", value.as_bytes()].concat()))
        .collect::<Result<Vec<_>, _>>()?;
    Err(sys::exec(&program, &args, &env)).step(|| format!("executing '{}'", program.to_string_lossy()))
}
