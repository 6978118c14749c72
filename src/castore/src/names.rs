//! Names of directory entries and targets of symbolic links.

use std::borrow::Borrow;
use std::fmt;
use std::ops::Deref;

use bytes::Bytes;

/// The name of an entry in a directory: 1 to 255 bytes, not `.` or `..`, no slash, no NUL.
///
/// Compares bytewise, which is the order entries have in a directory and in a NAR.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeName(Bytes);

/// Where a symbolic link points: 1 to 4095 bytes without NUL. It need not exist, nor be a clean path.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SymlinkTarget(Bytes);

/// Why something cannot be the name of a directory entry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// There is nothing.
    #[error("an entry's name is empty")]
    Empty,
    /// More than [`NodeName::MAX_LENGTH`] bytes.
    #[error("an entry's name has {0} bytes, more than {most}", most = NodeName::MAX_LENGTH)]
    TooLong(usize),
    /// `.` or `..`, or a slash or a NUL in it.
    #[error("\"{}\" cannot name an entry of a directory", .0.escape_ascii())]
    Invalid(Bytes),
}

/// Why something cannot be the target of a symbolic link.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// There is nothing.
    #[error("a symbolic link's target is empty")]
    Empty,
    /// More than [`SymlinkTarget::MAX_LENGTH`] bytes.
    #[error("a symbolic link's target has {0} bytes, more than {most}", most = SymlinkTarget::MAX_LENGTH)]
    TooLong(usize),
    /// A NUL in it.
    #[error("a symbolic link's target \"{}\" has a NUL in it", .0.escape_ascii())]
    Nul(Bytes),
}

impl NodeName {
    /// The most bytes a name can have (NAME_MAX of Linux).
    pub const MAX_LENGTH: usize = 255;

    /// Checks `name`.
    pub fn new(name: impl Into<Bytes>) -> Result<NodeName, NameError> {
        let name = name.into();
        match &name[..] {
            b"" => Err(NameError::Empty),
            long if long.len() > NodeName::MAX_LENGTH => Err(NameError::TooLong(long.len())),
            b"." | b".." => Err(NameError::Invalid(name)),
            other if other.iter().any(|byte| matches!(byte, b'/' | 0)) => Err(NameError::Invalid(name)),
            _ => Ok(NodeName(name)),
        }
    }

    /// The name as bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The name as shared bytes, without a copy.
    pub fn to_bytes(&self) -> Bytes {
        self.0.clone()
    }
}

impl SymlinkTarget {
    /// The most bytes a target can have (PATH_MAX of Linux without its NUL).
    pub const MAX_LENGTH: usize = 4095;

    /// Checks `target`.
    pub fn new(target: impl Into<Bytes>) -> Result<SymlinkTarget, TargetError> {
        let target = target.into();
        match &target[..] {
            b"" => Err(TargetError::Empty),
            long if long.len() > SymlinkTarget::MAX_LENGTH => Err(TargetError::TooLong(long.len())),
            other if other.contains(&0) => Err(TargetError::Nul(target)),
            _ => Ok(SymlinkTarget(target)),
        }
    }

    /// The target as bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The target as shared bytes, without a copy.
    pub fn to_bytes(&self) -> Bytes {
        self.0.clone()
    }
}

/// What both texts have in common: they are read as bytes and shown escaped.
macro_rules! bytes_inside {
    ($type:ident, $error:ident) => {
        impl Deref for $type {
            type Target = [u8];

            fn deref(&self) -> &[u8] {
                &self.0
            }
        }

        impl AsRef<[u8]> for $type {
            fn as_ref(&self) -> &[u8] {
                &self.0
            }
        }

        impl Borrow<[u8]> for $type {
            fn borrow(&self) -> &[u8] {
                &self.0
            }
        }

        impl TryFrom<&[u8]> for $type {
            type Error = $error;

            fn try_from(bytes: &[u8]) -> Result<$type, $error> {
                $type::new(Bytes::copy_from_slice(bytes))
            }
        }

        impl TryFrom<Vec<u8>> for $type {
            type Error = $error;

            fn try_from(bytes: Vec<u8>) -> Result<$type, $error> {
                $type::new(bytes)
            }
        }

        impl TryFrom<&str> for $type {
            type Error = $error;

            fn try_from(text: &str) -> Result<$type, $error> {
                $type::try_from(text.as_bytes())
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0.escape_ascii())
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "\"{}\"", self.0.escape_ascii())
            }
        }
    };
}

bytes_inside!(NodeName, NameError);
bytes_inside!(SymlinkTarget, TargetError);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_any_bytes_but_a_few() {
        for good in [&b"a"[..], b"...", b" ", b"\xff\xfe", b"-", &[b'x'; 255]] {
            assert_eq!(NodeName::try_from(good).unwrap().as_bytes(), good);
        }
        assert_eq!(NodeName::try_from(""), Err(NameError::Empty));
        assert_eq!(NodeName::try_from(&[b'x'; 256][..]), Err(NameError::TooLong(256)));
        for bad in [".", "..", "/", "a/b", "a\0"] {
            assert_eq!(NodeName::try_from(bad), Err(NameError::Invalid(Bytes::from(bad))), "{bad:?}");
        }
    }

    #[test]
    fn targets_are_any_path() {
        for good in [&b".."[..], b"/", b"//a/../b", b"\xff", &[b'x'; 4095]] {
            assert_eq!(SymlinkTarget::try_from(good).unwrap().as_bytes(), good);
        }
        assert_eq!(SymlinkTarget::try_from(""), Err(TargetError::Empty));
        assert_eq!(SymlinkTarget::try_from(&[b'x'; 4096][..]), Err(TargetError::TooLong(4096)));
        assert_eq!(SymlinkTarget::try_from("a\0b"), Err(TargetError::Nul(Bytes::from("a\0b"))));
    }

    #[test]
    fn errors_show_bytes_escaped() {
        let error = NodeName::try_from("a/\n").unwrap_err();
        assert_eq!(error.to_string(), r#""a/\n" cannot name an entry of a directory"#);
    }
}
