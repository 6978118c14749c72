//! What is known of a valid store object besides its contents.

use std::collections::BTreeSet;

use crate::content_address::ContentAddress;
use crate::hash::NarHash;
use crate::signature::{PublicKey, Signature};
use crate::store_path::{StoreDir, StorePath, content_address_path};

/// A store object's metadata.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathInfo {
    /// Its path.
    pub path: StorePath,
    /// The derivation it was built from, if that is known.
    pub deriver: Option<StorePath>,
    /// SHA-256 of its NAR.
    pub nar_hash: NarHash,
    /// The paths its contents mention; may contain itself.
    pub references: BTreeSet<StorePath>,
    /// When it became valid, in seconds since 1970.
    pub registration_time: u64,
    /// Length of its NAR in bytes.
    pub nar_size: u64,
    /// Whether it was built here, and so is trusted as the builder is.
    pub ultimate: bool,
    /// Claims that its path holds these contents.
    pub signatures: BTreeSet<Signature>,
    /// From what its path was computed, if from its contents.
    pub ca: Option<ContentAddress>,
}

impl PathInfo {
    /// The text that is signed: `1;<path>;<NAR hash>;<NAR size>;<references>`, with whole paths, sorted.
    pub fn fingerprint(&self, dir: &StoreDir) -> String {
        let mut text = format!("1;{};{};{};", dir.display(&self.path), self.nar_hash, self.nar_size);
        for (i, reference) in self.references.iter().enumerate() {
            if i > 0 {
                text.push(',');
            }
            text.push_str(dir.as_str());
            text.push('/');
            text.push_str(reference.base_name());
        }
        text
    }

    /// Whether the path follows from the content address.
    ///
    /// That the *contents* hash to it is for whoever has them to check.
    pub fn is_content_addressed(&self, dir: &StoreDir) -> bool {
        let Some(ca) = &self.ca else { return false };
        let mut others = self.references.clone();
        let self_reference = others.remove(&self.path);
        content_address_path(dir, self.path.name(), ca, &others, self_reference).is_ok_and(|path| path == self.path)
    }

    /// Whether one of `keys` has signed this. An object of size 0 exists nowhere, so nobody can have.
    pub fn is_signed_by(&self, dir: &StoreDir, keys: &[PublicKey]) -> bool {
        if self.nar_size == 0 || self.signatures.is_empty() || keys.is_empty() {
            return false;
        }
        let fingerprint = self.fingerprint(dir);
        let valid = |signature| keys.iter().any(|key| key.verify(fingerprint.as_bytes(), signature));
        self.signatures.iter().any(valid)
    }
}
