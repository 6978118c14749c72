//! Derivations: what `.drv` files hold, and how output paths follow from it.
//!
//! [`Derivation::parse`] and [`Derivation::to_aterm`] read and write the file format. The path of an output that is not
//! content-addressed contains the derivation's *hash modulo* ([`HashModulo`]), which depends on that of its inputs;
//! [`Derivation::fill_outputs`] and [`Derivation::verify_outputs`] compute paths and compare them. When the paths of
//! content-addressed inputs are known, [`Derivation::resolve`] puts them in.

use std::collections::{BTreeMap, BTreeSet};

use crate::store_path::StorePath;

mod aterm;
mod error;
mod modulo;
mod output;
mod output_paths;
mod placeholder;
mod resolve;

pub use error::Error;
pub use modulo::HashModulo;
pub use output::{Output, OutputName};
pub use placeholder::{Placeholder, output_placeholder, upstream_placeholder};
pub use resolve::replace_all;

/// The environment variable that holds structured attributes, as JSON.
pub const STRUCTURED_ATTRS: &[u8] = b"__json";

/// A derivation whose inputs are all realised: everything a builder is told.
///
/// Strings are bytes: nothing in a derivation has to be UTF-8 except what is a name or path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BasicDerivation {
    /// The name, without `.drv`. It stands in the file's path only.
    pub name: String,
    /// The outputs, at least one of them.
    pub outputs: BTreeMap<OutputName, Output>,
    /// Store paths the builder may read.
    pub input_srcs: BTreeSet<StorePath>,
    /// The system it is to be built on, such as `x86_64-linux`, or `builtin`.
    pub platform: Vec<u8>,
    /// The program to run, or `builtin:…`.
    pub builder: Vec<u8>,
    /// The program's arguments.
    pub args: Vec<Vec<u8>>,
    /// The program's environment.
    pub env: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl BasicDerivation {
    /// The value of an environment variable.
    pub fn env(&self, name: &str) -> Option<&[u8]> {
        self.env.get(name.as_bytes()).map(Vec::as_slice)
    }

    /// The JSON of its structured attributes, if it has them.
    pub fn structured_attrs(&self) -> Option<&[u8]> {
        self.env.get(STRUCTURED_ATTRS).map(Vec::as_slice)
    }

    /// Whether it is run by the daemon itself rather than by a program.
    pub fn is_builtin(&self) -> bool {
        self.builder.starts_with(b"builtin:")
    }

    /// Whether every build of it may make something else.
    pub fn is_impure(&self) -> bool {
        self.outputs.values().any(|output| matches!(output, Output::Impure { .. }))
    }

    /// Whether its builder may use the host's network: what comes of it is known, or is allowed to differ.
    pub fn has_network(&self) -> bool {
        self.fixed_output().is_some() || self.is_impure()
    }

    /// Its fixed output, if it is a *fixed-output derivation*: one output named `out` whose hash is known.
    pub fn fixed_output(&self) -> Option<(&StorePath, &crate::content_address::ContentAddress)> {
        match self.outputs.first_key_value() {
            Some((name, Output::Fixed { path, ca })) if self.outputs.len() == 1 && name.as_str() == "out" => {
                Some((path, ca))
            }
            _ => None,
        }
    }

    /// Whether the paths of all outputs will follow from their contents: what untrusted users may ask to have built.
    pub fn is_content_addressed(&self) -> bool {
        let content_addressed =
            |output: &Output| matches!(output, Output::Fixed { .. } | Output::Floating { .. } | Output::Impure { .. });
        !self.outputs.is_empty() && self.outputs.values().all(content_addressed)
    }
}

/// A derivation as its file has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Derivation {
    /// All but what other derivations have to make first.
    pub basic: BasicDerivation,
    /// Derivations to build first, and which of their outputs are needed.
    pub input_drvs: BTreeMap<StorePath, InputOutputs>,
}

/// What a derivation needs of another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InputOutputs {
    /// Its outputs that are needed themselves.
    pub outputs: BTreeSet<OutputName>,
    /// Those of its outputs that are derivations of which outputs are needed (*dynamic derivations*, experimental in
    /// stock Nix). Nests no deeper than [`MAX_DYNAMIC_DEPTH`].
    pub dynamic: BTreeMap<OutputName, InputOutputs>,
}

/// How often a derivation's output may be a derivation whose output is one again.
pub const MAX_DYNAMIC_DEPTH: usize = 16;

impl InputOutputs {
    /// All outputs that have to be there: those needed themselves, and those of which others are.
    pub fn names(&self) -> impl Iterator<Item = &OutputName> {
        self.outputs.iter().chain(self.dynamic.keys())
    }
}

/// Outputs alone.
impl From<BTreeSet<OutputName>> for InputOutputs {
    fn from(outputs: BTreeSet<OutputName>) -> Self {
        Self { outputs, dynamic: BTreeMap::new() }
    }
}

impl Derivation {
    /// What the `.drv` refers to: its input sources, and its input derivations' files.
    pub fn references(&self) -> BTreeSet<StorePath> {
        self.basic.input_srcs.iter().chain(self.input_drvs.keys()).cloned().collect()
    }

    /// Whether it needs outputs of derivations that have yet to be built.
    pub fn is_dynamic(&self) -> bool {
        self.input_drvs.values().any(|wanted| !wanted.dynamic.is_empty())
    }
}

/// A derivation without input derivations.
impl From<BasicDerivation> for Derivation {
    fn from(basic: BasicDerivation) -> Self {
        Self { basic, input_drvs: BTreeMap::new() }
    }
}
