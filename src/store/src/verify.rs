//! Checking paths: that what is registered is there and has the hash it was registered with.

use std::ops::ControlFlow;

use nix_compat::store_path::StorePath;

use crate::error::{Result, causes};
use crate::fsck::PathDamage;
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
        Ok(self.verify_damage(path, contents)?.map(|damage| damage.message))
    }

    /// The same, with what a repair needs to know.
    pub(crate) fn verify_damage(&self, path: &StorePath, contents: bool) -> Result<Option<PathDamage>> {
        // A path that was deleted since it was listed is no damage.
        let Some(entry) = self.entry(path)? else { return Ok(None) };
        let name = self.store_dir().display(path);
        for reference in &entry.info.references {
            if !self.is_valid(reference)? {
                let other = self.store_dir().display(reference);
                let message = format!("path '{name}' refers to '{other}', which is not valid");
                return Ok(Some(PathDamage { message, other_contents: false, missing: Some(reference.clone()) }));
            }
        }
        if contents { self.verify_contents(path) } else { Ok(None) }
    }

    /// Whether the NAR of a path is the one that was registered.
    pub(crate) fn verify_contents(&self, path: &StorePath) -> Result<Option<PathDamage>> {
        let Some(entry) = self.entry(path)? else { return Ok(None) };
        if self.is_partly_here(path, &entry.node)? {
            // That it is not here yet is no damage, and a check is no reason to fetch it.
            return Ok(None);
        }
        let name = self.store_dir().display(path);
        let facts = self.nar_facts(&entry.node, None);
        let other = facts.is_ok();
        let message = match facts {
            // Deleted while it was read.
            Err(_) if !self.is_valid(path)? => return Ok(None),
            Err(error) => format!("path '{name}' cannot be read: {}", causes(&error)),
            Ok(facts) if facts.nar_hash != entry.info.nar_hash => format!(
                "path '{name}' was modified! expected hash '{}', got '{}'",
                entry.info.nar_hash.to_prefixed_nix32(),
                facts.nar_hash.to_prefixed_nix32()
            ),
            Ok(facts) if facts.nar_size != entry.info.nar_size => format!(
                "path '{name}' has a NAR of {} bytes, but is recorded with {}",
                facts.nar_size, entry.info.nar_size
            ),
            Ok(_) => return Ok(None),
        };
        Ok(Some(PathDamage { message, other_contents: other, missing: None }))
    }
}
