//! What runs inside of a build to attack others: this test program itself, as the builder.
//!
//! A variable says which attack. What it finds out it says as a line of the build's log. An attack that can be
//! repelled in several ways says only whether it was.

use std::fs::{self, File, OpenOptions};
use std::io::IoSlice;
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::fcntl::AT_FDCWD;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat, mknod, mknodat};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::{Pid, getpid, getppid};

/// Names the attack.
pub(crate) const ATTACK: &str = "CASTORED_ATTACK";
/// What the attack is aimed at.
pub(crate) const TARGET: &str = "CASTORED_TARGET";
/// Before every line that this program says, to tell it from what the test harness says.
pub(crate) const SAID: &str = "attack: ";

fn say(text: impl std::fmt::Display) {
    println!("\n{SAID}{text}");
}

/// Says of an attack whether it went through.
fn outcome<T, E: std::fmt::Debug>(name: &str, result: Result<T, E>) {
    match result {
        Ok(_) => say(format_args!("{name} WORKED")),
        Err(error) => eprintln!("{name}: {error:?}"),
    }
}

#[test]
fn attacker() {
    let Ok(attack) = std::env::var(ATTACK) else { return };
    let target = std::env::var(TARGET).unwrap_or_default();
    let out = std::env::var("out").unwrap_or_default();
    match attack.as_str() {
        "abstract" => outcome("abstract socket", connect_abstract(&target)),
        "pass" => pass_descriptor(&target, &out, b"good\n"),
        "pass-large" => pass_descriptor(&target, &out, &vec![b'g'; LARGE]),
        "pass-directory" => pass_directory(&target, &out),
        "processes" => processes(&target),
        "wait" => wait_for(&target),
        "setuid" => setuid_files(&out),
        "namespaces" => namespaces(&target),
        "descriptors" => descriptors(),
        other => panic!("no such attack: {other}"),
    }
    if !Path::new(&out).exists() {
        fs::write(&out, "done\n").unwrap();
    }
}

fn connect_abstract(name: &str) -> std::io::Result<UnixStream> {
    UnixStream::connect_addr(&SocketAddr::from_abstract_name(name)?)
}

fn hand_over(socket: &UnixStream, file: &File) {
    let fds = [file.as_raw_fd()];
    let message = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(b"x")], &message, MsgFlags::empty(), None).unwrap();
}

/// Bytes of an output that takes a while to be read.
pub(crate) const LARGE: usize = 8 << 20;

/// Gives a writable descriptor of the output away.
fn pass_descriptor(socket: &str, out: &str, contents: &[u8]) {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(out).unwrap();
    std::io::Write::write_all(&mut &file, contents).unwrap();
    let socket = UnixStream::connect(socket).unwrap();
    hand_over(&socket, &file);
    // Until it has arrived.
    let _ = std::io::Read::read(&mut &socket, &mut [0]);
}

/// Makes pairs of a directory and a link to another one, and gives their parent away.
fn pass_directory(target: &str, out: &str) {
    let (socket, outside) = target.split_once(' ').unwrap();
    for pair in 0..PAIRS {
        let directory = format!("{out}/{pair:03}/dir");
        fs::create_dir_all(&directory).unwrap();
        fs::write(format!("{directory}/file"), "inside").unwrap();
        std::os::unix::fs::symlink(outside, format!("{out}/{pair:03}/link")).unwrap();
    }
    let socket = UnixStream::connect(socket).unwrap();
    hand_over(&socket, &File::open(out).unwrap());
    let _ = std::io::Read::read(&mut &socket, &mut [0]);
}

/// How many pairs [`pass_directory`] makes.
pub(crate) const PAIRS: usize = 200;

/// Everything one process can do to others: to the daemon, to its helper, to another build (whose processes are given).
fn processes(targets: &str) {
    say(format_args!("pid {} parent {}", getpid(), getppid()));
    for pid in targets.split(' ').map(|pid| Pid::from_raw(pid.parse().unwrap())).filter(|pid| *pid != getpid()) {
        outcome("signal 0", kill(pid, None));
        outcome("kill", kill(pid, Signal::SIGKILL));
        outcome("ptrace", ptrace::attach(pid));
        let mut bytes = [0; 16];
        let remote = [RemoteIoVec { base: 0x40_0000, len: bytes.len() }];
        // With the process there, it would be EFAULT or bytes.
        let read = process_vm_readv(pid, &mut [std::io::IoSliceMut::new(&mut bytes)], &remote);
        outcome("process_vm_readv", read.or_else(|e| if e == nix::errno::Errno::EFAULT { Ok(0) } else { Err(e) }));
        for name in ["environ", "mem", "root/etc/hostname", "cwd/.", "fd", "maps"] {
            outcome(name, File::open(format!("/proc/{pid}/{name}")).and_then(|mut f| peek(&mut f, name)));
        }
    }
    // All that may be signalled: only what is in this build.
    outcome("kill all", kill(Pid::from_raw(-1), Signal::SIGKILL));
    let mut secrets = 0;
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let environ = fs::read(entry.path().join("environ")).unwrap_or_default();
        secrets += usize::from(environ.windows(6).any(|window| window == b"SECRET"));
    }
    say(format_args!("{secrets} secrets"));
    for path in [
        "/proc/sysrq-trigger",
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/kernel/modprobe",
        "/proc/sys/vm/drop_caches",
        "/proc/self/oom_adj_none",
        "/proc/acpi",
        "/proc/kcore",
        "/proc/1/environ_",
    ] {
        outcome(path, OpenOptions::new().write(true).open(path));
    }
}

fn peek(file: &mut File, name: &str) -> std::io::Result<()> {
    if matches!(name, "fd" | "cwd/.") {
        return Ok(());
    }
    std::io::Read::read(file, &mut [0; 16]).map(|_| ())
}

/// Stays alive, with something worth having, until a file appears.
fn wait_for(text: &str) {
    let (inside, marker) = text.split_once(' ').unwrap();
    fs::write("precious", "of the other build\n").unwrap();
    say("waiting");
    let start = Instant::now();
    while !Path::new(inside).join(marker).exists() && start.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(20));
    }
    say("survived");
}

/// Every way to a file with a setuid or setgid bit, and to a device.
fn setuid_files(out: &str) {
    use std::os::unix::fs::PermissionsExt;
    fs::write("program", "").unwrap();
    let bits = [(Mode::S_ISUID, 0o4000), (Mode::S_ISGID, 0o2000)];
    for (bit, number) in bits {
        let mode = bit | Mode::S_IRWXU;
        outcome("chmod", fs::set_permissions("program", fs::Permissions::from_mode(number | 0o700)));
        outcome("fchmod", File::open("program").unwrap().set_permissions(fs::Permissions::from_mode(number | 0o700)));
        outcome("fchmodat", fchmodat(AT_FDCWD, "program", mode, FchmodatFlags::FollowSymlink));
        outcome("fchmodat2", fchmodat(AT_FDCWD, "program", mode, FchmodatFlags::NoFollowSymlink));
        outcome("mknod", mknod("made", SFlag::S_IFREG, mode, 0));
        outcome("mknodat", mknodat(AT_FDCWD, "made", SFlag::S_IFREG, mode, 0));
        let options = |flags| OpenOptions::new().write(true).custom_flags(flags).mode(number | 0o700).to_owned();
        outcome("open", options(nix::libc::O_CREAT).open("opened"));
        outcome("O_TMPFILE", options(nix::libc::O_TMPFILE).open("."));
    }
    outcome("device", mknod("device", SFlag::S_IFBLK, Mode::S_IRWXU, 1 << 8));
    // And the ordinary ways still work.
    fs::set_permissions("program", fs::Permissions::from_mode(0o755)).unwrap();
    OpenOptions::new().write(true).custom_flags(nix::libc::O_TMPFILE).mode(0o700).open(".").unwrap();
    fs::copy("program", out).unwrap();
}

/// As root of a user namespace of its own making.
fn namespaces(input: &str) {
    outcome("mount", mount(None::<&str>, "/tmp", Some("tmpfs"), MsFlags::empty(), None::<&str>));
    outcome("unshare", unshare(CloneFlags::CLONE_NEWNS));
    // The test harness has threads, and they have no namespaces of their own.
    let script = "mount -t tmpfs none /tmp && echo attack: root; \
         umount $0 2>/dev/null && echo attack: umount WORKED; \
         umount -l /proc 2>/dev/null && echo attack: umount /proc WORKED; \
         mount -o remount,bind,rw $0 2>/dev/null && echo x > $0/new && echo attack: write WORKED; \
         mount -o remount,rw $0 2>/dev/null && echo x > $0/new && echo attack: write WORKED; \
         mount -o remount,rw / 2>/dev/null && echo x > /new && echo attack: root write WORKED; \
         chmod 4755 /bin/sh 2>/dev/null && echo attack: chmod WORKED; \
         touch /build/s; chmod 4755 /build/s 2>/dev/null && echo attack: setuid WORKED; \
         mknod /build/d b 8 0 2>/dev/null && echo attack: device WORKED; \
         echo 1 2>/dev/null > /proc/sys/vm/drop_caches && echo attack: sysctl WORKED; :";
    let script = ["mount ", "umount ", "chmod ", "touch ", "mknod "]
        .iter()
        .fold(script.to_owned(), |script, name| script.replace(&format!(" {name}"), &format!(" /busybox {name}")));
    let script = format!("/busybox {script}");
    let status = std::process::Command::new("/busybox")
        .args(["unshare", "-U", "-r", "-m", "/busybox", "sh", "-c", &script, input])
        .status();
    eprintln!("{status:?}");
    outcome("umount", umount2(input, MntFlags::MNT_DETACH));
}

/// What the build was given without anybody having meant to.
fn descriptors() {
    let mut open: Vec<String> = fs::read_dir("/proc/self/fd")
        .unwrap()
        .flatten()
        .map(|entry| (entry.file_name(), fs::read_link(entry.path()).unwrap_or_default()))
        // What lists them, and the harness's own.
        .filter(|(_, target)| !target.starts_with("/proc") && !target.to_string_lossy().starts_with("anon_inode"))
        .map(|(name, target)| {
            let kind = target.to_string_lossy().split(':').next().unwrap_or_default().to_owned();
            format!("{}={kind}", name.to_string_lossy())
        })
        .collect();
    open.sort();
    say(open.join(" "));
    let mut names: Vec<String> = std::env::vars().map(|(name, _)| name).filter(|name| name.contains("CARGO")).collect();
    names.sort();
    say(format_args!("variables {names:?}"));
    outcome("tty", File::open("/dev/tty"));
}
