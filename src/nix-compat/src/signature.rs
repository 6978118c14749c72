//! Signatures over store objects, and the keys that make and check them: ed25519, written `name:base64`.

use std::fmt;
use std::str::FromStr;

use data_encoding::BASE64;
use ed25519_dalek::{Signer as _, SigningKey, VerifyingKey};

use crate::hash::decode_base64;

/// Why a text is not a signature or key. Secret keys are never quoted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No colon, nothing before it, or no base 64 after it.
    #[error("signature '{0}' is corrupt")]
    Signature(String),
    /// Not a name, a colon and 32 bytes that are a point on the curve.
    #[error("public key '{0}' is corrupt")]
    PublicKey(String),
    /// Not a name, a colon and the 64 bytes of seed and public key.
    #[error("secret key is corrupt")]
    SecretKey,
}

fn split(text: &str) -> Option<(&str, Vec<u8>)> {
    let (name, data) = text.split_once(':')?;
    let data = decode_base64(data)?;
    (!name.is_empty() && !data.is_empty()).then_some((name, data))
}

/// A signature and the name of the key that made it.
///
/// Of another length than 64 bytes it is kept as it is, as stock Nix keeps it, and just never valid.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Signature {
    name: String,
    data: Vec<u8>,
}

impl Signature {
    /// Puts a signature together; neither part may be empty, and the name has no colon.
    pub fn from_parts(name: &str, data: &[u8]) -> Result<Self, Error> {
        if name.is_empty() || data.is_empty() || name.contains(':') {
            return Err(Error::Signature(format!("{name}:{}", BASE64.encode(data))));
        }
        Ok(Self { name: name.to_owned(), data: data.to_owned() })
    }

    /// Reads `name:base64`.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let (name, data) = split(text).ok_or_else(|| Error::Signature(text.to_owned()))?;
        Ok(Self { name: name.to_owned(), data })
    }

    /// The key's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The bytes, 64 of them if it can be valid.
    pub fn data(&self) -> &[u8] {
        &self.data
    }
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.name, BASE64.encode(&self.data))
    }
}

impl FromStr for Signature {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::parse(text)
    }
}

/// A public key: what `trusted-public-keys` lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKey {
    name: String,
    key: VerifyingKey,
}

impl PublicKey {
    /// Reads `name:base64`.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let corrupt = || Error::PublicKey(text.to_owned());
        let (name, data) = split(text).ok_or_else(corrupt)?;
        let data = data.as_slice().try_into().map_err(|_| corrupt())?;
        let key = VerifyingKey::from_bytes(data).map_err(|_| corrupt())?;
        Ok(Self { name: name.to_owned(), key })
    }

    /// The name by which signatures refer to it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether this key made `signature` over `message`. A signature naming another key is not.
    pub fn verify(&self, message: &[u8], signature: &Signature) -> bool {
        signature.name == self.name
            && ed25519_dalek::Signature::from_slice(&signature.data)
                .is_ok_and(|signature| self.key.verify_strict(message, &signature).is_ok())
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.name, BASE64.encode(self.key.as_bytes()))
    }
}

impl FromStr for PublicKey {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::parse(text)
    }
}

/// A secret key, as in the files `secret-key-files` names. Neither its text nor its bytes are ever printed.
#[derive(Clone)]
pub struct SecretKey {
    name: String,
    key: SigningKey,
}

impl SecretKey {
    /// Reads `name:base64` of the seed followed by the public key.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let (name, data) = split(text.trim_end()).ok_or(Error::SecretKey)?;
        let data = data.as_slice().try_into().map_err(|_| Error::SecretKey)?;
        let key = SigningKey::from_keypair_bytes(data).map_err(|_| Error::SecretKey)?;
        Ok(Self { name: name.to_owned(), key })
    }

    /// The name put into signatures.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Signs `message`.
    pub fn sign(&self, message: &[u8]) -> Signature {
        Signature { name: self.name.clone(), data: self.key.sign(message).to_bytes().to_vec() }
    }

    /// The key to check its signatures with.
    pub fn public_key(&self) -> PublicKey {
        PublicKey { name: self.name.clone(), key: self.key.verifying_key() }
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretKey").field("name", &self.name).finish_non_exhaustive()
    }
}
