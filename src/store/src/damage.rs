//! Damage that somebody met who only wanted to read.
//!
//! What a reader gets is an error for that read. That the path be repaired for the next one is arranged by whoever
//! listens here: repairing takes sources, which the store knows nothing of.

use std::sync::Arc;

use nix_compat::store_path::StorePath;

use crate::error::Result;
use crate::store::Store;

/// Told of a path of which something could not be read, once for each read. Must return at once: a program waits.
pub type DamageListener = Arc<dyn Fn(&StorePath) + Send + Sync>;

impl Store {
    /// From now on `listener` is told of damage that is met in reading.
    pub fn on_damage(&self, listener: DamageListener) {
        *self.damage_listener.write() = Some(listener);
    }

    pub(crate) fn tell_damage(&self, path: &StorePath) {
        let listener = self.damage_listener.read().clone();
        if let Some(listener) = listener {
            listener(path);
        }
    }

    /// Checks one path from the disk up; tells what is wrong with it.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn examine_path(&self, path: &StorePath) -> Result<Option<String>> {
        Ok(self.check_path(path)?.map(|damage| damage.message))
    }

    /// Saves what can be saved of a path from its own packs, and takes it out of quarantine when it is sound. Tells what
    /// is wrong still; `None` also when the path is not valid any more.
    ///
    /// # Errors
    /// When the index or the packs cannot be read or written.
    pub fn recover_path(&self, path: &StorePath) -> Result<Option<String>> {
        let damage = self.heal_path(path)?;
        if damage.is_none() {
            self.release(path)?;
        }
        Ok(damage)
    }
}
