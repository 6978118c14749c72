//! castored as a unit of systemd: a manager of our own that takes messages, stores descriptors, and hands them over.

use std::ffi::OsString;
use std::fs;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use compat_tests::subject::{SOCKET, default_conf};
use compat_tests::{Call, Daemon, Who};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use crate::{Setup, castored_setup};

/// What systemd would be to a unit with a socket unit and a store of descriptors.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
    /// Names and numbers, which stay open in the children of this process.
    stored: Vec<(String, RawFd)>,
    ready: usize,
}

impl Manager {
    fn new(s: &Setup) -> Self {
        let path = s.room.tmp("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let listening = Path::new(SOCKET);
        fs::create_dir_all(listening.parent().unwrap()).unwrap();
        let listener = UnixListener::bind(listening).unwrap();
        fs::set_permissions(listening, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
        Self { socket, path, stored: vec![("castored.socket".to_owned(), inheritable(&listener))], ready: 0 }
    }

    /// Starts the daemon as the unit does, and waits until it says that it is ready.
    fn start(&mut self, s: &Setup) -> Daemon {
        let inner = s.subject.command(&s.room, &default_conf()).unwrap();
        let places = self.stored.iter().zip(3..).map(|((_, number), place)| format!(" {place}<&{number}"));
        let others = self.stored.iter().map(|(_, number)| format!(" {number}<&-"));
        let script = format!(
            "exec{}; exec{}; LISTEN_PID=$$ exec \"$@\" </dev/null",
            places.collect::<String>(),
            others.collect::<String>()
        );
        let names: Vec<&str> = self.stored.iter().map(|(name, _)| name.as_str()).collect();
        let mut command = Command::new("/bin/bash");
        command.args(["-c", &script, "bash"]).arg(inner.get_program()).args(inner.get_args()).env_clear();
        command.envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command.envs([
            ("LISTEN_FDS", OsString::from(self.stored.len().to_string())),
            ("LISTEN_FDNAMES", names.join(":").into()),
            ("NOTIFY_SOCKET", self.path.clone().into()),
            ("FDSTORE", "16".into()),
        ]);
        let (before, start) = (self.ready, Instant::now());
        thread::scope(|scope| {
            let starting = scope.spawn(|| Daemon::spawn(command, &s.room, Path::new(SOCKET)).unwrap());
            while self.ready == before {
                assert!(start.elapsed() < Duration::from_secs(20), "it is not ready");
                self.listen();
            }
            starting.join().unwrap()
        })
    }

    /// Takes a message, if one comes.
    fn listen(&mut self) {
        let mut text = [0; 4096];
        let mut control = nix::cmsg_space!([RawFd; 4]);
        let (length, numbers) = {
            let mut parts = [IoSliceMut::new(&mut text)];
            let Ok(message) = recvmsg::<()>(self.socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::empty())
            else {
                return;
            };
            let numbers = message.cmsgs().unwrap().find_map(|control| match control {
                ControlMessageOwned::ScmRights(numbers) => Some(numbers),
                _ => None,
            });
            (message.bytes, numbers.unwrap_or_default())
        };
        let text = String::from_utf8_lossy(&text[..length]).into_owned();
        let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or("stored").to_owned();
        if text.lines().any(|line| line == "FDSTORE=1") {
            self.stored.extend(numbers.into_iter().map(|number| (name.clone(), out_of_the_way(number))));
        } else if text.lines().any(|line| line == "FDSTOREREMOVE=1") {
            let gone = |stored: &(String, RawFd)| stored.0 == name && name != "castored.socket";
            self.stored
                .iter()
                .filter(|stored| gone(stored))
                .for_each(|(_, number)| nix::unistd::close(*number).unwrap());
            self.stored.retain(|stored| !gone(stored));
        } else if text.lines().any(|line| line == "BARRIER=1") {
            numbers.into_iter().for_each(|number| nix::unistd::close(number).unwrap());
        } else if text.lines().any(|line| line == "READY=1") {
            self.ready += 1;
        }
    }

    fn listen_for(&mut self, time: Duration) {
        let start = Instant::now();
        while start.elapsed() < time {
            self.listen();
        }
    }
}

/// The same descriptor by a high number, for the low ones are where a program looks for those that it is given.
fn out_of_the_way(number: RawFd) -> RawFd {
    // SAFETY: it came with a message just now, and nobody else knows its number.
    #[allow(unsafe_code)]
    let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
    inheritable(&descriptor)
}

/// A copy that stays open in programs that are started, where a shell can name it.
fn inheritable(descriptor: &impl std::os::fd::AsFd) -> RawFd {
    nix::fcntl::fcntl(descriptor, nix::fcntl::FcntlArg::F_DUPFD(100)).unwrap()
}

#[test]
fn under_systemd_the_mount_survives_without_a_keeper() {
    let Some(s) = castored_setup("systemd") else { return };
    let mut manager = Manager::new(&s);
    let daemon = manager.start(&s);
    assert_eq!(daemon.pid(), daemon.started_pid(), "systemd is keeper enough");
    let names: Vec<&str> = manager.stored.iter().map(|(name, _)| name.as_str()).collect();
    assert!(names.contains(&"mount-device") && names.contains(&"mount-state"), "{names:?}");
    let file = s.room.write("file", "x".repeat(300_000)).unwrap();
    let path = s.nix(Who::User, "nix-store").arg("--add").arg(&file).ok().unwrap().text();
    let inode = fs::metadata(&path).unwrap().ino();

    // Killed: somebody reads what nobody serves, and gets it.
    daemon.kill_hard().unwrap();
    let daemon = thread::scope(|scope| {
        let reading = scope.spawn(|| fs::read_to_string(&path).unwrap());
        let connecting = Call::nix(&s.room, Who::User, s.machine.newest(), "nix").args(["store", "info"]).quiet();
        let connecting = connecting.spawn().unwrap();
        thread::sleep(Duration::from_millis(200));
        assert!(!reading.is_finished(), "nobody has served it");
        let daemon = manager.start(&s);
        assert_eq!(reading.join().unwrap(), "x".repeat(300_000));
        assert!(connecting.wait_with_output().unwrap().status.success(), "who connected meanwhile was not served");
        daemon
    });
    assert_eq!(fs::metadata(&path).unwrap().ino(), inode);
    assert_eq!(super::successors(&daemon), 1);

    // Restarted in order.
    let mut daemon = daemon;
    kill(daemon.pid(), Signal::SIGUSR2).unwrap();
    assert!(daemon.wait(Duration::from_secs(20)).unwrap().success());
    let daemon = manager.start(&s);
    assert_eq!((fs::metadata(&path).unwrap().ino(), super::successors(&daemon)), (inode, 2));

    // Stopped: all is taken away, but for what is systemd's own.
    assert!(daemon.stop().unwrap().success());
    manager.listen_for(Duration::from_millis(100));
    assert_eq!(manager.stored.len(), 1, "{:?}", manager.stored);
    assert!(Path::new(SOCKET).exists());
    super::assert_unmounted();
    let daemon = manager.start(&s);
    assert_eq!(fs::read_to_string(&path).unwrap().len(), 300_000);
    daemon.stop().unwrap();
}
