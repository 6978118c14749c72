//! What a client wants to exist: a store object, or outputs of a derivation.

use std::collections::BTreeSet;

use super::Protocol;
use super::values::Text;
use crate::derivation::{self, MAX_DYNAMIC_DEPTH, OutputName};
use crate::store_path::{self, StorePath};
use crate::wire::Invalid;

/// From this minor on "!*" means all outputs and a bare `.drv` the file itself.
const NEW_SYNTAX: u16 = 30;

/// Something to build or substitute.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DerivedPath {
    /// The store object itself, even if it is a derivation.
    Opaque(StorePath),
    /// Outputs of a derivation.
    Built {
        /// The derivation.
        drv: StorePath,
        /// Which outputs.
        outputs: OutputsSpec,
    },
    /// Outputs of a derivation that has yet to be built (*dynamic derivations*, experimental in stock Nix).
    Dynamic {
        /// The derivation in the store that it begins with.
        drv: StorePath,
        /// The output of it that is a derivation, the output of that one that is, and so on; never empty, and at most
        /// [`MAX_DYNAMIC_DEPTH`].
        through: Vec<OutputName>,
        /// Which outputs of the last one.
        outputs: OutputsSpec,
    },
}

/// Which outputs of a derivation.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum OutputsSpec {
    /// Every output it has.
    All,
    /// These outputs; never empty.
    Names(BTreeSet<OutputName>),
}

impl OutputsSpec {
    /// Whether an output is meant.
    pub fn contains(&self, output: &OutputName) -> bool {
        match self {
            Self::All => true,
            Self::Names(names) => names.contains(output),
        }
    }
}

/// Why a text names nothing that could be built.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DerivedPathError {
    /// The part before "!", or all of it, is no store path.
    #[error(transparent)]
    StorePath(#[from] store_path::Error),
    /// A name after "!" cannot be an output's.
    #[error(transparent)]
    Output(#[from] derivation::Error),
    /// Nothing after "!".
    #[error("derived path '{0}' names no outputs after '!'")]
    NoOutputs(String),
    /// Outputs of outputs without end.
    #[error("derived path '{0}' has more than {MAX_DYNAMIC_DEPTH} outputs of outputs")]
    TooDeep(String),
}

impl DerivedPath {
    /// The store path before the "!", or all there is.
    pub fn base(&self) -> &StorePath {
        match self {
            Self::Opaque(path) => path,
            Self::Built { drv, .. } | Self::Dynamic { drv, .. } => drv,
        }
    }

    /// Parses the form that `protocol` uses.
    pub fn parse(text: &str, protocol: &Protocol) -> Result<Self, DerivedPathError> {
        let new_syntax = protocol.since(NEW_SYNTAX);
        let Some((before, outputs)) = text.rsplit_once('!') else {
            let path = protocol.store_dir.parse(text)?;
            return Ok(if !new_syntax && path.is_derivation() {
                Self::Built { drv: path, outputs: OutputsSpec::All }
            } else {
                Self::Opaque(path)
            });
        };
        let mut parts = before.split('!');
        let drv = protocol.store_dir.parse(parts.next().unwrap_or_default())?;
        let mut through = Vec::new();
        for output in parts {
            if through.len() == MAX_DYNAMIC_DEPTH {
                return Err(DerivedPathError::TooDeep(text.to_owned()));
            }
            through.push(output.parse()?);
        }
        let outputs = match outputs {
            "" => return Err(DerivedPathError::NoOutputs(text.to_owned())),
            "*" if new_syntax => OutputsSpec::All,
            names => OutputsSpec::Names(names.split(',').map(str::parse).collect::<Result<_, _>>()?),
        };
        Ok(if through.is_empty() { Self::Built { drv, outputs } } else { Self::Dynamic { drv, through, outputs } })
    }

    /// Prints the form that `protocol` uses. Below 1.30 a derivation's file and all its outputs look the same.
    pub fn print(&self, protocol: &Protocol) -> String {
        let (drv, through, outputs) = match self {
            Self::Opaque(path) => return protocol.store_dir.display(path),
            Self::Built { drv, outputs } => (drv, &[][..], outputs),
            Self::Dynamic { drv, through, outputs } => (drv, &through[..], outputs),
        };
        let mut text = protocol.store_dir.display(drv);
        for output in through {
            text.push('!');
            text.push_str(output.as_str());
        }
        match outputs {
            OutputsSpec::All if protocol.since(NEW_SYNTAX) => text.push_str("!*"),
            OutputsSpec::All => {}
            OutputsSpec::Names(names) => {
                let mut separator = '!';
                for name in names {
                    text.push(separator);
                    text.push_str(name.as_str());
                    separator = ',';
                }
            }
        }
        text
    }
}

impl Text for DerivedPath {
    fn from_text(text: &str, protocol: &Protocol) -> Result<Self, Invalid> {
        Ok(DerivedPath::parse(text, protocol)?)
    }

    fn to_text(&self, protocol: &Protocol) -> String {
        self.print(protocol)
    }
}
