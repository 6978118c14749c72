//! `castored status`: what a running daemon is doing, as it tells itself on a socket of its own.
//!
//! One connection, one JSON document. The socket lies in castored's own directory, which only the daemon's user
//! may enter: it shows what everybody builds.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use ::daemon::{Daemon, Locations};
use build::Scheduler;
use indicatif::HumanBytes;
use remote::ClientError;
use serde::{Deserialize, Serialize};
use store::Store;
use substitute::{Lazy, LazySource};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixListener;
use upload::{Uploads, Waiting};

use crate::budget::{Budget, Memory};
use crate::daemon::Listings;
use crate::failure::Failure;
use crate::sizes::Stats;
use crate::sockets;

/// The longest status read, in bytes.
const MAX_STATUS: u64 = 64 << 20;

/// What the daemon tells.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Status {
    pub(crate) version: String,
    pub(crate) pid: u32,
    pub(crate) store_dir: String,
    pub(crate) clients: Vec<ClientStatus>,
    pub(crate) builds: Vec<BuildStatus>,
    #[serde(default)]
    pub(crate) uploads: Vec<UploadStatus>,
    #[serde(default)]
    pub(crate) lazy: LazyStatus,
    #[serde(default)]
    pub(crate) memory: Memory,
    pub(crate) stats: Stats,
}

/// What has not come yet of lazy paths.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct LazyStatus {
    /// Files' contents that are elsewhere, equal ones counted once.
    pub(crate) blobs: u64,
    /// Their bytes.
    pub(crate) bytes: u64,
    pub(crate) sources: Vec<LazySourceStatus>,
}

/// A source of lazy paths.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct LazySourceStatus {
    pub(crate) url: String,
    /// Paths that are not known to be complete.
    pub(crate) paths: u64,
    /// Why it could not be fetched from, the last time.
    pub(crate) failure: Option<String>,
}

/// A store that built paths are sent to.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct UploadStatus {
    pub(crate) url: String,
    /// Built paths that wait.
    pub(crate) waiting: usize,
    /// Paths sent since the daemon started.
    pub(crate) sent: u64,
    /// Why the last attempt failed.
    pub(crate) failure: Option<String>,
    /// Seconds until the next attempt, after one that failed.
    pub(crate) again_in: Option<u64>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ClientStatus {
    pub(crate) user: String,
    pub(crate) pid: i32,
    /// Seconds since it connected.
    pub(crate) seconds: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct BuildStatus {
    pub(crate) derivation: String,
    /// Requests and other builds that want it.
    pub(crate) interests: usize,
    /// Derivations it waits for.
    pub(crate) waits_for: Vec<String>,
    /// What the builder says it is doing.
    pub(crate) phase: Option<String>,
    /// The other machine it runs on.
    #[serde(default)]
    pub(crate) machine: Option<String>,
    /// Seconds since its builder started; none while it waits.
    pub(crate) seconds: Option<u64>,
}

/// Where the daemon's status comes from.
pub(crate) struct Source {
    pub(crate) daemon: Arc<Daemon>,
    pub(crate) scheduler: Arc<Scheduler>,
    pub(crate) store: Arc<Store>,
    pub(crate) budget: Budget,
    pub(crate) listings: Listings,
    pub(crate) uploads: Option<Uploads>,
    pub(crate) lazy: Option<Arc<Lazy>>,
}

fn socket(state_dir: &Path) -> PathBuf {
    state_dir.join("castored/status.socket")
}

pub(crate) fn listen(state_dir: &Path) -> Result<UnixListener, Failure> {
    sockets::listen(&socket(state_dir))
}

/// Answers everybody who connects.
pub(crate) async fn answer(listener: UnixListener, source: Source) {
    let source = Arc::new(source);
    while let Ok((mut stream, _)) = listener.accept().await {
        // It looks for each blob that is elsewhere.
        let source = source.clone();
        let Ok(status) = tokio::task::spawn_blocking(move || source.status()).await else { continue };
        match status {
            Ok(status) => {
                let text = serde_json::to_vec(&status).unwrap_or_default();
                // A reader that leaves early has only itself to tell.
                let _ = stream.write_all(&text).await;
            }
            Err(error) => tracing::error!(%error, "cannot tell the status"),
        }
    }
}

impl Source {
    fn status(&self) -> Result<Status, Failure> {
        Ok(Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            store_dir: self.store.store_dir().as_str().to_owned(),
            clients: self
                .daemon
                .clients()
                .into_iter()
                .map(|client| ClientStatus {
                    user: client.peer.user,
                    pid: client.peer.pid,
                    seconds: client.since.elapsed().unwrap_or_default().as_secs(),
                })
                .collect(),
            builds: self
                .scheduler
                .status()
                .into_iter()
                .map(|build| BuildStatus {
                    derivation: self.store.store_dir().display(&build.drv),
                    interests: build.interests,
                    waits_for: build.waits_for.iter().map(|drv| self.store.store_dir().display(drv)).collect(),
                    phase: build.phase,
                    machine: build.machine,
                    seconds: build.started.map(|started| now().saturating_sub(started)),
                })
                .collect(),
            uploads: self
                .uploads
                .iter()
                .flat_map(Uploads::waiting)
                .map(|Waiting { url, waiting, sent, failure, again_in }| UploadStatus {
                    url,
                    waiting,
                    sent,
                    failure,
                    again_in,
                })
                .collect(),
            lazy: self.lazy()?,
            memory: self.budget.used(&self.store, &self.daemon, (self.listings)()),
            stats: Stats::of(&self.store)?,
        })
    }
}

impl Source {
    fn lazy(&self) -> Result<LazyStatus, Failure> {
        let elsewhere = self.store.elsewhere()?;
        let mut sources = Vec::new();
        if let Some(lazy) = &self.lazy {
            match lazy.sources() {
                Ok(told) => {
                    let source = |LazySource { url, paths, failure }| LazySourceStatus { url, paths, failure };
                    sources.extend(told.into_iter().map(source));
                }
                Err(error) => tracing::warn!(%error, "cannot tell the sources of lazy paths"),
            }
        }
        Ok(LazyStatus { blobs: elsewhere.blobs, bytes: elsewhere.bytes, sources })
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs())
}

/// Asks the daemon of a state directory.
pub(crate) fn ask(state_dir: &Path) -> Result<Status, Failure> {
    let path = socket(state_dir);
    let stream = sockets::connect(&path)?;
    let mut text = Vec::new();
    stream.take(MAX_STATUS).read_to_end(&mut text).map_err(Failure::file("read from", &path))?;
    serde_json::from_slice(&text).map_err(|e| ClientError::Protocol(format!("its status cannot be read: {e}")).into())
}

pub(crate) fn run(locations: &Locations, json: bool) -> Result<ExitCode, Failure> {
    let status = ask(&locations.state_dir)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&status).unwrap_or_default());
        return Ok(ExitCode::SUCCESS);
    }
    println!("castored {} (process {}), store {}", status.version, status.pid, status.store_dir);
    println!("\n{} clients", status.clients.len());
    for client in &status.clients {
        println!("  {:<12} process {:<8} for {} s", client.user, client.pid, client.seconds);
    }
    println!("\n{} builds", status.builds.len());
    for build in &status.builds {
        match build.seconds {
            Some(seconds) => {
                let place = build.machine.as_ref().map(|machine| format!(" on {machine}")).unwrap_or_default();
                let phase = build.phase.as_deref().unwrap_or("building");
                println!("  {}  {phase}{place}, {seconds} s", build.derivation);
            }
            None if build.waits_for.is_empty() => println!("  {}  waits for its turn", build.derivation),
            None => println!("  {}  waits for {}", build.derivation, build.waits_for.join(", ")),
        }
    }
    if !status.uploads.is_empty() {
        println!("\n{} destinations of uploads", status.uploads.len());
    }
    for upload in &status.uploads {
        println!("  {}  {} built paths wait, {} paths sent", upload.url, upload.waiting, upload.sent);
        if let Some(failure) = &upload.failure {
            let again = upload.again_in.map(|seconds| format!(", again in {seconds} s")).unwrap_or_default();
            println!("    {}{again}", failure.lines().next().unwrap_or_default());
        }
    }
    if !status.lazy.sources.is_empty() {
        let (blobs, bytes) = (status.lazy.blobs, HumanBytes(status.lazy.bytes));
        println!("\nlazy paths: {blobs} files ({bytes}) are still elsewhere");
    }
    for source in &status.lazy.sources {
        println!("  {}  {} paths not complete", source.url, source.paths);
        if let Some(failure) = &source.failure {
            println!("    {}", failure.lines().next().unwrap_or_default());
        }
    }
    println!();
    status.memory.print();
    println!();
    status.stats.print();
    Ok(ExitCode::SUCCESS)
}
