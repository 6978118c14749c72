//! What can be wrong with a derivation.

use super::OutputName;
use crate::store_path::{self, StorePath};
use crate::{content_address, hash};

/// Why a derivation cannot be read, or is not consistent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Something else than what the grammar has here.
    #[error("derivation '{name}' has something else than {expected} at byte {offset}")]
    Syntax {
        /// the derivation's name
        name: String,
        /// what should be there
        expected: &'static str,
        /// where
        offset: usize,
    },
    /// An input whose path has to be known, and is not.
    #[error("output '{output}' of '{input}' is not known yet")]
    UnresolvedInput {
        /// the input derivation
        input: StorePath,
        /// its output
        output: OutputName,
    },
    /// A form of derivation this crate does not read; the only one with a version that it reads is `xp-dyn-drv`.
    #[error("derivation '{name}' is of the unsupported version '{version}'")]
    UnsupportedVersion {
        /// the derivation's name
        name: String,
        /// the version it has
        version: String,
    },
    /// Entries that are not sorted, or there twice.
    #[error("derivation '{name}' has {what} that are not sorted or not unique")]
    Order {
        /// the derivation's name
        name: String,
        /// of what
        what: &'static str,
    },
    /// Bytes that should be a name or path.
    #[error("derivation '{name}' has a {what} that is not UTF-8")]
    NotText {
        /// the derivation's name
        name: String,
        /// what should be text
        what: &'static str,
    },
    /// A derivation makes at least one output.
    #[error("derivation '{0}' has no outputs")]
    NoOutputs(String),
    /// An input derivation of which no output is wanted.
    #[error("derivation '{name}' needs no output of its input '{input}'")]
    NoWantedOutputs {
        /// the derivation's name
        name: String,
        /// the input
        input: StorePath,
    },
    /// A text that is not a store path, or a path that cannot be computed.
    #[error("store path of a derivation")]
    Path(#[from] store_path::Error),
    /// A derivation's file is `<name>.drv`.
    #[error("'{0}' is not a derivation's path")]
    NotADerivation(StorePath),
    /// An output whose name cannot be part of a store path's name.
    #[error("'{name}' cannot be an output name")]
    OutputName {
        /// the name
        name: String,
        /// what is wrong with it
        source: store_path::Error,
    },
    /// An output with an unknown method.
    #[error("method of an output")]
    Method(#[from] content_address::Error),
    /// An output with an unknown algorithm or a hash that is none.
    #[error("hash of an output")]
    Hash(#[from] hash::Error),
    /// Path, algorithm and hash of an output do not go together.
    #[error("no output has path '{path}', hash algorithm '{algorithm}' and hash '{hash}'")]
    OutputFields {
        /// first field
        path: String,
        /// second field
        algorithm: String,
        /// third field
        hash: String,
    },
    /// The hash modulo of an input is not known.
    #[error("hash of the input derivation '{0}' is not known")]
    UnknownInput(StorePath),
    /// An input derivation has no such output.
    #[error("derivation '{input}' has no output '{output}'")]
    UnknownOutput {
        /// the input
        input: StorePath,
        /// the output wanted of it
        output: OutputName,
    },
    /// An output has another path than the one that follows from the derivation.
    #[error("derivation '{name}' has incorrect output '{found}' for '{output}', should be '{computed}'")]
    WrongOutputPath {
        /// the derivation's name
        name: String,
        /// the output
        output: OutputName,
        /// its path
        found: StorePath,
        /// what follows from the derivation
        computed: StorePath,
    },
    /// An output states a path although nobody can know it before its inputs are built.
    #[error("derivation '{name}' states a path for output '{output}' that cannot be known yet")]
    PathNotKnown {
        /// the derivation's name
        name: String,
        /// the output
        output: OutputName,
    },
    /// The environment variable named like an output does not hold its path.
    #[error("derivation '{name}' has incorrect environment variable '{output}', should be '{path}'")]
    WrongOutputVariable {
        /// the derivation's name
        name: String,
        /// the output and variable
        output: OutputName,
        /// what it should hold
        path: StorePath,
    },
    /// The environment variable named like an output is missing.
    #[error("derivation '{name}' has missing environment variable '{output}', should be '{path}'")]
    MissingOutputVariable {
        /// the derivation's name
        name: String,
        /// the output and variable
        output: OutputName,
        /// what it should hold
        path: StorePath,
    },
    /// Fixed, floating and other outputs in one derivation.
    #[error("derivation '{0}' has outputs of kinds that do not go together")]
    MixedOutputs(String),
}
