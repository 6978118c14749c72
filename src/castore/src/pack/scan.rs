//! Reading a pack from its beginning to its end, without the index.
//!
//! Blocks stand one directly after the other, so each tells where the next one begins. When a block's header is damaged,
//! its lengths may still be right: that is so when a whole block begins where they lead to. Where a flip of one bit in
//! the lengths makes the checksum match, they were flipped. Nothing is searched for beyond that: contents may be such that
//! they look like blocks, and what they say must never be believed.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::block::{self, BLOCK_HEADER, BlockError, Row};
use super::{FILE_HEADER, PackError, Place, at, number_of};
use crate::objects::ObjectKey;

/// What stands in a pack.
pub(crate) enum Scanned {
    /// A block, verified: its objects, their contents, and its raw length.
    Block { place: Place, rows: Vec<Row>, raw: Bytes },
    /// A block that cannot be read. What follows it is found all the same. The rescued are what its table and payload, of
    /// which no checksum is right, seem to hold: for who verifies their digests.
    Damaged { offset: u64, source: BlockError, rescued: Vec<(ObjectKey, Bytes)> },
    /// From here to the end of the file no block could be made out.
    Lost { offset: u64, bytes: u64 },
}

/// The packs in `dir` with their numbers and lengths, in the order of their numbers.
pub(crate) fn list(dir: &Path) -> Result<Vec<(u32, PathBuf, u64)>, PackError> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(at("listing", dir))? {
        let path = entry.map_err(at("listing", dir))?.path();
        if let Some(number) = number_of(&path) {
            let length = std::fs::metadata(&path).map_err(at("looking at", &path))?.len();
            found.push((number, path, length));
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Gives everything that stands in the pack `number`. Returns the end of the last thing that was whole.
pub(crate) fn scan<E: From<PackError>>(
    number: u32,
    path: &Path,
    each: &mut dyn FnMut(Scanned) -> Result<(), E>,
) -> Result<u64, E> {
    let file = File::open(path).map_err(at("opening", path))?;
    let end = file.metadata().map_err(at("looking at", path))?.len();
    let reader = Reader { file, path, end };
    let mut offset = FILE_HEADER as u64;
    let mut whole = offset.min(end);
    while offset < end {
        match reader.block(offset)? {
            Found::Whole(bytes) => {
                let bytes = Bytes::from(bytes);
                let place = Place { pack: number, offset, length: bytes.len() as u32 };
                offset += u64::from(place.length);
                let rows = block::rows(&bytes);
                let scanned = match block::decode(bytes.clone(), place.offset).and_then(|raw| Ok((rows?, raw))) {
                    Ok((rows, raw)) => {
                        whole = offset;
                        Scanned::Block { place, rows, raw }
                    }
                    Err(source) => Scanned::Damaged { offset: place.offset, source, rescued: rescue(&bytes) },
                };
                each(scanned)?;
            }
            Found::Broken(bytes) => {
                each(Scanned::Damaged { offset, source: BlockError::Head, rescued: rescue(&bytes) })?;
                offset += bytes.len() as u64;
            }
            Found::Nothing => {
                each(Scanned::Lost { offset, bytes: end - offset })?;
                break;
            }
        }
    }
    Ok(whole)
}

fn rescue(bytes: &[u8]) -> Vec<(ObjectKey, Bytes)> {
    let (Ok(rows), Ok(raw)) = (block::rows(bytes), block::salvage(bytes)) else { return Vec::new() };
    let whole = |row: &Row| row.start as usize + row.length as usize <= raw.len();
    let object = |row: Row| (row.key, raw.slice(row.start as usize..row.start as usize + row.length as usize));
    rows.into_iter().filter(whole).map(object).collect()
}

enum Found {
    /// A block with a whole head, as it is on disk; its payload may be anything.
    Whole(Vec<u8>),
    /// A block whose head is damaged, but whose end is known; with its lengths put right.
    Broken(Vec<u8>),
    Nothing,
}

struct Reader<'a> {
    file: File,
    path: &'a Path,
    end: u64,
}

impl Reader<'_> {
    fn block(&self, offset: u64) -> Result<Found, PackError> {
        let Some(header) = self.read(offset, BLOCK_HEADER)? else { return Ok(Found::Nothing) };
        if let Some(bytes) = self.with_header(offset, &header)? {
            return Ok(Found::Whole(bytes));
        }
        if let Some(next) = self.end_by(&header, offset)
            && self.may_follow(next)?
            && let Some(bytes) = self.read(offset, (next - offset) as usize)?
        {
            return Ok(Found::Broken(bytes));
        }
        // The fields for the number of objects and the two lengths: bytes 8 to 19. On disk the block stays as it is.
        for bit in 8 * 8..20 * 8 {
            let mut flipped = header.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            if let Some(bytes) = self.with_header(offset, &flipped)? {
                return Ok(Found::Broken(bytes));
            }
        }
        Ok(Found::Nothing)
    }

    /// The block at `offset`, if `header` is its header.
    fn with_header(&self, offset: u64, header: &[u8]) -> Result<Option<Vec<u8>>, PackError> {
        let Some(lengths) = block::lengths(header) else { return Ok(None) };
        let Some(mut head) = self.read(offset, lengths.head)? else { return Ok(None) };
        head[..BLOCK_HEADER].copy_from_slice(header);
        if !block::is_head_whole(&head, offset) {
            return Ok(None);
        }
        let Some(payload) = self.read(offset + lengths.head as u64, lengths.stored)? else { return Ok(None) };
        head.extend_from_slice(&payload);
        Ok(Some(head))
    }

    fn end_by(&self, header: &[u8], offset: u64) -> Option<u64> {
        block::lengths(header).map(|lengths| offset + lengths.whole() as u64).filter(|next| *next <= self.end)
    }

    /// Whether a block can have ended at `offset`: the file does, or a block begins.
    fn may_follow(&self, offset: u64) -> Result<bool, PackError> {
        if offset == self.end {
            return Ok(true);
        }
        let Some(header) = self.read(offset, BLOCK_HEADER)? else { return Ok(false) };
        let Some(lengths) = block::lengths(&header) else { return Ok(false) };
        let head = self.read(offset, lengths.head)?;
        Ok(head.is_some_and(|head| block::is_head_whole(&head, offset)))
    }

    /// `length` bytes at `offset`; `None` where the file has not so many.
    fn read(&self, offset: u64, length: usize) -> Result<Option<Vec<u8>>, PackError> {
        if offset.checked_add(length as u64).is_none_or(|end| end > self.end) {
            return Ok(None);
        }
        let mut bytes = vec![0; length];
        match self.file.read_exact_at(&mut bytes, offset) {
            Ok(()) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(at("reading", self.path)(error)),
        }
    }
}
