//! A pack from its beginning to its end, without the index.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use super::block::{self, BlockError, HEADER, Head};
use super::{FILE_HEADER, PackError, Packs, Place, at};

/// Where in a pack a walk is.
#[derive(Debug)]
pub(crate) struct Walk {
    pack: u32,
    next: u64,
}

impl Packs {
    /// A walk over the blocks of pack `number`.
    pub(crate) fn walk(&self, number: u32) -> Walk {
        Walk { pack: number, next: FILE_HEADER as u64 }
    }

    /// Where the block stands that begins at `offset`; `None` at the pack's end, and where no block can be. Only the lengths
    /// in its header are looked at: who reads the block verifies it.
    pub(crate) fn place_at(&self, number: u32, offset: u64) -> Option<Place> {
        let (lengths, end) = self.lengths_at(number, offset)?;
        let length = lengths.whole();
        (offset + length as u64 <= end).then_some(Place { pack: number, offset, length: length as u32 })
    }

    /// How long the payload of the block at `place` is before compression, as its header says; `None` when it is gone.
    pub(crate) fn raw_length(&self, place: Place) -> Option<u32> {
        Some(self.lengths_at(place.pack, place.offset)?.0.raw as u32)
    }

    /// The lengths in the header of the block at `offset`, and where what was written to the pack ends.
    fn lengths_at(&self, number: u32, offset: u64) -> Option<(block::Lengths, u64)> {
        let pack = self.packs.read().get(&number).cloned()?;
        let end = pack.written.load(Ordering::Acquire);
        let mut header = [0; HEADER];
        if offset + HEADER as u64 > end {
            return None;
        }
        self.file(&pack).ok()?.read_exact_at(&mut header, offset).ok()?;
        Some((block::lengths(&header)?, end))
    }

    /// The next block's place, header and table, verified; None after the last.
    ///
    /// # Errors
    /// [`PackError::Block`] where a block is damaged: where the one behind it begins is not known then. And
    /// [`PackError::Gone`].
    pub(crate) fn next(&self, walk: &mut Walk) -> Result<Option<(Place, Head)>, PackError> {
        let pack = self.packs.read().get(&walk.pack).cloned().ok_or(PackError::Gone(walk.pack))?;
        let (offset, end) = (walk.next, pack.written.load(Ordering::Acquire));
        if offset >= end {
            return Ok(None);
        }
        let damaged = |source| PackError::Block { pack: walk.pack, offset, source };
        let file = self.file(&pack)?;
        let read = |bytes: &mut [u8], offset| {
            file.read_exact_at(bytes, offset).map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => damaged(BlockError::Short),
                _ => at("reading", &pack.path)(error),
            })
        };
        let mut header = [0; HEADER];
        read(&mut header, offset)?;
        let mut head = vec![0; block::head_length(&header).map_err(damaged)?];
        read(&mut head, offset)?;
        let head = block::decode_head(&head, offset).map_err(damaged)?;
        walk.next = offset + u64::from(head.length);
        if walk.next > end {
            return Err(damaged(BlockError::Short));
        }
        Ok(Some((Place { pack: walk.pack, offset, length: head.length }, head)))
    }
}
