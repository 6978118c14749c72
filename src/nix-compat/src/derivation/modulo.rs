//! The hash modulo: what identifies a derivation up to how its fixed outputs are fetched.
//!
//! In the ATerm every input derivation's path is replaced by that one's hash modulo, and the result is hashed. A fixed
//! output counts by its hash and path alone, so fetching the same file another way changes nothing downstream.

use std::collections::{BTreeMap, BTreeSet};

use data_encoding::HEXLOWER;

use super::{Derivation, Error, Output, OutputName, aterm};
use crate::hash::sha256;
use crate::store_path::{StoreDir, StorePath};

/// What a derivation contributes to the hashes of those that depend on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HashModulo {
    /// A hash for each output of a fixed-output derivation.
    Fixed(BTreeMap<OutputName, [u8; 32]>),
    /// One hash for all outputs.
    Regular([u8; 32]),
    /// None yet: it or one of its inputs has outputs whose paths are known only when they are built.
    Deferred,
}

impl Derivation {
    /// The hash that derivations depending on this one put in the place of its path.
    ///
    /// `input` gives the same of each input derivation; what it does not know is [`Error::UnknownInput`].
    pub fn hash_modulo(
        &self,
        dir: &StoreDir,
        input: &mut dyn FnMut(&StorePath) -> Option<HashModulo>,
    ) -> Result<HashModulo, Error> {
        if self.basic.outputs.values().any(|output| matches!(output, Output::Deferred)) {
            return Ok(HashModulo::Deferred);
        }
        self.modulo(dir, input, false)
    }

    /// The hash its own output paths follow from: the same, with their places left empty.
    ///
    /// It is also what identifies the derivation in realisations before Nix 2.35.
    pub fn output_hash_modulo(
        &self,
        dir: &StoreDir,
        input: &mut dyn FnMut(&StorePath) -> Option<HashModulo>,
    ) -> Result<HashModulo, Error> {
        self.modulo(dir, input, true)
    }

    fn modulo(
        &self,
        dir: &StoreDir,
        input: &mut dyn FnMut(&StorePath) -> Option<HashModulo>,
        masked: bool,
    ) -> Result<HashModulo, Error> {
        if let Some((path, ca)) = self.basic.fixed_output() {
            let (prefix, algorithm) = (ca.method.prefix(), ca.hash.algorithm());
            let text = format!("fixed:out:{prefix}{algorithm}:{}:{}", ca.hash.to_base16(), dir.display(path));
            return Ok(HashModulo::Fixed([(OutputName::default(), sha256(text.as_bytes()))].into()));
        }
        for output in self.basic.outputs.values() {
            match output {
                Output::InputAddressed(_) | Output::Deferred => {}
                Output::Floating { .. } | Output::Impure { .. } => return Ok(HashModulo::Deferred),
                Output::Fixed { .. } => return Err(Error::MixedOutputs(self.basic.name.clone())),
            }
        }
        let Some(inputs) = self.hashed_inputs(input)? else { return Ok(HashModulo::Deferred) };
        let inputs = inputs.iter().map(|(hash, outputs)| (hash.clone(), outputs));
        Ok(HashModulo::Regular(sha256(&aterm::write(&self.basic, dir, inputs, masked))))
    }

    /// The input derivations by hash instead of path. Two with the same hash become one.
    fn hashed_inputs(
        &self,
        input: &mut dyn FnMut(&StorePath) -> Option<HashModulo>,
    ) -> Result<Option<BTreeMap<String, BTreeSet<OutputName>>>, Error> {
        let mut hashed: BTreeMap<String, BTreeSet<OutputName>> = BTreeMap::new();
        for (path, wanted) in &self.input_drvs {
            match input(path).ok_or_else(|| Error::UnknownInput(path.clone()))? {
                HashModulo::Deferred => return Ok(None),
                HashModulo::Regular(hash) => {
                    hashed.entry(HEXLOWER.encode(&hash)).or_default().extend(wanted.iter().cloned());
                }
                HashModulo::Fixed(hashes) => {
                    for output in wanted {
                        let hash = hashes
                            .get(output)
                            .ok_or_else(|| Error::UnknownOutput { input: path.clone(), output: output.clone() })?;
                        hashed.entry(HEXLOWER.encode(hash)).or_default().insert(OutputName::default());
                    }
                }
            }
        }
        Ok(Some(hashed))
    }
}
