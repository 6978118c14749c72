//! Accepting clients.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};

use crate::daemon::Daemon;
use crate::peer::{Peer, Trust};
use crate::session;

/// How long accepting rests when the process has run out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Which of the daemon's sockets a client came in by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// The one where stock clients look.
    Main,
    /// One where nobody is trusted: where `nix-daemon --stdio --force-untrusted` knocks.
    Untrusted,
}

impl Door {
    fn admits(self, trust: Trust) -> Trust {
        match self {
            Self::Main => trust,
            Self::Untrusted => Trust::Untrusted,
        }
    }
}

impl Daemon {
    /// Serves clients until `shutdown` is done. Sessions that are still running then end with the runtime.
    pub async fn run(self: &Arc<Self>, listener: UnixListener, door: Door, shutdown: impl Future<Output = ()>) {
        tokio::pin!(shutdown);
        loop {
            tokio::select! {
                () = &mut shutdown => return,
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => self.admit(stream, door),
                    Err(error) => {
                        // Most likely EMFILE: others will leave.
                        tracing::warn!(%error, "cannot accept a client; trying again");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
    }

    fn admit(self: &Arc<Self>, stream: UnixStream, door: Door) {
        let daemon = self.clone();
        tokio::spawn(async move {
            // Names of users and groups may come from the network.
            let settings = daemon.settings.clone();
            let forced = daemon.forced_trust;
            let identified = tokio::task::spawn_blocking(move || {
                let peer = Peer::of(&stream)?;
                let trust = forced.or_else(|| peer.trust(&settings)).map(|trust| door.admits(trust));
                Ok::<_, nix::Error>((stream, peer, trust))
            });
            let (stream, peer, trust) = match identified.await {
                Ok(Ok((stream, peer, Some(trust)))) => (stream, peer, trust),
                Ok(Ok((_, peer, None))) => {
                    tracing::warn!(user = peer.user, pid = peer.pid, "refused a user who is not in allowed-users");
                    return;
                }
                Ok(Err(error)) => {
                    tracing::warn!(%error, "refused a client whose identity is not known");
                    return;
                }
                Err(error) => {
                    tracing::error!(%error, "cannot look up a client");
                    return;
                }
            };
            let _entered = daemon.enter(peer.clone());
            tracing::debug!(user = peer.user, pid = peer.pid, ?trust, "accepted a client");
            if let Err(error) = session::serve(daemon, stream, peer.clone(), trust).await {
                tracing::debug!(user = peer.user, pid = peer.pid, %error, "a connection ended early");
            }
        });
    }
}
