//! Requests that an earlier server left unanswered.
//!
//! The kernel repeats them for the successor, with the highest bit of their number set. One of them may be what killed
//! the predecessor, and will kill the next as well. So they are answered one at a time, and which one it is stands in
//! memory that outlives the server. What several servers in a row died of is an error to whoever asked, and the store
//! lives on.

use std::io;

use parking_lot::{Mutex, MutexGuard};

use crate::kept::{DEATHS, IN_HAND, SUSPECT, State};

/// The bit that marks a repeated request.
const REPEATED: u64 = 1 << 63;
/// How many servers in a row may die of one repeated request.
const MAX_DEATHS: u64 = 3;

/// Watches over repeated requests.
#[derive(Debug, Default)]
pub(crate) struct Resent {
    suspicion: Mutex<Suspicion>,
}

#[derive(Debug, Default)]
pub(crate) struct Suspicion {
    state: Option<State>,
    /// What servers died of, and how many.
    suspect: u64,
    deaths: u64,
}

/// Leave to answer a request; to be held until it has been.
#[derive(Debug)]
pub(crate) struct Turn<'a> {
    /// For one that an earlier server was asked already: everybody else's turn comes when this one is over.
    repeated: Option<(MutexGuard<'a, Suspicion>, u64)>,
}

impl Resent {
    /// Looks at what the last server died of.
    pub(crate) fn new(state: State) -> io::Result<Resent> {
        let in_hand = state.number(IN_HAND)?;
        let (mut suspect, mut deaths) = (state.number(SUSPECT)?, state.number(DEATHS)?);
        if in_hand != 0 {
            deaths = if suspect == in_hand { deaths.saturating_add(1) } else { 1 };
            suspect = in_hand;
            state.set_number(DEATHS, deaths)?;
            state.set_number(SUSPECT, suspect)?;
            state.set_number(IN_HAND, 0)?;
        }
        Ok(Resent { suspicion: Mutex::new(Suspicion { state: Some(state), suspect, deaths }) })
    }

    /// Asks for leave to answer a request; none when too many servers died of it.
    pub(crate) fn turn(&self, unique: u64) -> Option<Turn<'_>> {
        if unique & REPEATED == 0 {
            return Some(Turn::first());
        }
        let number = unique & !REPEATED;
        let mut suspicion = self.suspicion.lock();
        if suspicion.suspect == number && suspicion.deaths >= MAX_DEATHS {
            tracing::error!(
                request = number,
                servers = suspicion.deaths,
                "servers died of a request again and again; it is answered with an error"
            );
            suspicion.clear();
            return None;
        }
        suspicion.write(IN_HAND, number);
        Some(Turn { repeated: Some((suspicion, number)) })
    }
}

impl Suspicion {
    fn write(&self, at: u64, number: u64) {
        if let Some(Err(error)) = self.state.as_ref().map(|state| state.set_number(at, number)) {
            tracing::warn!(%error, "cannot note which request is being answered");
        }
    }

    fn clear(&mut self) {
        (self.suspect, self.deaths) = (0, 0);
        self.write(SUSPECT, 0);
        self.write(DEATHS, 0);
    }
}

impl Turn<'_> {
    /// For what was never asked before.
    pub(crate) fn first() -> Turn<'static> {
        Turn { repeated: None }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if let Some((suspicion, number)) = &mut self.repeated {
            suspicion.write(IN_HAND, 0);
            if suspicion.suspect == *number {
                suspicion.clear();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::kept::Head;

    fn state() -> State {
        let (mountpoint, device) = ("/x".into(), "0:1".into());
        let none = Vec::new;
        State::new(&Head { mountpoint, device, shared: false, init: none(), reply: none(), note: none() }).unwrap()
    }

    fn again(state: &State) -> State {
        State(File::try_clone(&state.0).unwrap())
    }

    /// A server that dies while it answers that request.
    fn dies_of(state: &State, unique: u64) -> bool {
        let server = Resent::new(again(state)).unwrap();
        let turn = server.turn(unique);
        let served = turn.is_some();
        std::mem::forget(turn);
        served
    }

    #[test]
    fn a_request_that_kills_each_server_is_refused_in_the_end() {
        let state = state();
        for _ in 0..MAX_DEATHS {
            assert!(dies_of(&state, REPEATED | 8));
        }
        let server = Resent::new(again(&state)).unwrap();
        drop(server.turn(REPEATED | 6).unwrap());
        assert!(server.turn(REPEATED | 8).is_none());
        // And is forgotten.
        assert!(server.turn(REPEATED | 8).is_some());
    }

    #[test]
    fn who_dies_of_different_requests_dies_of_something_else() {
        let state = state();
        for unique in 1..20 {
            assert!(dies_of(&state, REPEATED | (unique * 2)));
        }
        let server = Resent::new(again(&state)).unwrap();
        drop(server.turn(REPEATED | 38).unwrap());
        assert_eq!(state.number(DEATHS).unwrap(), 0, "answered after all");
        // Deaths while first requests are answered leave no trace.
        assert!(server.turn(8).is_some());
        assert_eq!(state.number(IN_HAND).unwrap(), 0);
    }
}
