//! The index lost altogether: all of it made anew from the packs.
//!
//! The castore finds its objects ([`castore::rebuild`]); among them are the records ([`crate::records`]) of paths and
//! realisations, also of some that were deleted or have changed since. What counts is decided by what can only ever
//! become true:
//!
//! * a number that a checkpoint knows to be dead is dead;
//! * of two records with one number each has signatures, or `ultimate`, that the other may lack: what one of them says is so;
//! * of two records of one path with different numbers the higher number is the later registration.
//!
//! A path that was deleted so shortly before the loss that no checkpoint tells comes back when its contents are still
//! all there. It is no root, so the next collection takes it away again. When every block of the packs could be read, a
//! path that lacks contents or references was deleted; when some could not, it is damaged instead, and kept for repair.
//!
//! What a path from a lazy source lacks ([`crate::lazy`]) was not lost: it is promised again.
//!
//! Memory: all path infos at once, about a kilobyte each.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::ControlFlow;
use std::sync::Arc;

use castore::check::OnBytes;
use castore::index::{Batch, IndexOptions};
use castore::objects::{ObjectKey, ObjectKind};
use castore::{BlobService, Digest, DirectoryService, Node};
use nix_compat::store_path::StorePath;

use crate::derivations::output_paths;
use crate::error::{Error, Result};
use crate::lock::StateLock;
use crate::realisations::{self, realised_path};
use crate::record::Entry;
use crate::records::{Checkpoint, LazyRecord, RealisationRecord};
use crate::register::MAX_SIGNATURES;
use crate::store::{Config, META_NEXT_NUMBER, META_RECORDS, Store};
use crate::sweep;

/// Numbers that are skipped: more than can have been given away within the time in which nothing was durable yet.
const GAP: u32 = 1 << 20;
/// Rows written in one batch.
const ROWS: usize = 1000;

/// A path of which a record was found and which did not come back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// Which.
    pub path: StorePath,
    /// Why.
    pub reason: String,
}

/// What a rebuilding gave.
#[derive(Debug, Default)]
pub struct Rebuilt {
    /// What was found in the packs.
    pub packs: castore::rebuild::Rebuilt,
    /// Valid paths.
    pub paths: u64,
    /// Realisations.
    pub realisations: u64,
    /// Objects that were saved from damaged blocks.
    pub rescued: u64,
    /// Records that cannot be read.
    pub unreadable_records: u64,
    /// Paths that were deleted before the index was lost, or are not whole.
    pub dropped: Vec<Dropped>,
    /// Paths that are valid again, though contents or references of them are missing.
    pub damaged: Vec<Dropped>,
}

impl Store {
    /// The bytes that a rebuilding of this store will read.
    ///
    /// # Errors
    /// When the packs cannot be listed.
    pub fn rebuild_size(config: &Config) -> Result<u64> {
        Ok(castore::rebuild::size(&config.state_dir.join("castored"))?)
    }

    /// Makes the index of a store anew that nobody has open. An index that is there is kept under another name.
    ///
    /// # Errors
    /// [`Error::InUse`]; [`Error::WrongStoreDir`] when the packs were written for another store directory; failures to
    /// read packs or to write the new index.
    pub fn rebuild(config: Config, progress: OnBytes<'_>) -> Result<Rebuilt> {
        let dir = config.state_dir.join("castored");
        let lock = StateLock::acquire(&dir)?;
        let mut packs = castore::rebuild::rebuild_index(&dir, &IndexOptions::default(), progress)?;
        let rescued = std::mem::take(&mut packs.rescued);
        let store = Self::open_locked(config, lock)?;
        let mut rebuilt = Rebuilt { packs, ..Rebuilt::default() };
        let mut writer = store.engine.objects().writer();
        for (key, contents) in rescued {
            rebuilt.rescued += u64::from(writer.put(key, &contents).map_err(castore::Error::from)?);
        }
        writer.flush().map_err(castore::Error::from)?;
        drop(writer);
        let found = Found::read(&store, &mut rebuilt)?;
        found.restore(&store, &mut rebuilt)?;
        store.write_missing_records()?;
        store.sync()?;
        castore::rebuild::finish(&dir)?;
        Ok(rebuilt)
    }
}

/// What the records say.
#[derive(Default)]
struct Found {
    /// By number.
    paths: BTreeMap<u32, Entry>,
    realisations: BTreeMap<Vec<u8>, Vec<Vec<u8>>>,
    /// Sources of paths whose contents were elsewhere once, by the digest of the path.
    lazy: HashMap<[u8; 20], String>,
    /// The last one: its limit, and what is alive below. Limits grow, and what once was dead stays so.
    checkpoint: Option<(u32, BTreeSet<u32>)>,
}

impl Found {
    fn read(store: &Arc<Store>, rebuilt: &mut Rebuilt) -> Result<Self> {
        let mut keys = Vec::new();
        let mut each = |key| {
            keys.push(key);
            ControlFlow::Continue(())
        };
        store.engine.objects().keys_of(ObjectKind::Record, &mut each).map_err(castore::Error::from)?;
        let mut found = Self::default();
        for key in keys {
            match found.add(store, &key) {
                Ok(()) => {}
                Err(Error::WrongStoreDir { found, wanted }) => return Err(Error::WrongStoreDir { found, wanted }),
                Err(error) => {
                    tracing::warn!(%key, %error, "a record cannot be read");
                    rebuilt.unreadable_records += 1;
                }
            }
        }
        Ok(found)
    }

    fn add(&mut self, store: &Store, key: &ObjectKey) -> Result<()> {
        let Some(record) = store.record(key)? else { return Ok(()) };
        if let Some(row) = record.path {
            let entry = Entry::decode(key.to_string().as_bytes(), &row)?;
            match self.paths.get_mut(&entry.number) {
                Some(known) if known.info.path == entry.info.path => merge(known, entry),
                _ => drop(self.paths.insert(entry.number, entry)),
            }
        }
        if let Some(RealisationRecord { key, row }) = record.realisation {
            self.realisations.entry(key).or_default().push(row);
        }
        if let Some(LazyRecord { digest, source }) = record.lazy
            && let Ok(digest) = digest.try_into()
        {
            self.lazy.insert(digest, source);
        }
        if let Some(checkpoint) = record.checkpoint {
            self.add_checkpoint(store, &checkpoint)?;
        }
        Ok(())
    }

    fn add_checkpoint(&mut self, store: &Store, checkpoint: &Checkpoint) -> Result<()> {
        if checkpoint.store_dir != store.store_dir().as_str() {
            let (found, wanted) = (checkpoint.store_dir.clone(), store.store_dir().as_str().to_owned());
            return Err(Error::WrongStoreDir { found, wanted });
        }
        match &mut self.checkpoint {
            Some((limit, _)) if *limit > checkpoint.limit => {}
            Some((limit, alive)) if *limit == checkpoint.limit => {
                let other: BTreeSet<u32> = checkpoint.numbers().collect();
                alive.retain(|number| other.contains(number));
            }
            last => *last = Some((checkpoint.limit, checkpoint.numbers().collect())),
        }
        Ok(())
    }

    fn is_dead(&self, number: u32) -> bool {
        self.checkpoint.as_ref().is_some_and(|(limit, alive)| number < *limit && !alive.contains(&number))
    }

    fn restore(self, store: &Arc<Store>, rebuilt: &mut Rebuilt) -> Result<()> {
        let highest = self.paths.keys().next_back().map_or(0, |number| number + 1);
        let limit = self.checkpoint.as_ref().map_or(0, |(limit, _)| *limit);
        let next = highest.max(limit).max(crate::view::FIRST_ROOT_NUMBER).checked_add(GAP);
        let next = next.ok_or(Error::NumbersExhausted)?;
        let valid = self.valid_paths(store, rebuilt);

        let mut rows = Rows { store, batch: Batch::default() };
        for entry in valid.values() {
            rows.path(entry)?;
        }
        for (key, candidates) in &self.realisations {
            // The number tells which path it was about, should several have had the name one after the other.
            let alive = candidates.iter().filter(|row| match realised_path(key, row) {
                Ok((digest, number)) => valid.get(&digest).is_some_and(|entry| number == 0 || number == entry.number),
                Err(_) => false,
            });
            let row = alive.cloned().reduce(|one, other| realisations::merged(&one, &other).unwrap_or(one));
            if let Some(row) = row {
                let (digest, _) = realised_path(key, &row)?;
                rows.realisation(key, &digest, row)?;
                rebuilt.realisations += 1;
            }
        }
        // Visible from here on, so that derivations can be read.
        rows.flush()?;
        for entry in valid.values().filter(|entry| entry.info.path.is_derivation()) {
            rows.derivation(entry)?;
        }
        rebuilt.paths = valid.len() as u64;
        for damaged in &rebuilt.damaged {
            store.quarantine(&damaged.path, &damaged.reason, false)?;
        }
        rows.batch.put(store.tables.meta, META_NEXT_NUMBER, next.to_string());
        // Rows and records can differ now, and what was superseded is in the index again.
        rows.batch.delete(store.tables.meta, META_RECORDS);
        sweep::want(store, &mut rows.batch)?;
        rows.batch.delete(store.tables.meta, castore::rebuild::UNFINISHED);
        rows.flush()
    }

    /// Whether what a path lacks was elsewhere, or may have been: it is promised again. Its directories have to be here.
    fn expected_again(&self, store: &Store, entry: &Entry) -> bool {
        let digest = entry.info.path.digest();
        let Some(source) = self.lazy.get(&digest) else { return false };
        let promised = store.engine.promise(&entry.node, &digest).map_err(Error::from).and_then(|_| {
            let mut batch = Batch::default();
            batch.put(store.tables.lazy, &digest, source.clone());
            store.commit(batch)
        });
        if let Err(error) = &promised {
            tracing::warn!(path = %entry.info.path, %error, "what is missing of a path cannot be expected from its source");
        }
        promised.is_ok()
    }

    /// Which paths are valid, by digest.
    fn valid_paths(&self, store: &Store, rebuilt: &mut Rebuilt) -> BTreeMap<[u8; 20], Entry> {
        let mut trees = Trees { store, whole: HashMap::new() };
        let keep_damaged = !rebuilt.packs.is_whole() || rebuilt.unreadable_records > 0;
        let mut valid: BTreeMap<[u8; 20], Entry> = BTreeMap::new();
        let mut broken = Vec::new();
        // The highest numbers first: the last registration of a name, if its contents are there.
        for (number, entry) in self.paths.iter().rev() {
            let digest = entry.info.path.digest();
            if valid.contains_key(&digest) || self.is_dead(*number) {
                continue;
            }
            match trees.missing(&entry.node) {
                None => drop(valid.insert(digest, entry.clone())),
                Some(_) if self.expected_again(store, entry) => drop(valid.insert(digest, entry.clone())),
                Some(what) => broken.push((entry, what)),
            }
        }
        for (entry, reason) in broken {
            let dropped = Dropped { path: entry.info.path.clone(), reason };
            let digest = entry.info.path.digest();
            if valid.contains_key(&digest) {
                continue;
            }
            if keep_damaged {
                valid.insert(digest, entry.clone());
                rebuilt.damaged.push(dropped);
            } else {
                rebuilt.dropped.push(dropped);
            }
        }
        loop {
            let gone: Vec<(StorePath, StorePath)> = valid
                .values()
                .filter_map(|entry| {
                    let known = |path: &StorePath| valid.get(&path.digest()).is_some_and(|e| e.info.path == *path);
                    let missing = entry.info.references.iter().find(|reference| !known(reference))?;
                    Some((entry.info.path.clone(), missing.clone()))
                })
                .collect();
            for (path, missing) in &gone {
                let reason = format!("it refers to '{}', which is not valid", store.store_dir().display(missing));
                let dropped = Dropped { path: path.clone(), reason };
                if keep_damaged {
                    rebuilt.damaged.push(dropped);
                } else {
                    valid.remove(&path.digest());
                    rebuilt.dropped.push(dropped);
                }
            }
            if gone.is_empty() || keep_damaged {
                return valid;
            }
        }
    }
}

/// Two records of one registration as one.
fn merge(known: &mut Entry, other: Entry) {
    known.info.ultimate |= other.info.ultimate;
    let room = MAX_SIGNATURES.saturating_sub(known.info.signatures.len());
    let mut new = other.info.signatures;
    new.retain(|signature| !known.info.signatures.contains(signature));
    known.info.signatures.extend(new.into_iter().take(room));
    known.info.deriver = known.info.deriver.take().or(other.info.deriver);
    known.info.ca = known.info.ca.take().or(other.info.ca);
}

/// Finds out whether trees are whole: that their objects are in the index, each directory looked into once.
struct Trees<'a> {
    store: &'a Store,
    /// Directories that were looked into, with what is missing below.
    whole: HashMap<Digest, Option<String>>,
}

impl Trees<'_> {
    /// What a tree lacks.
    fn missing(&mut self, root: &Node) -> Option<String> {
        let mut stack: Vec<Node> = vec![root.clone()];
        let mut entered = Vec::new();
        let mut missing = None;
        while missing.is_none()
            && let Some(node) = stack.pop()
        {
            match node {
                Node::Symlink { .. } => {}
                Node::File { digest, .. } => {
                    if !self.blob_is_whole(&digest) {
                        missing = Some(format!("contents {digest} are not in the packs"));
                    }
                }
                Node::Directory { digest, .. } => match self.whole.get(&digest) {
                    Some(known) => missing.clone_from(known),
                    None => match self.store.engine.get(&digest) {
                        Ok(Some(directory)) => {
                            // Undone below if anything is missing.
                            self.whole.insert(digest, None);
                            entered.push(digest);
                            stack.extend(directory.entries().map(|(_, node)| node.clone()));
                        }
                        _ => missing = Some(format!("directory {digest} is not in the packs")),
                    },
                },
            }
        }
        if missing.is_some() {
            // Which of them have it below themselves is not known; they are looked into again.
            entered.iter().for_each(|digest| drop(self.whole.remove(digest)));
        }
        missing
    }

    fn blob_is_whole(&self, digest: &Digest) -> bool {
        let Ok(Some(stat)) = self.store.engine.stat(digest) else { return false };
        let objects = self.store.engine.objects();
        stat.chunks.iter().all(|(digest, _)| {
            objects.contains(&ObjectKey { kind: ObjectKind::Chunk, digest: *digest }).unwrap_or(false)
        })
    }
}

/// Writes the tables of the store.
struct Rows<'a> {
    store: &'a Arc<Store>,
    batch: Batch,
}

impl Rows<'_> {
    fn path(&mut self, entry: &Entry) -> Result<()> {
        let tables = &self.store.tables;
        let digest = entry.info.path.digest();
        self.batch.put(tables.paths, &digest, entry.encode());
        self.batch.put(tables.numbers, &entry.number.to_be_bytes(), digest.to_vec());
        for reference in &entry.info.references {
            self.batch.put(tables.referrers, &[reference.digest(), digest].concat(), Vec::new());
        }
        self.flush_some()
    }

    fn realisation(&mut self, key: &[u8], path: &[u8; 20], row: Vec<u8>) -> Result<()> {
        self.batch.put(self.store.tables.realised, &[&path[..], key].concat(), Vec::new());
        self.batch.put(self.store.tables.realisations, key, row);
        self.flush_some()
    }

    /// What a derivation says of its outputs. One that cannot be read is damaged, which is found elsewhere.
    fn derivation(&mut self, entry: &Entry) -> Result<()> {
        let path = &entry.info.path;
        match self.store.read_derivation_node(path, &entry.node) {
            Ok(derivation) => {
                for (name, output) in output_paths(&derivation.basic) {
                    let key = [output.digest(), path.digest()].concat();
                    self.batch.put(self.store.tables.derivers, &key, name.as_str().to_owned());
                }
            }
            Err(error) => tracing::warn!(%path, %error, "cannot read a derivation"),
        }
        self.flush_some()
    }

    fn flush_some(&mut self) -> Result<()> {
        if self.batch.len() >= ROWS { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        self.store.commit(std::mem::take(&mut self.batch))
    }
}
