//! The bytes of an object's entry in the index.

use bytes::Bytes;

use crate::pack::Place;

const LENGTH: usize = 24;

/// Where an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Its block.
    pub(crate) place: Place,
    /// Where it begins in the block's raw payload.
    pub(crate) start: u32,
    pub(crate) length: u32,
}

impl Entry {
    /// The object's contents in its block, or in as much of it as there is; none if they are not there.
    pub(crate) fn contents_in(&self, raw: &Bytes) -> Option<Bytes> {
        let (start, end) = (self.start as usize, self.end());
        (end <= raw.len()).then(|| raw.slice(start..end))
    }

    /// Where it ends in the block's raw payload.
    pub(crate) fn end(&self) -> usize {
        self.start as usize + self.length as usize
    }

    pub(crate) fn encode(&self) -> [u8; LENGTH] {
        let mut bytes = [0; LENGTH];
        bytes[0..4].copy_from_slice(&self.place.pack.to_le_bytes());
        bytes[4..12].copy_from_slice(&self.place.offset.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.place.length.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.start.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; LENGTH] = bytes.try_into().ok()?;
        let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let offset = u64::from_le_bytes(bytes.get(4..12)?.try_into().ok()?);
        let place = Place { pack: word(0)?, offset, length: word(12)? };
        Some(Self { place, start: word(16)?, length: word(20)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_has_the_documented_bytes() {
        let place = Place { pack: 0x0403_0201, offset: 0x0c0b_0a09_0807_0605, length: 0x100f_0e0d };
        let entry = Entry { place, start: 0x1413_1211, length: 0x1817_1615 };
        let bytes: Vec<u8> = (1..=24).collect();
        assert_eq!(entry.encode()[..], bytes);
        assert_eq!(Entry::decode(&bytes), Some(entry));
        assert_eq!(Entry::decode(&bytes[..23]), None);
    }
}
