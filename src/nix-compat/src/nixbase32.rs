//! Nix's own base 32: an alphabet without e, o, t and u, read from the last byte to the first.
//!
//! Bits are numbered from the low bit of the first byte; each character stands for five of them, and the character of
//! the *highest* five comes first. Whole groups of five bytes make eight characters, which is what both loops use.

/// The digits in order of value.
pub const ALPHABET: &[u8; 32] = b"0123456789abcdfghijklmnpqrsvwxyz";

/// Value of each ASCII character, or [`NO_DIGIT`].
const VALUES: [u8; 256] = {
    let mut values = [NO_DIGIT; 256];
    let mut i = 0;
    while i < ALPHABET.len() {
        values[ALPHABET[i] as usize] = i as u8;
        i += 1;
    }
    values
};
const NO_DIGIT: u8 = 0xff;

/// Why a text is not base 32.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A character outside of [`ALPHABET`].
    #[error("byte {0:#04x} is not a base-32 digit")]
    Digit(u8),
    /// No number of bytes is written with so many digits.
    #[error("{0} base-32 digits encode no whole number of bytes")]
    Length(usize),
    /// The first digit has bits set beyond the last byte.
    #[error("the first base-32 digit has bits beyond the last byte")]
    SpareBits,
}

/// Number of digits that `bytes` bytes are written with.
pub const fn encoded_len(bytes: usize) -> usize {
    (bytes * 8).div_ceil(5)
}

/// Writes `bytes` in base 32.
pub fn encode(bytes: &[u8]) -> String {
    let mut digits = vec![0; encoded_len(bytes.len())];
    encode_into(bytes, &mut digits);
    digits.into_iter().map(char::from).collect()
}

/// Writes `bytes` into `digits`, which must be exactly [`encoded_len`] long.
pub(crate) fn encode_into(bytes: &[u8], digits: &mut [u8]) {
    debug_assert_eq!(digits.len(), encoded_len(bytes.len()));
    for (group, out) in bytes.chunks(5).zip(digits.rchunks_mut(8)) {
        let mut bits = [0; 8];
        bits[..group.len()].copy_from_slice(group);
        let mut bits = u64::from_le_bytes(bits);
        for digit in out.iter_mut().rev() {
            *digit = ALPHABET[(bits & 31) as usize];
            bits >>= 5;
        }
    }
}

/// Reads base 32, strictly: what [`encode`] would not have written is an error.
pub fn decode(text: &str) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0; text.len() * 5 / 8];
    decode_into(text.as_bytes(), &mut bytes)?;
    Ok(bytes)
}

/// Reads `digits` into `bytes`; their lengths must belong together.
pub(crate) fn decode_into(digits: &[u8], bytes: &mut [u8]) -> Result<(), Error> {
    if digits.len() != encoded_len(bytes.len()) {
        return Err(Error::Length(digits.len()));
    }
    for (group, out) in digits.rchunks(8).zip(bytes.chunks_mut(5)) {
        let mut bits = 0u64;
        for &digit in group {
            let value = VALUES[usize::from(digit)];
            if value == NO_DIGIT {
                return Err(Error::Digit(digit));
            }
            bits = bits << 5 | u64::from(value);
        }
        if bits >> (8 * out.len()) != 0 {
            return Err(Error::SpareBits);
        }
        out.copy_from_slice(&bits.to_le_bytes()[..out.len()]);
    }
    Ok(())
}

/// Whether every byte of `text` is a digit.
pub(crate) fn is_digits(text: &[u8]) -> bool {
    text.iter().all(|&byte| VALUES[usize::from(byte)] != NO_DIGIT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_texts() {
        assert_eq!(encode(b""), "");
        assert_eq!(encode(&[0x1f]), "0z");
        // `nix hash to-base32 --type sha1` of sha1("abc")
        let sha1 = data_encoding::HEXLOWER.decode(b"a9993e364706816aba3e25717850c26c9cd0d89d").unwrap();
        assert_eq!(encode(&sha1), "kpcd173cq987hw957sx6m0868wv3x6d9");
        assert_eq!(decode("kpcd173cq987hw957sx6m0868wv3x6d9").unwrap(), sha1);
    }

    #[test]
    fn what_is_refused() {
        assert_eq!(decode("0e"), Err(Error::Digit(b'e')));
        assert_eq!(decode("0A"), Err(Error::Digit(b'A')));
        assert_eq!(decode("z"), Err(Error::Length(1)));
        assert_eq!(decode("000"), Err(Error::Length(3)));
        assert_eq!(decode("zz"), Err(Error::SpareBits));
    }

    /// The definition, one bit at a time.
    fn encode_bitwise(bytes: &[u8]) -> String {
        (0..encoded_len(bytes.len()))
            .rev()
            .map(|digit| {
                let bit = |b: usize| bytes.get(b / 8).map_or(0, |byte| byte >> (b % 8) & 1);
                let value: u8 = (0..5).map(|i| bit(digit * 5 + i) << i).sum();
                char::from(ALPHABET[usize::from(value)])
            })
            .collect()
    }

    proptest! {
        #[test]
        fn agrees_with_the_definition(bytes: Vec<u8>) {
            prop_assert_eq!(encode(&bytes), encode_bitwise(&bytes));
        }

        #[test]
        fn decodes_what_it_encodes(bytes: Vec<u8>) {
            prop_assert_eq!(decode(&encode(&bytes)), Ok(bytes));
        }

        #[test]
        fn a_text_has_one_meaning(text in "[0-9a-z]{0,40}") {
            if let Ok(bytes) = decode(&text) {
                prop_assert_eq!(encode(&bytes), text);
            }
        }
    }
}
