//! Decoding from the bytes received so far.

use super::{Invalid, ReadError};

/// Longest string accepted inside a message, in bytes: as long as a whole request may be.
pub const MAX_STRING: usize = 64 << 20;
/// Most elements accepted in a list: as many empty strings as fit into the largest request.
pub const MAX_ELEMENTS: u64 = (MAX_STRING / 8) as u64;

/// Size of an integer and of a string's length prefix.
const WORD: usize = 8;

type Result<T> = std::result::Result<T, ReadError>;

/// A cursor over a message of which perhaps only the beginning has arrived.
///
/// After [`ReadError::Incomplete`] the reader is spent: build a new one over more bytes and start the message again. To
/// keep that cheap for long lists, `needed` counts at least eight bytes for every element that is still missing, and
/// lists of strings are measured before their elements are looked at.
#[derive(Debug)]
pub struct Reader<'a> {
    data: &'a [u8],
    position: usize,
    /// Bytes that must follow the item being read, by the counts read so far.
    owed: usize,
}

impl<'a> Reader<'a> {
    /// Starts at the first byte of `data`.
    pub fn new(data: &'a [u8]) -> Self {
        Self { data, position: 0, owed: 0 }
    }

    /// Bytes consumed so far.
    pub fn position(&self) -> usize {
        self.position
    }

    /// The bytes not consumed yet.
    pub fn remaining(&self) -> &'a [u8] {
        &self.data[self.position..]
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        match self.remaining().get(..length) {
            Some(taken) => {
                self.position += length;
                Ok(taken)
            }
            None => Err(self.incomplete(length)),
        }
    }

    /// The error for an item of `length` bytes at the current position, of which not all have arrived.
    fn incomplete(&self, length: usize) -> ReadError {
        ReadError::Incomplete { needed: self.position.saturating_add(length).saturating_add(self.owed) }
    }

    /// An integer.
    pub fn u64(&mut self) -> Result<u64> {
        let word = self.take(WORD)?.first_chunk().copied().unwrap_or_default();
        Ok(u64::from_le_bytes(word))
    }

    fn narrow<T: TryFrom<u64>>(&mut self, bits: u32) -> Result<T> {
        let value = self.u64()?;
        T::try_from(value).map_err(|_| Invalid::IntegerTooLarge { value, bits }.into())
    }

    /// An integer that stock reads as 32 bits wide.
    pub fn u32(&mut self) -> Result<u32> {
        self.narrow(32)
    }

    /// An integer that stock reads as 8 bits wide: tags and small enumerations.
    pub fn u8(&mut self) -> Result<u8> {
        self.narrow(8)
    }

    /// A time in seconds since 1970, or a duration: an integer that must fit 63 bits.
    pub fn u63(&mut self) -> Result<u64> {
        let value = self.u64()?;
        if i64::try_from(value).is_err() {
            return Err(Invalid::IntegerTooLarge { value, bits: 63 }.into());
        }
        Ok(value)
    }

    /// A boolean: any number but 0 is true.
    pub fn bool(&mut self) -> Result<bool> {
        Ok(self.u64()? != 0)
    }

    /// A string of at most `limit` bytes, which need not be text.
    pub fn bytes(&mut self, limit: usize) -> Result<&'a [u8]> {
        let start = self.position;
        let stated = self.u64()?;
        let length = usize::try_from(stated)
            .ok()
            .filter(|&length| length <= limit)
            .ok_or(Invalid::StringTooLong { length: stated, limit })?;
        let padding = length.next_multiple_of(WORD) - length;
        // One request for body and padding, so that `needed` covers both.
        let Some(taken) = self.remaining().get(..length + padding) else {
            self.position = start;
            return Err(self.incomplete(WORD + length + padding));
        };
        self.position += length + padding;
        let (body, padding) = taken.split_at(length);
        if padding.iter().any(|&byte| byte != 0) {
            return Err(Invalid::NonZeroPadding.into());
        }
        Ok(body)
    }

    /// A string of at most `limit` bytes that must be UTF-8.
    pub fn text(&mut self, limit: usize) -> Result<&'a str> {
        std::str::from_utf8(self.bytes(limit)?).map_err(|_| Invalid::NotUtf8.into())
    }

    /// A string whose bytes that are not UTF-8 become U+FFFD: for values that are checked later, when an error can still
    /// be answered without losing the connection.
    pub fn lossy_text(&mut self, limit: usize) -> Result<String> {
        Ok(String::from_utf8_lossy(self.bytes(limit)?).into_owned())
    }

    /// A count of elements.
    pub fn count(&mut self) -> Result<u64> {
        let count = self.u64()?;
        if count > MAX_ELEMENTS {
            return Err(Invalid::ListTooLong { count, limit: MAX_ELEMENTS }.into());
        }
        Ok(count)
    }

    /// A list: calls `element` as often as the count says. `least` is the smallest encoding of an element in words of
    /// eight bytes; it keeps `needed` honest.
    pub fn each(&mut self, least: usize, mut element: impl FnMut(&mut Self) -> Result<()>) -> Result<()> {
        let count = self.count()?;
        let outside = self.owed;
        for read in 0..count {
            let after = usize::try_from(count - read - 1).unwrap_or(usize::MAX);
            self.owed = outside.saturating_add(after.saturating_mul(least).saturating_mul(WORD));
            element(self)?;
        }
        self.owed = outside;
        Ok(())
    }

    /// A list whose elements consist of `strings` strings each. All of it is measured first, so that no element is
    /// parsed more than once however often an incomplete message is tried.
    pub fn each_of_strings(&mut self, strings: usize, element: impl FnMut(&mut Self) -> Result<()>) -> Result<()> {
        let mut measure = Reader { ..*self };
        measure.each(strings, |reader| {
            for left in (0..strings).rev() {
                let outside = reader.owed;
                reader.owed = outside.saturating_add(left * WORD);
                reader.bytes(MAX_STRING)?;
                reader.owed = outside;
            }
            Ok(())
        })?;
        self.each(strings, element)
    }

    /// A list as a vector, which grows as elements arrive. `least` as for [`each`](Self::each).
    pub fn list<T>(&mut self, least: usize, mut element: impl FnMut(&mut Self) -> Result<T>) -> Result<Vec<T>> {
        let mut list = Vec::new();
        self.each(least, |reader| {
            list.push(element(reader)?);
            Ok(())
        })?;
        Ok(list)
    }

    /// Ends a message: an error if bytes are left over.
    pub fn finish(self) -> std::result::Result<(), Invalid> {
        match self.remaining().len() {
            0 => Ok(()),
            surplus => Err(Invalid::Surplus(surplus)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn incomplete(result: Result<impl std::fmt::Debug>) -> usize {
        match result {
            Err(ReadError::Incomplete { needed }) => needed,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn empty_strings_have_neither_body_nor_padding() {
        let mut reader = Reader::new(&[0; 16]);
        assert_eq!(reader.bytes(0).unwrap(), b"");
        assert_eq!(reader.position(), 8);
    }

    #[test]
    fn the_limit_counts_before_the_bytes_have_arrived() {
        let message = [9, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(incomplete(Reader::new(&message).bytes(9)), 8 + 16);
        let error = Reader::new(&message).bytes(8).unwrap_err();
        assert!(matches!(error, ReadError::Invalid(Invalid::StringTooLong { length: 9, limit: 8 })));
        let huge = [0xff; 8];
        assert!(matches!(Reader::new(&huge).bytes(MAX_STRING), Err(ReadError::Invalid(Invalid::StringTooLong { .. }))));
    }

    #[test]
    fn padding_must_be_zero() {
        let message = *b"\x03\0\0\0\0\0\0\0abc\0\0\0\0\x01";
        let error = Reader::new(&message).bytes(10).unwrap_err();
        assert!(matches!(error, ReadError::Invalid(Invalid::NonZeroPadding)));
    }

    #[test]
    fn integers_must_fit() {
        let mut reader = Reader::new(&[0, 1, 0, 0, 0, 0, 0, 0]);
        assert!(matches!(reader.u8(), Err(ReadError::Invalid(Invalid::IntegerTooLarge { value: 256, bits: 8 }))));
        assert!(Reader::new(&[0xff; 8]).u63().is_err());
        assert!(Reader::new(&[0xff; 8]).bool().unwrap());
        assert_eq!(incomplete(Reader::new(&[0; 7]).u64()), 8);
    }

    #[test]
    fn missing_elements_count_eight_bytes_each() {
        let mut message = [0; 16];
        message[0] = 5; // five strings, the first of them empty
        assert_eq!(incomplete(Reader::new(&message).list(1, |reader| Ok(reader.bytes(9)?.len()))), 8 + 5 * 8);
        assert_eq!(incomplete(Reader::new(&message).each_of_strings(2, |_| Ok(()))), 8 + 10 * 8);
    }

    #[test]
    fn nothing_may_follow_a_finished_message() {
        let reader = Reader::new(&[0; 3]);
        assert!(matches!(reader.finish(), Err(Invalid::Surplus(3))));
    }
}
