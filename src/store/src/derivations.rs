//! Derivations that lie in the store: reading them, their hash modulo, and the check of their output paths.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use castore::Node;
use nix_compat::content_address::Method;
use nix_compat::derivation::{BasicDerivation, Derivation, HashModulo, OutputName};
use nix_compat::hash::Algorithm;
use nix_compat::store_path::StorePath;
use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::nar_in::AddOptions;
use crate::store::Store;
use crate::temp_roots::TempRoots;

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
    fn remember(&self, path: &StorePath, hash: &HashModulo) {
        let mut hashes = self.hashes.lock();
        if hashes.len() >= CACHED_HASHES {
            hashes.clear();
        }
        hashes.insert(path.clone(), hash.clone());
    }

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

    /// Puts a derivation into the store, at the path that follows from it, which is in `roots` first.
    ///
    /// # Errors
    /// Those of [`Store::add_rooted`].
    pub fn add_derivation(&self, derivation: &Derivation, roots: &TempRoots) -> Result<StorePath> {
        let options = AddOptions {
            name: format!("{}.drv", derivation.basic.name),
            method: Method::Text,
            algorithm: Algorithm::Sha256,
            references: derivation.references(),
        };
        let text = derivation.to_aterm(self.store_dir());
        Ok(self.add_rooted(&options, roots, &mut text.as_slice())?.path)
    }

    /// The hash modulo of a valid derivation: what its outputs' paths depend on.
    ///
    /// # Errors
    /// When it, or a derivation it depends on, is not valid or does not parse.
    pub fn hash_modulo(&self, path: &StorePath) -> Result<HashModulo> {
        if let Some(hash) = self.derivations.hashes.lock().get(path) {
            return Ok(hash.clone());
        }
        // Depth first over the inputs, on a stack of our own: chains of derivations are long. What the walk knows it
        // keeps; the shared cache may be emptied at any time.
        let mut known: HashMap<StorePath, HashModulo> = HashMap::new();
        let mut stack = vec![(path.clone(), self.derivation(path)?)];
        while let Some((path, derivation)) = stack.last() {
            let unknown = {
                let shared = self.derivations.hashes.lock();
                derivation.input_drvs.keys().find(|input| match shared.get(*input) {
                    Some(hash) if !known.contains_key(*input) => {
                        known.insert((*input).clone(), hash.clone());
                        false
                    }
                    _ => !known.contains_key(*input),
                })
            };
            if let Some(input) = unknown.cloned() {
                let derivation = self.derivation(&input)?;
                stack.push((input, derivation));
                continue;
            }
            let hash = derivation
                .hash_modulo(self.store_dir(), &mut |input| known.get(input).cloned())
                .map_err(|e| Error::Derivation { path: self.store_dir().display(path), reason: e.to_string() })?;
            self.derivations.remember(path, &hash);
            known.insert(path.clone(), hash);
            stack.pop();
        }
        known.remove(path).ok_or_else(|| Error::path(self.store_dir(), path))
    }

    /// The hash modulo by which realisations name the outputs of a derivation, which need not be valid itself.
    ///
    /// # Errors
    /// When a derivation it depends on is not valid or does not parse.
    pub fn output_hash_modulo(&self, path: &StorePath, derivation: &Derivation) -> Result<HashModulo> {
        let failed = |reason: String| Error::Derivation { path: self.store_dir().display(path), reason };
        let hashes = self.input_hashes(path, derivation)?;
        derivation
            .output_hash_modulo(self.store_dir(), &mut |input| hashes.get(input).cloned())
            .map_err(|e| failed(e.to_string()))
    }

    fn input_hashes(&self, path: &StorePath, derivation: &Derivation) -> Result<HashMap<StorePath, HashModulo>> {
        let failed = |reason: String| Error::Derivation { path: self.store_dir().display(path), reason };
        let mut hashes = HashMap::new();
        for input in derivation.input_drvs.keys() {
            hashes.insert(input.clone(), self.hash_modulo(input).map_err(|e| failed(e.to_string()))?);
        }
        Ok(hashes)
    }

    /// Checks that a derivation's outputs have the paths that follow from it.
    ///
    /// # Errors
    /// [`Error::Derivation`] when they have not, or when an input derivation is not valid.
    pub fn check_derivation(&self, path: &StorePath, derivation: &Derivation) -> Result<()> {
        let failed = |reason: String| Error::Derivation { path: self.store_dir().display(path), reason };
        let hashes = self.input_hashes(path, derivation)?;
        derivation
            .verify_outputs(self.store_dir(), path, &mut |input| hashes.get(input).cloned())
            .map_err(|e| failed(e.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::atomic::{AtomicBool, Ordering};

    use nix_compat::content_address::{ContentAddress, Method};
    use nix_compat::hash::{Algorithm, Hash, sha256};
    use nix_compat::store_path::{StoreDir, content_address_path};

    use super::*;
    use crate::nar_in::AddOptions;
    use crate::store::Config;

    /// Adds a derivation with a fixed output.
    fn add(store: &Store, note: usize, inputs: BTreeSet<StorePath>) -> StorePath {
        let dir = store.store_dir();
        let ca = ContentAddress { method: Method::Flat, hash: Hash::Sha256(sha256(b"x")) };
        let out = dir.display(&content_address_path(dir, "d", &ca, &BTreeSet::new(), false).unwrap());
        let hex: String = sha256(b"x").iter().map(|byte| format!("{byte:02x}")).collect();
        let list: Vec<_> = inputs.iter().map(|input| format!(r#"("{}",["out"])"#, dir.display(input))).collect();
        let list = list.join(",");
        let text = format!(
            r#"Derive([("out","{out}","sha256","{hex}")],[{list}],[],"x","/b",[],[("note","{note}"),("out","{out}")])"#
        );
        let (name, method, algorithm) = ("d.drv".into(), Method::Text, Algorithm::Sha256);
        let options = AddOptions { name, method, algorithm, references: inputs };
        store.add(&options, &mut text.as_bytes()).unwrap().path
    }

    #[test]
    fn a_walk_ends_though_the_cache_is_emptied_all_the_time() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(Config::new(StoreDir::default(), dir.path())).unwrap();
        let mut layer = BTreeSet::new();
        for depth in 0..5 {
            layer = (0..3).map(|i| add(&store, depth * 3 + i, layer.clone())).collect();
        }
        let top = add(&store, 100, layer);
        let expected = store.hash_modulo(&top).unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Acquire) {
                    store.derivations.hashes.lock().clear();
                }
            });
            for _ in 0..50 {
                store.derivations.forget(&top);
                assert_eq!(store.hash_modulo(&top).ok().as_ref(), Some(&expected));
            }
            done.store(true, Ordering::Release);
        });
    }
}
