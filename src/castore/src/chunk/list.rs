//! The list of a blob's chunks.
//!
//! Stored as an object of its own kind under the digest of the *blob*: for each chunk, in order, its digest (32 bytes)
//! and its length (4 bytes, little endian, never 0). The number of chunks follows from the object's length and is at
//! least 2, since a blob of one chunk is that chunk. The digest is that of the blob because whoever makes a list hashes
//! the same bytes as a whole; a list that somebody sends is never stored.

use crate::Digest;
use crate::objects::MAX_OBJECT;

/// Bytes of one chunk in a list.
const ENTRY: usize = Digest::LENGTH + size_of::<u32>();
/// The most chunks a list may have, so that it is an object: blobs of about 60 GiB.
const MAX_CHUNKS: usize = MAX_OBJECT / ENTRY;

/// A list being made while its chunks are cut.
#[derive(Debug, Default)]
pub(crate) struct ChunkListBuilder {
    encoded: Vec<u8>,
}

impl ChunkListBuilder {
    /// Adds a chunk; false when the list is full.
    #[must_use]
    pub(crate) fn push(&mut self, digest: &Digest, length: u32) -> bool {
        if self.encoded.len() == MAX_CHUNKS * ENTRY {
            return false;
        }
        self.encoded.extend_from_slice(digest.as_bytes());
        self.encoded.extend_from_slice(&length.to_le_bytes());
        true
    }

    /// The list as it is stored; `None` for fewer than two chunks, which need none.
    pub(crate) fn finish(self) -> Option<Vec<u8>> {
        (self.encoded.len() >= 2 * ENTRY).then_some(self.encoded)
    }
}

/// A list as it is used: with the place of each chunk in the blob.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ChunkList {
    digests: Box<[Digest]>,
    /// Where each chunk ends in the blob.
    ends: Box<[u64]>,
}

impl ChunkList {
    /// Reads a stored list. `None` when it cannot be one.
    pub(crate) fn decode(encoded: &[u8]) -> Option<ChunkList> {
        let (entries, rest) = encoded.as_chunks::<ENTRY>();
        if entries.len() < 2 || !rest.is_empty() {
            return None;
        }
        let mut digests = Vec::with_capacity(entries.len());
        let mut ends = Vec::with_capacity(entries.len());
        let mut end = 0u64;
        for entry in entries {
            let (digest, length) = entry.split_first_chunk::<{ Digest::LENGTH }>()?;
            let length = u32::from_le_bytes(length.try_into().ok()?);
            if length == 0 {
                return None;
            }
            // At most MAX_OBJECT / ENTRY times 4 GiB: no overflow.
            end += u64::from(length);
            digests.push(Digest::from(*digest));
            ends.push(end);
        }
        Some(ChunkList { digests: digests.into(), ends: ends.into() })
    }

    /// The blob's length.
    pub(crate) fn size(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// The chunks in order with their lengths.
    pub(crate) fn chunks(&self) -> impl Iterator<Item = (Digest, u64)> {
        let starts = std::iter::once(&0).chain(&self.ends);
        self.digests.iter().zip(self.ends.iter().zip(starts)).map(|(digest, (end, start))| (*digest, end - start))
    }

    /// The chunks that hold the bytes from `offset` on, each with its digest, its length, and where in the chunk to
    /// begin.
    pub(crate) fn chunks_from(&self, offset: u64) -> impl Iterator<Item = (Digest, u64, u64)> {
        let first = self.ends.partition_point(|end| *end <= offset);
        (first..self.ends.len()).map(move |index| {
            let start = if index == 0 { 0 } else { self.ends[index - 1] };
            (self.digests[index], self.ends[index] - start, offset.saturating_sub(start))
        })
    }

    /// Bytes of memory it takes.
    pub(crate) fn memory(&self) -> usize {
        size_of::<ChunkList>() + self.ends.len() * (Digest::LENGTH + size_of::<u64>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(lengths: &[u32]) -> Vec<u8> {
        let mut builder = ChunkListBuilder::default();
        for &length in lengths {
            assert!(builder.push(&Digest::of(&length.to_le_bytes()), length));
        }
        builder.finish().unwrap()
    }

    #[test]
    fn layout_is_the_documented_one() {
        let bytes = encoded(&[1, 0x0203]);
        assert_eq!(bytes.len(), 72);
        assert_eq!(&bytes[..32], Digest::of(&1u32.to_le_bytes()).as_bytes());
        assert_eq!(&bytes[32..36], [1, 0, 0, 0]);
        assert_eq!(&bytes[68..], [3, 2, 0, 0]);
    }

    #[test]
    fn tells_where_bytes_are() {
        let list = ChunkList::decode(&encoded(&[10, 20, 5])).unwrap();
        assert_eq!(list.size(), 35);
        assert_eq!(list.chunks().map(|(_, length)| length).collect::<Vec<_>>(), [10, 20, 5]);
        let from = |offset| list.chunks_from(offset).map(|(_, length, skip)| (length, skip)).collect::<Vec<_>>();
        assert_eq!(from(0), [(10, 0), (20, 0), (5, 0)]);
        assert_eq!(from(9), [(10, 9), (20, 0), (5, 0)]);
        assert_eq!(from(10), [(20, 0), (5, 0)]);
        assert_eq!(from(34), [(5, 4)]);
        assert_eq!(from(35), []);
        assert_eq!(from(u64::MAX), []);
    }

    #[test]
    fn refuses_what_is_no_list() {
        let good = encoded(&[10, 20]);
        for bad in [&good[..0], &good[..36], &good[..71], &[&good[..], &[0]].concat(), &[&good[..], &[0; 36]].concat()]
        {
            assert_eq!(ChunkList::decode(bad), None, "{} bytes", bad.len());
        }
        assert_eq!(ChunkListBuilder::default().finish(), None);
    }
}
