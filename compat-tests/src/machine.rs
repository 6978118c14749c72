//! Brings a Debian machine to where the tests can run: packages, `/dev/fuse`, the Nix releases, stock's test data.

use std::fs::{self, File, OpenOptions, Permissions};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use nix::fcntl::{Flock, FlockArg};
use nix::unistd::{Pid, geteuid};

use crate::error::{Context, Error, Result};
use crate::releases::{self, Release};
use crate::{apt, sources};

/// Everything downloaded for the tests lives here; safe to delete at any time.
pub const CACHE: &str = "/var/tmp/castored-compat";

/// The Debian packages the harness and the demo use.
const PACKAGES: &[&str] = &["attr", "b3sum", "busybox-static", "fuse3", "patchelf", "procps", "xz-utils"];

/// A machine on which tests can run.
#[derive(Debug)]
pub struct Machine {
    /// The four stock releases, oldest first.
    pub releases: Vec<Release>,
    /// The data of stock's own unit tests: a directory for each format.
    pub unit_data: PathBuf,
}

impl Machine {
    /// The newest stock release: the usual client, and the stock daemon where one is needed.
    pub fn newest(&self) -> &Release {
        &self.releases[self.releases.len() - 1]
    }

    /// The release of that version, which must be one of the four.
    pub fn release(&self, version: &str) -> Result<&Release> {
        self.releases
            .iter()
            .find(|r| r.version == version)
            .ok_or_else(|| Error::Wrong(format!("no stock release {version}")))
    }
}

/// An address of the loopback interface at which nobody listens now.
pub fn free_address() -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").doing("listening on", "the loopback interface")?;
    listener.local_addr().doing("asking for the address of", "a listener")
}

/// Why tests cannot run here (no root, no FUSE), if so.
pub fn obstacle() -> Option<&'static str> {
    if !geteuid().is_root() {
        Some("not root: mount namespaces and a daemon of its own need root")
    } else if !Path::new("/dev/fuse").exists() && Command::new("modprobe").arg("fuse").status().is_err() {
        Some("no /dev/fuse on this machine")
    } else {
        None
    }
}

/// Prepares the machine once per process; processes take turns. Later calls are cheap.
pub fn prepare() -> Result<&'static Machine> {
    static MACHINE: OnceLock<Machine> = OnceLock::new();
    if let Some(machine) = MACHINE.get() {
        return Ok(machine);
    }
    let cache = Path::new(CACHE);
    fs::create_dir_all(cache).doing("creating", cache)?;
    fs::set_permissions(cache, Permissions::from_mode(0o755)).doing("opening to all", cache)?;
    let _turn = lock(cache)?;
    apt::install(PACKAGES)?;
    if Path::new("/dev/fuse").exists() {
        // What udev does on a full system: the device itself checks who may mount.
        fs::set_permissions("/dev/fuse", Permissions::from_mode(0o666)).doing("opening to all", "/dev/fuse")?;
    }
    remove_abandoned_rooms();
    let releases = releases::fetch_all(cache)?;
    let unit_data = sources::fetch(cache, sources::UNIT_DATA_RELEASE)?.join(sources::UNIT_DATA);
    Ok(MACHINE.get_or_init(|| Machine { releases, unit_data }))
}

/// Waits for the turn to change what is in the cache.
pub(crate) fn lock(cache: &Path) -> Result<Flock<File>> {
    let lock = cache.join(".lock");
    let file = OpenOptions::new().create(true).write(true).truncate(false).mode(0o600).open(&lock);
    let file = file.doing("opening", &lock)?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| e).doing("locking", &lock)
}

/// Deletes rooms whose process was killed before it could do so itself. Their mounts went with their namespaces.
fn remove_abandoned_rooms() {
    for entry in fs::read_dir("/var/tmp").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner =
            name.to_str().and_then(|n| n.strip_prefix("castored-room-")?.split('-').next()?.parse::<i32>().ok());
        if owner.is_some_and(|pid| nix::sys::signal::kill(Pid::from_raw(pid), None).is_err()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
