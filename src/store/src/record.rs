//! How a store path is written in the index.
//!
//! The encoding is protobuf, for its rules about growth: a field added later is skipped by an older castored.
//! It is private to the index; the wire form for others is `tvix.store.v1.PathInfo`.

use std::collections::BTreeSet;

use bytes::Bytes;
use castore::Node;
use nix_compat::content_address::ContentAddress;
use nix_compat::hash::NarHash;
use nix_compat::path_info::PathInfo;
use nix_compat::signature::Signature;
use nix_compat::store_path::StorePath;
use prost::Message;

use crate::error::{Error, Result};

/// A valid store path: what Nix knows about it, and where its contents are.
#[derive(Clone, Debug)]
pub struct Entry {
    /// What Nix knows.
    pub info: PathInfo,
    /// The root of its contents in the castore.
    pub node: Node,
    /// Its number in the mount, never given to another path.
    pub number: u32,
}

#[derive(Clone, PartialEq, Message)]
struct PathRecord {
    #[prost(string, tag = "1")]
    base_name: String,
    #[prost(message, optional, tag = "2")]
    node: Option<castore::proto::Node>,
    #[prost(uint32, tag = "3")]
    number: u32,
    #[prost(bytes = "vec", tag = "4")]
    nar_sha256: Vec<u8>,
    #[prost(uint64, tag = "5")]
    nar_size: u64,
    /// Base names.
    #[prost(string, repeated, tag = "6")]
    references: Vec<String>,
    /// Base name, empty for none.
    #[prost(string, tag = "7")]
    deriver: String,
    /// Seconds since 1970.
    #[prost(uint64, tag = "8")]
    registration_time: u64,
    #[prost(bool, tag = "9")]
    ultimate: bool,
    #[prost(string, repeated, tag = "10")]
    signatures: Vec<String>,
    /// Empty for none.
    #[prost(string, tag = "11")]
    ca: String,
}

/// Only the path of a record, for those who ask for nothing else, and ask often.
#[derive(Clone, PartialEq, Message)]
struct PathOnly {
    #[prost(string, tag = "1")]
    base_name: String,
}

/// What a walk over the reference graph needs of a record. The texts are taken as bytes, which protobuf writes alike, so
/// that none of them is copied.
#[derive(Clone, PartialEq, Message)]
struct EdgesOnly {
    #[prost(bytes = "bytes", tag = "1")]
    base_name: Bytes,
    #[prost(uint32, tag = "3")]
    number: u32,
    #[prost(bytes = "bytes", repeated, tag = "6")]
    references: Vec<Bytes>,
    #[prost(bytes = "bytes", tag = "7")]
    deriver: Bytes,
}

/// A path's place in the reference graph.
#[derive(Debug)]
pub(crate) struct Edges {
    /// The digest of its hash part.
    pub(crate) digest: [u8; 20],
    /// What follows the hash part in its base name.
    pub(crate) name: String,
    /// Its number in the mount.
    pub(crate) number: u32,
    /// The digests of what it refers to.
    pub(crate) references: Vec<[u8; 20]>,
    /// The digest of what it was built from.
    pub(crate) deriver: Option<[u8; 20]>,
}

impl Edges {
    /// Reads a record; `key` names it in the error.
    ///
    /// # Errors
    /// [`Error::Record`] when the bytes are not what [`Entry::encode`] writes.
    pub(crate) fn decode(key: &[u8], bytes: &[u8]) -> Result<Self> {
        Self::try_decode(bytes).map_err(|reason| damaged(key, reason))
    }

    fn try_decode(bytes: &[u8]) -> Result<Self, String> {
        let record = EdgesOnly::decode(Bytes::copy_from_slice(bytes)).map_err(|e| e.to_string())?;
        let (digest, name) = split(&record.base_name)?;
        if record.number == 0 {
            return Err("the path has no number".into());
        }
        Ok(Self {
            digest,
            name: name.to_owned(),
            number: record.number,
            references: record.references.iter().map(|r| Ok(split(r)?.0)).collect::<Result<_, String>>()?,
            deriver: if record.deriver.is_empty() { None } else { Some(split(&record.deriver)?.0) },
        })
    }
}

/// The digest and the name in a base name.
fn split(base_name: &[u8]) -> Result<([u8; 20], &str), String> {
    let text = std::str::from_utf8(base_name).map_err(|e| e.to_string())?;
    StorePath::split(text).map_err(|e| e.to_string())
}

/// The base name in a record; `key` names it in the error.
///
/// # Errors
/// [`Error::Record`] when the bytes are not what [`Entry::encode`] writes.
pub(crate) fn base_name(key: &[u8], bytes: &[u8]) -> Result<String> {
    PathOnly::decode(bytes).map(|record| record.base_name).map_err(|e| damaged(key, e.to_string()))
}

/// The error for a record whose key this is.
pub(crate) fn damaged(key: &[u8], reason: String) -> Error {
    Error::Record { key: key.iter().map(|b| format!("{b:02x}")).collect(), reason }
}

impl Entry {
    /// The record's bytes.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let info = &self.info;
        PathRecord {
            base_name: info.path.to_string(),
            node: Some(castore::proto::Node::new(Bytes::copy_from_slice(info.path.base_name().as_bytes()), &self.node)),
            number: self.number,
            nar_sha256: info.nar_hash.as_bytes().to_vec(),
            nar_size: info.nar_size,
            references: info.references.iter().map(StorePath::to_string).collect(),
            deriver: info.deriver.as_ref().map(StorePath::to_string).unwrap_or_default(),
            registration_time: info.registration_time,
            ultimate: info.ultimate,
            signatures: info.signatures.iter().map(Signature::to_string).collect(),
            ca: info.ca.as_ref().map(ContentAddress::to_string).unwrap_or_default(),
        }
        .encode_to_vec()
    }

    /// Reads a record; `key` names it in the error.
    ///
    /// # Errors
    /// [`Error::Record`] when the bytes are not what [`Entry::encode`] writes.
    pub(crate) fn decode(key: &[u8], bytes: &[u8]) -> Result<Self> {
        Self::try_decode(bytes).map_err(|reason| damaged(key, reason))
    }

    fn try_decode(bytes: &[u8]) -> Result<Self, String> {
        let record = PathRecord::decode(bytes).map_err(|e| e.to_string())?;
        let path = |name: &str| StorePath::from_base_name(name).map_err(|e| e.to_string());
        let nar_sha256: [u8; 32] =
            record.nar_sha256.as_slice().try_into().map_err(|_| "the NAR hash has not 32 bytes".to_owned())?;
        let node = record.node.ok_or("the root node is missing")?;
        let (_, node) = node.into_parts().map_err(|e| e.to_string())?;
        Ok(Self {
            info: PathInfo {
                path: path(&record.base_name)?,
                deriver: if record.deriver.is_empty() { None } else { Some(path(&record.deriver)?) },
                nar_hash: NarHash::from(nar_sha256),
                references: record.references.iter().map(|r| path(r)).collect::<Result<BTreeSet<_>, _>>()?,
                registration_time: record.registration_time,
                nar_size: record.nar_size,
                ultimate: record.ultimate,
                signatures: record
                    .signatures
                    .iter()
                    .map(|s| s.parse().map_err(|e| format!("signature '{s}': {e}")))
                    .collect::<Result<_, String>>()?,
                ca: if record.ca.is_empty() {
                    None
                } else {
                    Some(record.ca.parse().map_err(|e| format!("content address '{}': {e}", record.ca))?)
                },
            },
            node,
            number: record.number,
        })
    }
}
