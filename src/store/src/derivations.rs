//! Derivations that lie in the store: reading them, their hash modulo, and the check of their output paths.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use castore::Node;
use nix_compat::derivation::{BasicDerivation, Derivation, HashModulo, OutputName};
use nix_compat::store_path::StorePath;
use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::store::Store;

/// Hashes modulo kept in memory; at about 150 bytes each. When full, the cache starts anew.
const CACHED_HASHES: usize = 100_000;
/// The largest .drv read. The largest known are generated lists of some MB.
const MAX_DERIVATION: u64 = 256 << 20;

/// What was computed of derivations, by path. A .drv's contents never change, so neither does this.
#[derive(Debug, Default)]
pub(crate) struct DerivationCache {
    hashes: Mutex<HashMap<StorePath, HashModulo>>,
}

impl DerivationCache {
    pub(crate) fn forget(&self, path: &StorePath) {
        self.hashes.lock().remove(path);
    }
}

/// The outputs whose paths the derivation itself tells.
pub fn output_paths(derivation: &BasicDerivation) -> BTreeMap<OutputName, StorePath> {
    derivation.outputs.iter().filter_map(|(name, output)| Some((name.clone(), output.path()?.clone()))).collect()
}

impl Store {
    /// Reads a valid .drv.
    ///
    /// # Errors
    /// [`Error::NotValid`], or [`Error::Derivation`] when it does not parse.
    pub fn derivation(&self, path: &StorePath) -> Result<Arc<Derivation>> {
        let entry = self.valid_entry(path)?;
        Ok(Arc::new(self.read_derivation_node(path, &entry.node)?))
    }

    /// Reads a .drv from its castore node.
    pub(crate) fn read_derivation_node(&self, path: &StorePath, node: &Node) -> Result<Derivation> {
        let failed = |reason: String| Error::Derivation { path: self.store_dir().display(path), reason };
        let Node::File { digest, size, .. } = node else { return Err(failed("it is not a regular file".into())) };
        if *size > MAX_DERIVATION {
            return Err(failed(format!("it has {size} bytes, more than the {MAX_DERIVATION} that are read")));
        }
        let mut bytes = Vec::new();
        self.for_each_piece(digest, *size, &mut |piece| {
            bytes.extend_from_slice(piece);
            Ok(())
        })?;
        let name = path.name().strip_suffix(".drv").unwrap_or(path.name());
        Derivation::parse(self.store_dir(), name, &bytes).map_err(|e| failed(e.to_string()))
    }

    /// The hash modulo of a valid derivation: what its outputs' paths depend on.
    ///
    /// # Errors
    /// When it, or a derivation it depends on, is not valid or does not parse.
    pub fn hash_modulo(&self, path: &StorePath) -> Result<HashModulo> {
        if let Some(hash) = self.derivations.hashes.lock().get(path) {
            return Ok(hash.clone());
        }
        // Depth first over the inputs, on a stack of our own: chains of derivations are long.
        let mut stack = vec![(path.clone(), self.derivation(path)?)];
        while let Some((path, derivation)) = stack.last() {
            let unknown = {
                let hashes = self.derivations.hashes.lock();
                derivation.input_drvs.keys().find(|input| !hashes.contains_key(*input)).cloned()
            };
            if let Some(input) = unknown {
                let derivation = self.derivation(&input)?;
                stack.push((input, derivation));
                continue;
            }
            let hash = self.hash_of(path, derivation)?;
            let mut hashes = self.derivations.hashes.lock();
            if hashes.len() >= CACHED_HASHES {
                hashes.clear();
            }
            hashes.insert(path.clone(), hash);
            drop(hashes);
            stack.pop();
        }
        match self.derivations.hashes.lock().get(path) {
            Some(hash) => Ok(hash.clone()),
            None => Err(Error::path(self.store_dir(), path)),
        }
    }

    fn hash_of(&self, path: &StorePath, derivation: &Derivation) -> Result<HashModulo> {
        let hashes = self.derivations.hashes.lock();
        derivation
            .hash_modulo(self.store_dir(), &mut |input| hashes.get(input).cloned())
            .map_err(|e| Error::Derivation { path: self.store_dir().display(path), reason: e.to_string() })
    }

    /// Checks that a derivation's outputs have the paths that follow from it.
    ///
    /// # Errors
    /// [`Error::Derivation`] when they have not, or when an input derivation is not valid.
    pub fn check_derivation(&self, path: &StorePath, derivation: &Derivation) -> Result<()> {
        let failed = |reason: String| Error::Derivation { path: self.store_dir().display(path), reason };
        let mut hashes = HashMap::new();
        for input in derivation.input_drvs.keys() {
            hashes.insert(input.clone(), self.hash_modulo(input).map_err(|e| failed(e.to_string()))?);
        }
        derivation
            .verify_outputs(self.store_dir(), path, &mut |input| hashes.get(input).cloned())
            .map_err(|e| failed(e.to_string()))
    }
}
