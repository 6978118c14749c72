//! Accepting clients.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::OwnedSemaphorePermit;

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
    ///
    /// While there are as many as there may be, others wait in the kernel until one leaves.
    pub async fn run(self: &Arc<Self>, listener: UnixListener, door: Door, shutdown: impl Future<Output = ()>) {
        let places = &self.places;
        tokio::pin!(shutdown);
        loop {
            if places.available_permits() == 0 {
                tracing::warn!(clients = self.max_clients, "as many clients as there may be; others have to wait");
            }
            let accepted = async {
                // Nobody closes the semaphore.
                let place = places.clone().acquire_owned().await.ok();
                (listener.accept().await, place)
            };
            tokio::select! {
                () = &mut shutdown => return,
                (accepted, place) = accepted => match accepted {
                    Ok((stream, _)) => self.admit(stream, door, place),
                    Err(error) => {
                        // Most likely EMFILE: others will leave.
                        tracing::warn!(%error, "cannot accept a client; trying again");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
    }

    fn admit(self: &Arc<Self>, stream: UnixStream, door: Door, place: Option<OwnedSemaphorePermit>) {
        let daemon = self.clone();
        tokio::spawn(async move {
            let _place = place;
            // Names of users and groups may come from the network.
            let settings = daemon.settings.clone();
            let forced = daemon.forced_trust;
            // Clients lock and write their profiles themselves. Stock makes the directory whenever it opens the store, so
            // they rely on it also where somebody has removed it. Whoever cannot have it will say so.
            let profiles = daemon.locations.state_dir.join("profiles");
            let identified = tokio::task::spawn_blocking(move || {
                let _ = std::fs::create_dir(&profiles);
                let peer = Peer::of(&stream)?;
                // Clients up to 2.13 have the user's profile in it, and cannot make it themselves.
                if let Err(error) = peer.make_directory(&profiles.join("per-user")) {
                    tracing::debug!(user = peer.user, %error, "cannot make a directory for the user's profiles");
                }
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
            let Some(_entered) = daemon.enter(peer.clone(), trust) else {
                tracing::warn!(user = peer.user, pid = peer.pid, "refused a user who has too many connections");
                return;
            };
            tracing::debug!(user = peer.user, pid = peer.pid, ?trust, "accepted a client");
            if let Err(error) = session::serve(daemon, stream, peer.clone(), trust, None).await {
                tracing::debug!(user = peer.user, pid = peer.pid, %error, "a connection ended early");
            }
        });
    }
}
