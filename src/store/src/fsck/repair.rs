//! Putting right what a check found.
//!
//! What can be done here is done first: headers of packs, what is intact in damaged blocks, counts. Then what is left
//! of each affected path comes from elsewhere, which is the caller's to arrange. A path that cannot be had stays valid,
//! as with stock, and is quarantined ([`crate::quarantine`]). Nothing is deleted.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use castore::objects::ObjectKey;
use nix_compat::store_path::StorePath;

use super::{PathDamage, Report, Stage, Watch};
use crate::error::Result;
use crate::quarantine::Quarantined;
use crate::store::Store;

/// How it went with a path.
pub type Mended = Result<(), String>;

/// What was put right, and what could not be.
#[derive(Debug, Default)]
pub struct Repair {
    /// Files of packs that were put back, or filled up with nothing where they were lost.
    pub files: u64,
    /// Headers of packs that were restored.
    pub headers: u64,
    /// Objects that were saved from damaged blocks.
    pub salvaged: u64,
    /// Paths whose contents came from elsewhere.
    pub mended: BTreeSet<StorePath>,
    /// Damaged objects that no valid path needs; they are garbage.
    pub unused: u64,
    /// Paths that could not be repaired, with the reason: they are in quarantine now.
    pub quarantined: Vec<Quarantined>,
    /// Paths that were in quarantine and are sound.
    pub released: BTreeSet<StorePath>,
}

impl Store {
    /// Repairs what `report` tells of. `mend` has the contents of a path put into the store again, by
    /// [`Store::replace_contents`] in the end.
    ///
    /// # Errors
    /// When the index or the packs cannot be written. A path that cannot be repaired is no error.
    pub fn repair(
        &self,
        report: &Report,
        mend: &mut dyn FnMut(&StorePath) -> Mended,
        watch: &dyn Watch,
    ) -> Result<Repair> {
        let mut repair = Repair::default();
        let objects = self.engine.objects();
        repair.files = objects.restore_files().map_err(castore::Error::from)?;
        objects.restore_headers(&report.headers).map_err(castore::Error::from)?;
        repair.headers = report.headers.len() as u64;
        let damaged: BTreeSet<ObjectKey> = report.damaged.iter().map(|object| object.key).collect();
        // What could not be read for a header only is looked at again.
        let still = match report.headers.is_empty() {
            true => objects.check_some(&damaged),
            false => objects.check(&|_| std::ops::ControlFlow::Continue(())).map(|checked| checked.damaged),
        };
        let still = still.map_err(castore::Error::from)?;
        let before = still.len();
        let left = objects.salvage(still).map_err(castore::Error::from)?;
        repair.salvaged = (before - left.len()) as u64;
        let left: HashSet<ObjectKey> = left.into_iter().map(|object| object.key).collect();

        let (users, _) = self.users_of(left.clone())?;
        let mut affected: BTreeMap<StorePath, PathDamage> = report.affected.clone();
        for (path, key) in users {
            let message = format!("path '{}' is damaged: {key} cannot be read", self.store_dir().display(&path));
            affected.entry(path).or_insert(PathDamage { message, other_contents: false, missing: None });
        }
        watch.stage(Stage::Repair, affected.len() as u64);
        // What others refer to comes first, so that it is there when they are registered.
        for path in self.references_first(affected.keys())? {
            if self.mend_path(&path, mend, &mut repair)? {
                self.release(&path)?;
            }
            if watch.advance(1).is_break() {
                break;
            }
        }
        for quarantined in self.quarantined()? {
            if !affected.contains_key(&quarantined.path) && self.check_path(&quarantined.path)?.is_none() {
                self.release(&quarantined.path)?;
                repair.released.insert(quarantined.path);
            }
        }
        self.engine.forget_lost(&left)?;
        repair.unused = left.iter().filter(|key| objects.is_damaged(key)).count() as u64;
        objects.recount().map_err(castore::Error::from)?;
        self.rewrite_records()?;
        if repair.files > 0 {
            // The last one may be among what is lost.
            self.write_checkpoint()?;
        }
        self.sync()?;
        // Damaged garbage must not be taken for contents that are here.
        self.sweeper.wake();
        Ok(repair)
    }

    /// Whether the path is sound now.
    fn mend_path(
        &self,
        path: &StorePath,
        mend: &mut dyn FnMut(&StorePath) -> Mended,
        repair: &mut Repair,
    ) -> Result<bool> {
        // Another path that shares the damage may have brought what was missing.
        if self.heal_path(path)?.is_none() {
            return Ok(true);
        }
        let Some(mut damage) = self.check_path(path)? else { return Ok(true) };
        let mut reason = None;
        while let Some(missing) = damage.missing.take() {
            if let Err(why) = mend(&missing) {
                reason = Some(why);
                break;
            }
            match self.check_path(path)? {
                None => return Ok(true),
                // The same again: it was not made valid after all.
                Some(next) if next.missing.as_ref() == Some(&missing) => break,
                Some(next) => damage = next,
            }
        }
        if reason.is_none() {
            match mend(path) {
                Ok(()) => match self.check_path(path)? {
                    None => {
                        repair.mended.insert(path.clone());
                        return Ok(true);
                    }
                    Some(next) => damage = next,
                },
                Err(why) => reason = Some(why),
            }
        }
        let message = match reason {
            Some(why) => format!("{}; it could not be repaired: {why}", damage.message),
            None => damage.message,
        };
        self.quarantine(path, &message, damage.other_contents)?;
        let (path, withheld) = (path.clone(), damage.other_contents);
        repair.quarantined.push(Quarantined { path, reason: message, withheld });
        Ok(false)
    }

    /// The paths in an order in which none comes before one it refers to.
    fn references_first<'a>(&self, paths: impl Iterator<Item = &'a StorePath>) -> Result<Vec<StorePath>> {
        let paths: BTreeSet<&StorePath> = paths.collect();
        let (mut order, mut seen) = (Vec::new(), BTreeSet::new());
        for path in &paths {
            let mut stack = vec![((*path).clone(), false)];
            while let Some((path, left)) = stack.pop() {
                if left {
                    order.push(path);
                } else if seen.insert(path.clone()) {
                    let references = self.entry(&path)?.map(|entry| entry.info.references).unwrap_or_default();
                    stack.push((path, true));
                    stack.extend(references.into_iter().filter(|r| paths.contains(r)).map(|r| (r, false)));
                }
            }
        }
        Ok(order)
    }
}
