//! Sets of objects in little memory.

use std::collections::HashSet;
use std::hash::{BuildHasher, BuildHasherDefault, Hasher, RandomState};

use xxhash_rust::xxh3::xxh3_128_with_seed;

use super::key::{ObjectKey, key_bytes};

/// A set of objects, by 16 bytes of a hash that is seeded afresh for each set: nobody can prepare two objects that
/// are taken for one.
pub(crate) struct Fingerprints {
    seed: u64,
    set: HashSet<u128, BuildHasherDefault<Folded>>,
}

/// Fingerprints are hashes already.
#[derive(Default)]
struct Folded(u64);

impl Hasher for Folded {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(byte);
        }
    }
    fn write_u128(&mut self, fingerprint: u128) {
        self.0 = fingerprint as u64;
    }
}

impl Fingerprints {
    pub(crate) fn new() -> Self {
        Self { seed: RandomState::new().hash_one(0), set: HashSet::default() }
    }

    fn of(&self, key: &ObjectKey) -> u128 {
        xxh3_128_with_seed(&key_bytes(key), self.seed)
    }

    /// Whether `key` was not in yet.
    pub(crate) fn insert(&mut self, key: &ObjectKey) -> bool {
        self.set.insert(self.of(key))
    }

    pub(crate) fn len(&self) -> usize {
        self.set.len()
    }

    pub(crate) fn contains(&self, key: &ObjectKey) -> bool {
        self.set.contains(&self.of(key))
    }
}
