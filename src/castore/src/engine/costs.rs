//! What trees cost: what of the packs only they use and what they share, and how much their files come to.

use std::collections::HashMap;

use super::Engine;
use crate::blob::{chunk, chunk_list, directory as directory_key};
use crate::objects::{Fingerprints, ObjectKey};
use crate::pack::Place;
use crate::{Error, Node};

/// How many sets of trees can be asked about at once.
pub const MAX_SETS: usize = 64;
/// The most objects that the sets may have together. Each takes 130 bytes at most: 137 MB.
pub const MAX_OBJECTS: usize = 1 << 20;
/// Directories and files of other trees that are remembered, so that none is looked at twice: 17 to 39 bytes each, 82 MB at
/// most. With more of them it takes longer and comes out the same.
const MAX_SEEN: usize = 1 << 21;

/// Costs could not be told.
#[derive(Debug, thiserror::Error)]
pub enum CostError {
    /// More objects than are kept in memory.
    #[error("what is asked about has more than {MAX_OBJECTS} objects; ask about less at once")]
    TooMany,
    /// A tree could not be read.
    #[error(transparent)]
    Castore(#[from] Error),
}

/// What a set of trees takes in the packs. Bytes after compression; an object's are its part of its block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Of objects that no tree outside the set uses.
    pub unique: u64,
    /// Of objects that others use as well.
    pub shared: u64,
}

/// An object of the sets.
struct Held {
    /// Bytes.
    stored: u32,
    /// The sets of which a tree uses it.
    inside: u64,
    /// The sets outside of which a tree uses it.
    outside: u64,
}

/// Adds up what sets of trees cost. First come the trees of the sets ([`Costs::add`]), then all others of the store
/// ([`Costs::set_against`]).
pub struct Costs<'a> {
    engine: &'a Engine,
    objects: HashMap<ObjectKey, Held>,
    /// The block that was looked at last, and its length before compression: objects of a tree stand together.
    block: Option<(Place, u32)>,
    seen: Fingerprints,
}

impl Engine {
    /// Begins to add up costs.
    pub fn costs(&self) -> Costs<'_> {
        Costs { engine: self, objects: HashMap::new(), block: None, seen: Fingerprints::new() }
    }

    /// Begins to count files.
    pub fn distinct(&self) -> Distinct<'_> {
        Distinct { engine: self, seen: Fingerprints::new(), bytes: 0 }
    }
}

impl Costs<'_> {
    /// Adds a tree that is in these sets, each a bit, and in no others. What is missing from it costs nothing.
    ///
    /// # Errors
    /// [`CostError::TooMany`], and when it cannot be read.
    pub fn add(&mut self, root: &Node, sets: u64) -> Result<(), CostError> {
        let engine = self.engine;
        engine.walk(root, &mut |node| visit(engine, node, &mut |key| self.note(key, sets)))
    }

    /// Notes that a tree of these sets uses an object; whether that was news.
    fn note(&mut self, key: &ObjectKey, sets: u64) -> Result<bool, CostError> {
        if let Some(held) = self.objects.get_mut(key) {
            let before = (held.inside, held.outside);
            (held.inside, held.outside) = (held.inside | sets, held.outside | !sets);
            return Ok(before != (held.inside, held.outside));
        }
        if self.objects.len() >= MAX_OBJECTS {
            return Err(CostError::TooMany);
        }
        let stored = self.stored(key)?;
        self.objects.insert(*key, Held { stored, inside: sets, outside: !sets });
        Ok(true)
    }

    /// An object's part of its block; nothing when there is no such object, as the chunk of a blob that has several.
    fn stored(&mut self, key: &ObjectKey) -> Result<u32, CostError> {
        let core = &self.engine.objects.core;
        let Some(entry) = core.entry(key).map_err(Error::from)? else { return Ok(0) };
        let raw = match self.block {
            Some((place, raw)) if place == entry.place => raw,
            // A pack that was rewritten this moment: as if it were not compressed.
            _ => core.packs.raw_length(entry.place).unwrap_or(entry.place.length),
        };
        self.block = Some((entry.place, raw));
        let part = u64::from(entry.place.length) * u64::from(entry.length) / u64::from(raw.max(1));
        Ok(u32::try_from(part).unwrap_or(u32::MAX))
    }

    /// Notes what a tree that is in no set shares with those that are.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn set_against(&mut self, root: &Node) -> Result<(), CostError> {
        let engine = self.engine;
        engine.walk(root, &mut |node| visit(engine, node, &mut |key| Ok(self.note_outside(key))))
    }

    fn note_outside(&mut self, key: &ObjectKey) -> bool {
        match self.objects.get_mut(key) {
            Some(held) => std::mem::replace(&mut held.outside, u64::MAX) != u64::MAX,
            None if self.seen.len() < MAX_SEEN => self.seen.insert(key),
            None => !self.seen.contains(key),
        }
    }

    /// What the set of this number costs; it has to be below [`MAX_SETS`].
    pub fn of(&self, set: usize) -> Cost {
        let mut cost = Cost::default();
        let bit = u32::try_from(set).ok().and_then(|set| 1_u64.checked_shl(set)).unwrap_or(0);
        for held in self.objects.values().filter(|held| held.inside & bit != 0) {
            let sum = if held.outside & bit == 0 { &mut cost.unique } else { &mut cost.shared };
            *sum += u64::from(held.stored);
        }
        cost
    }
}

/// Tells `note` of the objects of a node itself; whether what is below it has to be looked at.
fn visit(
    engine: &Engine,
    node: &Node,
    note: &mut dyn FnMut(&ObjectKey) -> Result<bool, CostError>,
) -> Result<bool, CostError> {
    match node {
        Node::Directory { digest, .. } => return note(&directory_key(digest)),
        // The key of the whole blob stands for it, as in a collection, also when there is no such chunk.
        Node::File { digest, .. } if note(&chunk(digest))? => {
            if let Some(list) = engine.blobs.list(digest)? {
                note(&chunk_list(digest))?;
                for (piece, _) in list.chunks() {
                    note(&chunk(&piece))?;
                }
            }
        }
        Node::File { .. } | Node::Symlink { .. } => {}
    }
    Ok(false)
}

/// Counts what trees hold when equal files and directories count once. Memory: 17 to 39 bytes for each of them.
pub struct Distinct<'a> {
    engine: &'a Engine,
    seen: Fingerprints,
    bytes: u64,
}

impl Distinct<'_> {
    /// Adds a tree. What is missing from it counts nothing.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn add(&mut self, root: &Node) -> Result<(), Error> {
        let engine = self.engine;
        engine.walk(root, &mut |node| match node {
            Node::Directory { digest, .. } => {
                let key = directory_key(digest);
                if !self.seen.insert(&key) {
                    return Ok(false);
                }
                self.bytes += u64::from(engine.objects.length(&key)?.unwrap_or(0));
                Ok(true)
            }
            Node::File { digest, size, .. } => {
                if self.seen.insert(&chunk(digest)) {
                    self.bytes += size;
                }
                Ok(false)
            }
            Node::Symlink { .. } => Ok(false),
        })
    }

    /// Bytes of the distinct files' contents and of the directories as they are stored, before compression.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests;
