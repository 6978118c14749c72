//! The first request to a server, which shows what it speaks.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::time::timeout;
use url::{Origin, Url};

use crate::transport::KEPT_FOR;

/// How long others wait for a first request.
const PATIENCE: Duration = Duration::from_secs(1);
/// Servers remembered; then all are forgotten, which costs them some connections.
const MAX_SERVERS: usize = 256;

/// Has the first request to each server go alone until it is answered, or for a second. Whether one connection is enough is
/// known only then: those who ask meanwhile would each make one, to find that they do not need it.
#[derive(Default)]
pub(crate) struct FirstRequests {
    servers: Mutex<HashMap<Origin, Arc<Server>>>,
}

#[derive(Default)]
struct Server {
    turn: tokio::sync::Mutex<()>,
    /// When it was last asked, whatever came of that: a connection may be there still.
    asked: Mutex<Option<Instant>>,
}

impl FirstRequests {
    /// Sends a request to `url`, when it is its turn.
    pub(crate) async fn send<T>(&self, url: &Url, request: impl Future<Output = T>) -> T {
        let server = self.server(url);
        let turn = match server.was_asked() {
            true => None,
            false => timeout(PATIENCE, server.turn.lock()).await.ok(),
        };
        // Who had to wait is not the first, and nobody waits for it.
        let turn = turn.filter(|_| !server.was_asked());
        let answer = request.await;
        *server.asked.lock() = Some(Instant::now());
        drop(turn);
        answer
    }

    fn server(&self, url: &Url) -> Arc<Server> {
        let mut servers = self.servers.lock();
        if servers.len() >= MAX_SERVERS {
            servers.clear();
        }
        servers.entry(url.origin()).or_default().clone()
    }
}

impl Server {
    fn was_asked(&self) -> bool {
        self.asked.lock().is_some_and(|asked| asked.elapsed() < KEPT_FOR)
    }
}
