//! `castored daemon`: opening the store, mounting it, and serving until told to stop.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use ::daemon::{Daemon, Door, Extras, Locations, Recorder, Trust};
use build::{BuildConfig, Scheduler};
use mount::Mount;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::{Mode, umask};
use nix_compat::conf::Settings;
use store::{Config, Store};
use substitute::Substituters;
use tokio::net::unix::UCred;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::failure::Failure;
use crate::{fsck, mending, state, status};

/// Worker threads for what reads the disk or hashes. Idle ones end.
const BLOCKING_THREADS: usize = 256;
/// What is logged unless `CASTORED_LOG` says otherwise. The database below has nothing to tell an administrator.
const DEFAULT_LOG: &str = "info,fjall=warn,lsm_tree=warn";

/// How the daemon was started.
pub(crate) struct Options {
    pub(crate) locations: Locations,
    /// Where gRPC listens on TCP, if at all.
    pub(crate) grpc: Option<SocketAddr>,
    /// Settings from the command line.
    pub(crate) overrides: Vec<(String, String)>,
    /// Where sessions are recorded, if at all.
    pub(crate) record: Option<PathBuf>,
    /// Take every client for this.
    pub(crate) forced_trust: Option<Trust>,
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

pub(crate) fn run(options: Options) -> Result<ExitCode, Failure> {
    // Directories made here must be open to users, and to nobody else for writing, whoever starts the daemon.
    umask(Mode::from_bits_truncate(0o022));
    start_logging();
    let Options { locations, grpc, overrides, record, forced_trust } = options;
    let settings = settings(&locations, &overrides)?;
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
    let extras = Extras { recorder, forced_trust };
    if let Ok(remote) = std::env::var("NIX_REMOTE") {
        tracing::warn!(remote, "ignoring NIX_REMOTE: a daemon is not its own client");
    }
    raise_descriptor_limit();

    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .build()
        .map_err(|source| Failure::Process { action: "start the runtime", source })?;
    let termination = {
        let _inside = runtime.enter();
        Termination::catch()?
    };

    state::prepare(&locations)?;
    let durability = ::daemon::durability(&settings)?;
    let store = Store::open(Config { durability, ..Config::new(locations.store_dir.clone(), &locations.state_dir) })?;
    let store_dir = PathBuf::from(locations.store_dir.as_str());
    state::prepare_store_dir(&locations)?;
    let group = build_group(&settings);
    let mount = Mount::new(store.clone(), &store_dir, mount::Options { group, ..mount::Options::default() })?;
    let recognise = mount.recogniser();
    store.recognise_files(Arc::new(move |file| recognise(file.device, file.inode)));
    let served = runtime.block_on(serve(store.clone(), settings, locations, grpc, extras, store_dir, termination));
    // Sessions and builds that are still running end here.
    drop(runtime);
    mount.unmount()?;
    store.sync()?;
    served.map(|()| ExitCode::SUCCESS)
}

/// The group that stock gives its store directory to. A client run as root without the daemon would do that first, and stop
/// at the mount before it comes to where it is told what to do.
fn build_group(settings: &Settings) -> Option<u32> {
    let name = settings.build_users_group.as_deref().filter(|name| !name.is_empty())?;
    nix::unistd::Group::from_name(name).ok().flatten().map(|group| group.gid.as_raw())
}

async fn serve(
    store: Arc<Store>,
    settings: Settings,
    locations: Locations,
    grpc: Option<SocketAddr>,
    extras: Extras,
    store_mount: PathBuf,
    termination: Termination,
) -> Result<(), Failure> {
    let config = build_config(&locations, &settings, store_mount)?;
    let scheduler = Scheduler::new(store.clone(), config, Box::new(Substituters::new(store.clone())));
    mending::start(&store, scheduler.clone(), &settings);
    let listeners = listen_for_grpc(grpc, grpc_socket(&locations.state_dir), &settings)?;
    let grpc_address = listeners.tcp_address();
    let services = rpc_services(&store, &settings)?;
    let checks =
        fsck::Server { store: store.clone(), scheduler: scheduler.clone(), settings: Arc::new(settings.clone()) };
    let daemon = Daemon::new(store.clone(), scheduler.clone(), settings, locations.clone(), extras)?;
    let status = status::Source { daemon: daemon.clone(), scheduler, store };
    let answering = status::listen(&locations.state_dir)?;
    let checking = fsck::listen(&locations.state_dir)?;
    let (listener, own_socket) = match ::daemon::passed_by_systemd()? {
        Some(listener) => (listener, None),
        None => (::daemon::bind(&locations.socket)?, Some(locations.socket.clone())),
    };
    let untrusted_socket = locations.untrusted_socket();
    let untrusted = ::daemon::bind(&untrusted_socket)?;

    let (stop, stopped) = tokio::sync::watch::channel(false);
    let wait = |mut stopped: tokio::sync::watch::Receiver<bool>| async move {
        // An error means that the sender is gone, which is a stop as well.
        let _ = stopped.wait_for(|stopped| *stopped).await;
    };
    let grpc_server = tokio::spawn(listeners.serve(services, wait(stopped.clone())));
    tokio::spawn(status::answer(answering, status));
    tokio::spawn(checks.run(checking));
    tokio::spawn(async move {
        termination.wait().await;
        let _ = stop.send(true);
    });

    tracing::info!(
        socket = %locations.socket.display(),
        store = %locations.store_dir.as_str(),
        grpc = grpc_address.map_or_else(|| "none".to_owned(), |address| address.to_string()),
        "castored {} is ready", env!("CARGO_PKG_VERSION"),
    );
    // Without a service manager there is nobody to tell.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);

    tokio::join!(
        daemon.run(listener, Door::Main, wait(stopped.clone())),
        daemon.run(untrusted, Door::Untrusted, wait(stopped)),
    );
    tracing::info!("stopping");
    for socket in own_socket.iter().chain([&untrusted_socket]) {
        let _ = std::fs::remove_file(socket);
    }
    match grpc_server.await {
        Ok(result) => Ok(result?),
        Err(error) => Err(Failure::Process { action: "serve gRPC", source: std::io::Error::other(error) }),
    }
}

/// Opens the gRPC sockets. Without the TCP one the daemon is worth as much: a port that somebody else has taken
/// must not keep the store from being mounted.
fn listen_for_grpc(
    tcp: Option<SocketAddr>,
    unix: PathBuf,
    settings: &Settings,
) -> Result<rpc::Listeners, rpc::ServeError> {
    let mut listen = rpc::Listen { tcp, unix: Some(unix) };
    if tcp.is_some() && !settings.allowed_users.iter().any(|user| user == "*") {
        tracing::warn!("not serving gRPC on TCP: allowed-users names users, and a TCP peer could be anybody");
        listen.tcp = None;
    }
    match rpc::Listeners::bind(&listen) {
        Err(error @ rpc::ServeError::Tcp { .. }) => {
            tracing::error!(%error, "going on without gRPC on TCP");
            rpc::Listeners::bind(&rpc::Listen { tcp: None, ..listen })
        }
        other => other,
    }
}

fn build_config(locations: &Locations, settings: &Settings, store_mount: PathBuf) -> Result<BuildConfig, Failure> {
    let helper_exe =
        std::env::current_exe().map_err(|source| Failure::Process { action: "find castored's executable", source })?;
    let jobs = usize::try_from(settings.max_jobs).unwrap_or(usize::MAX);
    let config = BuildConfig::new(&locations.state_dir, locations.log_dir.clone(), store_mount, helper_exe, jobs);
    Ok(BuildConfig { client_env: locations.client_env(), ..config })
}

/// gRPC for processes of this machine, where the kernel says who they are.
pub(crate) fn grpc_socket(state_dir: &Path) -> PathBuf {
    state_dir.join("daemon-socket/grpc")
}

fn rpc_services(store: &Arc<Store>, settings: &Settings) -> Result<rpc::Services, Failure> {
    let trusted_keys = settings.public_keys()?;
    let settings = settings.clone();
    Ok(rpc::Services {
        blobs: store.engine().clone(),
        directories: store.engine().clone(),
        paths: store.clone(),
        trusted_keys,
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
pub(crate) struct Termination([Signal; 3]);

impl Termination {
    pub(crate) fn catch() -> Result<Self, Failure> {
        let catch = |kind| signal(kind).map_err(|source| Failure::Process { action: "catch signals", source });
        Ok(Self([catch(SignalKind::terminate())?, catch(SignalKind::interrupt())?, catch(SignalKind::hangup())?]))
    }

    pub(crate) async fn wait(mut self) {
        let [terminate, interrupt, hangup] = &mut self.0;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}
