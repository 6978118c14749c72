//! Objects whose stored copy is known to be unreadable.
//!
//! To a writer they are not there, so that whoever puts the same contents again puts a good copy, which takes the place
//! of the bad one in the index. Known only in memory: whether a copy can be read is found out anew after a restart.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::{ObjectKey, ObjectStore};

/// Objects remembered. Beyond that they are told when they are read, but healed only by a check.
const MAX_DAMAGED: usize = 1 << 20;

#[derive(Default)]
pub(crate) struct DamagedObjects {
    /// Spares the lock when there are none.
    any: AtomicBool,
    keys: Mutex<HashSet<ObjectKey>>,
}

impl DamagedObjects {
    pub(crate) fn add(&self, keys: impl IntoIterator<Item = ObjectKey>) {
        let mut known = self.keys.lock();
        for key in keys {
            if known.len() < MAX_DAMAGED {
                known.insert(key);
            }
        }
        self.any.store(!known.is_empty(), Ordering::Release);
    }

    pub(super) fn contains(&self, key: &ObjectKey) -> bool {
        self.any.load(Ordering::Acquire) && self.keys.lock().contains(key)
    }

    pub(super) fn remove(&self, keys: &[ObjectKey]) {
        if keys.is_empty() {
            return;
        }
        let mut known = self.keys.lock();
        for key in keys {
            known.remove(key);
        }
        self.any.store(!known.is_empty(), Ordering::Release);
    }
}

impl ObjectStore {
    /// Says that the stored copies of these objects are no good: the next that is put takes their place.
    pub fn mark_damaged(&self, keys: impl IntoIterator<Item = ObjectKey>) {
        self.core.damaged.add(keys);
    }

    /// Whether the object's stored copy is known to be no good.
    pub fn is_damaged(&self, key: &ObjectKey) -> bool {
        self.core.damaged.contains(key)
    }
}
