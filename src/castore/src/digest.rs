//! BLAKE3 digests: the names of everything in the castore.

use std::fmt;
use std::str::FromStr;

use data_encoding::BASE64;

/// A BLAKE3 digest of 32 bytes.
///
/// Its text form is `b3:` and the padded base64 of the bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; Digest::LENGTH]);

/// Why something is not a digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    /// The bytes are not 32.
    #[error("a digest has {expected} bytes, not {0}", expected = Digest::LENGTH)]
    Length(usize),
    /// The text does not begin with `b3:`, or what follows is not base64 of 32 bytes.
    #[error("{0:?} is not a digest: expected b3: and the base64 of 32 bytes")]
    Text(String),
}

impl Digest {
    /// Bytes in a digest.
    pub const LENGTH: usize = 32;

    /// The digest of no bytes: the empty blob's, and the empty directory's.
    pub const EMPTY: Digest = Digest([
        0xaf, 0x13, 0x49, 0xb9, 0xf5, 0xf9, 0xa1, 0xa6, 0xa0, 0x40, 0x4d, 0xea, 0x36, 0xdc, 0xc9, 0x49, 0x9b, 0xcb,
        0x25, 0xc9, 0xad, 0xc1, 0x12, 0xb7, 0xcc, 0x9a, 0x93, 0xca, 0xe4, 0x1f, 0x32, 0x62,
    ]);

    const PREFIX: &str = "b3:";

    /// The digest of `data`.
    pub fn of(data: &[u8]) -> Digest {
        Digest(*blake3::hash(data).as_bytes())
    }

    /// The digest as raw bytes.
    pub fn as_bytes(&self) -> &[u8; Digest::LENGTH] {
        &self.0
    }
}

impl From<[u8; Digest::LENGTH]> for Digest {
    fn from(bytes: [u8; Digest::LENGTH]) -> Digest {
        Digest(bytes)
    }
}

impl From<blake3::Hash> for Digest {
    fn from(hash: blake3::Hash) -> Digest {
        Digest(*hash.as_bytes())
    }
}

impl TryFrom<&[u8]> for Digest {
    type Error = DigestError;

    fn try_from(bytes: &[u8]) -> Result<Digest, DigestError> {
        bytes.try_into().map(Digest).map_err(|_| DigestError::Length(bytes.len()))
    }
}

impl AsRef<[u8]> for Digest {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", Digest::PREFIX, BASE64.encode_display(&self.0))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Digest, DigestError> {
        text.strip_prefix(Digest::PREFIX)
            .and_then(|base64| BASE64.decode(base64.as_bytes()).ok())
            .and_then(|bytes| bytes.try_into().ok())
            .map(Digest)
            .ok_or_else(|| DigestError::Text(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_vector_in_text_and_back() {
        let digest = Digest::of(b"x86_64-linux");
        let text = "b3:KOM3/IHEx7YfInAnlJpAElYezq0Sxn9fRz7xuClwNfA=";
        assert_eq!(digest.to_string(), text);
        assert_eq!(text.parse(), Ok(digest));
    }

    #[test]
    fn empty_is_the_digest_of_nothing() {
        assert_eq!(Digest::of(b""), Digest::EMPTY);
    }

    #[test]
    fn refuses_other_texts() {
        for text in [
            "",
            "b3:",
            "KOM3/IHEx7YfInAnlJpAElYezq0Sxn9fRz7xuClwNfA=",
            "b3:KOM3/IHEx7YfInAnlJpAElYezq0Sxn9fRz7xuClwNfA",
            "b3:KOM3/IHEx7YfInAnlJpAElYezq0Sxn9fRz7xuClwNfB=",
            "b3:KOM3/IHEx7YfInAnlJpAElYezq0Sxn9fRz7xuClw",
            "sha256:KOM3/IHEx7YfInAnlJpAElYezq0Sxn9fRz7xuClwNfA=",
        ] {
            assert_eq!(text.parse::<Digest>(), Err(DigestError::Text(text.to_owned())), "{text}");
        }
    }

    #[test]
    fn refuses_other_lengths() {
        assert_eq!(Digest::try_from(&[0u8; 31][..]), Err(DigestError::Length(31)));
        assert_eq!(Digest::try_from(&[7u8; 32][..]), Ok(Digest::from([7; 32])));
    }
}
