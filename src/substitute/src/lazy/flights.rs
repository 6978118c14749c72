//! Blobs on their way, and who waits for them.

use std::collections::{HashMap, VecDeque};

use castore::Digest;
use castore::engine::{Promise, Then};

/// Readers that wait at a time; the next one is refused.
const MAX_WAITING: usize = 16_384;

/// A blob to be fetched.
pub(super) struct Taken {
    pub(super) digest: Digest,
    pub(super) promise: Promise,
}

/// All of them: each blob once.
#[derive(Default)]
pub(super) struct Flights {
    /// Who waits for a blob that is wanted or being fetched.
    all: HashMap<Digest, Vec<Then>>,
    /// Those that nobody fetches yet.
    wanted: VecDeque<Taken>,
    waiting: usize,
    closed: bool,
}

impl Flights {
    /// Somebody waits for a blob. Gives them back where there is no room.
    pub(super) fn want(&mut self, digest: Digest, promise: Promise, then: Then) -> Option<Then> {
        if self.closed {
            // Let go of without an answer, as those who were there before.
            return None;
        }
        if self.waiting >= MAX_WAITING {
            return Some(then);
        }
        self.waiting += 1;
        if self.begin(digest) {
            self.wanted.push_back(Taken { digest, promise });
        }
        self.all.entry(digest).or_default().push(then);
        None
    }

    /// Whether nobody else fetches the blob, or is about to: whoever asks does now.
    pub(super) fn begin(&mut self, digest: Digest) -> bool {
        let is_new = !self.all.contains_key(&digest);
        if is_new {
            self.all.insert(digest, Vec::new());
        }
        is_new
    }

    /// What is to be fetched next.
    pub(super) fn take(&mut self) -> Option<Taken> {
        self.wanted.pop_front()
    }

    /// A blob is here, or cannot be had: who waits for it.
    pub(super) fn landed(&mut self, digest: &Digest) -> Vec<Then> {
        let waiting = self.all.remove(digest).unwrap_or_default();
        self.waiting -= waiting.len();
        waiting
    }

    /// Nothing more is to be fetched. Gives those who wait for what nobody has begun.
    pub(super) fn close(&mut self) -> Vec<Then> {
        self.closed = true;
        let left: Vec<Taken> = self.wanted.drain(..).collect();
        left.iter().flat_map(|taken| self.landed(&taken.digest)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn want(flights: &mut Flights, n: u8) -> bool {
        let promise = Promise { size: 1, note: Default::default() };
        flights.want(Digest::of(&[n]), promise, Box::new(|_| ())).is_none()
    }

    #[test]
    fn a_blob_is_fetched_once_for_all_who_wait() {
        let mut flights = Flights::default();
        assert!(want(&mut flights, 1) && want(&mut flights, 1) && want(&mut flights, 2));
        assert!(!flights.begin(Digest::of(&[1])), "it is wanted already");
        assert!(flights.begin(Digest::of(&[3])));
        assert!(want(&mut flights, 3), "somebody comes to wait for what is being fetched unasked");
        let taken: Vec<Digest> = std::iter::from_fn(|| flights.take()).map(|taken| taken.digest).collect();
        assert_eq!(taken, [1, 2].map(|n| Digest::of(&[n])));
        assert_eq!(flights.landed(&Digest::of(&[1])).len(), 2);
        assert_eq!(flights.landed(&Digest::of(&[3])).len(), 1);
        assert_eq!(flights.waiting, 1);
        // Once more: it may be wanted again after it failed.
        assert!(want(&mut flights, 1) && flights.take().is_some());
        want(&mut flights, 4);
        assert_eq!(flights.close().len(), 1);
    }

    #[test]
    fn who_waits_has_a_bound() {
        let mut flights = Flights::default();
        assert!((0..MAX_WAITING).all(|n| want(&mut flights, n as u8)));
        assert!(!want(&mut flights, 0));
        flights.landed(&Digest::of(&[0]));
        assert!(want(&mut flights, 0));
    }
}
