//! Cutting blobs into chunks, and the lists that put them together again.
//!
//! A blob of up to [`WHOLE`] bytes is one chunk. A larger one is cut where its contents say so (FastCDC, the 2020
//! variant): an insertion changes the chunks around it and leaves the others as they were, so a new version of a file
//! shares most of its chunks with the old one. The numbers follow from measurements: whole files below 64 KiB cost
//! little and save two thirds of the index; 32 KiB above finds three times what whole files find in a rebuild.

mod list;

use fastcdc::v2020::{Normalization, cut, select_masks};

pub(crate) use list::{ChunkList, ChunkListBuilder};

/// The longest blob that is one chunk whatever it contains, in bytes.
pub(crate) const WHOLE: usize = 64 * 1024;
/// The shortest chunk of a larger blob, except its last, in bytes.
pub(crate) const MIN_CHUNK: usize = 16 * 1024;
/// The length chunks tend to, in bytes.
const AVERAGE_CHUNK: usize = 32 * 1024;
/// The longest chunk, in bytes.
pub(crate) const MAX_CHUNK: usize = 128 * 1024;

/// Finds where chunks end.
///
/// The places depend on the sizes above and on tables of the fastcdc crate. Others would cut blobs that are stored
/// already at other places: nothing breaks, but old and new versions share less.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cutter {
    mask_small: u64,
    mask_large: u64,
}

impl Cutter {
    pub(crate) fn new() -> Cutter {
        let (mask_small, mask_large) = select_masks(AVERAGE_CHUNK, Normalization::Level1);
        Cutter { mask_small, mask_large }
    }

    /// The length of the chunk that `bytes` begin with. They must reach [`MAX_CHUNK`] bytes or to the end of the blob.
    pub(crate) fn next(&self, bytes: &[u8]) -> usize {
        let Cutter { mask_small, mask_large } = *self;
        let masks = (mask_small, mask_large, mask_small << 1, mask_large << 1);
        cut(bytes, MIN_CHUNK, AVERAGE_CHUNK, MAX_CHUNK, masks.0, masks.1, masks.2, masks.3).1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::services::contract::noise;

    fn lengths(mut bytes: &[u8]) -> Vec<usize> {
        let cutter = Cutter::new();
        let mut lengths = Vec::new();
        while !bytes.is_empty() {
            let length = cutter.next(&bytes[..bytes.len().min(MAX_CHUNK)]);
            lengths.push(length);
            bytes = &bytes[length..];
        }
        lengths
    }

    #[test]
    fn chunks_have_the_lengths_they_should() {
        let found = lengths(&noise(1, 20 << 20));
        let (last, others) = found.split_last().unwrap();
        assert!(*last <= MAX_CHUNK);
        assert!(others.iter().all(|length| (MIN_CHUNK..=MAX_CHUNK).contains(length)));
        let average = others.iter().sum::<usize>() / others.len();
        assert!((28 * 1024..48 * 1024).contains(&average), "{average}");
        assert_eq!(lengths(&[0; 200_000]), [MAX_CHUNK, 200_000 - MAX_CHUNK]);
    }

    #[test]
    fn cuts_stay_where_they_were() {
        // Other cuts than those of the last release would make old and new versions share nothing.
        assert_eq!(lengths(&noise(2, 200_000)), [70_348, 26_915, 34_333, 59_663, 8_741]);
    }

    #[test]
    fn an_insertion_changes_what_is_near() {
        let old = noise(3, 4 << 20);
        let new = [&old[..2_000_000], b"inserted", &old[2_000_000..]].concat();
        let cut = |bytes: &[u8]| {
            let mut at = 0;
            let cut = |length| {
                let chunk = crate::Digest::of(&bytes[at..at + length]);
                at += length;
                chunk
            };
            lengths(bytes).into_iter().map(cut).collect::<std::collections::HashSet<_>>()
        };
        let (old, new) = (cut(&old), cut(&new));
        assert!(new.difference(&old).count() <= 4, "{} of {}", new.difference(&old).count(), new.len());
    }
}
