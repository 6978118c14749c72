//! Making the index anew from the packs.
//!
//! Blocks describe themselves, so the packs have everything the object store's tables say. What the owner of the store
//! kept in tables of its own, it finds again in objects of the kind [`Record`](crate::objects::ObjectKind::Record).
//!
//! The new index is made under another name and put in place when it is whole; the old one, if there is one, is kept
//! under a third. Whoever calls this sees to it that nobody has the store open.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use crate::check::{OnBytes, verifies};
use crate::index::{Batch, Index, IndexError, IndexOptions, Table};
use crate::objects::{Entry, INDEX_VERSION, ObjectKey, ObjectKind, Usage, key_bytes};
use crate::pack::{FILE_HEADER, PackError, Packs, Place, Row, Scanned, list, scan};

/// The key in the table `meta` that says that the owner has not put its own tables into the new index yet. The owner
/// removes it with the last of them, and takes an index that has it for no use.
pub const UNFINISHED: &[u8] = b"rebuild-unfinished";

/// Damaged places that are told one by one; of more there is a number only.
const MAX_TOLD: usize = 1000;

/// Bytes of objects that are taken from damaged blocks: they are in memory until they are put again.
const MAX_RESCUED: usize = 256 << 20;

/// Why the index could not be made anew. What was there is as it was.
#[derive(Debug, thiserror::Error)]
pub enum RebuildError {
    /// The new index could not be written.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// A pack could not be read, or is of another version.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// A directory could not be put in its place.
    #[error("{doing} {path}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Ended by whoever asked for it.
    #[error("the rebuilding was ended early; nothing was changed")]
    Ended,
}

/// What was found in the packs.
#[derive(Debug, Default)]
pub struct Rebuilt {
    /// Packs read.
    pub packs: u64,
    /// Objects that the new index has.
    pub objects: u64,
    /// Their contents' bytes.
    pub bytes: u64,
    /// Blocks that cannot be read, and objects in others that are not what their digest says.
    pub damaged: u64,
    /// The first of them, told.
    pub told: Vec<String>,
    /// What is intact in damaged blocks: to be put again once the store is open.
    pub rescued: Vec<(ObjectKey, Bytes)>,
    /// Bytes in which no block could be made out.
    pub lost_bytes: u64,
    /// Where the index that was there before is now.
    pub before: Option<PathBuf>,
}

impl Rebuilt {
    /// Whether everything in the packs could be read.
    pub fn is_whole(&self) -> bool {
        self.damaged == 0 && self.lost_bytes == 0
    }

    fn tell(&mut self, text: String) {
        self.damaged += 1;
        if self.told.len() < MAX_TOLD {
            self.told.push(text);
        }
    }
}

/// The bytes of all packs in the store `dir`: what a rebuilding reads.
///
/// # Errors
/// When they cannot be listed.
pub fn size(dir: &Path) -> Result<u64, RebuildError> {
    Ok(list(&dir.join("packs"))?.into_iter().map(|(_, _, length)| length).sum())
}

/// Makes the index of the store in `dir` from its packs.
///
/// # Errors
/// See [`RebuildError`].
pub fn rebuild_index(dir: &Path, options: &IndexOptions, progress: OnBytes<'_>) -> Result<Rebuilt, RebuildError> {
    let unfinished = dir.join("index.rebuilt");
    match std::fs::remove_dir_all(&unfinished) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(failed("clearing away", &unfinished)(error));
        }
        _ => {}
    }
    let mut rebuilt = Rebuilt::default();
    {
        let index = Index::open(&unfinished, options)?;
        let mut work = Work {
            meta: index.table("meta")?,
            lengths: index.table("pack-lengths")?,
            objects: index.table("objects")?,
            usage: index.table("pack-usage")?,
            index: &index,
            rebuilt: &mut rebuilt,
            counts: BTreeMap::new(),
            ends: BTreeMap::new(),
            rescued_bytes: 0,
        };
        let packs = dir.join("packs");
        Packs::readmit(&packs)?;
        let mut noted = Packs::noted(&packs);
        for (number, path, length) in list(&packs)? {
            if length >= FILE_HEADER as u64 {
                let end = work.pack(number, &path, progress)?;
                noted.retain(|noted, length| *noted != number || *length > end);
            }
        }
        work.missing(&noted);
        work.finish()?;
        Packs::note_missing(&packs, &noted)?;
    }
    Packs::forget_all(&dir.join("packs"))?;
    let place = dir.join("index");
    if place.exists() {
        let kept = free_name(dir);
        std::fs::rename(&place, &kept).map_err(failed("moving away", &place))?;
        rebuilt.before = Some(kept);
    }
    std::fs::rename(&unfinished, &place).map_err(failed("putting in place", &unfinished))?;
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed("syncing", dir))?;
    Ok(rebuilt)
}

/// Forgets which packs were missing when the index of the store in `dir` was made anew: the owner knows what that means for
/// it, durably.
///
/// # Errors
/// When the note of them cannot be removed.
pub fn finish(dir: &Path) -> Result<(), RebuildError> {
    Ok(Packs::note_missing(&dir.join("packs"), &BTreeMap::new())?)
}

fn failed<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> RebuildError + 'a {
    move |source| RebuildError::Io { doing, path: path.to_owned(), source }
}

/// A name for the index that was there, which nobody has yet.
fn free_name(dir: &Path) -> PathBuf {
    let name = |number: u32| dir.join(format!("index.before-{number}"));
    (1..).map(name).find(|path| !path.exists()).unwrap_or_else(|| name(0))
}

struct Work<'a> {
    index: &'a Index,
    rebuilt: &'a mut Rebuilt,
    meta: Table,
    lengths: Table,
    objects: Table,
    usage: Table,
    counts: BTreeMap<u32, Usage>,
    ends: BTreeMap<u32, u64>,
    rescued_bytes: usize,
}

impl Work<'_> {
    /// Tells of packs that were longer once, or are gone altogether: what was durable is lost.
    fn missing(&mut self, packs: &BTreeMap<u32, u64>) {
        for (number, length) in packs {
            let rebuilt = &mut *self.rebuilt;
            match self.ends.get(number) {
                // What can be seen of it, in the middle of a block, was told already.
                Some(end) => {
                    rebuilt.lost_bytes += length - end;
                    rebuilt.tell(format!("pack {number:08x} had {length} bytes and is whole only to {end}"));
                }
                None => {
                    rebuilt.lost_bytes += length;
                    rebuilt.tell(format!("pack {number:08x}, of {length} bytes, is gone"));
                }
            }
        }
    }

    /// Where what is whole of it ends.
    fn pack(&mut self, number: u32, path: &Path, progress: OnBytes<'_>) -> Result<u64, RebuildError> {
        self.rebuilt.packs += 1;
        if Packs::ensure_header(number, path)? {
            self.rebuilt.tell(format!("the header of pack {number:08x} was damaged; it is restored"));
        }
        self.counts.insert(number, Usage::default());
        let end = scan(number, path, &mut |scanned| match scanned {
            Scanned::Block { place, rows, raw } => {
                self.block(place, &rows, &raw)?;
                match progress(u64::from(place.length)) {
                    ControlFlow::Continue(()) => Ok(()),
                    ControlFlow::Break(()) => Err(RebuildError::Ended),
                }
            }
            Scanned::Damaged { offset, source, rescued } => {
                self.rebuilt.tell(format!("block at {offset} of pack {number:08x}: {source}"));
                self.rescue(rescued);
                Ok(())
            }
            Scanned::Lost { offset, bytes } => {
                self.rebuilt.lost_bytes += bytes;
                self.rebuilt.tell(format!("no block can be made out from {offset} of pack {number:08x} on"));
                Ok(())
            }
        })?;
        let mut batch = Batch::new();
        batch.put(self.lengths, &Packs::key(number), end.to_le_bytes().to_vec());
        self.ends.insert(number, end);
        self.index.commit(batch)?;
        Ok(end)
    }

    /// Keeps what is intact in a damaged block. What a list names cannot be verified here.
    fn rescue(&mut self, objects: Vec<(ObjectKey, Bytes)>) {
        for (key, contents) in objects {
            let room = self.rescued_bytes + contents.len() <= MAX_RESCUED;
            if room && key.kind != ObjectKind::ChunkList && verifies(&key, &contents) {
                self.rescued_bytes += contents.len();
                self.rebuilt.rescued.push((key, contents));
            }
        }
    }

    fn block(&mut self, place: Place, rows: &[Row], raw: &[u8]) -> Result<(), RebuildError> {
        let mut batch = Batch::new();
        let mut usage = self.counts.get(&place.pack).copied().unwrap_or_default();
        usage.raw_bytes += raw.len() as u64;
        let mut entered = std::collections::HashSet::new();
        for &Row { key, start, length } in rows {
            let contents = raw.get(start as usize..start as usize + length as usize);
            if !contents.is_some_and(|contents| verifies(&key, contents)) {
                let Place { pack, offset, .. } = place;
                self.rebuilt.tell(format!("{key} in the block at {offset} of pack {pack:08x} has other contents"));
                continue;
            }
            if !entered.insert(key) || self.index.get(&self.objects, &key_bytes(&key))?.is_some() {
                continue;
            }
            let entry = Entry { place, start, length };
            batch.put(self.objects, &key_bytes(&key), entry.encode().to_vec());
            usage.live_objects += 1;
            usage.live_bytes += u64::from(length);
            self.rebuilt.objects += 1;
            self.rebuilt.bytes += u64::from(length);
        }
        self.counts.insert(place.pack, usage);
        Ok(self.index.commit(batch)?)
    }

    fn finish(&mut self) -> Result<(), RebuildError> {
        let mut batch = Batch::new();
        for (pack, usage) in &self.counts {
            batch.put(self.usage, &Packs::key(*pack), usage.encode());
        }
        batch.put(self.meta, UNFINISHED, "1");
        batch.put(self.meta, b"version", INDEX_VERSION.to_le_bytes().to_vec());
        self.index.commit(batch)?;
        Ok(self.index.sync()?)
    }
}

#[cfg(test)]
mod tests;
