//! What reader and writer share: the fixed byte sequences between the variable parts, and the rules for names.
//!
//! Every string in a NAR is a 64-bit little-endian length, the bytes, and zeros up to a multiple of eight. Between two
//! variable parts the strings are always the same, so they are compared and written as one piece.

use super::MAX_NAME_LEN;

/// Length of a string's length, and the unit of alignment.
pub(super) const WORD: usize = 8;

/// The archive's beginning: magic, and that of the root node.
pub(super) const MAGIC: &[u8; 56] = b"\x0d\0\0\0\0\0\0\0nix-archive-1\0\0\0\
    \x01\0\0\0\0\0\0\0(\0\0\0\0\0\0\0\
    \x04\0\0\0\0\0\0\0type\0\0\0\0";

/// `)`: ends a node, an entry.
pub(super) const CLOSE: &[u8; 16] = b"\x01\0\0\0\0\0\0\0)\0\0\0\0\0\0\0";

/// The three node types. Two have 16 bytes, so that many can be read before knowing which it is.
pub(super) const REGULAR: &[u8; 16] = b"\x07\0\0\0\0\0\0\0regular\0";
/// See [`REGULAR`].
pub(super) const SYMLINK: &[u8; 16] = b"\x07\0\0\0\0\0\0\0symlink\0";
/// See [`REGULAR`].
pub(super) const DIRECTORY: &[u8; 24] = b"\x09\0\0\0\0\0\0\0directory\0\0\0\0\0\0\0";

/// `contents`, before the length of a file.
pub(super) const CONTENTS: &[u8; 16] = b"\x08\0\0\0\0\0\0\0contents";
/// `executable`, as long as `contents` and the length together.
pub(super) const EXECUTABLE: &[u8; 24] = b"\x0a\0\0\0\0\0\0\0executable\0\0\0\0\0\0";
/// What follows `executable` up to the length: its empty value, and `contents`.
pub(super) const EXECUTABLE_TO_CONTENTS: &[u8; 24] = b"\0\0\0\0\0\0\0\0\x08\0\0\0\0\0\0\0contents";

/// `target`, before its length.
pub(super) const TARGET: &[u8; 16] = b"\x06\0\0\0\0\0\0\0target\0\0";

/// `entry`: begins an entry. As long as [`CLOSE`].
pub(super) const ENTRY: &[u8; 16] = b"\x05\0\0\0\0\0\0\0entry\0\0\0";
/// What follows `entry` up to the length of its name.
pub(super) const ENTRY_TO_NAME: &[u8; 32] = b"\x01\0\0\0\0\0\0\0(\0\0\0\0\0\0\0\
    \x04\0\0\0\0\0\0\0name\0\0\0\0";
/// What follows an entry's name up to the type of its node.
pub(super) const NAME_TO_TYPE: &[u8; 48] = b"\x04\0\0\0\0\0\0\0node\0\0\0\0\
    \x01\0\0\0\0\0\0\0(\0\0\0\0\0\0\0\
    \x04\0\0\0\0\0\0\0type\0\0\0\0";

/// How many zeros follow `len` bytes.
pub(super) const fn padding(len: u64) -> usize {
    (len.wrapping_neg() % WORD as u64) as usize
}

/// Why a name cannot be a directory entry's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing at all.
    #[error("it is empty")]
    Empty,
    /// Longer than [`MAX_NAME_LEN`].
    #[error("it is longer than {MAX_NAME_LEN} bytes")]
    TooLong,
    /// `.` or `..`.
    #[error("it is '.' or '..'")]
    Dots,
    /// A slash or NUL.
    #[error("it contains a slash or NUL")]
    IllegalByte,
    /// Not after the name before it, in bytewise order; so also a second time the same.
    #[error("it does not come after the entry before it")]
    Order,
}

/// Checks an entry's name. `previous` is the last name in the same directory, empty if there was none.
pub(super) fn check_name(name: &[u8], previous: &[u8]) -> Result<(), NameError> {
    match name {
        b"" => Err(NameError::Empty),
        _ if name.len() > MAX_NAME_LEN => Err(NameError::TooLong),
        b"." | b".." => Err(NameError::Dots),
        _ if name.iter().any(|&byte| byte == b'/' || byte == 0) => Err(NameError::IllegalByte),
        _ if name <= previous => Err(NameError::Order),
        _ => Ok(()),
    }
}

/// The last name in each open directory. Names are kept in buffers that stay, so a large tree allocates few of them.
#[derive(Default)]
pub(super) struct OpenDirectories {
    last_names: Vec<Vec<u8>>,
    open: usize,
}

impl OpenDirectories {
    pub(super) fn depth(&self) -> usize {
        self.open
    }

    pub(super) fn enter(&mut self) {
        match self.last_names.get_mut(self.open) {
            Some(name) => name.clear(),
            None => self.last_names.push(Vec::new()),
        }
        self.open += 1;
    }

    pub(super) fn leave(&mut self) {
        self.open -= 1;
    }

    /// Checks the name of the next entry in the innermost directory, and remembers it.
    pub(super) fn entry(&mut self, name: &[u8]) -> Result<(), NameError> {
        let last = &mut self.last_names[self.open - 1];
        check_name(name, last)?;
        last.clear();
        last.extend_from_slice(name);
        Ok(())
    }
}
