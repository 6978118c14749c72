//! Files of packs that somebody else deleted or cut short: put back, and what is lost with them forgotten.

use std::collections::{BTreeMap, HashSet};

use crate::index::Batch;
use crate::objects::{ObjectError, ObjectKey, ObjectStore, key_bytes};
use crate::pack::{PackError, Packs};

impl ObjectStore {
    /// Sees to it that the files of all packs are there and as long as they were, so that the store opens again. What no
    /// descriptor has any more is damaged from then on. How many files there were to restore.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn restore_files(&self) -> Result<u64, ObjectError> {
        let packs = &self.core.packs;
        let is_lost = |error| matches!(error, PackError::Deleted(_) | PackError::Cut { .. });
        let lost: Vec<u32> =
            packs.numbers().into_iter().filter(|pack| packs.check_file(*pack).is_err_and(is_lost)).collect();
        for pack in &lost {
            if !packs.restore_file(*pack)? {
                tracing::error!(pack, "the file of a pack was deleted or cut short; what it had is lost");
            }
        }
        Ok(lost.len() as u64)
    }

    /// Removes the entries of those objects that are damaged because the file has lost them: whoever puts them again, also
    /// after the next start, puts a good copy. How many there were.
    ///
    /// # Errors
    /// When the index cannot be read or written.
    pub(crate) fn forget_lost(&self, keys: &HashSet<ObjectKey>) -> Result<u64, ObjectError> {
        let core = &self.core;
        let mut state = core.catalog.lock();
        let (mut batch, mut changed, mut forgotten) = (Batch::new(), BTreeMap::new(), 0);
        for key in keys.iter().filter(|key| self.is_damaged(key)) {
            let Ok(Some(entry)) = core.entry(key) else { continue };
            if core.packs.is_lost(entry.place) {
                let usage = state.usage_in(&mut changed, entry.place.pack);
                usage.live_objects = usage.live_objects.saturating_sub(1);
                usage.live_bytes = usage.live_bytes.saturating_sub(u64::from(entry.length));
                batch.delete(core.tables.objects, &key_bytes(key));
                forgotten += 1;
            }
        }
        for (pack, usage) in &changed {
            batch.put(core.tables.usage, &Packs::key(*pack), usage.encode());
        }
        core.index.commit(batch)?;
        state.usage.extend(changed);
        Ok(forgotten)
    }
}

#[cfg(test)]
mod tests;
