//! Batches of the database's journals.
//!
//! The bytes, all little-endian, by fjall 3.1 (`journal/entry.rs`; there is a test that its journals are read):
//!
//! | what | bytes |
//! |---|---|
//! | start | 1, number of items (4), sequence number (8) |
//! | item | 2, kind (1), compression (1, 0 for none), table (8), length of key (2), of value (4), of value as stored (4), key, value |
//! | clear | 4, table (8); counts as an item |
//! | end | 3, XXH3 of all items (8), `FJL`, 3 |

use std::fs::File;
use std::io::{self, BufReader, Read, Write};

use xxhash_rust::xxh3::xxh3_64;

use super::BUFFER;

pub(super) const START: u8 = 1;
const ITEM: u8 = 2;
const END: u8 = 3;
const CLEAR: u8 = 4;
const TRAILER: [u8; 4] = *b"FJL\x03";
/// An item before its key, without the tag: kind, compression, table, the three lengths.
const ITEM_HEADER: usize = 20;
/// A clear without the tag: the table.
const CLEAR_LENGTH: usize = 8;
/// Bytes of the items of a batch: more than any has, since what gathers for one is bounded.
pub(super) const MAX_BATCH: u64 = 256 << 20;
/// Bytes for which memory is taken at a time, as they come.
const PIECE: usize = 4096;

/// A batch that is whole.
pub(super) struct Batch<'a> {
    /// Its sequence number: larger than those of all batches before.
    pub(super) sequence: u64,
    items: &'a [u8],
}

/// One change of a batch.
pub(super) struct Item<'a> {
    /// The number of the table; none for one that clears a table.
    pub(super) table: Option<u64>,
    /// As it is in the journal.
    pub(super) bytes: &'a [u8],
}

impl<'a> Batch<'a> {
    pub(super) fn items(&self) -> impl Iterator<Item = Item<'a>> {
        let mut left = self.items;
        std::iter::from_fn(move || {
            let (&tag, rest) = left.split_first()?;
            let table = |bytes: &[u8]| Some(u64::from_le_bytes(*bytes.first_chunk()?));
            let (length, table) = match tag {
                ITEM => (1 + ITEM_HEADER + lengths(rest.first_chunk()?), Some(table(&rest[2..])?)),
                _ => (1 + CLEAR_LENGTH, None),
            };
            let (bytes, rest) = left.split_at_checked(length)?;
            left = rest;
            Some(Item { table, bytes })
        })
    }
}

/// Writes a batch of these items.
pub(super) fn write(sequence: u64, count: u32, items: &[u8], out: &mut impl Write) -> io::Result<()> {
    out.write_all(&[START])?;
    out.write_all(&count.to_le_bytes())?;
    out.write_all(&sequence.to_le_bytes())?;
    out.write_all(items)?;
    out.write_all(&[END])?;
    out.write_all(&xxh3_64(items).to_le_bytes())?;
    out.write_all(&TRAILER)
}

/// The batches of a journal, one after the other, as long as they are whole.
pub(super) struct Batches<'a> {
    reader: BufReader<&'a File>,
    items: Vec<u8>,
    offset: u64,
}

impl<'a> Batches<'a> {
    /// From the beginning of the file.
    pub(super) fn new(file: &'a File) -> Self {
        Self { reader: BufReader::with_capacity(BUFFER, file), items: Vec::new(), offset: 0 }
    }

    /// The next one; None where no whole one follows.
    pub(super) fn next(&mut self) -> io::Result<Option<Batch<'_>>> {
        let Some((sequence, length)) = read(&mut self.reader, &mut self.items)? else { return Ok(None) };
        self.offset += length;
        Ok(Some(Batch { sequence, items: &self.items }))
    }

    /// Where the last whole one ends.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }
}

/// Whether a whole batch begins here.
pub(super) fn is_batch(mut bytes: &[u8]) -> io::Result<bool> {
    Ok(read(&mut bytes, &mut Vec::new())?.is_some())
}

/// Reads a batch's items; gives its sequence number and its length, or None when it is not whole.
fn read(reader: &mut impl Read, items: &mut Vec<u8>) -> io::Result<Option<(u64, u64)>> {
    items.clear();
    match read_whole(reader, items) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        result => result,
    }
}

fn read_whole(reader: &mut impl Read, items: &mut Vec<u8>) -> io::Result<Option<(u64, u64)>> {
    let [tag] = array(reader)?;
    if tag != START {
        return Ok(None);
    }
    let count = u32::from_le_bytes(array(reader)?);
    let sequence = u64::from_le_bytes(array(reader)?);
    for _ in 0..count {
        let [tag] = array(reader)?;
        items.push(tag);
        let rest = match tag {
            ITEM => {
                let header: [u8; ITEM_HEADER] = array(reader)?;
                items.extend_from_slice(&header);
                lengths(&header)
            }
            CLEAR => CLEAR_LENGTH,
            _ => return Ok(None),
        };
        if (items.len() + rest) as u64 > MAX_BATCH {
            return Ok(None);
        }
        append(reader, rest, items)?;
    }
    let end: [u8; 13] = array(reader)?;
    let whole = end[0] == END && end[1..9] == xxh3_64(items).to_le_bytes() && end[9..] == TRAILER;
    Ok(whole.then_some((sequence, 13 + items.len() as u64 + end.len() as u64)))
}

/// Bytes of key and value, by an item's header.
fn lengths(header: &[u8; ITEM_HEADER]) -> usize {
    let key = u16::from_le_bytes([header[10], header[11]]);
    let value = u32::from_le_bytes([header[16], header[17], header[18], header[19]]);
    usize::from(key) + value as usize
}

fn array<const N: usize>(reader: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    reader.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Memory is taken as bytes come, whatever a length says.
fn append(reader: &mut impl Read, mut length: usize, items: &mut Vec<u8>) -> io::Result<()> {
    while length > 0 {
        let (at, piece) = (items.len(), length.min(PIECE));
        items.resize(at + piece, 0);
        reader.read_exact(&mut items[at..])?;
        length -= piece;
    }
    Ok(())
}
