//! Checking the store: that what is registered is there and has the hash it was registered with.

use std::ops::ControlFlow;

use nix_compat::store_path::StorePath;

use crate::error::Result;
use crate::store::Store;

/// A valid path that is not what it should be.
#[derive(Debug)]
pub struct Damage {
    /// Which path.
    pub path: StorePath,
    /// What is wrong, as a sentence for the user.
    pub message: String,
}

impl Store {
    /// Checks every path: its references, and with `contents` that its NAR has the recorded hash and size.
    ///
    /// `each` is told of every path as its check begins and may stop the run.
    ///
    /// # Errors
    /// When the index cannot be read; damage is no error.
    pub fn verify(&self, contents: bool, each: &mut dyn FnMut(&StorePath) -> ControlFlow<()>) -> Result<Vec<Damage>> {
        let mut damage = Vec::new();
        for path in self.all_valid_paths()? {
            if each(&path).is_break() {
                break;
            }
            if let Some(message) = self.verify_path(&path, contents)? {
                damage.push(Damage { path, message });
            }
        }
        Ok(damage)
    }

    /// Checks one path; tells what is wrong with it, or `None`.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn verify_path(&self, path: &StorePath, contents: bool) -> Result<Option<String>> {
        // A path that was deleted since it was listed is no damage.
        let Some(entry) = self.entry(path)? else { return Ok(None) };
        let name = self.store_dir().display(path);
        for reference in &entry.info.references {
            if !self.is_valid(reference)? {
                let reference = self.store_dir().display(reference);
                return Ok(Some(format!("path '{name}' refers to '{reference}', which is not valid")));
            }
        }
        if !contents {
            return Ok(None);
        }
        Ok(match self.nar_facts(&entry.node, None) {
            Err(error) => Some(format!("path '{name}' cannot be read: {error}")),
            Ok(facts) if facts.nar_hash != entry.info.nar_hash => Some(format!(
                "path '{name}' was modified! expected hash '{}', got '{}'",
                entry.info.nar_hash.to_prefixed_nix32(),
                facts.nar_hash.to_prefixed_nix32()
            )),
            Ok(facts) if facts.nar_size != entry.info.nar_size => Some(format!(
                "path '{name}' has a NAR of {} bytes, but is recorded with {}",
                facts.nar_size, entry.info.nar_size
            )),
            Ok(_) => None,
        })
    }
}
