//! Objects in use that a sweep cannot read, and so does not know what they name.
//!
//! Not to sweep until they are repaired would end all collection for ever by one bit. To keep what is newer, or what
//! lies in the same packs, keeps nothing for certain: rewriting moves objects about. So the rule is:
//!
//! * First they are read once more, and saved from their blocks where they are intact there, as a repair does.
//! * **What only a damaged object would tell to be in use is given up once every path it is part of is in
//!   quarantine.** Such a path cannot be read at those places, and whatever repairs it brings the contents again. All
//!   that is marked through what can be read of the path stays.
//! * A path that is not in quarantine is put there by the sweep, committed before anything is removed, when the
//!   damage is lasting: the bytes were read, and they are wrong. Where a file is gone or a disk refuses, somebody may
//!   put it back: then the sweep is given up, and `castored fsck --repair` decides.
//! * Whatever else keeps an object from being read (no memory, no descriptors) gives the sweep up.
//!
//! Memory beyond a sweep's: as [`Users`](crate::fsck) has it, some 100 bytes for each directory and blob in use.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use castore::check::Damage;
use castore::engine::Garbage;
use castore::objects::ObjectKey;
use nix_compat::store_path::StorePath;

use super::SweepError;
use crate::error::{Error, Result, causes};
use crate::store::Store;

impl Store {
    /// Decides what becomes of what could not be read while everything alive was marked.
    pub(super) fn settle_unread(&self, garbage: &mut Garbage) -> Result<(), SweepError> {
        let mut tried = BTreeSet::new();
        // What was saved may name what cannot be read again.
        loop {
            let new: BTreeSet<ObjectKey> = garbage.unread().difference(&tried).copied().collect();
            if new.is_empty() {
                break;
            }
            self.save_intact(&new)?;
            tried.extend(new);
            garbage.mark_unread().map_err(Error::from)?;
        }
        if garbage.unread().is_empty() {
            return Ok(());
        }
        let damaged = self.engine.objects().check_some(garbage.unread()).map_err(castore::Error::from)?;
        let damaged = damaged.into_iter().filter(|object| object.damage.is_certain());
        let damaged: BTreeMap<ObjectKey, Damage> = damaged.map(|object| (object.key, object.damage)).collect();
        self.give_up_paths(&damaged)?;
        // What is left is not damaged and cannot be read nevertheless: then nothing is swept.
        garbage.pass_over(&damaged.into_keys().collect());
        Ok(())
    }

    /// Puts those of the objects again that are intact though they cannot be read where they are.
    fn save_intact(&self, keys: &BTreeSet<ObjectKey>) -> Result<(), castore::Error> {
        let objects = self.engine.objects();
        objects.restore_damaged_headers()?;
        let damaged = objects.check_some(keys)?;
        objects.salvage(damaged)?;
        Ok(())
    }

    /// Sees to it that every path which a damaged object is part of is in quarantine.
    fn give_up_paths(&self, damaged: &BTreeMap<ObjectKey, Damage>) -> Result<(), SweepError> {
        let passing: HashSet<ObjectKey> =
            damaged.iter().filter(|(_, damage)| !damage.is_lasting()).map(|(key, _)| *key).collect();
        if let Some((path, key)) = self.not_given_up(passing)?.pop_first() {
            self.tell_damage(&path);
            return Err(SweepError::Undecided { path: self.store_dir().display(&path), key });
        }
        for (path, key) in self.not_given_up(damaged.keys().copied().collect())? {
            let reason = damaged.get(&key).map_or_else(|| "it is missing".to_owned(), |damage| causes(damage));
            let message = format!("path '{}' is damaged: {key}: {reason}", self.store_dir().display(&path));
            tracing::error!("{message}; it is quarantined, and what only {key} named is collected");
            self.quarantine(&path, &message, false)?;
            // Perhaps a source has it.
            self.tell_damage(&path);
        }
        Ok(())
    }

    /// The paths that an object of these is part of and that are not in quarantine, each with one such object.
    fn not_given_up(&self, keys: HashSet<ObjectKey>) -> Result<BTreeMap<StorePath, ObjectKey>> {
        let (mut users, _) = self.users_of(keys)?;
        for quarantined in self.quarantined()? {
            users.remove(&quarantined.path);
        }
        Ok(users)
    }
}
