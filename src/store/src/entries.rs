//! Records of valid paths that were read lately.
//!
//! To read one from the index and to decode it costs more than all else an answer about a path takes. What is here is
//! never older than the index: whoever commits a change of a record then [forgets](EntryCache::forget) it before he tells
//! anybody, and a record that somebody is reading meanwhile is not kept either.

use std::sync::Arc;

use quick_cache::sync::{Cache, GuardResult};

use crate::error::Result;
use crate::record::Entry;

/// What a record takes, about. Bytes.
const ENTRY_BYTES: u64 = 600;
/// How many bytes of records are in memory, unless told otherwise: 32,768 of them.
pub(crate) const USUAL_BYTES: u64 = 32 * 1024 * ENTRY_BYTES;

/// The records, by the digest of the hash part.
pub(crate) struct EntryCache(Cache<[u8; 20], Arc<Entry>>);

impl EntryCache {
    /// Keeps so many bytes of records.
    pub(crate) fn new(bytes: u64) -> Self {
        Self(Cache::new(usize::try_from(bytes / ENTRY_BYTES).unwrap_or(usize::MAX).max(1)))
    }

    /// How many bytes of records are here, about.
    pub(crate) fn bytes(&self) -> u64 {
        self.0.len() as u64 * ENTRY_BYTES
    }

    /// The record, which `load` reads when it is not here. Of several threads that miss the same one, one reads it.
    ///
    /// # Errors
    /// Those of `load`.
    pub(crate) fn get(
        &self,
        digest: &[u8; 20],
        load: impl FnOnce() -> Result<Option<Entry>>,
    ) -> Result<Option<Arc<Entry>>> {
        let place = match self.0.get_value_or_guard(digest, None) {
            GuardResult::Value(entry) => return Ok(Some(entry)),
            GuardResult::Guard(place) => Some(place),
            GuardResult::Timeout => None,
        };
        let entry = load()?.map(Arc::new);
        if let (Some(place), Some(entry)) = (place, &entry) {
            // Refused when the record was forgotten meanwhile: what was read may be from before.
            let _ = place.insert(Arc::clone(entry));
        }
        Ok(entry)
    }

    /// The record, if it is here.
    pub(crate) fn peek(&self, digest: &[u8; 20]) -> Option<Arc<Entry>> {
        self.0.peek(digest)
    }

    /// Forgets a record that has changed.
    pub(crate) fn forget(&self, digest: &[u8; 20]) {
        self.0.remove(digest);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use castore::{Digest, Node};
    use nix_compat::hash::NarHash;
    use nix_compat::path_info::PathInfo;
    use nix_compat::store_path::StorePath;

    use super::*;

    const DIGEST: [u8; 20] = [7; 20];

    fn entry(number: u32) -> Entry {
        let info = PathInfo {
            path: StorePath::from_base_name("00000000000000000000000000000000-x").unwrap(),
            deriver: None,
            nar_hash: NarHash::from([0; 32]),
            references: BTreeSet::new(),
            registration_time: 1,
            nar_size: 0,
            ultimate: false,
            signatures: BTreeSet::new(),
            ca: None,
        };
        Entry { info, node: Node::File { digest: Digest::of(b""), size: 0, executable: false }, number }
    }

    #[test]
    fn a_record_is_read_once_and_again_after_it_was_forgotten() {
        let cache = EntryCache::new(USUAL_BYTES);
        assert!(cache.get(&DIGEST, || Ok(None)).unwrap().is_none());
        assert_eq!(cache.get(&DIGEST, || Ok(Some(entry(1)))).unwrap().unwrap().number, 1);
        assert_eq!(cache.get(&DIGEST, || unreachable!()).unwrap().unwrap().number, 1);
        cache.forget(&DIGEST);
        assert_eq!(cache.get(&DIGEST, || Ok(Some(entry(2)))).unwrap().unwrap().number, 2);
    }

    #[test]
    fn what_was_read_before_a_change_is_not_kept_after_it() {
        let cache = EntryCache::new(USUAL_BYTES);
        let old = cache.get(&DIGEST, || {
            // Another thread commits a change and says so.
            cache.forget(&DIGEST);
            Ok(Some(entry(1)))
        });
        assert_eq!(old.unwrap().unwrap().number, 1);
        assert_eq!(cache.get(&DIGEST, || Ok(Some(entry(2)))).unwrap().unwrap().number, 2);
    }
}
