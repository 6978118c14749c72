//! Questions about sizes whose answers need a look at everything: asked of a daemon, or of the store itself when none runs.
//!
//! One connection is one question: a line of JSON, then one line with the answer. The socket lies where only the daemon's
//! user may enter.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ::daemon::Locations;
use nix_compat::store_path::StorePath;
use remote::ClientError;
use serde::{Deserialize, Serialize};
use store::{Config, MAX_COSTS, Store};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixListener;
use tokio::sync::Semaphore;

use super::{PathSizes, Stats};
use crate::failure::Failure;
use crate::{sockets, state};

/// The longest question, in bytes: [`MAX_COSTS`] names, of 255 bytes at most.
const MAX_QUESTION: u64 = 1024 + 300 * MAX_COSTS as u64;
/// The longest answer read, in bytes.
const MAX_ANSWER: u64 = 1 << 20;
/// Clients that are listened to at once; others wait in the kernel. Of the answers one is worked out at a time.
const MAX_CLIENTS: usize = 8;
/// How long a client may take to send its question, or to read the answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is asked.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Question {
    /// How much is there; with what distinct files come to, which [`Stats::of`] does not know.
    Stats,
    /// What these paths cost. Base names.
    Costs(Vec<String>),
}

/// What is answered.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Answer {
    Stats(Stats),
    Costs(Vec<PathSizes>),
    Failed(String),
}

fn socket(state_dir: &Path) -> PathBuf {
    state_dir.join("castored/sizes.socket")
}

/// Opens the socket.
pub(crate) fn listen(state_dir: &Path) -> Result<UnixListener, Failure> {
    sockets::listen(&socket(state_dir))
}

/// Answers everybody who connects.
pub(crate) async fn serve(listener: UnixListener, store: Arc<Store>) {
    let (clients, turns) = (Arc::new(Semaphore::new(MAX_CLIENTS)), Arc::new(Semaphore::new(1)));
    loop {
        let Ok(client) = clients.clone().acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else { return };
        let (store, turns) = (store.clone(), turns.clone());
        tokio::spawn(async move {
            let _client = client;
            if let Err(error) = answer(stream, store, &turns).await {
                tracing::debug!(%error, "a client that asked for sizes has left");
            }
        });
    }
}

async fn answer(mut stream: tokio::net::UnixStream, store: Arc<Store>, turns: &Semaphore) -> std::io::Result<()> {
    let mut line = String::new();
    let (input, mut output) = stream.split();
    tokio::time::timeout(PATIENCE, BufReader::new(input.take(MAX_QUESTION)).read_line(&mut line)).await??;
    let question: Question = serde_json::from_str(&line)?;
    let answered = {
        let _turn = turns.acquire().await.map_err(std::io::Error::other)?;
        tokio::task::spawn_blocking(move || question.answer(&store)).await?
    };
    let answer = answered.unwrap_or_else(|failure| Answer::Failed(failure.to_string()));
    let mut line = serde_json::to_vec(&answer)?;
    line.push(b'\n');
    tokio::time::timeout(PATIENCE, output.write_all(&line)).await?
}

impl Question {
    /// Works out the answer, on a thread that may wait for the disk.
    fn answer(&self, store: &Store) -> Result<Answer, Failure> {
        match self {
            Self::Stats => {
                Ok(Answer::Stats(Stats { distinct_bytes: Some(store.distinct_bytes()?), ..Stats::of(store)? }))
            }
            Self::Costs(names) => {
                let path = |name: &String| {
                    StorePath::from_base_name(name)
                        .map_err(|e| Failure::Usage(format!("'{name}' is no store path: {e}")))
                };
                let paths = names.iter().map(path).collect::<Result<Vec<_>, _>>()?;
                let costs = store.costs(&paths)?;
                Ok(Answer::Costs(costs.iter().map(|cost| PathSizes::of(store, cost)).collect()))
            }
        }
    }
}

/// Asks the daemon of these places or, when none runs, the store itself.
pub(crate) fn ask(locations: &Locations, question: &Question) -> Result<Answer, Failure> {
    match ask_daemon(&locations.state_dir, question) {
        Ok(Answer::Failed(text)) => Err(Failure::Sizes(text)),
        Err(Failure::Client(ClientError::NoDaemon { .. })) => {
            state::prepare(locations)?;
            question.answer(&*Store::open(Config::new(locations.store_dir.clone(), &locations.state_dir))?)
        }
        answered => answered,
    }
}

fn ask_daemon(state_dir: &Path, question: &Question) -> Result<Answer, Failure> {
    let path = socket(state_dir);
    let mut text = Vec::new();
    sockets::send(&path, question)?
        .take(MAX_ANSWER)
        .read_to_end(&mut text)
        .map_err(Failure::file("read from", &path))?;
    serde_json::from_slice(&text)
        .map_err(|e| ClientError::Protocol(format!("what it says of sizes cannot be read: {e}")).into())
}
