//! The daemon under test: started in a room, stopped, killed.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::unistd::Pid;

use crate::error::{Context, Error, Result};
use crate::memory;
use crate::room::{BUILD_GROUP, MEMBERS, Room, TRUSTED, USER};
use crate::{Call, Who};

/// Where clients look for the daemon in a room.
pub const SOCKET: &str = "/nix/var/nix/daemon-socket/socket";
/// How long a daemon may take to answer after its start, or to end after SIGTERM.
const PATIENCE: Duration = Duration::from_secs(30);
/// Names another daemon than the workspace's own, for example a stock `nix-daemon`.
const DAEMON_VARIABLE: &str = "CASTORED_COMPAT_DAEMON";
/// Connects a socket under another user's name.
const CONNECT: &str = "compat-connect";
/// Where castored, called as `nix-daemon`, listens for gRPC.
pub const GRPC_VARIABLE: &str = "CASTORED_GRPC_LISTEN";

/// A daemon binary.
#[derive(Debug, Clone)]
pub struct Subject {
    binary: PathBuf,
    stock: bool,
}

impl Subject {
    /// The daemon that `CASTORED_COMPAT_DAEMON` names, else the `castored` built beside the running executable.
    pub fn from_environment() -> Result<Self> {
        if let Some(path) = std::env::var_os(DAEMON_VARIABLE) {
            let path = PathBuf::from(path);
            let stock = path.with_file_name("nix-instantiate").exists();
            return Ok(Self { binary: path, stock });
        }
        let advice = format!("run `cargo build -p castored` first, or name a daemon in {DAEMON_VARIABLE}");
        Ok(Self { binary: beside_us("castored", &advice)?, stock: false })
    }

    /// Stock Nix's own daemon.
    pub fn stock(release: &crate::Release) -> Self {
        Self { binary: release.command("nix-daemon"), stock: true }
    }

    /// Whether this is stock Nix, of which only stock's promises can be tested.
    pub fn is_stock(&self) -> bool {
        self.stock
    }

    /// The binary's path.
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// A copy of the binary in the room, which the unprivileged user can run wherever the checkout lies.
    pub fn copy_into(&self, room: &Room) -> Result<PathBuf> {
        let copy = room.dir().join("bin/castored");
        if !copy.exists() {
            fs::copy(&self.binary, &copy).doing("copying", &self.binary)?;
        }
        Ok(copy)
    }

    /// How to start the daemon in this room: called by the name `nix-daemon`, so that castored behaves as stock does.
    /// Under that name it opens no gRPC port unless [`GRPC_VARIABLE`] says so; rooms run side by side.
    pub fn command(&self, room: &Room, conf: &str) -> Result<Command> {
        let name = room.dir().join("bin/nix-daemon");
        if !name.exists() {
            // Not a copy: a stock nix finds its libraries by its own place.
            symlink(&self.binary, &name).doing("linking", &name)?;
        }
        let conf_dir = room.dir().join("daemon-conf");
        fs::create_dir_all(&conf_dir).doing("creating", &conf_dir)?;
        fs::write(conf_dir.join("nix.conf"), conf).doing("writing", conf_dir.join("nix.conf"))?;
        let mut command = Command::new(&name);
        command.env_clear().env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        command.env("HOME", room.dir().join("home-root")).env("NIX_CONF_DIR", &conf_dir);
        for passed in ["CASTORED_LOG", "RUST_BACKTRACE"] {
            command.envs(std::env::var_os(passed).map(|v| (passed, v)));
        }
        if self.stock
            && let Some(prefix) = self.binary.parent().and_then(Path::parent)
        {
            command.env("NIX_LIBEXEC_DIR", prefix.join("libexec"));
        }
        Ok(command)
    }

    /// Starts the daemon in the room with [`default_conf`] and waits until it answers.
    pub fn start(&self, room: &Room) -> Result<Daemon> {
        self.start_with(room, &default_conf())
    }

    /// Starts the daemon with this nix.conf and waits until it answers.
    pub fn start_with(&self, room: &Room, conf: &str) -> Result<Daemon> {
        Daemon::spawn(self.command(room, conf)?, room, Path::new(SOCKET))
    }

    /// Starts the daemon the way systemd does for a socket unit: the listening socket is descriptor 3.
    pub fn start_activated(&self, room: &Room, conf: &str, listener: UnixListener, socket: &Path) -> Result<Daemon> {
        let inner = self.command(room, conf)?;
        let mut command = Command::new("/bin/sh");
        // LISTEN_PID must name the daemon itself, which the shell becomes.
        command.args(["-c", "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\" 3<&0 </dev/null", "sh"]);
        command.arg(inner.get_program()).args(inner.get_args()).env_clear();
        command.envs(inner.get_envs().filter_map(|(k, v)| Some((k, v?))));
        command.stdin(OwnedFd::from(listener));
        Daemon::spawn(command, room, socket)
    }
}

/// Whether threads of a process run besides its first, or that one does.
fn has_threads(pid: Pid) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    threads > 1 || program_of(pid).is_some()
}

/// A nix.conf under which everything that the tests do is possible.
pub fn default_conf() -> String {
    let busybox = if Path::new("/usr/bin/busybox").exists() { "/usr/bin/busybox" } else { "/bin/busybox" };
    format!(
        "build-users-group = {BUILD_GROUP}\nsandbox = true\nsandbox-paths = /bin/sh={busybox}\nsubstituters =\n\
         trusted-users = root\nexperimental-features = nix-command\nmax-jobs = 2\ncores = 1\n"
    )
}

/// The default, with the users of a room: one trusted by name, one as a member of a group, one not allowed at all.
pub fn identities_conf() -> String {
    let trusted = format!("root {} @{MEMBERS}", TRUSTED.name);
    let conf = default_conf().replace("trusted-users = root", &format!("trusted-users = {trusted}"));
    format!("{conf}allowed-users = {trusted} {}\n", USER.name)
}

/// The program that a process runs; none when it has ended.
fn program_of(pid: Pid) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/exe")).ok()
}

/// A program of this workspace, beside the running executable.
fn beside_us(name: &str, advice: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().doing("finding", "the running executable")?;
    let found = own.ancestors().skip(1).take(2).map(|d| d.join(name)).find(|f| f.exists());
    found.ok_or_else(|| Error::Wrong(format!("no {name} beside {}: {advice}", own.display())))
}

/// A running daemon. Dropping it ends it.
///
/// castored is two processes: the one that was started keeps the mount and the sockets, and its child serves.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    log: PathBuf,
    socket: PathBuf,
}

impl Daemon {
    /// Starts a prepared command with its log captured, and waits until `socket` accepts connections.
    pub fn spawn(mut command: Command, room: &Room, socket: &Path) -> Result<Self> {
        let log = room.dir().join("daemon.log");
        let file = File::options().create(true).append(true).open(&log).doing("opening", &log)?;
        let copy = file.try_clone().doing("opening", &log)?;
        if !command.get_program().eq_ignore_ascii_case("/bin/sh") {
            command.stdin(Stdio::null());
        }
        let program = PathBuf::from(command.get_program());
        let child = command.stdout(copy).stderr(file).spawn().doing("starting", program)?;
        let mut daemon = Self { child, log, socket: socket.to_owned() };
        let start = Instant::now();
        loop {
            if let Some(status) = daemon.child.try_wait().doing("waiting for", "the daemon")? {
                return Err(daemon.failure(format!("the daemon ended at once with {status}")));
            }
            if UnixStream::connect(&daemon.socket).is_ok() {
                return Ok(daemon);
            }
            if start.elapsed() > PATIENCE {
                return Err(daemon.failure(format!("the daemon did not answer within {PATIENCE:?}")));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// A new connection.
    pub fn connect(&self) -> io::Result<UnixStream> {
        UnixStream::connect(&self.socket)
    }

    /// A new connection of somebody else's: the daemon sees them as its peer.
    pub fn connect_as(&self, room: &Room, who: Who) -> Result<UnixStream> {
        let advice = "run `cargo build -p compat-tests` first";
        // A copy, which everybody can run wherever the checkout lies.
        let program = room.dir().join("bin").join(CONNECT);
        if !program.exists() {
            fs::copy(beside_us(CONNECT, advice)?, &program).doing("copying", &program)?;
        }
        let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
            .doing("creating", "a socket")?;
        let copy = socket.try_clone().doing("copying", "a socket")?;
        Call::new(room, who, program).arg(&self.socket).quiet().input_from(copy).ok()?;
        Ok(UnixStream::from(socket))
    }

    /// The id of the process that was started, which a service manager would know.
    pub fn started_pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap_or(i32::MAX))
    }

    /// The id of the process that serves: castored's own child, or the very process that was started.
    pub fn pid(&self) -> Pid {
        self.server().unwrap_or(self.started_pid())
    }

    /// The child that serves, when there is one. What dead servers left may be children as well for a moment.
    fn server(&self) -> Option<Pid> {
        // Stock's children are sessions.
        if !program_of(self.started_pid())?.to_string_lossy().contains("castored") {
            return None;
        }
        let serves = |pid: &Pid| {
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let name = command.split(|byte| *byte == 0).next().unwrap_or_default();
            self.is_worker(*pid) && !name.is_empty() && !name.ends_with(b"castored-sandbox")
        };
        memory::children(self.started_pid()).into_iter().find(serves)
    }

    /// Everything it has logged in this room, over all its starts.
    pub fn log(&self) -> String {
        fs::read(&self.log).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default()
    }

    /// Whether it is still running.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Ends it with SIGTERM, as a service manager does; it must end by itself.
    pub fn stop(mut self) -> Result<ExitStatus> {
        kill(self.started_pid(), Signal::SIGTERM).doing("stopping", "the daemon")?;
        self.wait(PATIENCE)
    }

    /// Waits for the daemon to end by itself.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let start = Instant::now();
        while start.elapsed() < limit {
            if let Some(status) = self.child.try_wait().doing("waiting for", "the daemon")? {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Err(self.failure(format!("the daemon did not end within {limit:?}")))
    }

    /// Sends SIGKILL to all of the daemon: no warning, no cleaning up, and nobody is left who would start it again.
    pub fn send_kill(&self) -> Result<()> {
        // In this order, so that no successor comes.
        let workers: Vec<Pid> =
            memory::children(self.started_pid()).into_iter().filter(|pid| self.is_worker(*pid)).collect();
        kill(self.started_pid(), Signal::SIGKILL).doing("killing", "the daemon")?;
        for pid in workers {
            let _ = kill(pid, Signal::SIGKILL);
        }
        Ok(())
    }

    /// Sends SIGKILL to the process that serves; the one that keeps the mount goes on.
    pub fn kill_server(&self) -> Result<Pid> {
        let pid = self.server().ok_or_else(|| self.failure("nobody serves".into()))?;
        kill(pid, Signal::SIGKILL).doing("killing", "the server")?;
        Ok(pid)
    }

    /// Whether a child is the daemon itself once more, rather than something it runs.
    fn is_worker(&self, pid: Pid) -> bool {
        program_of(pid).is_some_and(|program| {
            let ours = program_of(self.started_pid());
            // A replaced server has another program.
            Some(&program) == ours.as_ref() || program.to_string_lossy().contains("castored")
        })
    }

    /// Kills it without warning and waits for its end.
    pub fn kill_hard(mut self) -> Result<()> {
        let server = self.pid();
        self.send_kill()?;
        self.child.wait().doing("waiting for", "the daemon")?;
        // Not our child. Its socket takes connections until the last of its threads has ended, which may be at the disk.
        let start = Instant::now();
        while has_threads(server) && start.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// An error that shows the log.
    fn failure(&self, what: String) -> Error {
        Error::Daemon { what, log: self.log() }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.is_running()
            && kill(self.started_pid(), Signal::SIGTERM).is_ok()
            && self.wait(Duration::from_secs(10)).is_err()
        {
            let _ = self.send_kill();
            let _ = self.child.wait();
        }
    }
}
