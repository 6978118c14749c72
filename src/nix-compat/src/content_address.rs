//! Content addresses: by which method and hash an object's path follows from its contents.
//!
//! Written `text:<hash>`, `fixed:<hash>`, `fixed:r:<hash>` or `fixed:git:<hash>`, the hash prefixed and in base 32; read in
//! any base.

use std::fmt;
use std::str::FromStr;

use crate::hash::{self, Algorithm, Hash};

/// Why a text is not a content address (or not one without its hash).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Neither `text:` nor `fixed:` at the beginning.
    #[error("content address '{0}' begins neither with 'text:' nor with 'fixed:'")]
    Prefix(String),
    /// No `algorithm:` before the digits.
    #[error("content address '{0}' lacks a hash algorithm")]
    NoAlgorithm(String),
    /// The hash is none.
    #[error("cannot read content address '{text}'")]
    Hash {
        /// the text read
        text: String,
        /// what is wrong with its hash
        source: hash::Error,
    },
}

/// What of an object is hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Method {
    /// A file's bytes, with references: `.drv` files and `builtins.toFile`.
    Text,
    /// A file's bytes.
    Flat,
    /// The NAR.
    Nar,
    /// What git hashes (experimental in stock Nix).
    Git,
}

impl Method {
    /// What stands before the algorithm in derivation outputs: `text:`, nothing, `r:`, or `git:`.
    pub const fn prefix(self) -> &'static str {
        match self {
            Self::Text => "text:",
            Self::Flat => "",
            Self::Nar => "r:",
            Self::Git => "git:",
        }
    }

    /// Splits the prefix off what a derivation's output has as its hash algorithm.
    pub fn split_prefix(text: &str) -> Result<(Self, &str), Error> {
        if let Some(rest) = text.strip_prefix("git:") {
            Ok((Self::Git, rest))
        } else if let Some(rest) = text.strip_prefix("r:") {
            Ok((Self::Nar, rest))
        } else if let Some(rest) = text.strip_prefix("text:") {
            Ok((Self::Text, rest))
        } else {
            Ok((Self::Flat, text))
        }
    }
}

/// Method and hash.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContentAddress {
    /// What is hashed.
    pub method: Method,
    /// To what.
    pub hash: Hash,
}

impl ContentAddress {
    /// Reads the text form.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let (method, rest) = split_method(text)?;
        let (algorithm, digits) = rest.split_once(':').ok_or_else(|| Error::NoAlgorithm(text.to_owned()))?;
        let in_address = |source| Error::Hash { text: text.to_owned(), source };
        let algorithm = algorithm.parse().map_err(in_address)?;
        let hash = Hash::parse(digits, Some(algorithm)).map_err(in_address)?;
        Ok(Self { method, hash })
    }
}

/// Reads a content address without digits, as AddToStore has it: `fixed:r:sha256`, `text:sha256`, …
pub fn parse_method(text: &str) -> Result<(Method, Algorithm), Error> {
    let (method, algorithm) = split_method(text)?;
    let algorithm = algorithm.parse().map_err(|source| Error::Hash { text: text.to_owned(), source })?;
    Ok((method, algorithm))
}

/// Writes what [`parse_method`] reads.
pub fn method_to_string(method: Method, algorithm: Algorithm) -> String {
    format!("{}{algorithm}", full_prefix(method))
}

const fn full_prefix(method: Method) -> &'static str {
    match method {
        Method::Text => "text:",
        Method::Flat => "fixed:",
        Method::Nar => "fixed:r:",
        Method::Git => "fixed:git:",
    }
}

fn split_method(text: &str) -> Result<(Method, &str), Error> {
    if let Some(rest) = text.strip_prefix("text:") {
        return Ok((Method::Text, rest));
    }
    let rest = text.strip_prefix("fixed:").ok_or_else(|| Error::Prefix(text.to_owned()))?;
    if let Some(rest) = rest.strip_prefix("git:") {
        return Ok((Method::Git, rest));
    }
    Ok(match rest.strip_prefix("r:") {
        Some(rest) => (Method::Nar, rest),
        None => (Method::Flat, rest),
    })
}

impl fmt::Display for ContentAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", full_prefix(self.method), self.hash.to_prefixed_nix32())
    }
}

impl FromStr for ContentAddress {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::parse(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn methods() {
        for (text, method, algorithm) in [
            ("text:sha256", Method::Text, Algorithm::Sha256),
            ("fixed:sha256", Method::Flat, Algorithm::Sha256),
            ("fixed:r:sha1", Method::Nar, Algorithm::Sha1),
            ("fixed:git:sha1", Method::Git, Algorithm::Sha1),
        ] {
            assert_eq!(parse_method(text), Ok((method, algorithm)));
            assert_eq!(method_to_string(method, algorithm), text);
        }
        assert!(matches!(parse_method("r:sha1"), Err(Error::Prefix(_))));
        assert!(matches!(parse_method("fixed:r:"), Err(Error::Hash { .. })));
        assert!(matches!(parse_method("text:r:sha256"), Err(Error::Hash { .. })));
    }

    #[test]
    fn what_is_refused() {
        let parse = ContentAddress::parse;
        assert!(matches!(parse(""), Err(Error::Prefix(_))));
        assert!(matches!(parse("fixed:sha256"), Err(Error::NoAlgorithm(_))));
        assert!(matches!(parse("fixed:sha256:00"), Err(Error::Hash { .. })));
    }

    proptest! {
        #[test]
        fn any_base_reads_back(data: Vec<u8>, which in 0usize..4, sha1: bool) {
            let method = [Method::Text, Method::Flat, Method::Nar, Method::Git][which];
            let hash = Hash::of(if sha1 { Algorithm::Sha1 } else { Algorithm::Sha256 }, &data);
            let address = ContentAddress { method, hash };
            prop_assert_eq!(ContentAddress::parse(&address.to_string()), Ok(address.clone()));
            for digits in [hash.to_base16(), hash.to_base64()] {
                let text = format!("{}:{digits}", method_to_string(method, hash.algorithm()));
                prop_assert_eq!(ContentAddress::parse(&text), Ok(address.clone()));
            }
        }
    }
}
