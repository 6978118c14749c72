//! The canonical encoding of a directory as a `tvix.castore.v1.Directory`.
//!
//! Written by hand because it is written for every directory of every import: generated messages would need a buffer
//! for each digest. The tests compare it with the generated encoding.

use bytes::Bytes;
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};

use super::{Directory, DirectoryError};
use crate::{Digest, Node, NodeError, NodeName, proto};

/// Why bytes are not the canonical encoding of a directory.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum DecodeError {
    /// The bytes are no protobuf message of this type.
    #[error("not an encoded directory: {0}")]
    Protobuf(#[from] prost::DecodeError),
    /// An entry's node is not valid.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// The entries do not make a directory.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// The names of one list are not in order.
    #[error("\"{0}\" is out of order in its list")]
    Unsorted(NodeName),
    /// The bytes mean a directory, but its encoding is another one, so they do not have its digest.
    #[error("the encoding of the directory is not the canonical one")]
    NotCanonical,
}

/// Numbers of the fields, the same for a list and for the fields of its nodes where they have the same meaning.
mod field {
    pub(super) const DIRECTORIES: u32 = 1;
    pub(super) const FILES: u32 = 2;
    pub(super) const SYMLINKS: u32 = 3;

    pub(super) const NAME: u32 = 1;
    pub(super) const DIGEST: u32 = 2;
    pub(super) const TARGET: u32 = 2;
    pub(super) const SIZE: u32 = 3;
    pub(super) const EXECUTABLE: u32 = 4;
}

pub(super) fn encode(directory: &Directory) -> Vec<u8> {
    // Keys, lengths, digest and size take less than this, beside the name and the target.
    const FIXED_PER_ENTRY: usize = 56;
    let capacity = directory.entries().map(|(name, node)| name.len() + text_length(node) + FIXED_PER_ENTRY).sum();
    let mut out = Vec::with_capacity(capacity);

    for (name, node) in directory.entries() {
        if let Node::Directory { digest, size } = node {
            begin(field::DIRECTORIES, named_length(name, digest.as_bytes()) + number_length(*size), &mut out);
            put_bytes(field::NAME, name, &mut out);
            put_bytes(field::DIGEST, digest.as_bytes(), &mut out);
            put_number(field::SIZE, *size, &mut out);
        }
    }
    for (name, node) in directory.entries() {
        if let Node::File { digest, size, executable } = node {
            let executable = u64::from(*executable);
            let numbers = number_length(*size) + number_length(executable);
            begin(field::FILES, named_length(name, digest.as_bytes()) + numbers, &mut out);
            put_bytes(field::NAME, name, &mut out);
            put_bytes(field::DIGEST, digest.as_bytes(), &mut out);
            put_number(field::SIZE, *size, &mut out);
            put_number(field::EXECUTABLE, executable, &mut out);
        }
    }
    for (name, node) in directory.entries() {
        if let Node::Symlink { target } = node {
            begin(field::SYMLINKS, named_length(name, target), &mut out);
            put_bytes(field::NAME, name, &mut out);
            put_bytes(field::TARGET, target, &mut out);
        }
    }
    out
}

pub(super) fn decode(encoded: Bytes) -> Result<Directory, DecodeError> {
    let message = proto::Directory::decode(encoded.clone())?;
    let directory = Directory::try_from(message)?;
    if encode(&directory) != encoded { Err(DecodeError::NotCanonical) } else { Ok(directory) }
}

impl TryFrom<proto::Directory> for Directory {
    type Error = DecodeError;

    /// Checks a message that was decoded elsewhere: the nodes, and the order of the lists.
    fn try_from(message: proto::Directory) -> Result<Directory, DecodeError> {
        let mut entries = Vec::with_capacity(message.directories.len() + message.files.len() + message.symlinks.len());
        append(&mut entries, message.directories)?;
        append(&mut entries, message.files)?;
        append(&mut entries, message.symlinks)?;
        Ok(Directory::new(entries)?)
    }
}

impl From<&Directory> for proto::Directory {
    fn from(directory: &Directory) -> proto::Directory {
        let mut message = proto::Directory::default();
        for (name, node) in directory.entries() {
            match proto::node::Node::new(name.to_bytes(), node) {
                proto::node::Node::Directory(node) => message.directories.push(node),
                proto::node::Node::File(node) => message.files.push(node),
                proto::node::Node::Symlink(node) => message.symlinks.push(node),
            }
        }
        message
    }
}

/// Adds one list of a message, which must be in order by itself.
fn append<N>(entries: &mut Vec<(NodeName, Node)>, list: Vec<N>) -> Result<(), DecodeError>
where
    proto::node::Node: From<N>,
{
    let mut previous: Option<NodeName> = None;
    for node in list {
        let (name, node) = proto::node::Node::from(node).into_parts()?;
        let name = NodeName::new(name).map_err(DirectoryError::from)?;
        if previous.is_some_and(|previous| previous > name) {
            return Err(DecodeError::Unsorted(name));
        }
        previous = Some(name.clone());
        entries.push((name, node));
    }
    Ok(())
}

fn text_length(node: &Node) -> usize {
    match node {
        Node::Directory { .. } | Node::File { .. } => Digest::LENGTH,
        Node::Symlink { target } => target.len(),
    }
}

fn named_length(name: &[u8], second: &[u8]) -> usize {
    [name, second].iter().map(|bytes| 1 + encoded_len_varint(bytes.len() as u64) + bytes.len()).sum()
}

fn number_length(value: u64) -> usize {
    if value == 0 { 0 } else { key_len(field::SIZE) + encoded_len_varint(value) }
}

fn begin(list: u32, length: usize, out: &mut Vec<u8>) {
    encode_key(list, WireType::LengthDelimited, out);
    encode_varint(length as u64, out);
}

/// Names, digests and targets are never empty, so they are never left out.
fn put_bytes(field: u32, bytes: &[u8], out: &mut Vec<u8>) {
    begin(field, bytes.len(), out);
    out.extend_from_slice(bytes);
}

/// Zero is the default of a number and is left out.
fn put_number(field: u32, value: u64, out: &mut Vec<u8>) {
    if value != 0 {
        encode_key(field, WireType::Varint, out);
        encode_varint(value, out);
    }
}
