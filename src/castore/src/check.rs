//! Checking the packs against the index: that every object is where the index says, whole, and what its digest says.
//!
//! It runs beside everything else. The index is read in slices of packs, so that the places of a bounded number of
//! objects are in memory ([`SLICE`]); each block is read from disk once, whatever is in the cache, and its objects are
//! hashed. What was collected meanwhile is no damage.
//!
//! [`ObjectStore::salvage`] puts again what is intact in damaged blocks: a block has one checksum, an object a digest.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;

use crate::chunk::ChunkList;
use crate::digest::Digest;
use crate::index::Batch;
use crate::objects::{Core, Entry, ObjectError, ObjectKey, ObjectKind, ObjectStore, Usage, key_of};
use crate::pack::{BlockError, PackError, Packs, Place};
use crate::parallel;

mod lost;

/// Objects whose places are in memory at a time: 64 bytes each.
const SLICE: u64 = 1 << 20;
/// Threads that read and hash, at most.
const MAX_THREADS: usize = 4;

/// Why an object that the index has is not there.
#[derive(Debug, thiserror::Error)]
pub enum Damage {
    /// The block cannot be read.
    #[error(transparent)]
    Unreadable(#[from] PackError),
    /// The index entry makes no sense.
    #[error("its index entry is damaged")]
    Entry,
    /// The block is whole, but the object is not in it.
    #[error("the block at {offset} of pack {pack:08x} does not hold it where the index says")]
    Elsewhere {
        /// The pack's number.
        pack: u32,
        /// Where the block begins.
        offset: u64,
    },
    /// The contents have another digest.
    #[error("its contents in the block at {offset} of pack {pack:08x} have another digest")]
    Digest {
        /// The pack's number.
        pack: u32,
        /// Where the block begins.
        offset: u64,
    },
    /// The list of a blob's chunks does not make that blob.
    #[error("the chunks it lists do not make the blob")]
    List,
}

impl Damage {
    /// Whether nothing that happens to the disk makes it readable again: its bytes were read, and they are wrong. A file
    /// that is gone or cut short may be put back, and a disk that refuses may be connected again.
    #[must_use]
    pub fn is_lasting(&self) -> bool {
        match self {
            Self::Unreadable(PackError::Block { source, .. }) => *source != BlockError::Short,
            Self::Unreadable(_) => false,
            Self::Entry | Self::Elsewhere { .. } | Self::Digest { .. } | Self::List => true,
        }
    }

    /// Whether it is damage at all, and not the system that refuses for want of memory or descriptors.
    #[must_use]
    pub fn is_certain(&self) -> bool {
        match self {
            Self::Unreadable(error) => error.is_damage() || matches!(error, PackError::Gone(_)),
            _ => true,
        }
    }
}

/// An object that cannot be read, or not as what it is.
#[derive(Debug)]
pub struct DamagedObject {
    /// Which.
    pub key: ObjectKey,
    /// What is wrong.
    pub damage: Damage,
}

/// What a check found.
#[derive(Debug, Default)]
pub struct Checked {
    /// Objects looked at.
    pub objects: u64,
    /// Their contents' bytes.
    pub bytes: u64,
    /// Objects that are damaged.
    pub damaged: Vec<DamagedObject>,
    /// Files of packs that were deleted or cut short. What they had may still be readable, as long as they are open.
    pub files: Vec<PackError>,
    /// Packs whose header is damaged: nothing in them can be read before it is restored.
    pub headers: Vec<u32>,
    /// Keys of the table of objects that name none.
    pub strange_keys: u64,
    /// Packs that the index has forgotten: it was damaged, and what they had is missing from it.
    pub unknown: Vec<PathBuf>,
    /// Packs of which the index counts wrongly what is alive.
    pub miscounted: Vec<u32>,
}

/// Told of every so many bytes that were checked; breaks to end the check early.
pub type OnBytes<'a> = &'a (dyn Fn(u64) -> ControlFlow<()> + Sync);

/// Entries of one block.
type Group = (Place, Vec<(ObjectKey, Entry)>);

impl ObjectStore {
    /// Checks every object there is. `progress` is told of the objects' bytes as they are checked, the total of which is
    /// [`Stats::raw_bytes`](crate::objects::Stats::raw_bytes).
    ///
    /// # Errors
    /// When the index cannot be read. Damage is no error.
    pub fn check(&self, progress: OnBytes<'_>) -> Result<Checked, ObjectError> {
        let core = &*self.core;
        let mut checked = Checked::default();
        for number in core.packs.numbers() {
            if let Err(error @ (PackError::Deleted(_) | PackError::Cut { .. })) = core.packs.check_file(number) {
                checked.files.push(error);
            } else if matches!(core.packs.check_header(number), Err(PackError::Header(_))) {
                checked.headers.push(number);
            }
        }
        checked.unknown = Packs::unknown(core.packs.dir())?;
        let mut lists = Vec::new();
        for (first, last) in self.slices() {
            let entries = self.entries_of(first, last, &mut checked)?;
            lists.extend(entries.iter().map(|(key, _)| *key).filter(|key| key.kind == ObjectKind::ChunkList));
            let found = check_all(core, &group(entries), progress);
            checked.objects += found.objects;
            checked.bytes += found.bytes;
            checked.damaged.extend(found.damaged);
            if found.ended {
                return Ok(checked);
            }
        }
        let damaged: HashSet<ObjectKey> = checked.damaged.iter().map(|damaged| damaged.key).collect();
        for key in lists.into_iter().filter(|key| !damaged.contains(key)) {
            if !self.is_list_right(&key)? {
                checked.damaged.push(DamagedObject { key, damage: Damage::List });
            }
        }
        checked.miscounted = self.miscounted()?.into_keys().collect();
        Ok(checked)
    }

    /// Checks these objects only; those that are damaged. What is not there is not.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn check_some(&self, keys: &BTreeSet<ObjectKey>) -> Result<Vec<DamagedObject>, ObjectError> {
        let (mut entries, mut damaged) = (Vec::new(), Vec::new());
        for key in keys {
            match self.core.entry(key) {
                Ok(Some(entry)) => entries.push((*key, entry)),
                Ok(None) => {}
                Err(ObjectError::Entry(key)) => damaged.push(DamagedObject { key, damage: Damage::Entry }),
                Err(error) => return Err(error),
            }
        }
        let found = check_all(&self.core, &group(entries), &|_| ControlFlow::Continue(()));
        damaged.extend(found.damaged);
        let known: HashSet<ObjectKey> = damaged.iter().map(|object| object.key).collect();
        for key in keys.iter().filter(|key| key.kind == ObjectKind::ChunkList && !known.contains(key)) {
            if !self.is_list_right(key)? {
                damaged.push(DamagedObject { key: *key, damage: Damage::List });
            }
        }
        Ok(damaged)
    }

    /// Ranges of packs with a bounded number of objects each, as far as the index counts them right.
    fn slices(&self) -> Vec<(u32, u32)> {
        let state = self.core.catalog.lock();
        let counts: BTreeMap<u32, u64> = state.usage.iter().map(|(pack, usage)| (*pack, usage.live_objects)).collect();
        drop(state);
        let (mut slices, mut first, mut sum) = (Vec::new(), 0, 0);
        for (pack, objects) in counts {
            if sum > 0 && sum + objects > SLICE {
                slices.push((first, pack - 1));
                (first, sum) = (pack, 0);
            }
            sum += objects;
        }
        // Also what points to packs that do not exist.
        slices.push((first, u32::MAX));
        slices
    }

    fn entries_of(&self, first: u32, last: u32, checked: &mut Checked) -> Result<Vec<(ObjectKey, Entry)>, ObjectError> {
        let core = &self.core;
        let mut entries = Vec::new();
        core.index.scan_prefix(&core.tables.objects, &[], &mut |key, value| {
            match (key_of(key), Entry::decode(value)) {
                (Some(key), Some(entry)) if (first..=last).contains(&entry.place.pack) => entries.push((key, entry)),
                // Told once.
                (Some(key), None) if first == 0 => {
                    checked.damaged.push(DamagedObject { key, damage: Damage::Entry });
                }
                (None, _) if first == 0 => checked.strange_keys += 1,
                _ => {}
            }
            ControlFlow::Continue(())
        })?;
        Ok(entries)
    }

    fn is_list_right(&self, key: &ObjectKey) -> Result<bool, ObjectError> {
        let Some(encoded) = self.readable(key)? else { return Ok(true) };
        self.makes_blob(key, &encoded)
    }

    /// Whether the chunks that a list names make the blob `key` is about, as far as they can be read.
    fn makes_blob(&self, key: &ObjectKey, encoded: &[u8]) -> Result<bool, ObjectError> {
        let Some(list) = ChunkList::decode(encoded) else { return Ok(false) };
        let mut hasher = blake3::Hasher::new();
        for (digest, length) in list.chunks() {
            let chunk = ObjectKey { kind: ObjectKind::Chunk, digest };
            match self.readable(&chunk)? {
                Some(contents) if contents.len() as u64 == length => hasher.update(&contents),
                Some(_) => return Ok(false),
                // A damaged chunk is told of itself; one that is not there at all is missing from the blob, unless the
                // blob has been collected.
                None => return Ok(self.contains(&chunk)? || !self.contains(key)?),
            };
        }
        Ok(Digest::from(hasher.finalize()) == key.digest)
    }

    /// The same, where a chunk that cannot be read leaves it unknown and so counts against it.
    fn makes_blob_surely(&self, key: &ObjectKey, encoded: &[u8]) -> Result<bool, ObjectError> {
        let Some(list) = ChunkList::decode(encoded) else { return Ok(false) };
        for (digest, _) in list.chunks() {
            if self.readable(&ObjectKey { kind: ObjectKind::Chunk, digest })?.is_none() {
                return Ok(false);
            }
        }
        self.makes_blob(key, encoded)
    }

    /// The object's contents; `None` when it is not there or cannot be read.
    fn readable(&self, key: &ObjectKey) -> Result<Option<Bytes>, ObjectError> {
        match self.get(key) {
            Err(ObjectError::Unreadable { .. } | ObjectError::Entry(_)) => Ok(None),
            other => other,
        }
    }

    /// What is alive in those packs of which the index says something else.
    fn miscounted(&self) -> Result<BTreeMap<u32, Usage>, ObjectError> {
        // A first count beside everything else; only where it differs others have to wait for a second.
        if wrong(&self.count()?, &self.core.catalog.lock().usage).is_empty() {
            return Ok(BTreeMap::new());
        }
        let state = self.core.catalog.lock();
        Ok(wrong(&self.count()?, &state.usage))
    }

    fn count(&self) -> Result<BTreeMap<u32, (u64, u64)>, ObjectError> {
        let core = &self.core;
        let mut counts: BTreeMap<u32, (u64, u64)> = BTreeMap::new();
        core.index.scan_prefix(&core.tables.objects, &[], &mut |_, value| {
            if let Some(entry) = Entry::decode(value) {
                let (objects, bytes) = counts.entry(entry.place.pack).or_default();
                (*objects, *bytes) = (*objects + 1, *bytes + u64::from(entry.length));
            }
            ControlFlow::Continue(())
        })?;
        Ok(counts)
    }

    /// Counts anew what is alive in each pack. Nobody else can enter objects meanwhile.
    ///
    /// # Errors
    /// When the index cannot be read or written.
    pub fn recount(&self) -> Result<(), ObjectError> {
        let core = &self.core;
        let mut state = core.catalog.lock();
        let right = wrong(&self.count()?, &state.usage);
        let mut batch = Batch::new();
        for (pack, usage) in &right {
            batch.put(core.tables.usage, &Packs::key(*pack), usage.encode());
        }
        core.index.commit(batch)?;
        state.usage.extend(right);
        Ok(())
    }

    /// Writes those headers of packs anew that are damaged; how many.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn restore_damaged_headers(&self) -> Result<u64, ObjectError> {
        let packs = &self.core.packs;
        let is_damaged = |pack: &u32| matches!(packs.check_header(*pack), Err(PackError::Header(_)));
        let damaged: Vec<u32> = packs.numbers().into_iter().filter(is_damaged).collect();
        self.restore_headers(&damaged)?;
        Ok(damaged.len() as u64)
    }

    /// Writes the headers of these packs anew.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn restore_headers(&self, packs: &[u32]) -> Result<(), ObjectError> {
        packs.iter().try_for_each(|pack| Ok(self.core.packs.restore_header(*pack)?))
    }

    /// Puts again those of `damaged` whose contents are intact though their block is not. The others are left marked as
    /// damaged and returned.
    ///
    /// # Errors
    /// When the index cannot be read or nothing can be written.
    pub fn salvage(
        self: &std::sync::Arc<Self>,
        damaged: Vec<DamagedObject>,
    ) -> Result<Vec<DamagedObject>, ObjectError> {
        self.mark_damaged(damaged.iter().map(|damaged| damaged.key));
        let mut writer = self.writer();
        let mut left = Vec::new();
        let mut last: Option<(Place, Option<Bytes>)> = None;
        // Lists are seen to be right by the chunks, so these come first.
        let (lists, others): (Vec<_>, Vec<_>) =
            damaged.into_iter().partition(|object| object.key.kind == ObjectKind::ChunkList);
        let mut flushed = false;
        for object in others.into_iter().chain(lists) {
            let is_list = object.key.kind == ObjectKind::ChunkList;
            if is_list && !flushed {
                writer.flush()?;
                flushed = true;
            }
            let entry = match self.core.entry(&object.key) {
                Ok(Some(entry)) => entry,
                Ok(None) => continue,
                Err(ObjectError::Entry(_)) => {
                    left.push(object);
                    continue;
                }
                Err(error) => return Err(error),
            };
            let raw = match &last {
                Some((place, raw)) if *place == entry.place => raw.clone(),
                _ => self.core.packs.read_unverified(entry.place).ok(),
            };
            last = Some((entry.place, raw.clone()));
            let contents = raw.as_ref().and_then(|raw| entry.contents_in(raw));
            match contents {
                Some(contents) if is_list && !self.makes_blob_surely(&object.key, &contents)? => left.push(object),
                Some(contents) if verifies(&object.key, &contents) => drop(writer.put(object.key, &contents)?),
                _ => left.push(object),
            }
        }
        writer.flush()?;
        Ok(left)
    }
}

fn wrong(right: &BTreeMap<u32, (u64, u64)>, known: &HashMap<u32, Usage>) -> BTreeMap<u32, Usage> {
    let mut wrong = BTreeMap::new();
    for (&pack, &(live_objects, live_bytes)) in right {
        let usage = known.get(&pack).copied().unwrap_or_default();
        if (usage.live_objects, usage.live_bytes) != (live_objects, live_bytes) {
            wrong.insert(pack, Usage { live_objects, live_bytes, raw_bytes: usage.raw_bytes.max(live_bytes) });
        }
    }
    for (&pack, usage) in known {
        if !right.contains_key(&pack) && usage.live_objects > 0 {
            wrong.insert(pack, Usage { live_objects: 0, live_bytes: 0, ..*usage });
        }
    }
    wrong
}

fn group(mut entries: Vec<(ObjectKey, Entry)>) -> Vec<Group> {
    entries.sort_unstable_by_key(|(_, entry)| (entry.place.pack, entry.place.offset, entry.place.length, entry.start));
    let mut groups: Vec<Group> = Vec::new();
    for (key, entry) in entries {
        match groups.last_mut() {
            Some((place, members)) if *place == entry.place => members.push((key, entry)),
            _ => groups.push((entry.place, vec![(key, entry)])),
        }
    }
    groups
}

#[derive(Default)]
struct Found {
    objects: u64,
    bytes: u64,
    damaged: Vec<DamagedObject>,
    /// Not all were looked at.
    ended: bool,
}

fn check_all(core: &Core, groups: &[Group], progress: OnBytes<'_>) -> Found {
    let (objects, bytes) = (AtomicU64::new(0), AtomicU64::new(0));
    let damaged = Mutex::new(Vec::new());
    let flow = parallel::for_each(groups, MAX_THREADS, |(place, members)| {
        let found = check_block(core, *place, members);
        let length: u64 = members.iter().map(|(_, entry)| u64::from(entry.length)).sum();
        objects.fetch_add(members.len() as u64, Ordering::Relaxed);
        bytes.fetch_add(length, Ordering::Relaxed);
        if !found.is_empty() {
            damaged.lock().extend(found);
        }
        progress(length)
    });
    Found {
        objects: objects.into_inner(),
        bytes: bytes.into_inner(),
        damaged: damaged.into_inner(),
        ended: flow.is_break(),
    }
}

/// What is damaged of the objects of one block.
fn check_block(core: &Core, place: Place, members: &[(ObjectKey, Entry)]) -> Vec<DamagedObject> {
    let found = match core.packs.read_with_table(place) {
        Ok((rows, raw)) => {
            let mut rows = rows.iter().peekable();
            let judge = |(key, entry): &(ObjectKey, Entry)| {
                while rows.next_if(|row| row.start < entry.start).is_some() {}
                // Objects without contents share their start with the next.
                let mut candidates = rows.clone().take_while(|row| row.start == entry.start);
                let (pack, offset) = (place.pack, place.offset);
                if !candidates.any(|row| row.key == *key && row.length == entry.length) {
                    return Some(DamagedObject { key: *key, damage: Damage::Elsewhere { pack, offset } });
                }
                let right = entry.contents_in(&raw).is_some_and(|contents| verifies(key, &contents));
                (!right).then_some(DamagedObject { key: *key, damage: Damage::Digest { pack, offset } })
            };
            members.iter().filter_map(judge).collect()
        }
        Err(error) => unreadable(core, members, &error),
    };
    // What was collected, moved or put again meanwhile is not damaged.
    let is_current = |damaged: &DamagedObject| {
        let before = members.iter().find(|(key, _)| *key == damaged.key).map(|(_, entry)| *entry);
        core.entry(&damaged.key).ok().flatten() == before
    };
    found.into_iter().filter(is_current).collect()
}

/// All members, each with what is wrong with their block.
fn unreadable(core: &Core, members: &[(ObjectKey, Entry)], error: &PackError) -> Vec<DamagedObject> {
    let again = |place| match core.packs.read_with_table(place) {
        Ok(_) => None,
        Err(error) => Some(Damage::Unreadable(error)),
    };
    let of_all = match error {
        PackError::Block { pack, offset, source } => {
            Some(|| Damage::Unreadable(PackError::Block { pack: *pack, offset: *offset, source: *source }))
        }
        _ => None,
    };
    members
        .iter()
        .filter_map(|(key, entry)| {
            let damage = of_all.as_ref().map_or_else(|| again(entry.place), |damage| Some(damage()))?;
            Some(DamagedObject { key: *key, damage })
        })
        .collect()
}

/// Whether contents are what their key says. A list of chunks can only be seen to be one.
pub(crate) fn verifies(key: &ObjectKey, contents: &[u8]) -> bool {
    match key.kind {
        ObjectKind::Chunk | ObjectKind::Directory | ObjectKind::Record => Digest::of(contents) == key.digest,
        ObjectKind::ChunkList => ChunkList::decode(contents).is_some(),
    }
}

#[cfg(test)]
mod tests;
