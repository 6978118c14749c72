//! Waiting for one's turn to build here.

use std::sync::Arc;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};

use crate::failure::Failure;
use crate::scheduler::graph::Goal;

/// The right to build here, until it is dropped.
pub(crate) enum Turn {
    /// It is the client's turn, and the machine's.
    Own { _client: OwnedSemaphorePermit, _machine: OwnedSemaphorePermit },
    /// A running build waits for this one, and has lent its own place.
    Lent { _place: OwnedSemaphorePermit },
}

/// Waits for a goal's turn, or for one of the places that running builds lend to those they wait for: which of its
/// watchers came first, and whose goal it therefore is, must not make a build wait for its own end.
pub(super) async fn wait(goal: &Goal, client: Arc<Semaphore>, machine: Arc<Semaphore>) -> Result<Turn, Failure> {
    let own = async {
        let client = client.acquire_owned().await?;
        Ok::<_, AcquireError>(Turn::Own { _client: client, _machine: machine.acquire_owned().await? })
    };
    tokio::pin!(own);
    loop {
        let joined = goal.feed.joined();
        tokio::pin!(joined);
        joined.as_mut().enable();
        let sessions = goal.feed.watchers();
        let lent = sessions.iter().filter_map(|(session, _)| Some(session.gate.as_ref()?.slot().clone()));
        let mut lent: FuturesUnordered<_> = lent.map(Semaphore::acquire_owned).collect();
        let turn = tokio::select! {
            turn = &mut own => turn,
            Some(place) = lent.next() => place.map(|place| Turn::Lent { _place: place }),
            () = joined => continue,
        };
        return turn.map_err(|_| Failure::misc("the daemon is stopping"));
    }
}
