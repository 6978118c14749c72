//! `castored daemon`: opening the store, mounting it, and serving until told to stop.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use ::daemon::{Daemon, Door, Extras, Locations, Recorder, Trust};
use build::{BuildConfig, Scheduler};
use fetch::DownloadOptions;
use keeper::Manager;
use mount::{Kept, Mount};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::{Mode, umask};
use nix_compat::conf::Settings;
use store::{AutoGc, Config, Durability, Signer, Store};
use substitute::{Lazy, Substituters};
use tokio::net::unix::UCred;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::EnvFilter;
use upload::Uploads;

use crate::budget::Budget;
use crate::failure::Failure;
use crate::idle::Idle;
use crate::kept::{self, Note};
use crate::sizes::serve as sizes;
use crate::{fsck, mending, prefetch, state, status};

/// Worker threads for what reads the disk or hashes. Idle ones end.
const BLOCKING_THREADS: usize = 256;
/// What is logged unless `CASTORED_LOG` says otherwise. The database below has nothing to tell an administrator.
const DEFAULT_LOG: &str = "info,fjall=warn,lsm_tree=warn";

/// What runs here, also when its file was replaced or removed, or was only ever in memory.
const OWN_PROGRAM: &str = "/proc/self/exe";

/// How the daemon was started.
pub(crate) struct Options {
    pub(crate) locations: Locations,
    /// Where gRPC listens on TCP, if at all.
    pub(crate) grpc: Option<SocketAddr>,
    /// Where HTTP listens, if the command line says anything of that.
    pub(crate) http: Option<Option<SocketAddr>>,
    /// Settings from the command line.
    pub(crate) overrides: Vec<(String, String)>,
    /// Where sessions are recorded, if at all.
    pub(crate) record: Option<PathBuf>,
    /// Take every client for this.
    pub(crate) forced_trust: Option<Trust>,
    /// Whether a process of ours should keep the mount while nobody serves it, unless somebody else does.
    pub(crate) keeper: bool,
}

/// Where to listen on TCP.
struct Ports {
    grpc: Option<SocketAddr>,
    http: Option<SocketAddr>,
}

/// Tells how many bytes of directories the mount has in memory.
pub(crate) type Listings = Box<dyn Fn() -> u64 + Send + Sync>;

/// How a daemon ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// For good.
    Stopped,
    /// For a successor, which takes over what is kept.
    Left,
}

/// The experimental feature without which stock lets nobody override trust.
pub(crate) const TRUST_OVERRIDE: &str = "daemon-trust-override";

/// The settings of nix.conf, `NIX_CONFIG` and the command line; what is wrong with them is logged.
pub(crate) fn settings(locations: &Locations, overrides: &[(String, String)]) -> Result<Settings, Failure> {
    let nix_config = std::env::var("NIX_CONFIG").ok();
    let processors = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let (settings, warnings) =
        ::daemon::load_settings(&locations.conf_dir, nix_config.as_deref(), overrides, processors)?;
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    Ok(settings)
}

/// Becomes the daemon, or its keeper.
pub(crate) fn run(options: Options) -> Result<ExitCode, Failure> {
    // Directories made here must be open to users, and to nobody else for writing, whoever starts the daemon.
    umask(Mode::from_bits_truncate(0o022));
    start_logging();
    kept::leave_store(Path::new(options.locations.store_dir.as_str()))?;
    build::oom::protect();
    if options.keeper && kept::should_keep() {
        return kept::keep(&options.locations);
    }
    let manager = Manager::from_environment()
        .map_err(|source| Failure::Process { action: "take what the daemon's keeper hands over", source })?;
    let left = kept::mount(&manager);
    let successor = left.is_some();
    let mut mount = None;
    let ended = open_and_serve(options, &manager, left, &mut mount);
    // A failure of a successor's may pass: the next one tries again.
    if matches!(ended, Ok(End::Left)) || (successor && ended.is_err()) {
        if let Some(mount) = mount {
            mount.leave();
        }
    } else {
        if let Some(mount) = mount {
            mount.unmount()?;
        }
        if let Err(error) = manager.remove_all() {
            tracing::debug!(%error, "whoever kept the mount is gone");
        }
    }
    ended.map(|_| ExitCode::SUCCESS)
}

/// Opens the store, mounts it or takes over what an earlier server has left, and serves. The mount is put into `mount`.
fn open_and_serve(
    options: Options,
    manager: &Manager,
    left: Option<Kept>,
    mount: &mut Option<Mount>,
) -> Result<End, Failure> {
    let Options { locations, grpc, http, overrides, record, forced_trust, keeper: _ } = options;
    raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .build()
        .map_err(|source| Failure::Process { action: "start the runtime", source })?;
    let termination = {
        let _inside = runtime.enter();
        Termination::catch(manager.keeps())?
    };

    let (store, settings, budget) = match left {
        Some(left) => {
            let note = Note::of(&left);
            state::make_directories(&locations)?;
            let budget = Budget::new(note.memory)?;
            let store = open_store(&locations, note.durability(), &budget)?;
            *mount = Some(Mount::take_over(store.clone(), left, mount_options(&note, &budget))?);
            // Not before: it may lie in the store.
            let settings = settings(&locations, &overrides)?;
            for (name, changed) in [
                ("durability", ::daemon::durability(&settings)? != note.durability()),
                ("memory-budget", ::daemon::memory_budget(&settings)? != note.memory),
            ] {
                if changed {
                    tracing::warn!(
                        "the setting '{name}' was changed; it takes effect when castored is stopped and started"
                    );
                }
            }
            (store, settings, budget)
        }
        None => {
            let settings = settings(&locations, &overrides)?;
            let (durability, memory) = (::daemon::durability(&settings)?, ::daemon::memory_budget(&settings)?);
            let budget = Budget::new(memory)?;
            state::prepare(&locations)?;
            let note = Note { group: build_group(&settings), immediate: durability == Durability::Immediate, memory };
            let store = open_store(&locations, note.durability(), &budget)?;
            state::prepare_store_dir(&locations)?;
            *mount = Some(mount_store(&store, &locations, &note, &budget, manager)?);
            (store, settings, budget)
        }
    };
    let mut listings: Listings = Box::new(|| 0);
    if let Some(mount) = mount {
        let recognise = mount.recogniser();
        store.recognise_files(Arc::new(move |file| recognise(file.device, file.inode)));
        listings = Box::new(mount.directories_in_memory());
    }
    let ports = Ports { grpc, http: http.map_or_else(|| ::daemon::http_listen(&settings), Ok)? };
    let extras = Extras { streams: Some(budget.streams()), ..extras(&settings, &locations, record, forced_trust)? };
    if let Ok(remote) = std::env::var("NIX_REMOTE") {
        tracing::warn!(remote, "ignoring NIX_REMOTE: a daemon is not its own client");
    }
    let service = Service { settings, ports, extras, budget, listings };
    let served = runtime.block_on(serve(store.clone(), service, locations, manager, termination));
    // Sessions and builds that are still running end here.
    drop(runtime);
    store.sync()?;
    served
}

pub(crate) fn open_store(
    locations: &Locations,
    durability: Durability,
    budget: &Budget,
) -> Result<Arc<Store>, Failure> {
    let mut config = Config::new(locations.store_dir.clone(), &locations.state_dir);
    config.durability = durability;
    budget.configure(&mut config);
    Ok(Store::open(config)?)
}

fn mount_options(note: &Note, budget: &Budget) -> mount::Options {
    mount::Options { group: note.group, directory_cache_bytes: budget.listings(), ..mount::Options::default() }
}

fn mount_store(
    store: &Arc<Store>,
    locations: &Locations,
    note: &Note,
    budget: &Budget,
    manager: &Manager,
) -> Result<Mount, Failure> {
    let store_dir = Path::new(locations.store_dir.as_str());
    let options = mount_options(note, budget);
    if !manager.keeps() {
        return Ok(Mount::new(store.clone(), store_dir, options)?);
    }
    Ok(Mount::kept(store.clone(), store_dir, options, &note.encode(), |mount| {
        manager.store(kept::MOUNT_DEVICE, mount.device())?;
        manager.store(kept::MOUNT_STATE, mount.state())?;
        manager.settle()
    })?)
}

fn extras(
    settings: &Settings,
    locations: &Locations,
    record: Option<PathBuf>,
    forced_trust: Option<Trust>,
) -> Result<Extras, Failure> {
    if let Some(trust) = forced_trust {
        settings.require_feature(TRUST_OVERRIDE)?;
        tracing::warn!(?trust, "taking every client for this, whoever it is");
    }
    let recorder = match record {
        Some(dir) => {
            let recorder =
                Recorder::new(&dir, &locations.store_dir).map_err(Failure::file("record sessions in", &dir))?;
            tracing::warn!(dir = %dir.display(), "recording every session, with everything that is added and read");
            Some(recorder)
        }
        None => None,
    };
    Ok(Extras { recorder, forced_trust, streams: None })
}

/// The group that stock gives its store directory to. A client run as root without the daemon would do that first, and stop
/// at the mount before it comes to where it is told what to do.
fn build_group(settings: &Settings) -> Option<u32> {
    let name = settings.build_users_group.as_deref().filter(|name| !name.is_empty())?;
    nix::unistd::Group::from_name(name).ok().flatten().map(|group| group.gid.as_raw())
}

/// How clients are served.
struct Service {
    settings: Settings,
    ports: Ports,
    extras: Extras,
    budget: Budget,
    listings: Listings,
}

async fn serve(
    store: Arc<Store>,
    service: Service,
    locations: Locations,
    manager: &Manager,
    termination: Termination,
) -> Result<End, Failure> {
    let Service { settings, ports, extras, budget, listings } = service;
    let config = build_config(&locations, &settings);
    let scheduler = Scheduler::new(store.clone(), config, Box::new(Substituters::new(store.clone())));
    mending::start(&store, scheduler.clone(), &settings);
    let lazy = start_lazy(&store, &settings);
    let grpc_unix = grpc_socket(&locations.state_dir);
    let listeners = listen_for_grpc(manager, ports.grpc, grpc_unix.clone(), &settings)?;
    let grpc_address = listeners.tcp_address();
    let services = rpc_services(&store, &settings)?;
    let http = listen_for_http(manager, ports.http, &store, &settings, &locations);
    let http_address = http.as_ref().and_then(|(server, _)| server.address().ok());
    let uploads = start_uploads(&store, &settings);
    let checks =
        fsck::Server { store: store.clone(), scheduler: scheduler.clone(), settings: Arc::new(settings.clone()) };
    let idle_after = ::daemon::optimise_when_idle(&settings)?;
    let daemon = Daemon::new(store.clone(), scheduler.clone(), settings, locations.clone(), extras)?;
    let measuring = (sizes::listen(&locations.state_dir)?, store.clone());
    let idle = idle_after.map(|after| Idle {
        daemon: daemon.clone(),
        scheduler: scheduler.clone(),
        store: store.clone(),
        after,
    });
    let until_the_end = lazy.clone();
    let fetching = lazy.clone().zip(Some((prefetch::serve::listen(&locations.state_dir)?, store.clone())));
    let status = status::Source { daemon: daemon.clone(), scheduler, store, budget, listings, uploads, lazy };
    let answering = status::listen(&locations.state_dir)?;
    let checking = fsck::listen(&locations.state_dir)?;
    let (listener, own_socket) = match kept::activated(manager)? {
        Some(listener) => (listener, None),
        None => (kept::listen(manager, kept::SOCKET, &locations.socket)?, Some(locations.socket.clone())),
    };
    let untrusted_socket = locations.untrusted_socket();
    let untrusted = kept::listen(manager, kept::UNTRUSTED, &untrusted_socket)?;

    let (stop, stopped) = tokio::sync::watch::channel(false);
    let wait = |mut stopped: tokio::sync::watch::Receiver<bool>| async move {
        // An error means that the sender is gone, which is a stop as well.
        let _ = stopped.wait_for(|stopped| *stopped).await;
    };
    let grpc_server = tokio::spawn(listeners.serve(services, wait(stopped.clone())));
    let http_server = tokio::spawn({
        let stopped = wait(stopped.clone());
        async move {
            if let Some((server, served)) = http {
                server.serve(served, http_cache::Limits::default(), stopped).await;
            }
        }
    });
    tokio::spawn(status::answer(answering, status));
    tokio::spawn(checks.run(checking));
    if let Some((lazy, (listener, store))) = fetching {
        tokio::spawn(prefetch::serve::serve(listener, store, lazy));
    }
    if let Some(idle) = idle {
        tokio::spawn(idle.run(stopped.clone()));
    }
    tokio::spawn(sizes::serve(measuring.0, measuring.1));
    let end = tokio::spawn(async move {
        let end = termination.wait().await;
        let _ = stop.send(true);
        end
    });

    tracing::info!(
        socket = %locations.socket.display(),
        store = %locations.store_dir.as_str(),
        grpc = shown(grpc_address),
        http = shown(http_address),
        "castored {} is ready", env!("CARGO_PKG_VERSION"),
    );
    if let Err(error) = manager.ready() {
        tracing::warn!(%error, "cannot tell the service manager that castored is ready");
    }

    tokio::join!(
        daemon.run(listener, Door::Main, wait(stopped.clone())),
        daemon.run(untrusted, Door::Untrusted, wait(stopped)),
    );
    let failed = |action| move |error| Failure::Process { action, source: std::io::Error::other(error) };
    let end = end.await.map_err(failed("wait for signals"))?;
    if let Some(lazy) = until_the_end {
        // While there is a runtime for those who are fetching.
        lazy.stop();
    }
    if end == End::Left {
        // Whoever connects from here on waits for the successor.
        tracing::info!("making room for a successor");
        return Ok(end);
    }
    tracing::info!("stopping");
    let kept_socket = manager.keeps().then_some(&grpc_unix);
    for socket in own_socket.iter().chain([&untrusted_socket]).chain(kept_socket) {
        let _ = std::fs::remove_file(socket);
    }
    grpc_server.await.map_err(failed("serve gRPC"))??;
    http_server.await.map_err(failed("serve HTTP"))?;
    Ok(end)
}

/// Opens the gRPC sockets. Without the TCP one the daemon is worth as much: a port that somebody else has taken
/// must not keep the store from being mounted.
fn listen_for_grpc(
    manager: &Manager,
    tcp: Option<SocketAddr>,
    unix: PathBuf,
    settings: &Settings,
) -> Result<rpc::Listeners, rpc::ServeError> {
    let mut listen = rpc::Listen { tcp, unix: Some(unix) };
    if tcp.is_some() && !settings.allowed_users.iter().any(|user| user == "*") {
        tracing::warn!("not serving gRPC on TCP: allowed-users names users, and a TCP peer could be anybody");
        listen.tcp = None;
    }
    match kept::listen_for_grpc(manager, &listen) {
        Err(error @ rpc::ServeError::Tcp { .. }) => {
            tracing::error!(%error, "going on without gRPC on TCP");
            kept::listen_for_grpc(manager, &rpc::Listen { tcp: None, ..listen })
        }
        other => other,
    }
}

/// The address of a port, for the log.
fn shown(address: Option<SocketAddr>) -> String {
    address.map_or_else(|| "none".to_owned(), |address| address.to_string())
}

/// Opens the port for HTTP. Without it the daemon is worth as much, as with gRPC's.
fn listen_for_http(
    manager: &Manager,
    address: Option<SocketAddr>,
    store: &Arc<Store>,
    settings: &Settings,
    locations: &Locations,
) -> Option<(http_cache::Server, http_cache::Served)> {
    // Not to be served unsigned for want of a key.
    let served = address.map(|_| served_over_http(store, settings, locations)).transpose();
    let opened = served.and_then(|served| {
        let server = kept::listen_for_http(manager, address)?;
        Ok(server.zip(served))
    });
    opened.unwrap_or_else(|error| {
        tracing::error!(%error, "going on without HTTP");
        // Nor is a port kept at which nobody answers.
        let _ = kept::listen_for_http(manager, None);
        None
    })
}

/// Has what is built sent elsewhere, if that is wanted. Without it the daemon is worth as much.
fn start_uploads(store: &Arc<Store>, settings: &Settings) -> Option<Uploads> {
    let urls = ::daemon::upload_to(settings);
    let start = || {
        // Not to be sent unsigned for want of a key.
        let signer = Signer::new(&settings.secret_key_files)?;
        Uploads::start(store, &urls, &signer, &DownloadOptions::new(settings)).map_err(Failure::from)
    };
    start().inspect_err(|error| tracing::error!(%error, "going on without uploads")).ok()
}

/// Has contents fetched that lazy sources have promised. Without it only what is here can be read.
fn start_lazy(store: &Arc<Store>, settings: &Settings) -> Option<Arc<Lazy>> {
    let started = Lazy::start(store, settings);
    started.inspect_err(|error| tracing::error!(%error, "nothing of lazy paths will be fetched")).ok().map(Arc::new)
}

/// The store as a binary cache, signed by the keys of the settings.
pub(crate) fn served_over_http(
    store: &Arc<Store>,
    settings: &Settings,
    locations: &Locations,
) -> Result<http_cache::Served, Failure> {
    let signer = Signer::new(&settings.secret_key_files)?;
    let pushers = ::daemon::http_push_token_file(settings).map(http_cache::Tokens::read).transpose()?;
    let (store, log_dir, room) = (store.clone(), locations.log_dir.clone(), AutoGc::from(settings));
    Ok(http_cache::Served { store, signer, log_dir, pushers, room })
}

fn build_config(locations: &Locations, settings: &Settings) -> BuildConfig {
    let jobs = usize::try_from(settings.max_jobs).unwrap_or(usize::MAX);
    let store_mount = PathBuf::from(locations.store_dir.as_str());
    let config = BuildConfig::new(
        &locations.state_dir,
        locations.log_dir.clone(),
        store_mount,
        PathBuf::from(OWN_PROGRAM),
        jobs,
    );
    BuildConfig { client_env: locations.client_env(), ..config }
}

/// gRPC for processes of this machine, where the kernel says who they are.
pub(crate) fn grpc_socket(state_dir: &Path) -> PathBuf {
    state_dir.join("daemon-socket/grpc")
}

fn rpc_services(store: &Arc<Store>, settings: &Settings) -> Result<rpc::Services, Failure> {
    let trusted_keys = settings.public_keys()?;
    // What is told over gRPC has the paths' own signatures, which is worth something without ours.
    let signer = Signer::new(&settings.secret_key_files).unwrap_or_else(|error| {
        tracing::error!(%error, "what is told over gRPC is not signed here");
        Signer::default()
    });
    let settings = settings.clone();
    Ok(rpc::Services {
        blobs: store.engine().clone(),
        directories: store.engine().clone(),
        paths: store.clone(),
        trusted_keys,
        signer,
        trust_of: Arc::new(move |peer: UCred| {
            let peer = ::daemon::Peer::from_ids(peer.pid().unwrap_or_default(), peer.uid(), peer.gid());
            match peer.trust(&settings) {
                Some(Trust::Trusted) => Some(rpc::Trust::Trusted),
                Some(Trust::Untrusted) => Some(rpc::Trust::Untrusted),
                None => None,
            }
        }),
    })
}

/// Logs to standard error: plain where a service manager reads it, coloured on a terminal.
pub(crate) fn start_logging() {
    let filter = EnvFilter::try_from_env("CASTORED_LOG").unwrap_or_else(|_| EnvFilter::new(DEFAULT_LOG));
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .with_env_filter(filter)
        .init();
}

/// Each client takes a descriptor, and each build a few.
fn raise_descriptor_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

/// The signals that end the daemon. Caught from before the store is mounted, so that none of them leaves the mount
/// behind.
pub(crate) struct Termination {
    end: [Signal; 3],
    /// Asks to make room for a successor.
    leave: Signal,
    /// Whether anybody keeps the mount until that one comes.
    kept: bool,
}

impl Termination {
    pub(crate) fn catch(kept: bool) -> Result<Self, Failure> {
        let catch = |kind| signal(kind).map_err(|source| Failure::Process { action: "catch signals", source });
        let end = [catch(SignalKind::terminate())?, catch(SignalKind::interrupt())?, catch(SignalKind::hangup())?];
        Ok(Self { end, leave: catch(SignalKind::user_defined2())?, kept })
    }

    pub(crate) async fn wait(mut self) -> End {
        let [terminate, interrupt, hangup] = &mut self.end;
        tokio::select! {
            _ = terminate.recv() => End::Stopped,
            _ = interrupt.recv() => End::Stopped,
            _ = hangup.recv() => End::Stopped,
            _ = self.leave.recv() => if self.kept { End::Left } else { End::Stopped },
        }
    }
}
