//! Store paths: the store directory, the base name below it, and how both are read.
//!
//! A store path is `<store dir>/<32 base-32 digits>-<name>`. [`StorePath`] is the part below the directory;
//! [`StoreDir`] reads and prints whole paths. How the digits follow from what the path holds is [`text_path`],
//! [`source_path`], [`fixed_output_path`] and [`output_path`].

use std::borrow::{Borrow, Cow};
use std::fmt;
use std::sync::Arc;

use crate::hash::Algorithm;
use crate::nixbase32;

mod compute;

pub use compute::{content_address_path, fixed_output_path, output_path, scratch_path, source_path, text_path};

/// Digits of the hash part.
pub const HASH_PART_LEN: usize = 32;
/// Bytes the hash part stands for.
pub const DIGEST_LEN: usize = 20;
/// The longest name, in bytes.
pub const MAX_NAME_LEN: usize = 211;

/// Why something is not a store path, or why none can be computed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The name has no byte.
    #[error("store path name is empty")]
    EmptyName,
    /// The name is longer than [`MAX_NAME_LEN`].
    #[error("store path name '{0}' is longer than {MAX_NAME_LEN} bytes")]
    LongName(String),
    /// The name is `.` or `..`, or begins with `.-` or `..-`.
    #[error("store path name '{0}' begins with a reserved component of dots")]
    Dots(String),
    /// A byte that names do not have.
    #[error("store path name '{0}' contains an illegal character")]
    IllegalCharacter(String),
    /// The hash part is not 32 base-32 digits followed by a dash.
    #[error("'{0}' does not begin with a store path's hash part and a dash")]
    HashPart(String),
    /// Not an absolute path.
    #[error("path '{0}' is not absolute")]
    NotAbsolute(String),
    /// Not a path directly below the store directory.
    #[error("path '{path}' is not in the store directory '{store_dir}'")]
    NotInStore {
        /// the path read
        path: String,
        /// the store directory
        store_dir: StoreDir,
    },
    /// A store directory has to be absolute, below the root and without `.`, `..`, double or trailing slashes.
    #[error("'{0}' cannot be a store directory")]
    StoreDir(String),
    /// Only text and SHA-256 NAR objects may have references.
    #[error("fixed output '{0}' is not allowed to refer to other store paths")]
    References(String),
    /// A text object's path contains the hash of its contents, so these cannot contain the path.
    #[error("text object '{0}' is not allowed to refer to itself")]
    SelfReference(String),
    /// What git hashes is addressed by SHA-1 only.
    #[error("'{name}' is hashed as git does by {algorithm}, not sha1")]
    GitAlgorithm {
        /// name of the object
        name: String,
        /// the algorithm asked for
        algorithm: Algorithm,
    },
    /// Text objects are addressed by SHA-256 only.
    #[error("text object '{name}' is addressed by {algorithm}, not sha256")]
    TextAlgorithm {
        /// name of the object
        name: String,
        /// the algorithm asked for
        algorithm: Algorithm,
    },
}

/// Checks a store path's name: 1 to 211 bytes of `0-9A-Za-z+-._?=`, and no lone dots at its beginning.
pub fn validate_name(name: &str) -> Result<(), Error> {
    let bytes = name.as_bytes();
    if bytes.is_empty() {
        return Err(Error::EmptyName);
    }
    if bytes.len() > MAX_NAME_LEN {
        return Err(Error::LongName(name.to_owned()));
    }
    if let Some(rest) = bytes.strip_prefix(b".") {
        // `.x` and `...` are names; `.`, `..` and either of them before a dash are not.
        let rest = rest.strip_prefix(b".").unwrap_or(rest);
        if rest.is_empty() || rest[0] == b'-' {
            return Err(Error::Dots(name.to_owned()));
        }
    }
    let legal = |byte: &u8| byte.is_ascii_alphanumeric() || b"+-._?=".contains(byte);
    if !bytes.iter().all(legal) {
        return Err(Error::IllegalCharacter(name.to_owned()));
    }
    Ok(())
}

/// The base name of a store path: cheap to clone, ordered by its text.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StorePath(Arc<str>);

impl StorePath {
    /// Reads `<hash part>-<name>`.
    pub fn from_base_name(base_name: &str) -> Result<Self, Error> {
        check_base_name(base_name)?;
        Ok(Self(base_name.into()))
    }

    /// Puts a path together from the 20 bytes behind its hash part, and its name.
    pub fn from_parts(digest: [u8; DIGEST_LEN], name: &str) -> Result<Self, Error> {
        validate_name(name)?;
        Ok(Self(format!("{}-{name}", nixbase32::encode(&digest)).into()))
    }

    /// The bytes behind the hash part and the name in `<hash part>-<name>`, where a whole path is more than is needed.
    pub fn split(base_name: &str) -> Result<([u8; DIGEST_LEN], &str), Error> {
        check_base_name(base_name)?;
        let mut digest = [0; DIGEST_LEN];
        // As in `digest`.
        let decoded = nixbase32::decode_into(&base_name.as_bytes()[..HASH_PART_LEN], &mut digest);
        debug_assert!(decoded.is_ok());
        Ok((digest, &base_name[HASH_PART_LEN + 1..]))
    }

    /// The 32 digits.
    pub fn hash_part(&self) -> &str {
        &self.0[..HASH_PART_LEN]
    }

    /// The bytes the digits stand for.
    pub fn digest(&self) -> [u8; DIGEST_LEN] {
        let mut digest = [0; DIGEST_LEN];
        // 32 digits are exactly 20 bytes, and that they are digits was checked at construction.
        let decoded = nixbase32::decode_into(self.hash_part().as_bytes(), &mut digest);
        debug_assert!(decoded.is_ok());
        digest
    }

    /// What follows the hash part and its dash.
    pub fn name(&self) -> &str {
        &self.0[HASH_PART_LEN + 1..]
    }

    /// Hash part, dash and name.
    pub fn base_name(&self) -> &str {
        &self.0
    }

    /// Whether the name ends in `.drv`.
    pub fn is_derivation(&self) -> bool {
        self.0.ends_with(".drv")
    }
}

fn check_base_name(base_name: &str) -> Result<(), Error> {
    let bytes = base_name.as_bytes();
    if bytes.get(HASH_PART_LEN) != Some(&b'-') || !nixbase32::is_digits(&bytes[..HASH_PART_LEN]) {
        return Err(Error::HashPart(base_name.to_owned()));
    }
    validate_name(&base_name[HASH_PART_LEN + 1..])
}

/// The base name.
impl fmt::Display for StorePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for StorePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Sets and maps of paths can be asked by base name.
impl Borrow<str> for StorePath {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl std::str::FromStr for StorePath {
    type Err = Error;

    fn from_str(base_name: &str) -> Result<Self, Error> {
        Self::from_base_name(base_name)
    }
}

/// The directory all paths of a store are in: part of every hash, so a store cannot be moved.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StoreDir(Arc<str>);

impl StoreDir {
    /// Takes an absolute path in canonical form.
    pub fn new(path: &str) -> Result<Self, Error> {
        match canonicalise(path) {
            Ok(canonical) if canonical == path && path != "/" && !path.contains('\0') => Ok(Self(path.into())),
            _ => Err(Error::StoreDir(path.to_owned())),
        }
    }

    /// The path, without a slash at its end.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Reads a whole store path. As stock Nix since 2.4 does, `.`, `..`, double and trailing slashes are resolved first.
    pub fn parse(&self, path: &str) -> Result<StorePath, Error> {
        // What clients send is canonical nearly always: one comparison instead of a copy.
        if let Some(base_name) = self.strip(path)
            && !base_name.contains('/')
            && base_name != "."
            && base_name != ".."
        {
            return StorePath::from_base_name(base_name);
        }
        let canonical = canonicalise(path)?;
        match self.strip(&canonical) {
            Some(base_name) if !base_name.contains('/') => StorePath::from_base_name(base_name),
            _ => Err(self.not_in_store(path)),
        }
    }

    /// Reads a path to something in a store object: the object, and the rest of the path without a leading slash.
    pub fn to_store_path(&self, path: &str) -> Result<(StorePath, String), Error> {
        let canonical = canonicalise(path)?;
        let below = self.strip(&canonical).ok_or_else(|| self.not_in_store(path))?;
        let (base_name, rest) = below.split_once('/').unwrap_or((below, ""));
        Ok((StorePath::from_base_name(base_name)?, rest.to_owned()))
    }

    /// The whole path as text.
    pub fn display(&self, path: &StorePath) -> String {
        let mut text = String::with_capacity(self.0.len() + 1 + path.0.len());
        text.push_str(&self.0);
        text.push('/');
        text.push_str(&path.0);
        text
    }

    fn strip<'a>(&self, path: &'a str) -> Option<&'a str> {
        path.strip_prefix(&*self.0)?.strip_prefix('/').filter(|below| !below.is_empty())
    }

    fn not_in_store(&self, path: &str) -> Error {
        Error::NotInStore { path: path.to_owned(), store_dir: self.clone() }
    }
}

/// `/nix/store`.
impl Default for StoreDir {
    fn default() -> Self {
        Self("/nix/store".into())
    }
}

impl fmt::Display for StoreDir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for StoreDir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Resolves `.`, `..`, double and trailing slashes by the text alone.
fn canonicalise(path: &str) -> Result<Cow<'_, str>, Error> {
    let below_root = path.strip_prefix('/').ok_or_else(|| Error::NotAbsolute(path.to_owned()))?;
    if path == "/" || below_root.split('/').all(|component| !matches!(component, "" | "." | "..")) {
        return Ok(Cow::Borrowed(path));
    }
    let mut components = Vec::new();
    for component in below_root.split('/') {
        match component {
            "" | "." => {}
            ".." => {
                components.pop();
            }
            name => components.push(name),
        }
    }
    Ok(Cow::Owned(format!("/{}", components.join("/"))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BASE: &str = "g1w7hy3qg1w7hy3qg1w7hy3qg1w7hy3q-x";

    #[test]
    fn names() {
        for name in ["x", "a+b-c._?=Z9", ".x", "..x", "...", ".x-", "-", &"n".repeat(211)] {
            assert_eq!(validate_name(name), Ok(()), "{name}");
        }
        assert_eq!(validate_name(""), Err(Error::EmptyName));
        for name in [".", "..", ".-x", "..-x"] {
            assert_eq!(validate_name(name), Err(Error::Dots(name.into())), "{name}");
        }
        for name in ["a b", "a/b", "ä", "a\0", "a~", "!"] {
            assert_eq!(validate_name(name), Err(Error::IllegalCharacter(name.into())), "{name}");
        }
        assert!(matches!(validate_name(&"n".repeat(212)), Err(Error::LongName(_))));
    }

    #[test]
    fn parts() {
        let path = StorePath::from_base_name(BASE).unwrap();
        assert_eq!((path.hash_part(), path.name(), path.is_derivation()), (&BASE[..32], "x", false));
        assert_eq!(StorePath::from_parts(path.digest(), path.name()), Ok(path));
        for wrong in ["", "x", &BASE[..32], &BASE[..33], &BASE.replace('-', "_"), &BASE.replace('h', "e"), "é"] {
            assert!(StorePath::from_base_name(wrong).is_err(), "{wrong}");
        }
        // multi-byte characters across the place of the dash
        assert!(StorePath::from_base_name(&"é".repeat(40)).is_err());
    }

    #[test]
    fn whole_paths() {
        let dir = StoreDir::default();
        let path = StorePath::from_base_name(BASE).unwrap();
        for text in ["/nix/store/", "//nix//store///", "/nix/../nix/./store/", "/../nix/store/y/../"] {
            assert_eq!(dir.parse(&format!("{text}{BASE}")), Ok(path.clone()), "{text}");
            assert_eq!(dir.parse(&format!("{text}{BASE}//")), Ok(path.clone()), "{text}");
        }
        assert_eq!(dir.parse(&dir.display(&path)), Ok(path.clone()));
        for text in ["", "/", "/nix/store", "/nix/store/", "/nix/store/.", "/nix/store/..", "/nix/storex/", BASE] {
            assert!(dir.parse(text).is_err(), "{text}");
        }
        assert!(matches!(dir.parse(&format!("/nix/store/{BASE}/y")), Err(Error::NotInStore { .. })));
        assert!(matches!(dir.parse(&format!("/gnu/store/{BASE}")), Err(Error::NotInStore { .. })));
        assert!(matches!(dir.parse(BASE), Err(Error::NotAbsolute(_))));
        assert_eq!(dir.to_store_path(&format!("/nix/store/{BASE}/bin//sh")), Ok((path.clone(), "bin/sh".into())));
        assert_eq!(dir.to_store_path(&format!("/nix/store/{BASE}")), Ok((path, String::new())));
    }

    #[test]
    fn store_directories() {
        assert!(StoreDir::new("/gnu/store").is_ok());
        for wrong in ["", "/", "nix/store", "/nix/store/", "/nix//store", "/nix/./store", "/nix/x/../store"] {
            assert_eq!(StoreDir::new(wrong), Err(Error::StoreDir(wrong.into())));
        }
    }

    proptest! {
        #[test]
        fn reads_what_it_prints(digest: [u8; 20], name in "[0-9a-zA-Z+_?=][0-9a-zA-Z+._?=-]{0,210}") {
            let path = StorePath::from_parts(digest, &name).unwrap();
            prop_assert_eq!(path.digest(), digest);
            let dir = StoreDir::default();
            prop_assert_eq!(dir.parse(&dir.display(&path)), Ok(path));
        }

        #[test]
        fn nothing_panics(text in "[/.a-]{0,12}|.*") {
            let _ = StorePath::from_base_name(&text);
            let _ = StoreDir::default().parse(&format!("/nix/store/{text}"));
            let _ = StoreDir::default().to_store_path(&text);
        }
    }
}
