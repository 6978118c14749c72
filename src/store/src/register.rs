//! Making paths valid.
//!
//! A registration is one atomic batch of the index: path infos, referrers, derivers and numbers appear
//! together or not at all. Objects are in the index before (an import flushes its session first), so a path
//! can be read the moment it is valid.

use std::collections::BTreeSet;
use std::time::{SystemTime, UNIX_EPOCH};

use castore::Node;
use castore::index::Batch;
use nix_compat::path_info::PathInfo;
use nix_compat::signature::Signature;
use nix_compat::store_path::StorePath;

use crate::claims;
use crate::derivations::output_paths;
use crate::error::{Error, Result};
use crate::nar_in::Pin;
use crate::record::Entry;
use crate::records::RecordWriter;
use crate::store::{META_NEXT_NUMBER, Store};
use crate::view::StoreEvent;

/// Signatures a path may have: clients may add them without being trusted, and a record is read whole.
pub const MAX_SIGNATURES: usize = 128;
/// Bytes of one of them as text.
pub const MAX_SIGNATURE_LENGTH: usize = 1024;
/// Numbers reserved at a time. A crash skips at most so many.
const NUMBER_RESERVE: u32 = 1024;

/// A path to be registered, its contents already in the castore.
#[derive(Clone, Debug)]
pub struct NewPath {
    /// What Nix knows of it. A registration time of 0 means now.
    pub info: PathInfo,
    /// The root of its contents.
    pub node: Node,
    /// Keeps the contents from being swept until they are registered, if they were imported just now.
    pub pin: Option<Pin>,
}

/// Hands out path numbers.
///
/// The mount derives inode numbers from them and the kernel remembers those longer than a crash of ours, so a
/// number must never come twice: each is reserved durably before it is used. They grow, so whoever deletes paths finds
/// what has been registered since it looked.
#[derive(Debug)]
pub(crate) struct Numbers {
    next: u32,
    reserved: u32,
    /// How many realisations were registered.
    realisations: u64,
}

impl Numbers {
    pub(crate) fn starting_at(next: u32) -> Self {
        Self { next, reserved: next, realisations: 0 }
    }

    /// The number of the path that is registered next: all that are valid have smaller ones.
    pub(crate) fn next(&self) -> u32 {
        self.next
    }

    /// Changes with each registration of a realisation.
    pub(crate) fn realisations(&self) -> u64 {
        self.realisations
    }

    pub(crate) fn count_realisation(&mut self) {
        self.realisations += 1;
    }
}

impl Store {
    pub(crate) fn take_number(&self, numbers: &mut Numbers) -> Result<u32> {
        if numbers.next == numbers.reserved {
            let reserved = numbers.reserved.checked_add(NUMBER_RESERVE).ok_or(Error::NumbersExhausted)?;
            let mut batch = Batch::default();
            batch.put(self.tables.meta, META_NEXT_NUMBER, reserved.to_string());
            self.commit(batch)?;
            self.sync()?;
            numbers.reserved = reserved;
        }
        numbers.next += 1;
        Ok(numbers.next - 1)
    }

    /// Makes the paths valid, all of them or none, and visible in the mount before it returns.
    ///
    /// A path that is valid already keeps its record; new signatures are added to it, and `ultimate` is not
    /// taken back. References must be valid or among the paths. The outputs of a derivation are verified.
    ///
    /// Durability follows as [`Durability`](crate::Durability) says, or at the next [`Store::sync`].
    ///
    /// # Errors
    /// [`Error::InvalidReference`], [`Error::Derivation`], [`Error::ContentAddressMismatch`] for a content address that
    /// does not give the path, [`Error::SignatureTooLong`], [`Error::TooManySignatures`], or a failure of the index;
    /// nothing is registered.
    pub fn register(&self, paths: Vec<NewPath>) -> Result<()> {
        let offered: BTreeSet<StorePath> = paths.iter().map(|p| p.info.path.clone()).collect();
        // Derivations are read and checked outside of the lock: it only costs time.
        let mut outputs = Vec::new();
        for new in &paths {
            self.check_address(&new.info)?;
            self.check_signature_sizes(&new.info.path, &new.info.signatures)?;
            if new.info.path.is_derivation() {
                let derivation = self.read_derivation_node(&new.info.path, &new.node)?;
                self.check_derivation(&new.info.path, &derivation)?;
                outputs.push((new.info.path.clone(), derivation));
            }
        }
        let mut events = Vec::new();
        {
            let mut numbers = self.changing.lock();
            let mut batch = Batch::default();
            let mut records = RecordWriter::new(self);
            for new in &paths {
                let (entry, is_new) =
                    self.add_to_batch(new.clone(), &offered, &mut numbers, &mut batch, &mut events)?;
                let row = entry.encode();
                if is_new {
                    records.new_path(&row)?
                } else {
                    records.path(&row)?
                }
                batch.put(self.tables.paths, &entry.info.path.digest(), row);
            }
            for (drv_path, derivation) in &outputs {
                for (name, output) in output_paths(&derivation.basic) {
                    let key = [output.digest(), drv_path.digest()].concat();
                    batch.put(self.tables.derivers, &key, name.as_str().to_owned());
                }
            }
            self.forewarn(paths.iter().map(|new| new.info.path.to_string()));
            records.commit(self, batch)?;
        }
        // The pins in `paths` may go from here on.
        drop(paths);
        self.publish(&events);
        self.registered()
    }

    /// The path as it will be, and whether it was not valid before.
    fn add_to_batch(
        &self,
        new: NewPath,
        offered: &BTreeSet<StorePath>,
        numbers: &mut Numbers,
        batch: &mut Batch,
        events: &mut Vec<StoreEvent>,
    ) -> Result<(Entry, bool)> {
        let NewPath { mut info, node, pin: _ } = new;
        let digest = info.path.digest();
        Ok(match self.entry_by_digest(&digest)? {
            Some(existing) => {
                let mut existing = (*existing).clone();
                existing.info.ultimate |= info.ultimate;
                // Where there is no room for the new ones, the path is valid without them.
                let room = MAX_SIGNATURES.saturating_sub(existing.info.signatures.len());
                info.signatures.retain(|signature| !existing.info.signatures.contains(signature));
                existing.info.signatures.extend(info.signatures.into_iter().take(room));
                existing.info.deriver = existing.info.deriver.or(info.deriver);
                existing.info.ca = existing.info.ca.or(info.ca);
                (existing, false)
            }
            None => {
                for reference in &info.references {
                    if !offered.contains(reference) && !self.is_valid(reference)? {
                        return Err(Error::InvalidReference {
                            path: self.store_dir().display(&info.path),
                            reference: self.store_dir().display(reference),
                        });
                    }
                    batch.put(self.tables.referrers, &[reference.digest(), digest].concat(), Vec::new());
                }
                if info.registration_time == 0 {
                    info.registration_time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |d| d.as_secs());
                }
                let number = self.take_number(numbers)?;
                batch.put(self.tables.numbers, &number.to_be_bytes(), digest.to_vec());
                events.push(StoreEvent::Added { name: info.path.to_string(), number });
                (Entry { info, node, number }, true)
            }
        })
    }

    /// Adds signatures to a valid path.
    ///
    /// # Errors
    /// [`Error::NotValid`], [`Error::SignatureTooLong`], [`Error::TooManySignatures`].
    pub fn add_signatures(&self, path: &StorePath, signatures: impl IntoIterator<Item = Signature>) -> Result<()> {
        let changing = self.changing.lock();
        let mut entry = self.valid_entry(path)?;
        entry.info.signatures.extend(signatures);
        self.check_signature_sizes(path, &entry.info.signatures)?;
        let row = entry.encode();
        let mut records = RecordWriter::new(self);
        records.path(&row)?;
        let mut batch = Batch::default();
        batch.put(self.tables.paths, &path.digest(), row);
        records.commit(self, batch)?;
        drop(changing);
        self.registered()
    }

    fn check_signature_sizes(&self, path: &StorePath, signatures: &BTreeSet<Signature>) -> Result<()> {
        if signatures.len() > MAX_SIGNATURES {
            return Err(Error::TooManySignatures { path: self.store_dir().display(path), limit: MAX_SIGNATURES });
        }
        if signatures.iter().any(|signature| signature.to_string().len() > MAX_SIGNATURE_LENGTH) {
            return Err(Error::SignatureTooLong { path: self.store_dir().display(path), limit: MAX_SIGNATURE_LENGTH });
        }
        Ok(())
    }

    /// Imports check this too, against the contents; nobody may get by with a false address by not importing.
    fn check_address(&self, info: &PathInfo) -> Result<()> {
        match &info.ca {
            Some(ca) if !info.is_content_addressed(self.store_dir()) => Err(Error::ContentAddressMismatch {
                path: self.store_dir().display(&info.path),
                specified: ca.to_string(),
                got: claims::OTHER_PATH.to_owned(),
            }),
            _ => Ok(()),
        }
    }
}
