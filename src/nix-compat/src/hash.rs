//! Hashes: the four algorithms, their text forms, and the hash of a NAR.
//!
//! A digest is written in base 16 (lower case; read in any case), in [Nix's base 32](crate::nixbase32) or in base 64.
//! Around it stands nothing (*bare*: the reader knows the algorithm), `algorithm:` before it (*prefixed*), or
//! `algorithm-` before base 64 (*SRI*). For a given algorithm the length alone tells the base.

use std::fmt;
use std::str::FromStr;

use data_encoding::{BASE64, HEXLOWER, HEXLOWER_PERMISSIVE};
use sha2::Digest as _;

use crate::nixbase32;

/// Why a text or a byte string is not a hash.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not one of `md5`, `sha1`, `sha256`, `sha512`.
    #[error("unknown hash algorithm '{0}'")]
    Algorithm(String),
    /// The text names another algorithm than the one wanted.
    #[error("hash '{text}' should have type {wanted}")]
    OtherAlgorithm {
        /// the text read
        text: String,
        /// the algorithm it should have had
        wanted: Algorithm,
    },
    /// A bare hash where the algorithm is not known.
    #[error("hash '{0}' does not include a type")]
    NoAlgorithm(String),
    /// A length that fits none of the three bases.
    #[error("hash '{text}' has the wrong length for {algorithm}")]
    Length {
        /// the text read
        text: String,
        /// the algorithm it was read for
        algorithm: Algorithm,
    },
    /// Another number of bytes than the algorithm has.
    #[error("{found} bytes are no {algorithm} digest")]
    Bytes {
        /// the algorithm meant
        algorithm: Algorithm,
        /// how many bytes there were
        found: usize,
    },
    /// The right length, but wrong digits.
    #[error("hash '{0}' has a character that is no digit of its base, or surplus bits")]
    Digits(String),
}

/// A hash algorithm Nix knows without experimental features.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Algorithm {
    /// MD5, 16 bytes. Only for old fixed outputs.
    Md5,
    /// SHA-1, 20 bytes.
    Sha1,
    /// SHA-256, 32 bytes: what everything of Nix's own uses.
    Sha256,
    /// SHA-512, 64 bytes.
    Sha512,
}

impl Algorithm {
    /// The name as it stands in text forms.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Md5 => "md5",
            Self::Sha1 => "sha1",
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }

    /// Length of a digest in bytes.
    pub const fn digest_len(self) -> usize {
        match self {
            Self::Md5 => 16,
            Self::Sha1 => 20,
            Self::Sha256 => 32,
            Self::Sha512 => 64,
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Algorithm {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        match name {
            "md5" => Ok(Self::Md5),
            "sha1" => Ok(Self::Sha1),
            "sha256" => Ok(Self::Sha256),
            "sha512" => Ok(Self::Sha512),
            other => Err(Error::Algorithm(other.to_owned())),
        }
    }
}

/// A digest together with its algorithm.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hash {
    /// An MD5 digest.
    Md5([u8; 16]),
    /// A SHA-1 digest.
    Sha1([u8; 20]),
    /// A SHA-256 digest.
    Sha256([u8; 32]),
    /// A SHA-512 digest.
    Sha512([u8; 64]),
}

impl Hash {
    /// Hashes `data` at once.
    pub fn of(algorithm: Algorithm, data: &[u8]) -> Self {
        let mut hasher = Hasher::new(algorithm);
        hasher.update(data);
        hasher.finalize()
    }

    /// The algorithm.
    pub const fn algorithm(&self) -> Algorithm {
        match self {
            Self::Md5(_) => Algorithm::Md5,
            Self::Sha1(_) => Algorithm::Sha1,
            Self::Sha256(_) => Algorithm::Sha256,
            Self::Sha512(_) => Algorithm::Sha512,
        }
    }

    /// The digest.
    pub const fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Md5(bytes) => bytes,
            Self::Sha1(bytes) => bytes,
            Self::Sha256(bytes) => bytes,
            Self::Sha512(bytes) => bytes,
        }
    }

    fn as_bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Md5(bytes) => bytes,
            Self::Sha1(bytes) => bytes,
            Self::Sha256(bytes) => bytes,
            Self::Sha512(bytes) => bytes,
        }
    }

    const fn zero(algorithm: Algorithm) -> Self {
        match algorithm {
            Algorithm::Md5 => Self::Md5([0; 16]),
            Algorithm::Sha1 => Self::Sha1([0; 20]),
            Algorithm::Sha256 => Self::Sha256([0; 32]),
            Algorithm::Sha512 => Self::Sha512([0; 64]),
        }
    }

    /// Takes a digest of exactly [`Algorithm::digest_len`] bytes.
    pub fn from_bytes(algorithm: Algorithm, bytes: &[u8]) -> Result<Self, Error> {
        if bytes.len() != algorithm.digest_len() {
            return Err(Error::Bytes { algorithm, found: bytes.len() });
        }
        let mut hash = Self::zero(algorithm);
        hash.as_bytes_mut().copy_from_slice(bytes);
        Ok(hash)
    }

    /// Reads any of the forms in any base. A bare digest needs `algorithm`; a text that names another one is an error.
    pub fn parse(text: &str, algorithm: Option<Algorithm>) -> Result<Self, Error> {
        let (named, digits, sri) = match text.split_once([':', '-']) {
            Some((name, digits)) => (Some(name.parse()?), digits, text.as_bytes().get(name.len()) == Some(&b'-')),
            None => (None, text, false),
        };
        let algorithm = match (named, algorithm) {
            (Some(named), Some(wanted)) if named != wanted => {
                return Err(Error::OtherAlgorithm { text: text.to_owned(), wanted });
            }
            (Some(algorithm), _) | (None, Some(algorithm)) => algorithm,
            (None, None) => return Err(Error::NoAlgorithm(text.to_owned())),
        };
        let mut hash = Self::zero(algorithm);
        let (bytes, len) = (hash.as_bytes_mut(), algorithm.digest_len());
        let bad_digits = || Error::Digits(text.to_owned());
        if sri || digits.len() == BASE64.encode_len(len) {
            let decoded = decode_base64(digits).ok_or_else(bad_digits)?;
            if decoded.len() != len {
                return Err(Error::Length { text: text.to_owned(), algorithm });
            }
            bytes.copy_from_slice(&decoded);
        } else if digits.len() == len * 2 {
            HEXLOWER_PERMISSIVE.decode_mut(digits.as_bytes(), bytes).map_err(|_| bad_digits())?;
        } else if digits.len() == nixbase32::encoded_len(len) {
            nixbase32::decode_into(digits.as_bytes(), bytes).map_err(|_| bad_digits())?;
        } else {
            return Err(Error::Length { text: text.to_owned(), algorithm });
        }
        Ok(hash)
    }

    /// Bare base 16.
    pub fn to_base16(&self) -> String {
        HEXLOWER.encode(self.as_bytes())
    }

    /// Bare base 32.
    pub fn to_nix32(&self) -> String {
        nixbase32::encode(self.as_bytes())
    }

    /// Bare base 64, padded.
    pub fn to_base64(&self) -> String {
        BASE64.encode(self.as_bytes())
    }

    /// `algorithm-base64`.
    pub fn to_sri(&self) -> String {
        format!("{}-{}", self.algorithm(), self.to_base64())
    }

    /// `algorithm:base32`.
    pub fn to_prefixed_nix32(&self) -> String {
        format!("{}:{}", self.algorithm(), self.to_nix32())
    }

    /// `algorithm:base16`.
    pub fn to_prefixed_base16(&self) -> String {
        format!("{}:{}", self.algorithm(), self.to_base16())
    }
}

/// The SRI form.
impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_sri())
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_sri())
    }
}

/// Reads base 64 as leniently as stock Nix does: newlines are skipped, the first `=` ends the text, padding may be
/// missing and the surplus bits of the last digit may be anything.
pub(crate) fn decode_base64(text: &str) -> Option<Vec<u8>> {
    const LENIENT: data_encoding::Encoding = data_encoding::BASE64_NOPAD;
    let end = text.find('=').unwrap_or(text.len());
    let mut digits: Vec<u8> = text.as_bytes()[..end].iter().copied().filter(|&byte| byte != b'\n').collect();
    match digits.len() % 4 {
        // A lone last digit holds no whole byte.
        1 => return None,
        2 => mask_last(&mut digits, 0b11_0000)?,
        3 => mask_last(&mut digits, 0b11_1100)?,
        _ => {}
    }
    LENIENT.decode(&digits).ok()
}

/// Clears the bits of the last base-64 digit that belong to no byte.
fn mask_last(digits: &mut [u8], mask: u8) -> Option<()> {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let last = digits.last_mut()?;
    let value = ALPHABET.iter().position(|digit| digit == last)?;
    *last = ALPHABET[value & usize::from(mask)];
    Some(())
}

/// Hashes data that comes in pieces.
#[derive(Clone)]
pub struct Hasher(State);

#[derive(Clone)]
enum State {
    Md5(md5::Md5),
    Sha1(sha1::Sha1),
    Sha256(sha2::Sha256),
    Sha512(sha2::Sha512),
}

impl Hasher {
    /// Starts with nothing hashed.
    pub fn new(algorithm: Algorithm) -> Self {
        Self(match algorithm {
            Algorithm::Md5 => State::Md5(md5::Md5::new()),
            Algorithm::Sha1 => State::Sha1(sha1::Sha1::new()),
            Algorithm::Sha256 => State::Sha256(sha2::Sha256::new()),
            Algorithm::Sha512 => State::Sha512(sha2::Sha512::new()),
        })
    }

    /// Hashes the next piece.
    pub fn update(&mut self, data: &[u8]) {
        match &mut self.0 {
            State::Md5(state) => state.update(data),
            State::Sha1(state) => state.update(data),
            State::Sha256(state) => state.update(data),
            State::Sha512(state) => state.update(data),
        }
    }

    /// The digest of all pieces.
    pub fn finalize(self) -> Hash {
        match self.0 {
            State::Md5(state) => Hash::Md5(state.finalize().into()),
            State::Sha1(state) => Hash::Sha1(state.finalize().into()),
            State::Sha256(state) => Hash::Sha256(state.finalize().into()),
            State::Sha512(state) => Hash::Sha512(state.finalize().into()),
        }
    }
}

impl std::io::Write for Hasher {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        self.update(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// SHA-256 of `data`.
pub fn sha256(data: &[u8]) -> [u8; 32] {
    sha2::Sha256::digest(data).into()
}

/// The SHA-256 of a NAR: what identifies the contents of every store object.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NarHash([u8; 32]);

impl NarHash {
    /// Reads a SHA-256 in any form and base.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let mut hash = Hash::parse(text, Some(Algorithm::Sha256))?;
        let mut bytes = [0; 32];
        bytes.copy_from_slice(hash.as_bytes_mut());
        Ok(Self(bytes))
    }

    /// The digest.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Bare base 16: the form on the worker protocol.
    pub fn to_base16(&self) -> String {
        HEXLOWER.encode(&self.0)
    }

    /// `sha256:base32`: the form that is signed and that narinfos have.
    pub fn to_prefixed_nix32(&self) -> String {
        Hash::Sha256(self.0).to_prefixed_nix32()
    }
}

impl From<[u8; 32]> for NarHash {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl From<NarHash> for Hash {
    fn from(hash: NarHash) -> Self {
        Self::Sha256(hash.0)
    }
}

/// `sha256:base32`.
impl fmt::Display for NarHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_prefixed_nix32())
    }
}

impl fmt::Debug for NarHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_prefixed_nix32())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: [Algorithm; 4] = [Algorithm::Md5, Algorithm::Sha1, Algorithm::Sha256, Algorithm::Sha512];

    #[test]
    fn texts_of_stock_nix() {
        // `nix hash file --type … --base32/--sri` of a file holding "abc"
        let texts = [
            (Algorithm::Md5, "3jgzhjhz9zjvbb0kyj7jc500ch", "md5-kAFQmDzST7DWlj99KOF/cg=="),
            (Algorithm::Sha1, "kpcd173cq987hw957sx6m0868wv3x6d9", "sha1-qZk+NkcGgWq6PiVxeFDCbJzQ2J0="),
            (
                Algorithm::Sha256,
                "1b8m03r63zqhnjf7l5wnldhh7c134ap5vpj0850ymkq1iyzicy5s",
                "sha256-ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0=",
            ),
            (
                Algorithm::Sha512,
                "2gs8k559z4rlahfx0y688s49m2vvszylcikrfinm30ly9rak69236nkam5ydvly1ai7xac99vxfc4ii84hawjbk876blyk1jfhkbbyx",
                "sha512-3a81oZNherrMQXNJriBBMRLm+k6JqX6iCp7u5ktV05ohkpkqJ0/BqDa6PCOj/uu9RU1EI2Q86A4qmslPpUyknw==",
            ),
        ];
        for (algorithm, nix32, sri) in texts {
            let hash = Hash::of(algorithm, b"abc");
            assert_eq!(hash.to_nix32(), nix32);
            assert_eq!(hash.to_sri(), sri);
        }
    }

    #[test]
    fn what_is_refused() {
        let parse = |text| Hash::parse(text, None);
        assert!(matches!(parse("900150983cd24fb0d6963f7d28e17f72"), Err(Error::NoAlgorithm(_))));
        assert!(matches!(parse("md4:900150983cd24fb0d6963f7d28e17f72"), Err(Error::Algorithm(_))));
        assert!(matches!(parse("md5:900150983cd24fb0d6963f7d28e17f7"), Err(Error::Length { .. })));
        assert!(matches!(parse("md5:900150983cd24fb0d6963f7d28e17fxx"), Err(Error::Digits(_))));
        assert!(matches!(parse("md5:zjgzhjhz9zjvbb0kyj7jc500ch"), Err(Error::Digits(_))));
        assert!(matches!(parse("md5-900150983cd24fb0d6963f7d28e17f72"), Err(Error::Length { .. })));
        assert!(matches!(parse("sha256-ungWv48B"), Err(Error::Length { .. })));
        assert!(matches!(parse("md5:é00150983cd24fb0d6963f7d28e17f7"), Err(Error::Digits(_))));
        let md5 = "md5:900150983cd24fb0d6963f7d28e17f72";
        assert!(matches!(Hash::parse(md5, Some(Algorithm::Sha1)), Err(Error::OtherAlgorithm { .. })));
        assert!(NarHash::parse(md5).is_err());
        assert!(Hash::from_bytes(Algorithm::Md5, &[0; 20]).is_err());
    }

    #[test]
    fn base64_is_read_leniently() {
        let hash = Hash::of(Algorithm::Md5, b"abc");
        for text in ["md5-kAFQmDzST7DWlj99KOF/cg", "md5-kAFQmDzST7DWlj99KOF/cg===x", "md5-kAFQmDzST7DW\nlj99KOF/ch=="] {
            assert_eq!(Hash::parse(text, None), Ok(hash), "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_form_reads_back(data: Vec<u8>, which in 0usize..4) {
            let algorithm = ALL[which];
            let hash = Hash::of(algorithm, &data);
            for text in [hash.to_sri(), hash.to_prefixed_base16(), hash.to_prefixed_nix32(), hash.to_base16().to_uppercase(),
                hash.to_nix32(), hash.to_base64(), format!("{algorithm}:{}", hash.to_base64())] {
                prop_assert_eq!(Hash::parse(&text, Some(algorithm)), Ok(hash));
            }
            prop_assert_eq!(Hash::from_bytes(algorithm, hash.as_bytes()), Ok(hash));
        }

        #[test]
        fn nothing_panics(text: String) {
            for algorithm in ALL {
                let _ = Hash::parse(&text, Some(algorithm));
                let _ = Hash::parse(&format!("{algorithm}-{text}"), None);
            }
        }
    }
}
