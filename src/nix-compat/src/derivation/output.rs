//! Outputs: their names, and how much is known of their paths.

use std::borrow::{Borrow, Cow};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use super::Error;
use crate::content_address::{ContentAddress, Method};
use crate::hash::{Algorithm, Hash};
use crate::store_path::{StoreDir, StorePath, validate_name};

/// The name of an output, `out` as a rule. Legal as part of a store path's name; cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OutputName(Arc<str>);

impl OutputName {
    /// Takes a legal name.
    pub fn new(name: &str) -> Result<Self, Error> {
        validate_name(name).map_err(|source| Error::OutputName { name: name.to_owned(), source })?;
        Ok(Self(name.into()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name of this output's store path: that of the derivation, with a dash and the output's name unless it is `out`.
    pub fn path_name<'a>(&self, drv_name: &'a str) -> Cow<'a, str> {
        match &*self.0 {
            "out" => Cow::Borrowed(drv_name),
            name => Cow::Owned(format!("{drv_name}-{name}")),
        }
    }
}

/// `out`.
impl Default for OutputName {
    fn default() -> Self {
        Self("out".into())
    }
}

impl fmt::Display for OutputName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for OutputName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Borrow<str> for OutputName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl FromStr for OutputName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Self::new(name)
    }
}

/// How an output gets its path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// From the derivation.
    InputAddressed(StorePath),
    /// From its contents, whose hash is given.
    Fixed {
        /// the path that follows from name and hash
        path: StorePath,
        /// what the contents must hash to
        ca: ContentAddress,
    },
    /// From its contents, once they are built. Experimental in stock Nix.
    Floating {
        /// what is hashed
        method: Method,
        /// by what
        algo: Algorithm,
    },
    /// From the derivation, once the paths of its floating inputs are known.
    Deferred,
    /// From its contents, and every build may make others. Experimental in stock Nix.
    Impure {
        /// what is hashed
        method: Method,
        /// by what
        algo: Algorithm,
    },
}

/// What stands for a hash when the output is impure.
const IMPURE: &str = "impure";

impl Output {
    /// Reads the three texts an output is in `.drv` files and on the worker protocol: its path, if that is known; the
    /// hash algorithm with the method's prefix; and the hash, base 16 as a rule.
    pub fn from_fields(dir: &StoreDir, path: &str, algorithm: &str, hash: &str) -> Result<Self, Error> {
        let inconsistent =
            || Error::OutputFields { path: path.to_owned(), algorithm: algorithm.to_owned(), hash: hash.to_owned() };
        if algorithm.is_empty() {
            return match (path, hash) {
                ("", "") => Ok(Self::Deferred),
                (path, "") => Ok(Self::InputAddressed(dir.parse(path)?)),
                _ => Err(inconsistent()),
            };
        }
        let (method, algo) = Method::split_prefix(algorithm)?;
        let algo = algo.parse()?;
        match (path, hash) {
            ("", "") => Ok(Self::Floating { method, algo }),
            ("", IMPURE) => Ok(Self::Impure { method, algo }),
            ("", _) | (_, "" | IMPURE) => Err(inconsistent()),
            (path, hash) => {
                let ca = ContentAddress { method, hash: Hash::parse(hash, Some(algo))? };
                Ok(Self::Fixed { path: dir.parse(path)?, ca })
            }
        }
    }

    /// Writes what [`from_fields`](Self::from_fields) reads.
    pub fn to_fields(&self, dir: &StoreDir) -> (String, String, String) {
        let path = self.path().map(|path| dir.display(path)).unwrap_or_default();
        let prefixed = |method: &Method, algo: &Algorithm| format!("{}{algo}", method.prefix());
        let (algorithm, hash) = match self {
            Self::InputAddressed(_) | Self::Deferred => (String::new(), String::new()),
            Self::Fixed { ca, .. } => (prefixed(&ca.method, &ca.hash.algorithm()), ca.hash.to_base16()),
            Self::Floating { method, algo } => (prefixed(method, algo), String::new()),
            Self::Impure { method, algo } => (prefixed(method, algo), IMPURE.to_owned()),
        };
        (path, algorithm, hash)
    }

    /// The path, if it is known before building.
    pub fn path(&self) -> Option<&StorePath> {
        match self {
            Self::InputAddressed(path) | Self::Fixed { path, .. } => Some(path),
            Self::Floating { .. } | Self::Deferred | Self::Impure { .. } => None,
        }
    }
}
