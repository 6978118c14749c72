//! What one user may take of what all share. Trusted users may take all of it; of the others, each has a share, so that
//! whoever takes everything takes it from nobody else.

use std::collections::HashMap;
use std::sync::Arc;

use nix::sys::resource::{Resource, getrlimit};
use parking_lot::Mutex;
use tokio::sync::Semaphore;

/// Descriptors that clients do not get: the store's files, builds, the mount. Of a low limit it is half.
const RESERVED_DESCRIPTORS: u64 = 512;
/// Clients at once, however many descriptors there are.
const MAX_CLIENTS: usize = 16_384;
/// Connections of one user who is not trusted. Where there are few in all it is half of them.
const MAX_CLIENTS_OF_USER: usize = 4_096;

/// How many clients there may be at once: a store that cannot open its files because of them would be of no use to any.
pub(crate) fn max_clients() -> usize {
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
    let left = limit - RESERVED_DESCRIPTORS.min(limit / 2);
    usize::try_from(left).unwrap_or(MAX_CLIENTS).clamp(1, MAX_CLIENTS)
}

/// How many of `all` may be those of one user who is not trusted.
pub(crate) fn max_clients_of_user(all: usize) -> usize {
    MAX_CLIENTS_OF_USER.min(all.div_ceil(2))
}

/// A number of places for each user.
#[derive(Debug)]
pub(crate) struct Shares {
    places: usize,
    of_user: Mutex<HashMap<u32, Arc<Semaphore>>>,
}

impl Shares {
    /// So many places for each.
    pub(crate) fn new(places: usize) -> Self {
        Self { places, of_user: Mutex::default() }
    }

    /// The places of a user.
    pub(crate) fn of(&self, uid: u32) -> Arc<Semaphore> {
        let mut of_user = self.of_user.lock();
        if !of_user.contains_key(&uid) {
            // Those who are gone are forgotten.
            of_user.retain(|_, places| Arc::strong_count(places) > 1);
        }
        of_user.entry(uid).or_insert_with(|| Arc::new(Semaphore::new(self.places))).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_user_has_places_of_their_own() {
        let shares = Shares::new(1);
        let one = shares.of(1);
        let taken = one.clone().try_acquire_owned().unwrap();
        assert!(shares.of(1).try_acquire().is_err());
        assert!(shares.of(2).try_acquire().is_ok());
        drop(one);
        // Taken places are remembered although nobody else knows of them.
        assert!(shares.of(3).try_acquire().is_ok());
        assert!(shares.of(1).try_acquire().is_err());
        drop(taken);
        assert!(shares.of(1).try_acquire().is_ok());
    }

    #[test]
    fn one_user_leaves_room_for_others() {
        assert_eq!(max_clients_of_user(MAX_CLIENTS), MAX_CLIENTS_OF_USER);
        assert_eq!(max_clients_of_user(80), 40);
        assert_eq!(max_clients_of_user(1), 1);
    }
}
