//! The tables of the store against each other.
//!
//! A path and the rows that follow from it are looked at with changes locked out, one path at a time.

use std::ops::ControlFlow;

use castore::index::{Batch, Table};
use nix_compat::store_path::StorePath;

use super::{PathDamage, Report, Stage, TableProblem, Watch};
use crate::derivations::output_paths;
use crate::error::Result;
use crate::realisations::realised_path;
use crate::record::Entry;
use crate::records::{key_of_path, key_of_realisation};
use crate::store::Store;

/// The check under way.
struct Tables<'a> {
    store: &'a Store,
    repair: bool,
    report: &'a mut Report,
    records_missing: bool,
}

impl Store {
    pub(super) fn check_tables(&self, repair: bool, report: &mut Report, watch: &dyn Watch) -> Result<()> {
        let paths = self.keys(&self.tables.paths)?;
        watch.stage(Stage::Tables, paths.len() as u64);
        let mut tables = Tables { store: self, repair, report, records_missing: false };
        for digest in &paths {
            tables.path(digest)?;
            if watch.advance(1).is_break() {
                tables.report.ended = true;
                return Ok(());
            }
        }
        tables.numbers()?;
        tables.referrers()?;
        tables.realisations()?;
        if tables.records_missing && repair {
            self.rewrite_records()?;
        }
        Ok(())
    }

    fn keys(&self, table: &Table) -> Result<Vec<Vec<u8>>> {
        let mut keys = Vec::new();
        self.index().scan_prefix(table, &[], &mut |key, _| {
            keys.push(key.to_vec());
            ControlFlow::Continue(())
        })?;
        Ok(keys)
    }
}

impl Tables<'_> {
    fn tell(&mut self, message: String, fix: Batch) -> Result<()> {
        let repaired = self.repair && !fix.is_empty();
        if repaired {
            self.store.commit(fix)?;
        }
        self.report.tables.push(TableProblem { message, repaired });
        Ok(())
    }

    fn put(&self, table: Table, key: &[u8], value: impl Into<Vec<u8>>) -> Batch {
        let mut batch = Batch::default();
        batch.put(table, key, value.into());
        batch
    }

    fn delete(&self, table: Table, key: &[u8]) -> Batch {
        let mut batch = Batch::default();
        batch.delete(table, key);
        batch
    }

    fn path(&mut self, key: &[u8]) -> Result<()> {
        let store = self.store;
        let _changing = store.changing.lock();
        let (index, tables) = (store.index(), &store.tables);
        let Some(row) = index.get(&tables.paths, key)? else { return Ok(()) };
        self.report.paths += 1;
        let entry = match Entry::decode(key, &row) {
            Ok(entry) if entry.info.path.digest()[..] == *key => entry,
            Ok(entry) => {
                let text = format!("the row of '{}' has the key of another path", entry.info.path);
                return self.tell(text, Batch::default());
            }
            Err(error) => return self.tell(error.to_string(), Batch::default()),
        };
        let digest = entry.info.path.digest();
        let name = store.store_dir().display(&entry.info.path);
        let number = entry.number.to_be_bytes();
        if index.get(&tables.numbers, &number)?.as_deref() != Some(&digest[..]) {
            let fix = self.put(tables.numbers, &number, digest);
            self.tell(format!("the index does not find '{name}' by its number"), fix)?;
        }
        for reference in &entry.info.references {
            if !store.is_valid(reference)? {
                let other = store.store_dir().display(reference);
                let message = format!("path '{name}' refers to '{other}', which is not valid");
                let damage = PathDamage { message, other_contents: false, missing: Some(reference.clone()) };
                self.report.affected.insert(entry.info.path.clone(), damage);
            }
            let row = [reference.digest(), digest].concat();
            if index.get(&tables.referrers, &row)?.is_none() {
                let fix = self.put(tables.referrers, &row, Vec::<u8>::new());
                self.tell(format!("the index does not know that '{name}' refers to '{reference}'"), fix)?;
            }
        }
        let record = key_of_path(&row);
        if !store.engine.objects().contains(&record).map_err(castore::Error::from)? {
            self.missing_record(&name)?;
        }
        self.outputs(&entry.info.path, &entry)
    }

    /// That outputs of a derivation know of it. One that cannot be read is found by its contents.
    fn outputs(&mut self, path: &StorePath, entry: &Entry) -> Result<()> {
        if !path.is_derivation() {
            return Ok(());
        }
        let store = self.store;
        let Ok(derivation) = store.read_derivation_node(path, &entry.node) else { return Ok(()) };
        for (name, output) in output_paths(&derivation.basic) {
            let key = [output.digest(), path.digest()].concat();
            if store.index().get(&store.tables.derivers, &key)?.is_none() {
                let fix = self.put(store.tables.derivers, &key, name.as_str());
                self.tell(format!("the index does not know that '{output}' is an output of '{path}'"), fix)?;
            }
        }
        Ok(())
    }

    fn missing_record(&mut self, what: &str) -> Result<()> {
        self.records_missing = true;
        let message = format!("'{what}' has no record in the packs");
        self.report.tables.push(TableProblem { message, repaired: self.repair });
        Ok(())
    }

    fn numbers(&mut self) -> Result<()> {
        let store = self.store;
        for key in store.keys(&store.tables.numbers)? {
            let _changing = store.changing.lock();
            let Some(digest) = store.index().get(&store.tables.numbers, &key)? else { continue };
            let entry = <[u8; 20]>::try_from(&digest[..]).ok().map(|digest| store.entry_by_digest(&digest));
            // A row that cannot be read has been told of.
            let Some(Ok(entry)) = entry else { continue };
            if entry.is_none_or(|entry| entry.number.to_be_bytes()[..] != key[..]) {
                let fix = self.delete(store.tables.numbers, &key);
                self.tell(format!("number {} belongs to no valid path", hex(&key)), fix)?;
            }
        }
        Ok(())
    }

    fn referrers(&mut self) -> Result<()> {
        let store = self.store;
        for key in store.keys(&store.tables.referrers)? {
            let halves =
                key.split_at_checked(20).map(|(to, from)| (<[u8; 20]>::try_from(to), <[u8; 20]>::try_from(from)));
            let Some((Ok(to), Ok(from))) = halves else {
                let fix = self.delete(store.tables.referrers, &key);
                self.tell(format!("a row of the table of referrers is damaged: {}", hex(&key)), fix)?;
                continue;
            };
            let _changing = store.changing.lock();
            if store.index().get(&store.tables.referrers, &key)?.is_none() {
                continue;
            }
            let Ok(entry) = store.entry_by_digest(&from) else { continue };
            if !entry.is_some_and(|entry| entry.info.references.iter().any(|reference| reference.digest() == to)) {
                let fix = self.delete(store.tables.referrers, &key);
                self.tell(format!("the index knows of a reference that is none: {}", hex(&key)), fix)?;
            }
        }
        Ok(())
    }

    fn realisations(&mut self) -> Result<()> {
        let store = self.store;
        let (index, tables) = (store.index(), &store.tables);
        for key in store.keys(&tables.realisations)? {
            let _changing = store.changing.lock();
            let Some(row) = index.get(&tables.realisations, &key)? else { continue };
            let digest = match realised_path(&key, &row) {
                Ok((digest, _)) => digest,
                Err(error) => {
                    let fix = self.delete(tables.realisations, &key);
                    self.tell(error.to_string(), fix)?;
                    continue;
                }
            };
            if index.get(&tables.paths, &digest)?.is_none() {
                let fix = self.delete(tables.realisations, &key);
                self.tell(format!("realisation {} names a path that is not valid", hex(&key)), fix)?;
                continue;
            }
            let back = [&digest[..], &key].concat();
            if index.get(&tables.realised, &back)?.is_none() {
                let fix = self.put(tables.realised, &back, Vec::<u8>::new());
                self.tell(format!("the index does not find realisation {} by its path", hex(&key)), fix)?;
            }
            let record = key_of_realisation(&key, &row);
            if !store.engine.objects().contains(&record).map_err(castore::Error::from)? {
                self.missing_record(&format!("realisation {}", hex(&key)))?;
            }
        }
        for key in store.keys(&tables.realised)? {
            let _changing = store.changing.lock();
            let known = match key.split_at_checked(20) {
                Some((path, realisation)) => index
                    .get(&tables.realisations, realisation)?
                    .is_some_and(|row| realised_path(realisation, &row).is_ok_and(|(digest, _)| digest == *path)),
                None => false,
            };
            if !known && index.get(&tables.realised, &key)?.is_some() {
                let fix = self.delete(tables.realised, &key);
                self.tell(format!("a path is said to have a realisation it has not: {}", hex(&key)), fix)?;
            }
        }
        Ok(())
    }
}

fn hex(key: &[u8]) -> String {
    key.iter().map(|byte| format!("{byte:02x}")).collect()
}
