//! Whether a tree that a peer put together is whole.

use std::collections::HashSet;

use castore::{BlobService, Digest, DirectoryService, Error, Node};

use crate::limits::MAX_DIRECTORIES_PER_PUT;

/// What is wrong with a tree.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// A directory or blob is missing or cannot be read.
    #[error(transparent)]
    Castore(#[from] Error),
    /// A directory or blob has another size than the node for it says.
    #[error("{object} is said to have size {claimed}, but it has {actual}")]
    Size {
        /// The directory or blob.
        object: Digest,
        /// What its node says.
        claimed: u64,
        /// What it has.
        actual: u64,
    },
    /// Checking it would take too much memory.
    #[error("it has more than {MAX_DIRECTORIES_PER_PUT} directories")]
    TooLarge,
}

/// Checks that every directory and blob of the tree is here and has the size it is said to have.
///
/// A directory can be put before the blobs in it, so only when a path is made of a tree can this be asked.
pub(crate) fn check<S>(service: &S, root: &Node) -> Result<(), TreeError>
where
    S: BlobService + DirectoryService + ?Sized,
{
    let mut seen = HashSet::new();
    let mut waiting = Vec::new();
    check_node(service, root, &mut waiting)?;
    while let Some((digest, claimed)) = waiting.pop() {
        let directory = service.get(&digest)?.ok_or(Error::DirectoryNotFound(digest))?;
        check_size(digest, claimed, directory.size())?;
        if !seen.insert(digest) {
            continue;
        }
        if seen.len() > MAX_DIRECTORIES_PER_PUT {
            return Err(TreeError::TooLarge);
        }
        for (_, node) in directory.entries() {
            check_node(service, node, &mut waiting)?;
        }
    }
    Ok(())
}

fn check_node<S>(service: &S, node: &Node, waiting: &mut Vec<(Digest, u64)>) -> Result<(), TreeError>
where
    S: BlobService + DirectoryService + ?Sized,
{
    match node {
        Node::Directory { digest, size } => waiting.push((*digest, *size)),
        Node::File { digest, size, .. } => {
            let blob = service.stat(digest)?.ok_or(Error::BlobNotFound(*digest))?;
            check_size(*digest, *size, blob.size)?;
        }
        Node::Symlink { .. } => {}
    }
    Ok(())
}

fn check_size(object: Digest, claimed: u64, actual: u64) -> Result<(), TreeError> {
    if claimed == actual { Ok(()) } else { Err(TreeError::Size { object, claimed, actual }) }
}

#[cfg(test)]
mod tests {
    use castore::{Directory, MemoryStore, NodeName};

    use super::*;

    fn file(contents: &[u8], size: u64) -> Node {
        Node::File { digest: Digest::of(contents), size, executable: false }
    }

    fn directory_of(file: Node) -> Directory {
        Directory::new([(NodeName::try_from("file").unwrap(), file)]).unwrap()
    }

    #[test]
    fn whole_trees_pass_and_others_do_not() {
        let store = MemoryStore::new();
        BlobService::put(&store, &mut &b"here"[..]).unwrap();

        let whole = directory_of(file(b"here", 4));
        let lying = directory_of(file(b"here", 3));
        let lacking = directory_of(file(b"missing", 7));
        for directory in [&whole, &lying, &lacking] {
            DirectoryService::put(&store, std::slice::from_ref(directory)).unwrap();
        }

        check(&store, &whole.to_node()).unwrap();
        let error = check(&store, &lying.to_node()).unwrap_err();
        assert!(matches!(error, TreeError::Size { claimed: 3, actual: 4, .. }), "{error}");
        let error = check(&store, &lacking.to_node()).unwrap_err();
        assert!(matches!(error, TreeError::Castore(Error::BlobNotFound(_))), "{error}");

        let Node::Directory { digest, .. } = whole.to_node() else { unreachable!() };
        let error = check(&store, &Node::Directory { digest, size: 2 }).unwrap_err();
        assert!(matches!(error, TreeError::Size { claimed: 2, actual: 1, .. }), "{error}");
        let error = check(&store, &Node::Directory { digest: Digest::of(b"none"), size: 0 }).unwrap_err();
        assert!(matches!(error, TreeError::Castore(Error::DirectoryNotFound(_))), "{error}");
    }
}
