//! The bytes of one block: a header, a table of the objects inside, a payload. `FORMAT.md` has the layout.

use std::cell::RefCell;

use bytes::Bytes;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};
use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::{CParameter, DCtx, InBuffer, OutBuffer, ResetDirective};

use super::{Form, PackError};
use crate::digest::Digest;
use crate::objects::{ObjectKey, ObjectKind};

/// The largest raw payload a block may have: the largest object, in a block to itself.
pub(crate) const MAX_RAW: usize = 64 << 20;
/// The largest table a block may have.
pub(super) const MAX_OBJECTS: usize = 1 << 16;

const MAGIC: [u8; 4] = *b"cBLK";
pub(super) const HEADER: usize = 40;
const ROW: usize = 37;
/// No block is longer than this.
pub(super) const MAX_BLOCK: usize = HEADER + MAX_OBJECTS * ROW + MAX_RAW;

/// Compression has to save at least a 32nd, else the block is stored raw and read without decoding.
const WORTHWHILE: usize = 32;
/// Shorter payloads are not worth the call: the record of a single path, or one small file.
const COMPRESSED_FROM: usize = 512;
/// Payloads from here on are sampled before they are compressed whole.
const SAMPLED_FROM: usize = 64 << 10;
const SAMPLE: usize = 4 << 10;

/// Codec of a payload that is stored as it is.
const RAW: u8 = 0;
/// Codec of a payload that is one zstd frame.
const ZSTD: u8 = 1;

/// What is wrong with the bytes of a block.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum BlockError {
    /// Fewer bytes than the block should have.
    #[error("the block is cut short")]
    Short,
    /// It does not begin as blocks do.
    #[error("no block begins here")]
    Magic,
    /// Header or table do not have the checksum they were written with.
    #[error("the checksum of header and table does not match")]
    Head,
    /// The payload does not have the checksum it was written with.
    #[error("the checksum of the payload does not match")]
    Payload,
    /// The checksums match, but what they protect makes no sense.
    #[error("the block contradicts itself: {0}")]
    Contradiction(&'static str),
}

/// Objects that are gathered into one block, in the order of their arrival.
#[derive(Debug, Default)]
pub(crate) struct BlockBuilder {
    raw: Vec<u8>,
    objects: Vec<(ObjectKey, u32)>,
}

impl BlockBuilder {
    pub(crate) fn push(&mut self, key: ObjectKey, contents: &[u8]) {
        self.raw.extend_from_slice(contents);
        self.objects.push((key, contents.len() as u32));
    }

    pub(crate) fn raw_length(&self) -> usize {
        self.raw.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    /// Whether it has gathered what a block of this form holds, or its table has no room for another object.
    pub(crate) fn is_full(&self, form: Form) -> bool {
        self.raw.len() >= form.block() || self.objects.len() >= MAX_OBJECTS
    }

    /// Takes what `other` has gathered behind its own, if that is no more than a block of this form holds; else gives it
    /// back.
    pub(crate) fn absorb(&mut self, other: BlockBuilder, form: Form) -> Result<(), BlockBuilder> {
        if self.raw.len() + other.raw.len() > form.block() || self.objects.len() + other.objects.len() > MAX_OBJECTS {
            return Err(other);
        }
        self.raw.extend_from_slice(&other.raw);
        self.objects.extend_from_slice(&other.objects);
        Ok(())
    }

    /// The objects with their offset in the raw payload and their length.
    pub(crate) fn objects(&self) -> impl Iterator<Item = (ObjectKey, u32, u32)> {
        let mut offset = 0;
        self.objects.iter().map(move |&(key, length)| {
            let start = offset;
            offset += length;
            (key, start, length)
        })
    }

    /// Compresses what was gathered. The expensive part of writing a block; it needs no lock.
    pub(crate) fn encode(&self, form: Form) -> Result<EncodedBlock, PackError> {
        let payload_at = HEADER + self.objects.len() * ROW;
        let mut bytes = Vec::with_capacity(payload_at + zstd::zstd_safe::compress_bound(self.raw.len()));
        bytes.resize(payload_at, 0);
        let codec = append_compressed(&self.raw, form, &mut bytes).map_err(PackError::Compress)?;
        let stored = bytes.len() - payload_at;
        let checksum = xxh3_64(&bytes[payload_at..]);

        bytes[0..4].copy_from_slice(&MAGIC);
        bytes[4] = codec;
        bytes[8..12].copy_from_slice(&(self.objects.len() as u32).to_le_bytes());
        bytes[12..16].copy_from_slice(&(self.raw.len() as u32).to_le_bytes());
        bytes[16..20].copy_from_slice(&(stored as u32).to_le_bytes());
        bytes[24..32].copy_from_slice(&checksum.to_le_bytes());
        for (row, (key, length)) in bytes[HEADER..payload_at].chunks_exact_mut(ROW).zip(&self.objects) {
            row[0] = key.kind as u8;
            row[1..33].copy_from_slice(key.digest.as_bytes());
            row[33..37].copy_from_slice(&length.to_le_bytes());
        }
        Ok(EncodedBlock { bytes, payload_at, form })
    }
}

/// A block that only lacks its place.
pub(crate) struct EncodedBlock {
    bytes: Vec<u8>,
    payload_at: usize,
    form: Form,
}

impl EncodedBlock {
    /// How long the whole block is.
    pub(crate) fn length(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn form(&self) -> Form {
        self.form
    }

    /// The bytes to write at `offset`.
    pub(super) fn at(&mut self, offset: u64) -> &[u8] {
        let checksum = head_checksum(&self.bytes[..self.payload_at], offset);
        self.bytes[32..40].copy_from_slice(&checksum.to_le_bytes());
        &self.bytes
    }
}

/// Covers header and table, and by its seed the place: a block that ended up elsewhere is not taken for the right one.
fn head_checksum(head: &[u8], offset: u64) -> u64 {
    let mut hasher = Xxh3::with_seed(offset);
    hasher.update(&head[..32]);
    hasher.update(&head[HEADER..]);
    hasher.digest()
}

/// What a block says of itself before its payload.
#[derive(Debug)]
pub(crate) struct Head {
    /// The length of the whole block in the file.
    pub(crate) length: u32,
    /// The objects with their offset in the raw payload and their length.
    pub(crate) objects: Vec<(ObjectKey, u32, u32)>,
}

/// How many bytes header and table of the block have that begins with `header`.
pub(super) fn head_length(header: &[u8; HEADER]) -> Result<usize, BlockError> {
    if header[0..4] != MAGIC {
        return Err(BlockError::Magic);
    }
    let objects = u32_at(header, 8) as usize;
    if objects > MAX_OBJECTS { Err(BlockError::Head) } else { Ok(HEADER + objects * ROW) }
}

/// Header and table of a block that stands at `offset` of its file; their checksum is verified.
pub(super) fn decode_head(head: &[u8], offset: u64) -> Result<Head, BlockError> {
    let header = head.first_chunk::<HEADER>().ok_or(BlockError::Short)?;
    if head.len() != head_length(header)? || head_checksum(head, offset) != u64_at(header, 32) {
        return Err(BlockError::Head);
    }
    let mut objects = Vec::with_capacity((head.len() - HEADER) / ROW);
    let mut start = 0_u32;
    for row in head[HEADER..].as_chunks::<ROW>().0 {
        let kind = ObjectKind::from_byte(row[0]).ok_or(BlockError::Contradiction("an object of an unknown kind"))?;
        let mut digest = [0; 32];
        digest.copy_from_slice(&row[1..33]);
        let length = u32_at(row, 33);
        objects.push((ObjectKey { kind, digest: Digest::from(digest) }, start, length));
        start = start.checked_add(length).ok_or(BlockError::Contradiction("its objects are too long"))?;
    }
    let stored = u32_at(header, 16);
    if start != u32_at(header, 12) || start as usize > MAX_RAW || stored > start {
        return Err(BlockError::Contradiction("its lengths do not agree"));
    }
    Ok(Head { length: head.len() as u32 + stored, objects })
}

/// The raw payload of the block `bytes`, which stands at `offset` of its file. Every checksum is verified.
pub(super) fn decode(bytes: impl Into<Bytes>, offset: u64) -> Result<Bytes, BlockError> {
    let bytes = bytes.into();
    let header = bytes.first_chunk::<HEADER>().ok_or(BlockError::Short)?;
    let payload_at = head_length(header)?;
    let head = bytes.get(..payload_at).ok_or(BlockError::Short)?;
    if head_checksum(head, offset) != u64_at(header, 32) {
        return Err(BlockError::Head);
    }
    let raw_length = u32_at(header, 12) as usize;
    let stored_length = u32_at(header, 16) as usize;
    if raw_length > MAX_RAW || stored_length > raw_length {
        return Err(BlockError::Contradiction("its length is above the limit"));
    }
    let payload = &bytes[payload_at..];
    if payload.len() != stored_length {
        return Err(BlockError::Short);
    }
    if xxh3_64(payload) != u64_at(header, 24) {
        return Err(BlockError::Payload);
    }
    match header[4] {
        RAW if stored_length == raw_length => Ok(bytes.slice(payload_at..)),
        RAW => Err(BlockError::Contradiction("a raw payload of another length")),
        ZSTD => {
            let raw = decompress(payload, raw_length)
                .map_err(|_| BlockError::Contradiction("the payload does not decompress"))?;
            if raw.len() != raw_length {
                return Err(BlockError::Contradiction("the payload decompresses to another length"));
            }
            Ok(Bytes::from(raw))
        }
        _ => Err(BlockError::Contradiction("unknown codec")),
    }
}

/// The first `wanted` bytes of the raw payload of the block that `begun` is the beginning of, **without any checksum
/// verified**. `None` when it is not long enough for that, or does not look like a compressed block, or less than a
/// quarter would be spared.
///
/// Reading and decompressing is what most of the time of a cold read goes into, and who wants one small file of a block
/// needs half of it on average. Such a reader has a digest that says whether it got the right bytes.
pub(super) fn decode_start(begun: &[u8], wanted: usize) -> Option<Bytes> {
    let header = begun.first_chunk::<HEADER>()?;
    let payload = begun.get(head_length(header).ok()?..)?;
    let raw_length = (u32_at(header, 12) as usize).min(MAX_RAW);
    if header[4] != ZSTD || wanted > raw_length / 4 * 3 {
        return None;
    }
    decompress_start(payload, wanted).ok().map(Bytes::from)
}

/// How many bytes of a block in the quick form are likely enough for [`decode_start`]: nearly all that is compressed
/// shrinks to less than five eighths, and a table has some fifty objects.
pub(super) fn likely_enough(wanted: usize) -> usize {
    wanted.next_multiple_of(Form::Quick.frame_block() as usize) / 8 * 5 + 2048
}

/// An object in a block: where its contents lie in the raw payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) key: ObjectKey,
    pub(crate) start: u32,
    pub(crate) length: u32,
}

/// The lengths in a block's header, of which nothing but their limits was verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lengths {
    /// Header and table.
    pub(super) head: usize,
    pub(super) stored: usize,
    pub(super) raw: usize,
}

impl Lengths {
    pub(super) fn whole(self) -> usize {
        self.head + self.stored
    }
}

/// The length of a block's header.
pub(super) const BLOCK_HEADER: usize = HEADER;

/// What the header `bytes` begin with says of lengths; `None` when no block can have them.
pub(super) fn lengths(bytes: &[u8]) -> Option<Lengths> {
    let header = bytes.first_chunk::<HEADER>()?;
    let objects = u32_at(header, 8) as usize;
    let (raw, stored) = (u32_at(header, 12) as usize, u32_at(header, 16) as usize);
    let possible = objects <= MAX_OBJECTS && raw <= MAX_RAW && stored <= raw;
    possible.then_some(Lengths { head: HEADER + objects * ROW, stored, raw })
}

/// Whether header and table, which `head` is, are as they were written at `offset`.
pub(super) fn is_head_whole(head: &[u8], offset: u64) -> bool {
    head.first_chunk::<HEADER>().is_some_and(|header| {
        header[0..4] == MAGIC
            && HEADER + u32_at(header, 8) as usize * ROW == head.len()
            && head_checksum(head, offset) == u64_at(header, 32)
    })
}

/// The table of the block `bytes`.
pub(super) fn rows(bytes: &[u8]) -> Result<Vec<Row>, BlockError> {
    let lengths = lengths(bytes).ok_or(BlockError::Head)?;
    let table = bytes.get(HEADER..lengths.head).ok_or(BlockError::Short)?;
    let mut start = 0_usize;
    let mut rows = Vec::with_capacity(table.len() / ROW);
    for row in table.chunks_exact(ROW) {
        let kind = ObjectKind::from_byte(row[0]);
        let mut digest = [0; 32];
        digest.copy_from_slice(&row[1..33]);
        let length = u32_at(row, 33);
        // A kind of a later version is passed over; its contents count all the same.
        if let Some(kind) = kind {
            let key = ObjectKey { kind, digest: Digest::from(digest) };
            rows.push(Row { key, start: start as u32, length });
        }
        start += length as usize;
        if start > lengths.raw {
            return Err(BlockError::Contradiction("its objects are longer than its payload"));
        }
    }
    Ok(rows)
}

/// What may be the raw payload of a damaged block: no checksum is looked at. For who knows the digests of what is in it.
pub(super) fn salvage(bytes: &[u8]) -> Result<Bytes, BlockError> {
    let lengths = lengths(bytes).ok_or(BlockError::Head)?;
    // The end of the block is known from elsewhere, and the payload reaches up to it.
    let payload = bytes.len().checked_sub(lengths.stored).and_then(|at| bytes.get(at..)).ok_or(BlockError::Short)?;
    if lengths.stored == lengths.raw {
        return Ok(Bytes::copy_from_slice(payload));
    }
    decompress(payload, lengths.raw)
        .map(Bytes::from)
        .map_err(|_| BlockError::Contradiction("the payload does not decompress"))
}

thread_local! {
    // A context costs a hundred kilobytes to set up; threads that compress do so all the time.
    static COMPRESSOR: RefCell<Option<Compressor<'static>>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
    static STREAM: RefCell<Option<DCtx<'static>>> = const { RefCell::new(None) };
}

/// Appends `raw` to `out` in the form that pays.
fn append_compressed(raw: &[u8], form: Form, out: &mut Vec<u8>) -> std::io::Result<u8> {
    COMPRESSOR.with_borrow_mut(|slot| {
        let compressor = match slot {
            Some(compressor) => compressor,
            None => slot.insert(Compressor::new(form.level())?),
        };
        compressor.set_compression_level(form.level())?;
        compressor.set_parameter(CParameter::MaxBlockSize(form.frame_block()))?;
        let start = out.len();
        if raw.len() >= COMPRESSED_FROM && sample_shrinks(raw, compressor)? {
            let compressed = {
                let mut tail = std::io::Cursor::new(&mut *out);
                tail.set_position(start as u64);
                compressor.compress_to_buffer(raw, &mut tail)?
            };
            if compressed + raw.len() / WORTHWHILE < raw.len() {
                out.truncate(start + compressed);
                return Ok(ZSTD);
            }
        }
        out.truncate(start);
        out.extend_from_slice(raw);
        Ok(RAW)
    })
}

/// Whether at least one of a few samples of a large payload compresses: most of what does not is known by that.
fn sample_shrinks(raw: &[u8], compressor: &mut Compressor<'_>) -> std::io::Result<bool> {
    if raw.len() < SAMPLED_FROM {
        return Ok(true);
    }
    let mut buffer = Vec::with_capacity(zstd::zstd_safe::compress_bound(SAMPLE));
    for quarter in 0..4 {
        let at = (raw.len() - SAMPLE) / 3 * quarter;
        buffer.clear();
        let length = compressor.compress_to_buffer(&raw[at..at + SAMPLE], &mut buffer)?;
        if length + SAMPLE / WORTHWHILE < SAMPLE {
            return Ok(true);
        }
    }
    Ok(false)
}

fn decompress(payload: &[u8], raw_length: usize) -> std::io::Result<Vec<u8>> {
    DECOMPRESSOR.with_borrow_mut(|slot| {
        let decompressor = match slot {
            Some(decompressor) => decompressor,
            None => slot.insert(Decompressor::new()?),
        };
        decompressor.decompress(payload, raw_length)
    })
}

/// The first `wanted` bytes of what `payload` decompresses to, which are fewer than all.
fn decompress_start(payload: &[u8], wanted: usize) -> std::io::Result<Vec<u8>> {
    STREAM.with_borrow_mut(|slot| {
        let failed = |code| std::io::Error::other(zstd::zstd_safe::get_error_name(code));
        let context = slot.get_or_insert_with(DCtx::create);
        // Whatever came of the frame before.
        context.reset(ResetDirective::SessionOnly).map_err(failed)?;
        let mut raw = Vec::with_capacity(wanted);
        let (mut from, mut to) = (InBuffer::around(payload), OutBuffer::around(&mut raw));
        while to.pos() < wanted {
            let before = (from.pos(), to.pos());
            context.decompress_stream(&mut to, &mut from).map_err(failed)?;
            if (from.pos(), to.pos()) == before {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(raw)
    })
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}
