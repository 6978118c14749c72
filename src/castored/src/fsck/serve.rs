//! A check by the daemon, and asking for one.
//!
//! One connection is one check: a line with the request, then lines of news until the last. Who hangs up ends it.

use std::ops::ControlFlow;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use build::{Client, Events, Scheduler};
use nix_compat::conf::Settings;
use nix_compat::store_path::StorePath;
use nix_compat::worker::stderr::{Message, Verbosity};
use parking_lot::Mutex;
use store::Store;
use tokio::net::UnixListener;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::castores::Castores;
use super::news::{News, Request, Summary};
use super::{Tell, work};
use crate::failure::Failure;
use crate::sockets;

/// The longest request, in bytes: some 100,000 paths.
const MAX_REQUEST: u64 = 16 << 20;
/// The longest line of news, in bytes. The last names every damaged path.
const MAX_LINE: u64 = 1 << 30;
/// How long a client may take to send its request, or to read what it is told.
const PATIENCE: Duration = Duration::from_secs(60);

fn socket(state_dir: &Path) -> PathBuf {
    state_dir.join("castored/fsck.socket")
}

/// Opens the socket.
pub(crate) fn listen(state_dir: &Path) -> Result<UnixListener, Failure> {
    sockets::listen(&socket(state_dir))
}

/// The daemon's side.
pub(crate) struct Server {
    pub(crate) store: Arc<Store>,
    pub(crate) scheduler: Arc<Scheduler>,
    pub(crate) settings: Arc<Settings>,
}

impl Server {
    /// Does one check after the other.
    pub(crate) async fn run(self, listener: UnixListener) {
        let server = Arc::new(self);
        let turns = Arc::new(Semaphore::new(1));
        while let Ok((stream, _)) = listener.accept().await {
            let Ok(turn) = turns.clone().acquire_owned().await else { return };
            let server = server.clone();
            let runtime = Handle::current();
            tokio::task::spawn_blocking(move || {
                let _turn = turn;
                if let Err(error) = server.serve(stream, &runtime) {
                    tracing::debug!(%error, "a client that asked for a check has left");
                }
            });
        }
    }

    fn serve(&self, stream: tokio::net::UnixStream, runtime: &Handle) -> std::io::Result<()> {
        let (stream, request): (_, Request) = sockets::request(stream, MAX_REQUEST, PATIENCE)?;
        let teller = Arc::new(ToSocket(Mutex::new(stream)));
        let castores = Castores::new(&self.settings, runtime);
        let mut build = |path: &StorePath| {
            let client = Client {
                events: Arc::new(Logs(teller.clone())),
                temp_roots: Arc::new(self.store.new_temp_roots()),
                uid: None,
                cancel: CancellationToken::new(),
                gate: None,
            };
            runtime.block_on(self.scheduler.repair_path(path.clone(), self.settings.clone(), client))
        };
        let mut mend = |path: &StorePath| castores.mend(&self.store, path, &mut build);
        let last = match work::run(&self.store, &request, &mut mend, &*teller) {
            Ok(summary) => News::End(summary),
            Err(error) => News::Failed(error.to_string()),
        };
        let _ = teller.tell(last);
        Ok(())
    }
}

/// Writes news to whoever asked.
struct ToSocket(Mutex<UnixStream>);

impl Tell for ToSocket {
    fn tell(&self, news: News) -> ControlFlow<()> {
        match sockets::write_line(&mut self.0.lock(), &news) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    }
}

/// What builds and downloads have to say.
struct Logs(Arc<ToSocket>);

impl Events for Logs {
    fn emit(&self, message: Message) {
        if let Message::Next(text) = message {
            let _ = self.0.tell(News::Log(String::from_utf8_lossy(&text).into_owned()));
        }
    }

    fn log(&self, _: Verbosity, line: &str) {
        let _ = self.0.tell(News::Log(line.to_owned()));
    }
}

/// Asks the daemon of a state directory.
pub(super) fn ask(state_dir: &Path, request: &Request, teller: &dyn Tell) -> Result<Summary, Failure> {
    let unfinished = "it ended before the check did";
    sockets::converse(&socket(state_dir), request, MAX_LINE, unfinished, |news| match news {
        News::End(summary) => ControlFlow::Break(Ok(summary)),
        News::Failed(text) => ControlFlow::Break(Err(Failure::Fsck(text))),
        news => {
            // Who cannot be told still waits for the end.
            let _ = teller.tell(news);
            ControlFlow::Continue(())
        }
    })
}
