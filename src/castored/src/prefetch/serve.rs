//! Fetching by the daemon, and asking for it.
//!
//! One connection is one request: a line with the paths, then lines of news until the last. Who hangs up ends it.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix_compat::store_path::StorePath;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use store::Store;
use substitute::Lazy;
use tokio::net::UnixListener;
use tokio::sync::Semaphore;

use crate::failure::Failure;
use crate::sockets;

/// The longest request, in bytes: some 100,000 paths.
const MAX_REQUEST: u64 = 16 << 20;
/// The longest line of news, in bytes.
const MAX_LINE: u64 = 1 << 20;
/// How long a client may take to send its request, or to read what it is told.
const PATIENCE: Duration = Duration::from_secs(60);
/// Requests at a time; others wait.
const MAX_REQUESTS: usize = 4;
/// Paths of a request that are fetched side by side.
const THREADS: usize = 4;
/// Time between two news of progress.
const INTERVAL: Duration = Duration::from_millis(100);

/// What is asked: base names.
#[derive(Debug, Serialize, Deserialize)]
struct Request {
    paths: Vec<String>,
}

/// One line of what comes back.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum News {
    /// So much is elsewhere. What several paths have is counted for each.
    Total { blobs: u64, bytes: u64 },
    /// So much of it has come.
    Done { blobs: u64, bytes: u64 },
    /// A path is not complete.
    Failed { path: String, reason: String },
    /// It is over.
    End,
    /// It could not be done.
    Refused(String),
}

fn socket(state_dir: &Path) -> PathBuf {
    state_dir.join("castored/prefetch.socket")
}

/// Opens the socket.
pub(crate) fn listen(state_dir: &Path) -> Result<UnixListener, Failure> {
    sockets::listen(&socket(state_dir))
}

/// Serves everybody who connects.
pub(crate) async fn serve(listener: UnixListener, store: Arc<Store>, lazy: Arc<Lazy>) {
    let turns = Arc::new(Semaphore::new(MAX_REQUESTS));
    while let Ok((stream, _)) = listener.accept().await {
        let Ok(turn) = turns.clone().acquire_owned().await else { return };
        let (store, lazy) = (store.clone(), lazy.clone());
        tokio::task::spawn_blocking(move || {
            let _turn = turn;
            if let Err(error) = answer(stream, &store, &lazy) {
                tracing::debug!(%error, "a client that asked for paths to be fetched has left");
            }
        });
    }
}

fn answer(stream: tokio::net::UnixStream, store: &Store, lazy: &Lazy) -> std::io::Result<()> {
    let (stream, request): (_, Request) = sockets::request(stream, MAX_REQUEST, PATIENCE)?;
    let client = Mutex::new(Client { stream, told: Instant::now(), blobs: 0, bytes: 0 });
    let fetching = Fetching { store, lazy, client };
    let last = match fetching.run(&request) {
        Ok(()) => News::End,
        Err(error) => News::Refused(error.to_string()),
    };
    fetching.tell(&last)
}

/// One request.
struct Fetching<'a> {
    store: &'a Store,
    lazy: &'a Lazy,
    client: Mutex<Client>,
}

/// Who asked.
struct Client {
    stream: UnixStream,
    /// When they were told last how far it is.
    told: Instant,
    /// What has come.
    blobs: u64,
    bytes: u64,
}

impl Client {
    fn done(&self) -> News {
        News::Done { blobs: self.blobs, bytes: self.bytes }
    }
}

impl Fetching<'_> {
    fn run(&self, request: &Request) -> Result<(), Failure> {
        let mut wanted = BTreeSet::new();
        for name in &request.paths {
            let path = StorePath::from_base_name(name).map_err(|error| Failure::Usage(format!("'{name}': {error}")))?;
            self.store.valid_entry(&path)?;
            wanted.insert(path);
        }
        let (mut lazy, mut blobs, mut bytes) = (Vec::new(), 0, 0_u64);
        for path in self.store.closure(&wanted)? {
            if self.store.lazy_source(&path.digest())?.is_none() {
                continue;
            }
            let entry = self.store.valid_entry(&path)?;
            let counted = self.store.engine().elsewhere(&entry.node, &mut |_, promise| {
                blobs += 1;
                bytes = bytes.saturating_add(promise.size);
                ControlFlow::Continue(())
            });
            counted.map_err(store::Error::from)?;
            lazy.push(path);
        }
        let told = flow(self.tell(&News::Total { blobs, bytes }));
        if told.is_continue() && castore::parallel::for_each(&lazy, THREADS, |path| self.fetch(path)).is_continue() {
            let done = self.client.lock().done();
            // Whoever has left by now finds nothing missing.
            let _ = self.tell(&done);
        }
        Ok(())
    }

    fn fetch(&self, path: &StorePath) -> ControlFlow<()> {
        let Err(error) = self.lazy.fetch_path(path, &|blobs, bytes| self.came(blobs, bytes)) else {
            return ControlFlow::Continue(());
        };
        let reason = store::causes(&error);
        let path = self.store.store_dir().display(path);
        flow(self.tell(&News::Failed { path, reason }))
    }

    fn came(&self, blobs: u64, bytes: u64) -> ControlFlow<()> {
        let mut client = self.client.lock();
        client.blobs += blobs;
        client.bytes += bytes;
        if client.told.elapsed() < INTERVAL {
            return ControlFlow::Continue(());
        }
        client.told = Instant::now();
        let done = client.done();
        flow(sockets::write_line(&mut client.stream, &done))
    }

    fn tell(&self, news: &News) -> std::io::Result<()> {
        sockets::write_line(&mut self.client.lock().stream, news)
    }
}

fn flow(told: std::io::Result<()>) -> ControlFlow<()> {
    match told {
        Ok(()) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()),
    }
}

/// Asks the daemon of a state directory.
pub(super) fn ask(state_dir: &Path, paths: Vec<String>, tell: &mut dyn FnMut(News)) -> Result<(), Failure> {
    let unfinished = "it ended before everything was fetched";
    sockets::converse(&socket(state_dir), &Request { paths }, MAX_LINE, unfinished, |news| match news {
        News::End => ControlFlow::Break(Ok(())),
        News::Refused(text) => ControlFlow::Break(Err(Failure::Prefetch(text))),
        news => {
            tell(news);
            ControlFlow::Continue(())
        }
    })
}
