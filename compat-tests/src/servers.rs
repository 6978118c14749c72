//! Real servers, from Debian packages that are unpacked and not installed: nginx, and OpenSSH with its client. They run in a
//! room, listen on the loopback interface, and end when they are dropped.

use std::fs::{self, File};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::apt::{PrivateApt, remove_left, run};
use crate::error::{Context, Error, Result};
use crate::machine::{CACHE, free_address, lock};
use crate::releases::{bind_to, copy, copy_libraries};
use crate::room::{Room, User};

/// The suite they come from.
const SUITE: &str = "bookworm";
/// The packages.
const PACKAGES: [&str; 3] = ["nginx", "openssh-client", "openssh-server"];
/// Their programs.
const PROGRAMS: [&str; 4] = ["usr/sbin/nginx", "usr/sbin/sshd", "usr/bin/ssh", "usr/bin/ssh-keygen"];
/// How long one may take to listen.
const PATIENCE: Duration = Duration::from_secs(20);

/// The programs, on disk.
#[derive(Debug, Clone)]
pub struct Servers {
    /// Their directory.
    pub bin: PathBuf,
}

impl Servers {
    /// Fetches what is missing of them.
    pub fn fetch() -> Result<Self> {
        let cache = Path::new(CACHE);
        let _turn = lock(cache)?;
        let place = cache.join("servers");
        if !place.is_dir() {
            println!("fetching {} from Debian {SUITE}", PACKAGES.join(", "));
            fetch(cache, &place)?;
        }
        Ok(Self { bin: place.join("bin") })
    }

    /// nginx that serves the files of a directory, with nothing but its defaults.
    pub fn nginx(&self, room: &Room, files: &Path) -> Result<Server> {
        let address = free_address()?;
        let dir = work(room, "nginx")?;
        self.start_nginx(&dir, address, &format!("listen {address}; root {};", files.display()), "off")
    }

    /// The same in TLS, where it offers HTTP/2.
    pub fn nginx_with_tls(&self, room: &Room, files: &Path) -> Result<Https> {
        let address = free_address()?;
        let dir = work(room, "nginx-tls")?;
        let own = rcgen::generate_simple_self_signed([address.ip().to_string()])
            .map_err(|error| Error::Wrong(format!("cannot make a certificate: {error}")))?;
        let (certificate, key, requests) = (dir.join("certificate"), dir.join("key"), dir.join("requests"));
        fs::write(&certificate, own.cert.pem()).doing("writing", &certificate)?;
        fs::write(&key, own.signing_key.serialize_pem()).doing("writing", &key)?;
        let serve = format!(
            "listen {address} ssl http2; ssl_certificate {}; ssl_certificate_key {}; root {};",
            certificate.display(),
            key.display(),
            files.display()
        );
        let server = self.start_nginx(&dir, address, &serve, &format!("{} seen", requests.display()))?;
        Ok(Https { server, certificate, requests })
    }

    fn start_nginx(&self, dir: &Path, address: SocketAddr, serve: &str, log: &str) -> Result<Server> {
        let d = dir.display();
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .iter()
            .map(|name| format!("{name}_temp_path {d}/{name};\n"))
            .collect();
        let conf = format!(
            "daemon off;\nuser root;\nworker_processes 1;\npid {d}/pid;\nerror_log {d}/log;\nevents {{}}\nhttp {{\n\
             log_format seen '$connection $server_protocol $status $uri';\naccess_log {log};\n{temporary}\
             server {{ {serve} }}\n}}\n"
        );
        fs::write(dir.join("conf"), conf).doing("writing", dir.join("conf"))?;
        let mut command = Command::new(self.bin.join("nginx"));
        command.arg("-p").arg(dir).arg("-e").arg(dir.join("log")).arg("-c").arg(dir.join("conf"));
        Server::start(command, dir, address)
    }

    /// OpenSSH's server, which lets `user` in with a key.
    pub fn sshd(&self, room: &Room, user: User) -> Result<Ssh> {
        let address = free_address()?;
        let dir = work(room, "sshd")?;
        for name in ["host", "own"] {
            let keygen = self.bin.join("ssh-keygen");
            run(Command::new(keygen).args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(dir.join(name)))?;
        }
        let allowed = dir.join("allowed");
        fs::copy(dir.join("own.pub"), &allowed).doing("copying", &allowed)?;
        fs::set_permissions(&allowed, fs::Permissions::from_mode(0o644)).doing("opening to all", &allowed)?;
        let d = dir.display();
        let conf = format!(
            "ListenAddress {address}\nHostKey {d}/host\nAuthorizedKeysFile {d}/allowed\nStrictModes no\nUsePAM no\n\
             PasswordAuthentication no\nAllowUsers {}\nPidFile none\n",
            user.name
        );
        fs::write(dir.join("conf"), conf).doing("writing", dir.join("conf"))?;
        // It wants an empty directory of root's there; the machine's own stays as it is.
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("tmpfs"), "/run", Some("tmpfs"), flags, Some("mode=755")).doing("mounting", "/run")?;
        fs::create_dir("/run/sshd").doing("creating", "/run/sshd")?;
        let mut command = Command::new(self.bin.join("sshd"));
        command.args(["-D", "-e", "-f"]).arg(dir.join("conf"));
        let server = Server::start(command, &dir, address)?;
        let read = |name: &str| fs::read(dir.join(name)).doing("reading", dir.join(name));
        let host_key = data_encoding::BASE64.encode(read("host.pub")?.trim_ascii());
        Ok(Ssh { server, key: dir.join("own"), host_key })
    }
}

/// A server that runs.
#[derive(Debug)]
pub struct Server {
    child: Child,
    /// Where it listens.
    pub address: SocketAddr,
}

/// One that is known by its certificate.
#[derive(Debug)]
pub struct Https {
    /// The server.
    pub server: Server,
    /// The file with its certificate.
    pub certificate: PathBuf,
    /// What it was asked, a line each: the connection's number, the protocol, the status, the file.
    pub requests: PathBuf,
}

/// One that lets in who has a key.
#[derive(Debug)]
pub struct Ssh {
    /// The server.
    pub server: Server,
    /// The file with the key that it lets in.
    pub key: PathBuf,
    /// Its own, as `base64-ssh-public-host-key` has it.
    pub host_key: String,
}

impl Server {
    /// Starts it and waits until it listens.
    fn start(mut command: Command, dir: &Path, address: SocketAddr) -> Result<Self> {
        let log = dir.join("output");
        let file = File::create(&log).doing("creating", &log)?;
        let copy = file.try_clone().doing("opening", &log)?;
        let program = PathBuf::from(command.get_program());
        command.stdin(Stdio::null()).stdout(copy).stderr(file);
        let mut server = Self { child: command.spawn().doing("starting", program)?, address };
        let start = Instant::now();
        while TcpStream::connect(address).is_err() {
            let ended = server.child.try_wait().doing("waiting for", "a server")?;
            if ended.is_some() || start.elapsed() > PATIENCE {
                let said =
                    ["output", "log"].map(|name| fs::read_to_string(dir.join(name)).unwrap_or_default()).concat();
                return Err(Error::Wrong(format!("nobody listens at {address}, {ended:?}: {said}")));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // In order: the workers of nginx end with it.
        let _ = kill(Pid::from_raw(i32::try_from(self.child.id()).unwrap_or(i32::MAX)), Signal::SIGTERM);
        let _ = self.child.wait();
    }
}

fn work(room: &Room, name: &str) -> Result<PathBuf> {
    let dir = room.dir().join(name);
    fs::create_dir(&dir).doing("creating", &dir)?;
    Ok(dir)
}

/// Unpacks beside the final place, then renames.
fn fetch(cache: &Path, place: &Path) -> Result<()> {
    let (work, new) = (cache.join(".apt/servers"), cache.join(".new-servers"));
    remove_left(&[&work, &new])?;
    let root = work.join("root");
    for dir in [&root, &new.join("bin"), &new.join("lib")] {
        fs::create_dir_all(dir).doing("creating", dir)?;
    }
    let is_wanted = |name: &str| ["lib", "zlib", "nginx", "openssh"].iter().any(|part| name.starts_with(part));
    PrivateApt::new(&work, "deb", SUITE)?.unpack_closure(&PACKAGES, &root, is_wanted)?;
    for program in PROGRAMS {
        let (from, name) = (root.join(program), Path::new(program).file_name().unwrap_or_default());
        copy_libraries(&root, &from, &new.join("lib"))?;
        copy(&from, &new.join("bin").join(name))?;
        bind_to(&new.join("bin").join(name), &place.join("lib"))?;
    }
    fs::rename(&new, place).doing("moving into place", place)?;
    fs::remove_dir_all(&work).doing("removing", &work)
}
