//! Other contents for a path that is valid.
//!
//! That happens to a path that is damaged: its contents come again from elsewhere, or from another build. Most of the
//! time they are the same, and putting their objects was all there was to do. Where they are not, the path gets them
//! under a new number: to the mount it is another path that has the same name.

use std::ops::ControlFlow;

use castore::index::Batch;
use nix_compat::path_info::PathInfo;

use crate::error::{Error, Result};
use crate::realisations::renumbered;
use crate::record::Entry;
use crate::records::RecordWriter;
use crate::register::NewPath;
use crate::store::Store;
use crate::sweep;
use crate::view::StoreEvent;

impl Store {
    /// Gives a path the contents of `new`, which were imported just now, and registers it if it is not valid. It leaves
    /// the quarantine. Whether the contents are what the info says was looked at when they were imported; who may say so
    /// is the caller's business.
    ///
    /// # Errors
    /// [`Error::InvalidReference`], and those of a registration.
    pub fn replace_contents(&self, new: NewPath) -> Result<()> {
        let path = new.info.path.clone();
        let Some(known) = self.entry(&path)? else { return self.register(vec![new]) };
        if known.node == new.node && known.info.nar_hash == new.info.nar_hash {
            return self.release(&path);
        }
        let events;
        {
            let mut numbers = self.changing.lock();
            let known = self.valid_entry(&path)?;
            let digest = path.digest();
            let mut batch = Batch::default();
            for reference in new.info.references.iter().filter(|reference| **reference != path) {
                if !self.is_valid(reference)? {
                    return Err(Error::InvalidReference {
                        path: self.store_dir().display(&path),
                        reference: self.store_dir().display(reference),
                    });
                }
            }
            for reference in &known.info.references {
                batch.delete(self.tables.referrers, &[reference.digest(), digest].concat());
            }
            for reference in &new.info.references {
                batch.put(self.tables.referrers, &[reference.digest(), digest].concat(), Vec::new());
            }
            let number = self.take_number(&mut numbers)?;
            batch.delete(self.tables.numbers, &known.number.to_be_bytes());
            batch.put(self.tables.numbers, &number.to_be_bytes(), digest.to_vec());
            let info = PathInfo {
                deriver: new.info.deriver.clone().or(known.info.deriver),
                registration_time: known.info.registration_time,
                ultimate: new.info.ultimate,
                ..new.info.clone()
            };
            let row = Entry { info, node: new.node.clone(), number }.encode();
            let mut records = RecordWriter::new(self);
            records.path(&row)?;
            batch.put(self.tables.paths, &digest, row);
            for (key, row) in self.realisation_rows(&digest)? {
                if let Some(row) = renumbered(&row, number) {
                    records.realisation(&key, &row)?;
                    batch.put(self.tables.realisations, &key, row);
                }
            }
            self.quarantine.release(&digest, &self.tables, &mut batch);
            batch.delete(self.tables.lazy, &digest);
            // What it had is garbage, and its number dead.
            sweep::want(self, &mut batch)?;
            self.forewarn([path.to_string()].into_iter());
            records.commit(self, batch)?;
            self.derivations.forget(&path);
            let name = path.to_string();
            events =
                [StoreEvent::Removed { name: name.clone(), number: known.number }, StoreEvent::Added { name, number }];
        }
        drop(new);
        self.publish(&events);
        self.sweeper.wake();
        Ok(())
    }

    /// Keys and rows of the realisations of a path.
    pub(crate) fn realisation_rows(&self, digest: &[u8; 20]) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let mut keys = Vec::new();
        self.index().scan_prefix(&self.tables.realised, digest, &mut |key, _| {
            keys.push(key[digest.len()..].to_vec());
            ControlFlow::Continue(())
        })?;
        let mut rows = Vec::new();
        for key in keys {
            if let Some(row) = self.index().get(&self.tables.realisations, &key)? {
                rows.push((key, row.to_vec()));
            }
        }
        Ok(rows)
    }
}
