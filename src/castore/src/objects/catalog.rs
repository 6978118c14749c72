//! The one place where object entries are made and removed.
//!
//! Looking whether an object is there, entering it and keeping count of what is alive in each pack have to be one step,
//! also with regard to a collection that removes entries. That step is the catalog's lock, which is held for memory
//! operations and index lookups only, never while something is compressed or appended.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, MutexGuard};

use super::entry::Entry;
use super::key::key_bytes;
use super::{Core, Fingerprints, ObjectError, ObjectKey};
use crate::index::Batch;
use crate::pack::{BlockBuilder, Form, Landing, Packs};

/// What is alive in a pack.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    /// Objects the index finds in it.
    pub(crate) live_objects: u64,
    /// Their contents' bytes.
    pub(crate) live_bytes: u64,
    /// Raw bytes of all its blocks: what `live_bytes` would be had nothing died.
    pub(crate) raw_bytes: u64,
}

impl Usage {
    pub(crate) fn encode(&self) -> Vec<u8> {
        [self.live_objects, self.live_bytes, self.raw_bytes].map(u64::to_le_bytes).concat()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (words, rest) = bytes.as_chunks::<8>();
        match (words, rest) {
            (&[objects, live, raw], []) => Some(Self {
                live_objects: u64::from_le_bytes(objects),
                live_bytes: u64::from_le_bytes(live),
                raw_bytes: u64::from_le_bytes(raw),
            }),
            _ => None,
        }
    }
}

#[derive(Default)]
pub(crate) struct CatalogState {
    pub(crate) usage: HashMap<u32, Usage>,
    /// While a collection runs: objects that were put or found since it began, by fingerprint.
    pub(crate) touched: Option<Fingerprints>,
}

/// See the module.
pub(crate) struct Catalog {
    state: Mutex<CatalogState>,
    /// Whether `touched` is there: spares the lock when no collection runs.
    recording: AtomicBool,
}

impl Catalog {
    pub(super) fn new(usage: HashMap<u32, Usage>) -> Self {
        Self { state: Mutex::new(CatalogState { usage, touched: None }), recording: AtomicBool::new(false) }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, CatalogState> {
        self.state.lock()
    }

    /// Starts or ends the recording of what is touched.
    pub(crate) fn record(&self, touched: Option<Fingerprints>) {
        let mut state = self.state.lock();
        self.recording.store(touched.is_some(), Ordering::Release);
        state.touched = touched;
    }

    /// What is alive in all packs together.
    pub(super) fn totals(&self) -> Usage {
        let state = self.state.lock();
        state.usage.values().fold(Usage::default(), |total, usage| Usage {
            live_objects: total.live_objects + usage.live_objects,
            live_bytes: total.live_bytes + usage.live_bytes,
            raw_bytes: total.raw_bytes + usage.raw_bytes,
        })
    }
}

impl CatalogState {
    /// What is alive in a pack, to be changed in `changed` before it is committed.
    pub(crate) fn usage_in<'a>(&self, changed: &'a mut BTreeMap<u32, Usage>, pack: u32) -> &'a mut Usage {
        changed.entry(pack).or_insert_with(|| self.usage.get(&pack).copied().unwrap_or_default())
    }
}

impl Core {
    /// Whether the object is there; if so, a collection that runs will not remove it.
    pub(super) fn touch(&self, key: &ObjectKey) -> Result<bool, ObjectError> {
        if self.damaged.contains(key) {
            // As if it were not here: what is put in its place is a good copy.
            return Ok(false);
        }
        if !self.catalog.recording.load(Ordering::Acquire) {
            return self.is_here(key);
        }
        let mut state = self.catalog.lock();
        let found = self.is_here(key)?;
        if found && let Some(touched) = &mut state.touched {
            touched.insert(key);
        }
        Ok(found)
    }

    /// Whether the object has an entry, and its pack's file is not known to have lost it.
    fn is_here(&self, key: &ObjectKey) -> Result<bool, ObjectError> {
        let Some(entry) = self.entry(key)? else { return Ok(false) };
        let lost = self.packs.is_lost(entry.place);
        if lost {
            self.damaged.add([*key]);
        }
        Ok(!lost)
    }

    /// Enters the objects of a block that was appended, but for those that came to be in the meantime. A copy that is
    /// known to be damaged gives way. What `with` changes becomes visible in the same step.
    pub(super) fn enter(&self, block: &BlockBuilder, landing: Landing, with: Batch) -> Result<(), ObjectError> {
        let place = landing.place;
        let mut state = self.catalog.lock();
        let mut changed = BTreeMap::new();
        state.usage_in(&mut changed, place.pack).raw_bytes += block.raw_length() as u64;
        let mut batch = Batch::new();
        let mut entered = HashSet::new();
        let mut healed = Vec::new();
        for (key, start, length) in block.objects() {
            if entered.insert(key) {
                let damaged = self.damaged.contains(&key);
                let before = match self.entry(&key) {
                    Err(ObjectError::Entry(_)) if damaged => None,
                    other => other?,
                };
                if before.is_none() || damaged {
                    if let Some(before) = before {
                        let usage = state.usage_in(&mut changed, before.place.pack);
                        usage.live_objects = usage.live_objects.saturating_sub(1);
                        usage.live_bytes = usage.live_bytes.saturating_sub(u64::from(before.length));
                    }
                    let usage = state.usage_in(&mut changed, place.pack);
                    usage.live_objects += 1;
                    usage.live_bytes += u64::from(length);
                    let entry = Entry { place, start, length };
                    batch.put(self.tables.objects, &key_bytes(&key), entry.encode().to_vec());
                    if damaged {
                        healed.push(key);
                    }
                }
            }
            if let Some(touched) = &mut state.touched {
                touched.insert(&key);
            }
        }
        for (&pack, usage) in &changed {
            batch.put(self.tables.usage, &Packs::key(pack), usage.encode());
        }
        batch.append(with);
        self.index.commit(batch)?;
        state.usage.extend(changed);
        self.damaged.remove(&healed);
        Ok(())
    }

    /// Gives the objects of a block that was appended, copies of what is at `old`, their new places. What the index finds
    /// elsewhere by now, or not at all, is left alone. Returns how many objects have moved.
    pub(crate) fn relocate(
        &self,
        block: &BlockBuilder,
        old: &[Entry],
        form: Form,
        landing: Landing,
    ) -> Result<u64, ObjectError> {
        let place = landing.place;
        let mut state = self.catalog.lock();
        let mut changed = BTreeMap::new();
        state.usage_in(&mut changed, place.pack).raw_bytes += block.raw_length() as u64;
        let mut batch = Batch::new();
        let mut moved = 0;
        for ((key, start, length), old) in block.objects().zip(old) {
            if self.entry(&key)? != Some(*old) {
                continue;
            }
            let from = state.usage_in(&mut changed, old.place.pack);
            from.live_objects = from.live_objects.saturating_sub(1);
            from.live_bytes = from.live_bytes.saturating_sub(u64::from(length));
            let to = state.usage_in(&mut changed, place.pack);
            to.live_objects += 1;
            to.live_bytes += u64::from(length);
            batch.put(self.tables.objects, &key_bytes(&key), Entry { place, start, length }.encode().to_vec());
            moved += 1;
        }
        for (&pack, usage) in &changed {
            batch.put(self.tables.usage, &Packs::key(pack), usage.encode());
        }
        if let Some(form) = form.encode() {
            batch.put(self.tables.forms, &Packs::key(place.pack), vec![form]);
        }
        self.index.commit(batch)?;
        state.usage.extend(changed);
        Ok(moved)
    }

    /// Notes that a sealed pack is not worth rewriting.
    pub(crate) fn note_fixed(&self, pack: u32) -> Result<(), ObjectError> {
        let Some(form) = Form::Fixed.encode() else { return Ok(()) };
        let mut batch = Batch::new();
        batch.put(self.tables.forms, &Packs::key(pack), vec![form]);
        self.index.commit(batch)?;
        self.packs.note_form(pack, Form::Fixed);
        Ok(())
    }
}
