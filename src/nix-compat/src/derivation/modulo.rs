//! The hash modulo: what identifies a derivation up to how its fixed outputs are fetched.
//!
//! In the ATerm every input derivation's path is replaced by that one's hash modulo, and the result is hashed. A fixed
//! output counts by its hash and path alone, so fetching the same file another way changes nothing downstream.

use std::collections::BTreeMap;

use data_encoding::HEXLOWER;

use super::{Derivation, Error, InputOutputs, Output, OutputName, aterm};
use crate::hash::sha256;
use crate::store_path::{StoreDir, StorePath};

/// What a derivation contributes to the hashes of those that depend on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HashModulo {
    /// A hash for each output of a fixed-output derivation.
    Fixed(BTreeMap<OutputName, [u8; 32]>),
    /// One hash for all outputs.
    Regular([u8; 32]),
    /// The same, but no path follows from it: it or one of its inputs has outputs whose paths are known only when they
    /// are built.
    Deferred([u8; 32]),
}

/// What is hashed in the place of an impure derivation: two builds of one have nothing in common.
const IMPURE: &[u8] = b"impure";

impl HashModulo {
    /// What it says of one output; `None` for an output that is not there.
    pub fn of(&self, output: &OutputName) -> Option<[u8; 32]> {
        match self {
            Self::Fixed(hashes) => hashes.get(output).copied(),
            Self::Regular(hash) | Self::Deferred(hash) => Some(*hash),
        }
    }
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
        let hash = self.modulo(dir, input, false)?;
        Ok(match hash {
            HashModulo::Regular(hash) if self.basic.outputs.values().any(|o| matches!(o, Output::Deferred)) => {
                HashModulo::Deferred(hash)
            }
            other => other,
        })
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
        let mut deferred = false;
        for output in self.basic.outputs.values() {
            match output {
                Output::InputAddressed(_) | Output::Deferred => {}
                Output::Floating { .. } => deferred = true,
                Output::Impure { .. } => return Ok(HashModulo::Deferred(sha256(IMPURE))),
                Output::Fixed { .. } => return Err(Error::MixedOutputs(self.basic.name.clone())),
            }
        }
        let (inputs, unknown) = self.hashed_inputs(input)?;
        let hash = sha256(&aterm::write(&self.basic, dir, &inputs, self.is_dynamic(), masked));
        Ok(if deferred || unknown { HashModulo::Deferred(hash) } else { HashModulo::Regular(hash) })
    }

    /// The input derivations by hash instead of path, and whether one of these is deferred. Two with the same hash become
    /// one. Outputs of outputs do not count, as in stock Nix.
    fn hashed_inputs(
        &self,
        input: &mut dyn FnMut(&StorePath) -> Option<HashModulo>,
    ) -> Result<(BTreeMap<String, InputOutputs>, bool), Error> {
        let mut hashed: BTreeMap<String, InputOutputs> = BTreeMap::new();
        let mut deferred = false;
        for (path, wanted) in &self.input_drvs {
            let hash = input(path).ok_or_else(|| Error::UnknownInput(path.clone()))?;
            deferred |= matches!(hash, HashModulo::Deferred(_));
            for output in &wanted.outputs {
                let unknown = || Error::UnknownOutput { input: path.clone(), output: output.clone() };
                let text = HEXLOWER.encode(&hash.of(output).ok_or_else(unknown)?);
                hashed.entry(text).or_default().outputs.insert(output.clone());
            }
        }
        Ok((hashed, deferred))
    }
}
