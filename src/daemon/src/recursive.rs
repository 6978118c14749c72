//! The store for running builds ("recursive Nix"): sessions behind a [`Gate`].
//!
//! Such a session is that of an untrusted client, and what it may ask for is decided in [`ops`](crate::ops) beside. It
//! ends with its build.

use std::io;
use std::os::unix::net::UnixListener as StdListener;
use std::sync::{Arc, Weak};
use std::time::Duration;

use build::{Gate, RecursiveStore, Serving};
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::Handle;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::daemon::Daemon;
use crate::peer::{Peer, Trust};
use crate::session;

/// Connections of one build at once; others wait in the kernel. They take no places from ordinary clients, who may be
/// waiting for the build.
const MAX_SESSIONS: usize = 64;
/// How long accepting rests when the process has run out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The daemon, as builds know it.
pub(crate) struct ForBuilds(pub(crate) Weak<Daemon>);

impl RecursiveStore for ForBuilds {
    fn serve(&self, listener: StdListener, gate: Arc<Gate>) -> io::Result<Box<dyn Serving>> {
        let daemon = self.0.upgrade().ok_or_else(|| io::Error::other("the daemon is stopping"))?;
        let runtime = Handle::try_current().map_err(io::Error::other)?;
        listener.set_nonblocking(true)?;
        let listener = {
            let _inside = runtime.enter();
            UnixListener::from_std(listener)?
        };
        let stop = CancellationToken::new();
        let task = runtime.spawn(accept(daemon, listener, gate, stop.clone()));
        Ok(Box::new(Sessions { runtime, stop, task }))
    }
}

/// The sessions of one build.
struct Sessions {
    runtime: Handle,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Serving for Sessions {
    fn close(self: Box<Self>) {
        self.stop.cancel();
        if let Err(error) = self.runtime.block_on(self.task)
            && error.is_panic()
        {
            tracing::error!(%error, "the task that serves a build failed");
        }
    }
}

async fn accept(daemon: Arc<Daemon>, listener: UnixListener, gate: Arc<Gate>, stop: CancellationToken) {
    let mut sessions = JoinSet::new();
    loop {
        let may_come = sessions.len() < MAX_SESSIONS;
        tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = sessions.join_next() => {}
            accepted = listener.accept(), if may_come => match accepted {
                Ok((stream, _)) => drop(sessions.spawn(serve(daemon.clone(), stream, gate.clone()))),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a client of a build; trying again");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    sessions.shutdown().await;
}

async fn serve(daemon: Arc<Daemon>, stream: UnixStream, gate: Arc<Gate>) {
    // Names of users and groups may come from the network.
    let identified = tokio::task::spawn_blocking(move || Peer::of(&stream).map(|peer| (stream, peer)));
    let Ok(Ok((stream, peer))) = identified.await else {
        tracing::warn!("refused a client of a build whose identity is not known");
        return;
    };
    let Some(_entered) = daemon.enter(peer.clone(), Trust::Untrusted) else {
        tracing::warn!(user = peer.user, pid = peer.pid, "refused a user who has too many connections");
        return;
    };
    tracing::debug!(user = peer.user, pid = peer.pid, "accepted a client of a build");
    if let Err(error) = session::serve(daemon, stream, peer.clone(), Trust::Untrusted, Some(gate)).await {
        tracing::debug!(user = peer.user, pid = peer.pid, %error, "a connection of a build ended early");
    }
}
