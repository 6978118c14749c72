//! The messages of `tvix.castore.v1`, generated from `protos/castore.proto`, and their conversions.
//!
//! A message says what came over the wire; [`Node`](crate::Node) and [`Directory`](crate::Directory) are what was
//! checked. The conversions of directories are with their encoding, in [`crate::Directory`].

use bytes::Bytes;

pub use generated::*;

use crate::{Digest, DigestError, SymlinkTarget, TargetError};

mod generated {
    include!(concat!(env!("OUT_DIR"), "/tvix.castore.v1.rs"));
}

/// Why a message is not a valid node.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NodeError {
    /// The message names none of the three kinds.
    #[error("a node is neither directory nor file nor symbolic link")]
    NoKind,
    /// The digest of a directory or file is not 32 bytes.
    #[error("node \"{}\": {error}", .name.escape_ascii())]
    Digest {
        /// The node's name, unchecked.
        name: Bytes,
        /// What is wrong with the digest.
        error: DigestError,
    },
    /// The target of a symbolic link cannot be one.
    #[error("node \"{}\": {error}", .name.escape_ascii())]
    Target {
        /// The node's name, unchecked.
        name: Bytes,
        /// What is wrong with the target.
        error: TargetError,
    },
}

impl Node {
    /// The message for `node` under `name`, which may be empty where the protocol has no name.
    pub fn new(name: Bytes, node: &crate::Node) -> Node {
        Node { node: Some(node::Node::new(name, node)) }
    }

    /// The name, still unchecked, and the node.
    pub fn into_parts(self) -> Result<(Bytes, crate::Node), NodeError> {
        self.node.ok_or(NodeError::NoKind)?.into_parts()
    }
}

impl node::Node {
    /// The message for `node` under `name`, which may be empty where the protocol has no name.
    pub fn new(name: Bytes, node: &crate::Node) -> node::Node {
        match node {
            crate::Node::Directory { digest, size } => {
                node::Node::Directory(DirectoryNode { name, digest: (*digest).into(), size: *size })
            }
            crate::Node::File { digest, size, executable } => {
                node::Node::File(FileNode { name, digest: (*digest).into(), size: *size, executable: *executable })
            }
            crate::Node::Symlink { target } => node::Node::Symlink(SymlinkNode { name, target: target.to_bytes() }),
        }
    }

    /// The name, still unchecked, and the node.
    pub fn into_parts(self) -> Result<(Bytes, crate::Node), NodeError> {
        match self {
            node::Node::Directory(DirectoryNode { name, digest, size }) => {
                let digest = checked_digest(&name, &digest)?;
                Ok((name, crate::Node::Directory { digest, size }))
            }
            node::Node::File(FileNode { name, digest, size, executable }) => {
                let digest = checked_digest(&name, &digest)?;
                Ok((name, crate::Node::File { digest, size, executable }))
            }
            node::Node::Symlink(SymlinkNode { name, target }) => match SymlinkTarget::new(target) {
                Ok(target) => Ok((name, crate::Node::Symlink { target })),
                Err(error) => Err(NodeError::Target { name, error }),
            },
        }
    }
}

fn checked_digest(name: &Bytes, digest: &[u8]) -> Result<Digest, NodeError> {
    Digest::try_from(digest).map_err(|error| NodeError::Digest { name: name.clone(), error })
}

impl From<Digest> for Bytes {
    fn from(digest: Digest) -> Bytes {
        Bytes::copy_from_slice(digest.as_bytes())
    }
}

impl From<DirectoryNode> for node::Node {
    fn from(node: DirectoryNode) -> node::Node {
        node::Node::Directory(node)
    }
}

impl From<FileNode> for node::Node {
    fn from(node: FileNode) -> node::Node {
        node::Node::File(node)
    }
}

impl From<SymlinkNode> for node::Node {
    fn from(node: SymlinkNode) -> node::Node {
        node::Node::Symlink(node)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_there_and_back() {
        let nodes = [
            crate::Node::Directory { digest: Digest::of(b"d"), size: 7 },
            crate::Node::File { digest: Digest::of(b"f"), size: 1, executable: true },
            crate::Node::Symlink { target: SymlinkTarget::try_from("../x").unwrap() },
        ];
        for node in nodes {
            let message = Node::new(Bytes::from("name"), &node);
            assert_eq!(message.into_parts(), Ok((Bytes::from("name"), node)));
        }
    }

    #[test]
    fn refuses_what_is_no_node() {
        assert_eq!(Node { node: None }.into_parts(), Err(NodeError::NoKind));

        let name = Bytes::from("n");
        let file = FileNode { name: name.clone(), digest: Bytes::from("short"), size: 0, executable: false };
        let error = DigestError::Length(5);
        assert_eq!(node::Node::from(file).into_parts(), Err(NodeError::Digest { name: name.clone(), error }));

        let link = SymlinkNode { name: name.clone(), target: Bytes::new() };
        let error = TargetError::Empty;
        assert_eq!(node::Node::from(link).into_parts(), Err(NodeError::Target { name, error }));
    }
}
