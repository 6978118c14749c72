//! Objects for tests that know them by numbers.

use super::{ObjectKey, ObjectKind};
use crate::Digest;

/// Noise of 500 bytes.
pub(crate) fn contents(number: u64) -> Vec<u8> {
    let mut contents = vec![0; 500];
    blake3::Hasher::new().update(&number.to_le_bytes()).finalize_xof().fill(&mut contents);
    contents
}

/// The chunk of these contents.
pub(crate) fn key(number: u64) -> ObjectKey {
    ObjectKey { kind: ObjectKind::Chunk, digest: Digest::of(&contents(number)) }
}
