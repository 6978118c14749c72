//! Rewriting packs: what is alive in a pack is copied into blocks of another, then the pack is deleted.
//!
//! Two things make a pack worth it: a collection left little alive in it ([`ObjectStore::repack_sparse`]), or it takes
//! less space in the dense form ([`ObjectStore::optimise`]). Either way one pack after the other goes through these
//! steps:
//!
//! 1. It is sealed: from now on no entry of the index begins to point into it.
//! 2. Block by block, with checksums verified, the objects that the index finds there are gathered and appended to the
//!    open pack of the form wanted; then their entries change to the new places in one batch, unless they have changed
//!    meanwhile. A reader with an old place still finds the old bytes.
//! 3. When no entry points into the pack any more, the index is synced, with it the new places' data; only then is the
//!    pack deleted ([`Core::delete_packs`]). A reader who comes with an old place now looks into the index again.
//!
//! It can stop anywhere, by a crash as well: objects that have moved stay moved, and the next time goes on with those
//! that have not. A pack with a damaged block is left as it is, since only there can be found out what is lost.
//!
//! Memory: one block as it is read, one as it is written; whatever the store holds.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use crate::collect::CollectError;
use crate::objects::{Core, Entry, ObjectError, ObjectKey, ObjectKind, ObjectStore};
use crate::pack::{BlockBuilder, Form, Head, PackError, Place};

/// Packs of which less than half is alive are rewritten after a collection.
pub const SPARSE: Share = Share(500);
/// When space is short, these are.
pub const SPARSE_WHEN_SHORT: Share = Share(900);
/// A pack that is still appended to is rewritten when it has this part of its final size: one at the beginning fills up
/// with what is alive.
const OPEN_FROM: u64 = 8;
/// Rewriting has to save a 32nd of a pack.
const WORTHWHILE: u64 = 32;
/// Places in a pack where it is tried out how much the dense form saves.
const SAMPLES: u64 = 8;
/// While others import, rewriting rests after each block for as long as the block took, but no longer than this.
const LONGEST_REST: Duration = Duration::from_millis(100);

/// A share of something, in thousandths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Share(u16);

impl Share {
    /// The share that `part` is of `whole`; of nothing, all.
    #[must_use]
    pub fn of(part: u64, whole: u64) -> Self {
        if whole == 0 {
            return Self(1000);
        }
        let thousandths = u128::from(part) * 1000 / u128::from(whole);
        Self(u16::try_from(thousandths.min(1000)).unwrap_or(1000))
    }

    /// In thousandths.
    #[must_use]
    pub fn thousandths(self) -> u16 {
        self.0
    }
}

/// What a rewriting did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Repacked {
    /// Packs that were to be looked at.
    pub expected_packs: u64,
    /// Packs that are done, in whatever way.
    pub done_packs: u64,
    /// Packs deleted.
    pub deleted_packs: u64,
    /// Bytes of the deleted packs.
    pub freed_bytes: u64,
    /// Objects that have moved.
    pub moved_objects: u64,
    /// Bytes of the blocks they were written to.
    pub written_bytes: u64,
    /// Packs left as they are because of damage.
    pub damaged_packs: u64,
}

impl Repacked {
    /// Bytes the filesystem got back, less those that were written.
    #[must_use]
    pub fn saved_bytes(&self) -> u64 {
        self.freed_bytes.saturating_sub(self.written_bytes)
    }
}

/// Tells how many bytes may be written before a pack's are given back. A pack of which more is alive is passed over: on a
/// disk that is nearly full, half a copy of it would be the last thing that fits.
pub type Room<'a> = &'a dyn Fn() -> u64;

/// Called after each block; when it breaks, the rewriting ends early, with nothing wrong.
pub type Progress<'a> = &'a mut dyn FnMut(&Repacked) -> ControlFlow<()>;

impl ObjectStore {
    /// Rewrites packs of which less than `below` is alive, those with the least first, and deletes those in which nothing
    /// is. Those in the dense form stay in it.
    ///
    /// # Errors
    /// When the index or the disk refuses, e.g. for lack of space; what was rewritten by then stays so.
    pub fn repack_sparse(
        &self,
        below: Share,
        room: Room<'_>,
        progress: Progress<'_>,
    ) -> Result<Repacked, CollectError> {
        let core = &self.core;
        let mut sparse: Vec<(Share, u32)> =
            core.shares_alive().into_iter().filter(|(share, pack)| *share < below && core.is_grown(*pack)).collect();
        sparse.sort_unstable();
        let form = |pack| match core.packs.facts(pack) {
            Some((_, Form::Dense)) => Some(Form::Dense),
            Some((_, Form::Quick | Form::Fixed)) => Some(Form::Quick),
            None => None,
        };
        core.repack(sparse.into_iter().map(|(_, pack)| pack).collect(), &|pack| Ok(form(pack)), room, progress)
    }

    /// Rewrites packs that take noticeably less space in the dense form: better compressed, in larger blocks.
    ///
    /// # Errors
    /// As for [`repack_sparse`](Self::repack_sparse).
    pub fn optimise(&self, room: Room<'_>, progress: Progress<'_>) -> Result<Repacked, CollectError> {
        let core = &self.core;
        let form = |pack| match core.packs.facts(pack) {
            Some((_, Form::Quick)) if core.is_worth_it(pack)? => Ok(Some(Form::Dense)),
            _ => Ok(None),
        };
        core.repack(core.packs.numbers(), &form, room, progress)
    }

    /// Whether there are packs in which nothing is alive, to which nothing is appended any more.
    #[must_use]
    pub fn has_dead_packs(&self) -> bool {
        self.core.shares_alive().iter().any(|(share, pack)| share.thousandths() == 0 && !self.core.packs.is_open(*pack))
    }
}

impl Core {
    /// How much of each pack is alive, in bytes before compression.
    fn shares_alive(&self) -> Vec<(Share, u32)> {
        let state = self.catalog.lock();
        let share = |pack: u32| {
            let usage = state.usage.get(&pack).copied().unwrap_or_default();
            (Share::of(usage.live_bytes, usage.raw_bytes), pack)
        };
        self.packs.numbers().into_iter().map(share).collect()
    }

    /// About how many bytes of a pack's file are alive.
    fn stored_alive(&self, pack: u32) -> u64 {
        let length = self.packs.facts(pack).map_or(0, |(length, _)| length);
        let usage = self.catalog.lock().usage.get(&pack).copied().unwrap_or_default();
        (length * u64::from(Share::of(usage.live_bytes, usage.raw_bytes).thousandths())).div_ceil(1000)
    }

    fn is_grown(&self, pack: u32) -> bool {
        let grown = |(length, _)| length >= self.packs.seal_at() / OPEN_FROM;
        !self.packs.is_open(pack) || self.packs.facts(pack).is_some_and(grown)
    }

    /// Rewrites `packs`, each in the form that `form` says, if any.
    fn repack(
        &self,
        packs: Vec<u32>,
        form: &dyn Fn(u32) -> Result<Option<Form>, ObjectError>,
        room: Room<'_>,
        progress: Progress<'_>,
    ) -> Result<Repacked, CollectError> {
        let mut done = Repacked { expected_packs: packs.len() as u64, ..Repacked::default() };
        for pack in packs {
            let one_at_a_time = self.repacking.lock();
            let rewritten = match form(pack) {
                Ok(Some(_)) if self.stored_alive(pack) > room() => {
                    tracing::warn!(pack, "too little space is free to rewrite a pack");
                    Ok(ControlFlow::Continue(()))
                }
                Ok(Some(form)) => {
                    let rewriting =
                        Rewriting { core: self, form, contents: Gathered::default(), directories: Gathered::default() };
                    rewriting.run(pack, &mut done, progress)
                }
                Ok(None) => Ok(ControlFlow::Continue(())),
                Err(error) => Err(error),
            };
            match rewritten {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(())) => return Ok(done),
                Err(ObjectError::Pack(PackError::Gone(gone))) if gone == pack => {}
                Err(ObjectError::Pack(error @ (PackError::Block { .. } | PackError::Deleted(_)))) => {
                    tracing::error!(error = &error as &dyn std::error::Error, "a damaged pack is left as it is");
                    done.damaged_packs += 1;
                }
                Err(error) => return Err(error.into()),
            }
            let (deleted, freed) = self.delete_if_dead(pack)?;
            done.deleted_packs += deleted;
            done.freed_bytes += freed;
            done.done_packs += 1;
            drop(one_at_a_time);
            if progress(&done).is_break() {
                break;
            }
        }
        Ok(done)
    }

    fn delete_if_dead(&self, pack: u32) -> Result<(u64, u64), CollectError> {
        let dead = {
            let state = self.catalog.lock();
            state.usage.get(&pack).is_none_or(|usage| usage.live_objects == 0)
        };
        if !dead || self.packs.is_open(pack) || !self.packs.seal(pack) {
            return Ok((0, 0));
        }
        self.index.sync()?;
        self.delete_packs(&[pack])
    }

    /// The objects of a block that the index finds in it.
    fn alive_in(&self, place: Place, head: &Head) -> Result<Vec<(ObjectKey, Entry)>, ObjectError> {
        let mut alive = Vec::new();
        for &(key, start, length) in &head.objects {
            let here = Entry { place, start, length };
            if self.entry(&key)? == Some(here) {
                alive.push((key, here));
            }
        }
        Ok(alive)
    }

    /// Whether the dense form would save enough, going by a few samples. If not, that is remembered.
    fn is_worth_it(&self, pack: u32) -> Result<bool, ObjectError> {
        let Some((length, _)) = self.packs.facts(pack) else { return Ok(false) };
        let (mut quick, mut dense) = (0, 0);
        let mut walk = self.packs.walk(pack);
        let (mut next, step) = (0, length / SAMPLES);
        let mut block = BlockBuilder::default();
        while let Some((place, head)) = self.packs.next(&mut walk)? {
            if place.offset < next {
                continue;
            }
            quick += u64::from(place.length);
            let contents = self.packs.read(place)?;
            for &(key, start, length) in &head.objects {
                block.push(key, &contents[start as usize..(start + length) as usize]);
            }
            if block.is_full(Form::Dense) {
                dense += std::mem::take(&mut block).encode(Form::Dense)?.length() as u64;
                next = place.offset + step;
            }
        }
        if !block.is_empty() {
            dense += block.encode(Form::Dense)?.length() as u64;
        }
        let usage = self.catalog.lock().usage.get(&pack).copied().unwrap_or_default();
        let alive = u64::from(Share::of(usage.live_bytes, usage.raw_bytes).thousandths());
        let expected = u128::from(dense) * u128::from(alive) / 1000;
        if expected * u128::from(WORTHWHILE) < u128::from(quick) * u128::from(WORTHWHILE - 1) {
            return Ok(true);
        }
        if !self.packs.is_open(pack) && self.packs.seal(pack) {
            self.note_fixed(pack)?;
        }
        Ok(false)
    }

    fn rest_after(&self, began: Instant) {
        if self.epochs.writers() > 0 {
            std::thread::sleep(began.elapsed().min(LONGEST_REST));
        }
    }
}

/// A pack on its way into another. As in imports, directories have blocks of their own.
struct Rewriting<'a> {
    core: &'a Core,
    form: Form,
    contents: Gathered,
    directories: Gathered,
}

/// What one block will hold.
#[derive(Default)]
struct Gathered {
    block: BlockBuilder,
    /// Where the index finds the objects in `block`.
    old: Vec<Entry>,
}

impl Rewriting<'_> {
    fn run(mut self, pack: u32, done: &mut Repacked, progress: Progress<'_>) -> Result<ControlFlow<()>, ObjectError> {
        let packs = &self.core.packs;
        if !packs.seal(pack) {
            return Ok(ControlFlow::Continue(()));
        }
        let mut walk = packs.walk(pack);
        loop {
            let began = Instant::now();
            let Some((place, head)) = packs.next(&mut walk)? else { break };
            let alive = self.core.alive_in(place, &head)?;
            if !alive.is_empty() {
                let contents = packs.read(place)?;
                for (key, entry) in alive {
                    let (start, end) = (entry.start as usize, entry.start as usize + entry.length as usize);
                    self.push(key, entry, &contents[start..end], done)?;
                }
            }
            self.core.rest_after(began);
            if progress(done).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        self.contents.land(self.core, self.form, done)?;
        self.directories.land(self.core, self.form, done)?;
        Ok(ControlFlow::Continue(()))
    }

    fn push(&mut self, key: ObjectKey, old: Entry, contents: &[u8], done: &mut Repacked) -> Result<(), ObjectError> {
        let gathered = if key.kind == ObjectKind::Directory { &mut self.directories } else { &mut self.contents };
        // A large object has a block to itself.
        if contents.len() >= self.form.block() {
            gathered.land(self.core, self.form, done)?;
        }
        gathered.block.push(key, contents);
        gathered.old.push(old);
        if gathered.block.is_full(self.form) {
            gathered.land(self.core, self.form, done)?;
        }
        Ok(())
    }
}

impl Gathered {
    /// Appends it as a block, unless it is empty.
    fn land(&mut self, core: &Core, form: Form, done: &mut Repacked) -> Result<(), ObjectError> {
        let Gathered { block, old } = std::mem::take(self);
        if block.is_empty() {
            return Ok(());
        }
        let encoded = block.encode(form)?;
        let length = encoded.length() as u64;
        let landing = core.packs.append(encoded)?;
        done.written_bytes += length;
        done.moved_objects += core.relocate(&block, &old, form, landing)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
