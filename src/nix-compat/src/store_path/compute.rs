//! From what a store object is to its path.
//!
//! Each kind of object has a *fingerprint* `<type>:sha256:<base 16>:<store dir>:<name>`; its SHA-256, folded to 20
//! bytes, is the path's hash part.

use std::collections::BTreeSet;

use super::{DIGEST_LEN, Error, StoreDir, StorePath};
use crate::content_address::{ContentAddress, Method};
use crate::derivation::OutputName;
use crate::hash::{Algorithm, Hash, sha256};
use data_encoding::HEXLOWER;

/// The path of a text object (a `.drv`, or what `builtins.toFile` makes) with these contents and references.
pub fn text_path(
    dir: &StoreDir,
    name: &str,
    contents: &[u8],
    references: &BTreeSet<StorePath>,
) -> Result<StorePath, Error> {
    from_fingerprint(dir, &type_with_references(dir, "text", references, false), &sha256(contents), name)
}

/// The path of an object addressed by the SHA-256 of its NAR.
///
/// `references` do not contain the object itself; `self_reference` says whether it refers to itself, and then
/// `nar_sha256` is the hash with its own hash part blanked out.
pub fn source_path(
    dir: &StoreDir,
    name: &str,
    nar_sha256: &[u8; 32],
    references: &BTreeSet<StorePath>,
    self_reference: bool,
) -> Result<StorePath, Error> {
    from_fingerprint(dir, &type_with_references(dir, "source", references, self_reference), nar_sha256, name)
}

/// The path of an object without references whose contents hash to `hash` by `method`.
pub fn fixed_output_path(dir: &StoreDir, name: &str, method: Method, hash: &Hash) -> Result<StorePath, Error> {
    match (method, hash) {
        (Method::Nar, Hash::Sha256(digest)) => source_path(dir, name, digest, &BTreeSet::new(), false),
        (Method::Git, hash) if hash.algorithm() != Algorithm::Sha1 => {
            Err(Error::GitAlgorithm { name: name.to_owned(), algorithm: hash.algorithm() })
        }
        (Method::Nar | Method::Flat | Method::Git, _) => {
            // The last colon belongs to a field that has been empty ever since.
            let inner = format!("fixed:out:{}{}:{}:", method.prefix(), hash.algorithm(), hash.to_base16());
            from_fingerprint(dir, "output:out", &sha256(inner.as_bytes()), name)
        }
        (Method::Text, Hash::Sha256(digest)) => from_fingerprint(dir, "text", digest, name),
        (Method::Text, _) => Err(Error::TextAlgorithm { name: name.to_owned(), algorithm: hash.algorithm() }),
    }
}

/// The path of output `output` of a derivation named `drv_name` (without `.drv`) that is not content-addressed.
///
/// `modulo` is the derivation's masked [hash modulo](crate::derivation::Derivation::output_hash_modulo).
pub fn output_path(dir: &StoreDir, modulo: &[u8; 32], output: &OutputName, drv_name: &str) -> Result<StorePath, Error> {
    from_fingerprint(dir, &format!("output:{output}"), modulo, &output.path_name(drv_name))
}

/// Where an output is built whose own path will follow from its contents.
///
/// It collides with no other path, and is the same for every build of the derivation: contents that hide it (compressed,
/// for example) do not differ from build to build.
pub fn scratch_path(
    dir: &StoreDir,
    drv_path: &StorePath,
    output: &OutputName,
    drv_name: &str,
) -> Result<StorePath, Error> {
    let kind = format!("rewrite:{}:name:{output}", drv_path.base_name());
    from_fingerprint(dir, &kind, &[0; 32], &output.path_name(drv_name))
}

/// The path of an object with this content address.
///
/// `references` do not contain the object itself, see [`source_path`]. Only objects addressed as text or by the SHA-256
/// of their NAR may have references, and only the latter may refer to themselves.
pub fn content_address_path(
    dir: &StoreDir,
    name: &str,
    address: &ContentAddress,
    references: &BTreeSet<StorePath>,
    self_reference: bool,
) -> Result<StorePath, Error> {
    match (address.method, &address.hash) {
        (Method::Text, _) if self_reference => Err(Error::SelfReference(name.to_owned())),
        (Method::Text, Hash::Sha256(digest)) => {
            from_fingerprint(dir, &type_with_references(dir, "text", references, false), digest, name)
        }
        (Method::Nar, Hash::Sha256(digest)) => source_path(dir, name, digest, references, self_reference),
        (Method::Nar | Method::Flat | Method::Git, _) if self_reference || !references.is_empty() => {
            Err(Error::References(name.to_owned()))
        }
        (method, hash) => fixed_output_path(dir, name, method, hash),
    }
}

fn type_with_references(dir: &StoreDir, kind: &str, references: &BTreeSet<StorePath>, self_reference: bool) -> String {
    let mut text = kind.to_owned();
    for reference in references {
        text.push(':');
        text.push_str(dir.as_str());
        text.push('/');
        text.push_str(reference.base_name());
    }
    if self_reference {
        text.push_str(":self");
    }
    text
}

fn from_fingerprint(dir: &StoreDir, kind: &str, inner: &[u8; 32], name: &str) -> Result<StorePath, Error> {
    let algorithm = Algorithm::Sha256;
    let fingerprint = format!("{kind}:{algorithm}:{}:{dir}:{name}", HEXLOWER.encode(inner));
    let mut digest = [0; DIGEST_LEN];
    for (i, byte) in sha256(fingerprint.as_bytes()).into_iter().enumerate() {
        digest[i % DIGEST_LEN] ^= byte;
    }
    StorePath::from_parts(digest, name)
}
