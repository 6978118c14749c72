//! What objects are known by.

use crate::digest::Digest;

/// Kind and digest.
const KEY_LENGTH: usize = 33;

/// What an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum ObjectKind {
    /// A piece of a blob, or a whole small blob.
    Chunk = 1,
    /// The list of the chunks of a large blob; its digest is that of the blob.
    ChunkList = 2,
    /// A directory in its canonical encoding.
    Directory = 3,
    /// Something that the owner of the store knows, kept here so that it can be found again without the index.
    Record = 4,
}

impl ObjectKind {
    pub(crate) fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Chunk),
            2 => Some(Self::ChunkList),
            3 => Some(Self::Directory),
            4 => Some(Self::Record),
            _ => None,
        }
    }
}

/// What an object is known by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    /// What it is.
    pub kind: ObjectKind,
    /// BLAKE3 of what it says.
    pub digest: Digest,
}

impl std::fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match self.kind {
            ObjectKind::Chunk => "chunk",
            ObjectKind::ChunkList => "chunk list",
            ObjectKind::Directory => "directory",
            ObjectKind::Record => "record",
        };
        write!(f, "{kind} {}", self.digest)
    }
}

/// The key of an object in the index.
pub(crate) fn key_bytes(key: &ObjectKey) -> [u8; KEY_LENGTH] {
    let mut bytes = [0; KEY_LENGTH];
    bytes[0] = key.kind as u8;
    bytes[1..].copy_from_slice(key.digest.as_bytes());
    bytes
}

/// The object of a key in the index, if it can be one.
pub(crate) fn key_of(bytes: &[u8]) -> Option<ObjectKey> {
    let (&kind, digest) = bytes.split_first()?;
    let digest: [u8; 32] = digest.try_into().ok()?;
    Some(ObjectKey { kind: ObjectKind::from_byte(kind)?, digest: Digest::from(digest) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_kind_and_digest() {
        let key = ObjectKey { kind: ObjectKind::Directory, digest: Digest::from([7; 32]) };
        let bytes = key_bytes(&key);
        assert_eq!(bytes[0], 3);
        assert_eq!(key_of(&bytes), Some(key));
        assert_eq!(key_of(&[5; 33]), None);
        assert_eq!(key_of(&bytes[..32]), None);
    }
}
