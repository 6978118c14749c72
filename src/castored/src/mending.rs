//! Paths that were found damaged when a program read them: saved from what the packs hold, else fetched again.
//!
//! The reader has its error by then; this is for the next one. Nothing is built for it: another build may have other
//! contents, and to change a path that somebody uses is for an administrator to decide (`castored fsck --repair`).

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use build::{Client, Events, Scheduler};
use nix_compat::conf::Settings;
use nix_compat::store_path::StorePath;
use nix_compat::worker::stderr::{Message, Verbosity};
use parking_lot::Mutex;
use store::Store;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Damaged paths that wait for their turn. Of more the next read tells again.
const MAX_WAITING: usize = 256;
/// Paths remembered because they could not be repaired.
const MAX_GIVEN_UP: usize = 4096;
/// How long a path is left alone that could not be repaired.
const RETRY_AFTER: Duration = Duration::from_secs(300);

/// What is under way.
#[derive(Default)]
struct State {
    /// Waiting, or being repaired.
    waiting: HashSet<StorePath>,
    /// Could not be repaired, and when that was found.
    given_up: HashMap<StorePath, Instant>,
}

impl State {
    /// Whether the path is to be put into the queue.
    fn wants(&mut self, path: &StorePath) -> bool {
        if self.given_up.get(path).is_some_and(|since| since.elapsed() < RETRY_AFTER) || self.waiting.contains(path) {
            return false;
        }
        self.given_up.remove(path);
        true
    }

    fn give_up(&mut self, path: StorePath) {
        if self.given_up.len() >= MAX_GIVEN_UP {
            self.given_up.retain(|_, since| since.elapsed() < RETRY_AFTER);
        }
        if self.given_up.len() < MAX_GIVEN_UP {
            self.given_up.insert(path, Instant::now());
        }
    }
}

/// Repairs what readers find, one path after the other, for as long as the runtime lives. Must be called in it.
pub(crate) fn start(store: &Arc<Store>, scheduler: Arc<Scheduler>, settings: &Settings) {
    let state = Arc::new(Mutex::new(State::default()));
    let (sender, mut reports) = mpsc::channel::<StorePath>(MAX_WAITING);
    let known = state.clone();
    store.on_damage(Arc::new(move |path| {
        let mut known = known.lock();
        if known.wants(path) && sender.try_send(path.clone()).is_ok() {
            known.waiting.insert(path.clone());
        }
    }));
    let mut settings = settings.clone();
    settings.max_jobs = 0;
    settings.builders = String::new();
    let mender = Mender { store: store.clone(), scheduler, settings: Arc::new(settings) };
    tokio::spawn(async move {
        while let Some(path) = reports.recv().await {
            let outcome = mender.mend(&path).await;
            let shown = mender.store.store_dir().display(&path);
            let mut state = state.lock();
            state.waiting.remove(&path);
            match outcome {
                Ok(true) => tracing::info!(path = shown, "repaired a damaged path"),
                Ok(false) => {}
                Err(reason) => {
                    tracing::error!(path = shown, reason, "a damaged path could not be repaired");
                    state.give_up(path);
                }
            }
        }
    });
}

struct Mender {
    store: Arc<Store>,
    scheduler: Arc<Scheduler>,
    settings: Arc<Settings>,
}

impl Mender {
    /// Whether there was something to repair, and has been.
    async fn mend(&self, path: &StorePath) -> Result<bool, String> {
        let before = self.check(path, false).await?;
        let Some(damage) = before else { return Ok(false) };
        tracing::warn!(damage, "a program met damage; repairing it");
        if self.check(path, true).await?.is_none() {
            return Ok(true);
        }
        let client = Client {
            events: Arc::new(ToLog),
            temp_roots: Arc::new(self.store.new_temp_roots()),
            uid: None,
            cancel: CancellationToken::new(),
            gate: None,
        };
        self.scheduler.repair_path(path.clone(), self.settings.clone(), client).await?;
        self.check(path, true).await?.map_or(Ok(true), Err)
    }

    /// What is wrong with the path; with `recover`, after what can be saved of it was.
    async fn check(&self, path: &StorePath, recover: bool) -> Result<Option<String>, String> {
        let (store, path) = (self.store.clone(), path.clone());
        let check = move || match recover {
            true => store.recover_path(&path),
            false => store.examine_path(&path),
        };
        let checked = tokio::task::spawn_blocking(check).await.map_err(|error| error.to_string())?;
        checked.map_err(|error| error.to_string())
    }
}

/// What downloads have to say.
struct ToLog;

impl Events for ToLog {
    fn emit(&self, message: Message) {
        if let Message::Next(text) = message {
            tracing::info!("repairing: {}", String::from_utf8_lossy(&text).trim_end());
        }
    }

    fn log(&self, level: Verbosity, line: &str) {
        if level.code() <= Verbosity::Warn.code() {
            tracing::warn!("repairing: {line}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(name: &str) -> StorePath {
        StorePath::from_parts([7; 20], name).unwrap()
    }

    #[test]
    fn a_path_is_repaired_once_at_a_time_and_left_alone_when_it_cannot_be() {
        let mut state = State::default();
        assert!(state.wants(&path("a")));
        state.waiting.insert(path("a"));
        assert!(!state.wants(&path("a")) && state.wants(&path("b")));
        state.waiting.remove(&path("a"));
        state.give_up(path("a"));
        assert!(!state.wants(&path("a")) && state.wants(&path("b")));
        state.given_up.insert(path("a"), Instant::now() - RETRY_AFTER);
        assert!(state.wants(&path("a")));
    }

    #[test]
    fn what_is_remembered_has_a_bound() {
        let mut state = State::default();
        for i in 0..MAX_GIVEN_UP + 10 {
            state.give_up(path(&i.to_string()));
        }
        assert_eq!(state.given_up.len(), MAX_GIVEN_UP);
    }
}
