//! `tvix.store.v1.PathInfo`: from and to what the store knows of a path.
//!
//! The message cannot hold everything: when a path was registered and whether it was built here stay behind.

use std::collections::BTreeSet;

use castore::proto::Node as NodeMessage;
use castore::{Node, NodeError};
use nix_compat::content_address::{ContentAddress, Method};
use nix_compat::hash::{self, Algorithm, Hash, NarHash};
use nix_compat::path_info::PathInfo;
use nix_compat::signature::{self, Signature};
use nix_compat::store_path::{self, StorePath};
use store::NewPath;

use crate::proto::store as message;
use crate::proto::store::nar_info::ca::Hash as CaKind;

/// The messages leave the ending of a deriver's name out.
const DERIVATION: &str = ".drv";

/// Why a message does not describe a store path.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPathInfo {
    /// It has no tree.
    #[error("the path info has no node")]
    NoNode,
    /// Its tree is none.
    #[error("{0}")]
    Node(#[from] NodeError),
    /// Its tree's name is no path's.
    #[error("the node's name \"{name}\" is not the base name of a store path: {error}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        error: String,
    },
    /// Nothing is said of its NAR.
    #[error("the path info has no narinfo")]
    NoNarInfo,
    /// The NAR's hash is none; its length in bytes.
    #[error("nar_sha256 has {0} bytes, not 32")]
    NarHash(usize),
    /// There are not as many references as names of them.
    #[error("there are {digests} references, but {names} reference names")]
    ReferenceCount {
        /// References.
        digests: usize,
        /// Names.
        names: usize,
    },
    /// A reference's name is none.
    #[error("reference name \"{name}\" is not the base name of a store path: {error}")]
    ReferenceName {
        /// The name.
        name: String,
        /// What is wrong with it.
        error: store_path::Error,
    },
    /// A reference's name and hash part do not belong together.
    #[error("reference \"{0}\" has another hash part than its name says")]
    ReferenceDigest(String),
    /// The deriver's hash part is none.
    #[error("the digest of deriver \"{name}\" has {length} bytes, not 20")]
    DeriverDigest {
        /// The deriver's name.
        name: String,
        /// The length of the hash part, in bytes.
        length: usize,
    },
    /// The deriver is no path.
    #[error("deriver \"{name}\" is not a store path: {error}")]
    Deriver {
        /// The deriver's name.
        name: String,
        /// What is wrong with it.
        error: store_path::Error,
    },
    /// A signature is none.
    #[error("{0}")]
    Signature(#[from] signature::Error),
    /// Nobody knows this kind of content address.
    #[error("the content address is of unknown type {0}")]
    CaKind(i32),
    /// A content address is none.
    #[error("the content address: {0}")]
    CaHash(hash::Error),
}

/// The message for a path.
pub fn to_message(info: &PathInfo, node: &Node) -> message::PathInfo {
    let narinfo = message::NarInfo {
        nar_size: info.nar_size,
        nar_sha256: info.nar_hash.as_bytes().to_vec().into(),
        signatures: info.signatures.iter().map(signature_to_message).collect(),
        reference_names: info.references.iter().map(|reference| reference.base_name().to_owned()).collect(),
        deriver: info.deriver.as_ref().map(deriver_to_message),
        ca: info.ca.as_ref().and_then(ca_to_message),
    };
    message::PathInfo {
        node: Some(NodeMessage::new(info.path.base_name().to_owned().into(), node)),
        references: info.references.iter().map(|reference| reference.digest().to_vec().into()).collect(),
        narinfo: Some(narinfo),
    }
}

/// The path a message describes. Nothing is checked but its form.
///
/// # Errors
/// When it describes none.
pub fn from_message(path_info: message::PathInfo) -> Result<NewPath, InvalidPathInfo> {
    let message::PathInfo { node, references: digests, narinfo } = path_info;
    let (path, node) = root_of(node)?;
    let message::NarInfo { nar_size, nar_sha256, signatures, reference_names, deriver, ca } =
        narinfo.ok_or(InvalidPathInfo::NoNarInfo)?;

    if digests.len() != reference_names.len() {
        let (digests, names) = (digests.len(), reference_names.len());
        return Err(InvalidPathInfo::ReferenceCount { digests, names });
    }
    let references = digests.iter().zip(&reference_names).map(|(digest, name)| reference(digest, name));
    let nar_hash: [u8; 32] = nar_sha256[..].try_into().map_err(|_| InvalidPathInfo::NarHash(nar_sha256.len()))?;
    let info = PathInfo {
        path,
        deriver: deriver.map(deriver_from_message).transpose()?,
        nar_hash: NarHash::from(nar_hash),
        references: references.collect::<Result<_, _>>()?,
        registration_time: 0,
        nar_size,
        ultimate: false,
        signatures: signatures.iter().map(signature_from_message).collect::<Result<BTreeSet<_>, _>>()?,
        ca: ca.map(ca_from_message).transpose()?,
    };
    Ok(NewPath { info, node, pin: None })
}

/// The path and the tree that a message's node names.
///
/// # Errors
/// When it names none.
pub fn root_of(node: Option<NodeMessage>) -> Result<(StorePath, Node), InvalidPathInfo> {
    let (name, node) = node.ok_or(InvalidPathInfo::NoNode)?.into_parts()?;
    Ok((base_name(&name)?, node))
}

fn base_name(bytes: &[u8]) -> Result<StorePath, InvalidPathInfo> {
    let wrong = |error: String| InvalidPathInfo::Name { name: bytes.escape_ascii().to_string(), error };
    let name = str::from_utf8(bytes).map_err(|error| wrong(error.to_string()))?;
    StorePath::from_base_name(name).map_err(|error| wrong(error.to_string()))
}

fn reference(digest: &[u8], name: &str) -> Result<StorePath, InvalidPathInfo> {
    let path = StorePath::from_base_name(name)
        .map_err(|error| InvalidPathInfo::ReferenceName { name: name.to_owned(), error })?;
    if path.digest() != digest { Err(InvalidPathInfo::ReferenceDigest(name.to_owned())) } else { Ok(path) }
}

fn signature_to_message(signature: &Signature) -> message::nar_info::Signature {
    message::nar_info::Signature { name: signature.name().to_owned(), data: signature.data().to_vec().into() }
}

fn signature_from_message(signature: &message::nar_info::Signature) -> Result<Signature, signature::Error> {
    Signature::from_parts(&signature.name, &signature.data)
}

fn deriver_to_message(deriver: &StorePath) -> message::StorePath {
    let name = deriver.name();
    message::StorePath {
        name: name.strip_suffix(DERIVATION).unwrap_or(name).to_owned(),
        digest: deriver.digest().to_vec().into(),
    }
}

fn deriver_from_message(deriver: message::StorePath) -> Result<StorePath, InvalidPathInfo> {
    let message::StorePath { name, digest } = deriver;
    let Ok(digest) = <[u8; 20]>::try_from(&digest[..]) else {
        return Err(InvalidPathInfo::DeriverDigest { name, length: digest.len() });
    };
    StorePath::from_parts(digest, &format!("{name}{DERIVATION}"))
        .map_err(|error| InvalidPathInfo::Deriver { name, error })
}

/// `None` for the combinations that the message has no number for, such as a text hashed with SHA-1.
fn ca_to_message(ca: &ContentAddress) -> Option<message::nar_info::Ca> {
    let kind = match (ca.method, ca.hash.algorithm()) {
        (Method::Nar, Algorithm::Sha256) => CaKind::NarSha256,
        (Method::Nar, Algorithm::Sha1) => CaKind::NarSha1,
        (Method::Nar, Algorithm::Sha512) => CaKind::NarSha512,
        (Method::Nar, Algorithm::Md5) => CaKind::NarMd5,
        (Method::Text, Algorithm::Sha256) => CaKind::TextSha256,
        (Method::Flat, Algorithm::Sha1) => CaKind::FlatSha1,
        (Method::Flat, Algorithm::Md5) => CaKind::FlatMd5,
        (Method::Flat, Algorithm::Sha256) => CaKind::FlatSha256,
        (Method::Flat, Algorithm::Sha512) => CaKind::FlatSha512,
        (Method::Text | Method::Git, _) => return None,
    };
    Some(message::nar_info::Ca { r#type: kind.into(), digest: ca.hash.as_bytes().to_vec().into() })
}

fn ca_from_message(ca: message::nar_info::Ca) -> Result<ContentAddress, InvalidPathInfo> {
    let kind = CaKind::try_from(ca.r#type).map_err(|_| InvalidPathInfo::CaKind(ca.r#type))?;
    let (method, algorithm) = match kind {
        CaKind::NarSha256 => (Method::Nar, Algorithm::Sha256),
        CaKind::NarSha1 => (Method::Nar, Algorithm::Sha1),
        CaKind::NarSha512 => (Method::Nar, Algorithm::Sha512),
        CaKind::NarMd5 => (Method::Nar, Algorithm::Md5),
        CaKind::TextSha256 => (Method::Text, Algorithm::Sha256),
        CaKind::FlatSha1 => (Method::Flat, Algorithm::Sha1),
        CaKind::FlatMd5 => (Method::Flat, Algorithm::Md5),
        CaKind::FlatSha256 => (Method::Flat, Algorithm::Sha256),
        CaKind::FlatSha512 => (Method::Flat, Algorithm::Sha512),
    };
    let hash = Hash::from_bytes(algorithm, &ca.digest).map_err(InvalidPathInfo::CaHash)?;
    Ok(ContentAddress { method, hash })
}

#[cfg(test)]
mod tests {
    use castore::SymlinkTarget;

    use super::*;

    fn path(name: &str) -> StorePath {
        StorePath::from_parts(std::array::from_fn(|i| i as u8 ^ name.len() as u8), name).unwrap()
    }

    fn example(ca: Option<ContentAddress>) -> (PathInfo, Node) {
        let info = PathInfo {
            path: path("hello-2.12"),
            deriver: Some(path("hello-2.12.drv")),
            nar_hash: NarHash::from([7; 32]),
            references: [path("glibc"), path("hello-2.12")].into(),
            registration_time: 0,
            nar_size: 1234,
            ultimate: false,
            signatures: [Signature::from_parts("key-1", &[3; 64]).unwrap()].into(),
            ca,
        };
        (info, Node::Symlink { target: SymlinkTarget::try_from("elsewhere").unwrap() })
    }

    #[test]
    fn there_and_back() {
        let digests: [(Algorithm, usize); 4] =
            [(Algorithm::Md5, 16), (Algorithm::Sha1, 20), (Algorithm::Sha256, 32), (Algorithm::Sha512, 64)];
        let hashes = digests.map(|(algorithm, length)| Hash::from_bytes(algorithm, &vec![9; length]).unwrap());
        let mut addresses = vec![None];
        for method in [Method::Nar, Method::Flat] {
            addresses.extend(hashes.iter().map(|hash| Some(ContentAddress { method, hash: *hash })));
        }
        addresses.push(Some(ContentAddress { method: Method::Text, hash: hashes[2] }));
        for ca in addresses {
            let (info, node) = example(ca);
            let back = from_message(to_message(&info, &node)).unwrap();
            assert_eq!(back.info, info);
            assert_eq!(back.node, node);
        }
    }

    #[test]
    fn derivers_lose_their_ending_on_the_wire() {
        let (info, node) = example(None);
        assert_eq!(to_message(&info, &node).narinfo.unwrap().deriver.unwrap().name, "hello-2.12");
    }

    #[test]
    fn malformed_messages_are_refused() {
        type Spoil = fn(&mut message::PathInfo);
        let cases: [(Spoil, &str); 9] = [
            (|m| m.node = None, "the path info has no node"),
            (|m| m.narinfo = None, "the path info has no narinfo"),
            (|m| m.references.clear(), "there are 0 references, but 2 reference names"),
            (|m| m.references.swap(0, 1), "has another hash part than its name says"),
            (|m| m.narinfo.as_mut().unwrap().nar_sha256.truncate(31), "nar_sha256 has 31 bytes, not 32"),
            (
                |m| m.narinfo.as_mut().unwrap().reference_names[0] = "../x".into(),
                "is not the base name of a store path",
            ),
            (|m| m.narinfo.as_mut().unwrap().signatures[0].name.clear(), "corrupt"),
            (|m| m.narinfo.as_mut().unwrap().deriver.as_mut().unwrap().digest.clear(), "has 0 bytes, not 20"),
            (
                |m| {
                    m.narinfo.as_mut().unwrap().ca =
                        Some(message::nar_info::Ca { r#type: 99, digest: Default::default() })
                },
                "unknown type 99",
            ),
        ];
        for (spoil, expected) in cases {
            let (info, node) = example(None);
            let mut spoiled = to_message(&info, &node);
            spoil(&mut spoiled);
            let error = from_message(spoiled).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
