//! What outlives the serving process, and who keeps it: a keeper of ours, or systemd.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ::daemon::Locations;
use keeper::{Config, Keeper, Limits, Manager, image, replace};
use mount::Kept;
use serde::{Deserialize, Serialize};
use store::Durability;
use tokio::net::UnixListener;

use crate::failure::Failure;

/// Names of what is kept: the mount, and the sockets that clients connect to.
pub(crate) const MOUNT_DEVICE: &str = "mount-device";
pub(crate) const MOUNT_STATE: &str = "mount-state";
pub(crate) const SOCKET: &str = "socket";
pub(crate) const UNTRUSTED: &str = "untrusted";
pub(crate) const GRPC: &str = "grpc";
pub(crate) const GRPC_TCP: &str = "grpc-tcp";
pub(crate) const HTTP_TCP: &str = "http-tcp";
const ALL: [&str; 7] = [MOUNT_DEVICE, MOUNT_STATE, SOCKET, UNTRUSTED, GRPC, GRPC_TCP, HTTP_TCP];

/// What the first server tells its successors, who have to serve the mount before they may look at anything: the
/// configuration may itself lie in the store.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Note {
    /// Whose the store directory seems to be.
    pub(crate) group: Option<u32>,
    /// Whether registrations are durable before they are answered.
    pub(crate) immediate: bool,
    /// The memory budget in bytes, if one is set.
    #[serde(default)]
    pub(crate) memory: Option<u64>,
}

impl Note {
    pub(crate) fn durability(&self) -> Durability {
        if self.immediate { Durability::Immediate } else { Durability::Grouped }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    pub(crate) fn of(kept: &Kept) -> Note {
        serde_json::from_slice(kept.note()).unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot read what the first server noted; going on with what is usual");
            Note::default()
        })
    }
}

/// Runs the daemon from memory from now on, when its program lies in the store. Returns when it does not, or does run from
/// memory.
pub(crate) fn leave_store(store_dir: &Path) -> Result<(), Failure> {
    if !image::lies_in(store_dir) {
        return Ok(());
    }
    let libraries = image::libraries_in(store_dir);
    if !libraries.is_empty() {
        tracing::warn!(
            ?libraries,
            "castored uses libraries in the store that it serves: when they are not in memory, it waits for itself for ever; \
             use one that is linked statically"
        );
    }
    let gone = |source| Failure::Process { action: "run castored from memory", source };
    image::copy_own().and_then(image::become_program).map_err(gone).map(|never| match never {})
}

/// Whether this process should keep a server rather than be one.
pub(crate) fn should_keep() -> bool {
    // What lies in the store cannot be started by others while nobody serves the store: then systemd cannot keep it.
    let by_systemd = keeper::by_service_manager() && !image::is_copy();
    !(keeper::by_keeper() || by_systemd)
}

/// Keeps servers until one ends in order.
pub(crate) fn keep(locations: &Locations) -> Result<ExitCode, Failure> {
    let failed = |action| move |source| Failure::Process { action, source };
    let config = Config {
        program: image::own().map_err(failed("open castored's program"))?,
        arguments: image::arguments(std::env::args_os()),
        given: keeper::given().map_err(failed("take what the service manager hands over"))?,
        control: control(&locations.state_dir),
        limits: Limits::default(),
        release,
    };
    let end = Keeper::new(config)?.run()?;
    abandon(end.kept);
    Ok(ExitCode::from(end.code))
}

/// Lets threads die that wait for the mount, which nobody serves.
fn release(kept: &[(String, OwnedFd)], threads: &[u32]) {
    let Some((_, device)) = kept.iter().find(|(name, _)| name == MOUNT_DEVICE) else { return };
    match mount::answer_for(device.as_fd(), threads) {
        Ok(0) => {}
        Ok(count) => tracing::warn!(count, "answered, with an error, what dying processes had asked of the mount"),
        Err(error) => tracing::warn!(%error, "cannot answer dying processes that wait for the mount"),
    }
}

/// Takes away what no server will serve any more.
fn abandon(mut kept: Vec<(String, OwnedFd)>) {
    let mut take = |name: &str| {
        let at = kept.iter().position(|(other, _)| other == name)?;
        Some(kept.swap_remove(at).1)
    };
    if let Some((device, state)) = take(MOUNT_DEVICE).zip(take(MOUNT_STATE)) {
        let abandoned = Kept::new(device, state).and_then(|kept| {
            tracing::error!(mountpoint = %kept.mountpoint().display(), "nobody serves the mount any more; it is taken away");
            mount::abandon(kept)
        });
        if let Err(error) = abandoned {
            tracing::error!(%error, "cannot take the mount away");
        }
    }
    for (_, socket) in kept {
        let address = StdUnixListener::from(socket).local_addr();
        if let Some(path) = address.ok().as_ref().and_then(|address| address.as_pathname()) {
            let _ = fs::remove_file(path);
        }
    }
}

/// Where the keeper listens. Only the daemon's user may enter the directory.
fn control(state_dir: &Path) -> PathBuf {
    state_dir.join("castored/keeper.socket")
}

/// `castored daemon --replace`: has the program that runs here take the running daemon's place.
pub(crate) fn replace(locations: &Locations) -> Result<ExitCode, Failure> {
    let store_dir = Path::new(locations.store_dir.as_str());
    let program = if image::lies_in(store_dir) { image::copy_own() } else { image::own() };
    let program = program.map_err(|source| Failure::Process { action: "open castored's program", source })?;
    replace::ask(&control(&locations.state_dir), program.as_fd())?;
    println!("the daemon was replaced and serves");
    Ok(ExitCode::SUCCESS)
}

/// The mount that an earlier server left, if it can be taken over.
pub(crate) fn mount(manager: &Manager) -> Option<Kept> {
    let (device, state) = manager.take(MOUNT_DEVICE).zip(manager.take(MOUNT_STATE))?;
    let unusable = match Kept::new(device, state) {
        Ok(kept) if kept.is_alive() => return Some(kept),
        Ok(kept) => {
            tracing::warn!("the mount of the earlier server is gone");
            mount::abandon(kept).err()
        }
        Err(error) => Some(error),
    };
    if let Some(error) = unusable {
        tracing::warn!(%error, "cannot take the mount over; mounting anew");
    }
    for name in [MOUNT_DEVICE, MOUNT_STATE] {
        if let Err(error) = manager.remove(name) {
            tracing::warn!(name, %error, "cannot take it from whoever keeps it");
        }
    }
    None
}

/// A Unix socket of an earlier server's that still listens where it should, or else a new one, which is kept then.
pub(crate) fn listen(manager: &Manager, name: &str, path: &Path) -> Result<UnixListener, Failure> {
    if let Some(socket) = manager.take(name) {
        let listener = StdUnixListener::from(socket);
        if listens_at(&listener, path) {
            return Ok(::daemon::adopt(listener.into())?);
        }
        forget(manager, name);
    }
    let listener = ::daemon::bind(path)?;
    keep_open(manager, name, listener.as_fd());
    Ok(listener)
}

/// The socket that a socket unit of systemd gave, if one did.
pub(crate) fn activated(manager: &Manager) -> Result<Option<UnixListener>, Failure> {
    Ok(manager.take_other(&ALL).map(::daemon::adopt).transpose()?)
}

/// Opens the sockets for gRPC, or takes those of an earlier server.
pub(crate) fn listen_for_grpc(manager: &Manager, listen: &rpc::Listen) -> Result<rpc::Listeners, rpc::ServeError> {
    let tcp = manager.take(GRPC_TCP).map(TcpListener::from).filter(|tcp| serves(tcp, listen.tcp));
    let unix = manager.take(GRPC).map(StdUnixListener::from);
    let unix = unix.filter(|socket| listen.unix.as_deref().is_some_and(|path| listens_at(socket, path)));
    let missing =
        rpc::Listen { tcp: listen.tcp.filter(|_| tcp.is_none()), unix: listen.unix.clone().filter(|_| unix.is_none()) };
    let mut listeners = rpc::Listeners::bind(&missing)?;
    if manager.keeps() {
        let (new_tcp, new_unix) = listeners.share();
        for (name, socket) in [(GRPC_TCP, new_tcp), (GRPC, new_unix)] {
            if let Some(socket) = socket {
                forget(manager, name);
                keep_open(manager, name, socket);
            }
        }
    }
    // They are listening sockets: nothing can be wrong with them but this process's lack of descriptors.
    listeners
        .adopt(tcp, unix)
        .map_err(|source| rpc::ServeError::Unix { path: listen.unix.clone().unwrap_or_default(), source })
}

/// Opens the socket for HTTP, or takes that of an earlier server. Where there is to be none any more, that one is closed.
pub(crate) fn listen_for_http(
    manager: &Manager,
    address: Option<SocketAddr>,
) -> Result<Option<http_cache::Server>, http_cache::ListenError> {
    if let Some(socket) = manager.take(HTTP_TCP).map(TcpListener::from) {
        if let Some(address) = address.filter(|_| serves(&socket, address)) {
            let taken = http_cache::Server::adopt(socket);
            return taken.map(Some).map_err(|source| http_cache::ListenError { address, source });
        }
        forget(manager, HTTP_TCP);
    }
    let Some(address) = address else { return Ok(None) };
    let server = http_cache::Server::bind(address)?;
    if manager.keeps() {
        keep_open(manager, HTTP_TCP, server.socket());
    }
    Ok(Some(server))
}

fn serves(tcp: &TcpListener, wanted: Option<SocketAddr>) -> bool {
    let (Ok(address), Some(wanted)) = (tcp.local_addr(), wanted) else { return false };
    address.ip() == wanted.ip() && (wanted.port() == 0 || address.port() == wanted.port())
}

fn listens_at(socket: &StdUnixListener, path: &Path) -> bool {
    let there = socket.local_addr().is_ok_and(|address| address.as_pathname() == Some(path));
    // Whether somebody has removed or replaced it cannot be seen from the socket.
    there && path.exists()
}

fn keep_open(manager: &Manager, name: &str, socket: std::os::fd::BorrowedFd<'_>) {
    if let Err(error) = manager.store(name, socket) {
        tracing::warn!(name, %error, "cannot have a socket kept open; clients will find it closed when castored restarts");
    }
}

fn forget(manager: &Manager, name: &str) {
    if let Err(error) = manager.remove(name) {
        tracing::warn!(name, %error, "cannot take a socket from whoever keeps it");
    }
}
