//! Why a message could not be decoded.

use crate::worker::{DerivedPathError, RealisationError};
use crate::{content_address, derivation, hash, signature, store_path};

/// The outcome of decoding, other than a value.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The message goes on behind the bytes at hand.
    #[error("the message is longer than the bytes received: at least {needed} are needed")]
    Incomplete {
        /// How many bytes the message has at least, counted from the reader's first byte. Trying again with fewer is
        /// in vain; the message may be longer still.
        needed: usize,
    },
    /// The message is not what the protocol allows. Where it ends is unknown.
    #[error(transparent)]
    Invalid(#[from] Invalid),
}

/// A violation of the protocol. The texts are those of stock where users know them.
#[derive(Debug, thiserror::Error)]
pub enum Invalid {
    /// A string is followed by something else than zeros.
    #[error("non-zero padding")]
    NonZeroPadding,
    /// An integer does not fit the type it is meant for.
    #[error("serialised integer {value} is too large for a {bits}-bit number")]
    IntegerTooLarge {
        /// The integer.
        value: u64,
        /// Width of its type.
        bits: u32,
    },
    /// A string longer than accepted.
    #[error("a string of {length} bytes is too long: the limit is {limit}")]
    StringTooLong {
        /// Its length as stated, in bytes.
        length: u64,
        /// The most accepted here, in bytes.
        limit: usize,
    },
    /// A list longer than accepted.
    #[error("a list of {count} elements is too long: the limit is {limit}")]
    ListTooLong {
        /// How many elements were announced.
        count: u64,
        /// The most accepted.
        limit: u64,
    },
    /// A string is not text.
    #[error("a string that must be text is not UTF-8")]
    NotUtf8,
    /// Bytes follow where the message must end.
    #[error("{0} bytes follow the end of the message")]
    Surplus(usize),
    /// No operation has this number.
    #[error("invalid operation {0}")]
    Operation(u64),
    /// A number that selects one of several things selects none.
    #[error("invalid {what} {value}")]
    UnknownTag {
        /// What it should select.
        what: &'static str,
        /// The number.
        value: u64,
    },
    /// No store path.
    #[error(transparent)]
    StorePath(#[from] store_path::Error),
    /// No hash.
    #[error(transparent)]
    Hash(#[from] hash::Error),
    /// No content address.
    #[error(transparent)]
    ContentAddress(#[from] content_address::Error),
    /// No signature.
    #[error(transparent)]
    Signature(#[from] signature::Error),
    /// No derivation output, or no name for one.
    #[error(transparent)]
    Derivation(#[from] derivation::Error),
    /// Nothing that could be built.
    #[error(transparent)]
    DerivedPath(#[from] DerivedPathError),
    /// No realisation.
    #[error(transparent)]
    Realisation(#[from] RealisationError),
}
