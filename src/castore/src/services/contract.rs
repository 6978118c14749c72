//! What every implementation of the services must do, as lists of checks that panic.
//!
//! Public, so that an implementation in another crate (the gRPC client) runs the same lists, but not part of the
//! crate's promises. A service may hold other things already.

// Checks panic; that is how a test hears of them.
#![allow(clippy::expect_used)]

use std::collections::HashSet;
use std::io::{self, Read};
use std::ops::ControlFlow;

use crate::{BlobService, Digest, Directory, DirectoryService, Error, Node, NodeName, SymlinkTarget};

/// Sizes around which an implementation may do something else: nothing, one byte, a whole-file chunk, a largest chunk.
const SIZES: [usize; 11] =
    [0, 1, 100, 65_535, 65_536, 65_537, 131_071, 131_072, 131_073, 1024 * 1024, 3 * 1024 * 1024 + 17];

/// Bytes that do not repeat, the same for the same seed (xorshift64*).
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        bytes.extend_from_slice(&state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Runs every check of blobs.
pub fn blobs(service: &dyn BlobService) {
    unknown_blob(service);
    known_vector(service);
    blobs_of_all_sizes(service);
    chunks_make_the_blob(service);
    same_blob_twice(service);
    reader_in_small_pieces(service);
    reader_that_fails(service);
}

/// Runs every check of directories.
pub fn directories(service: &dyn DirectoryService) {
    unknown_directory(service);
    empty_directory(service);
    tree_in_order(service);
    child_missing(service);
    child_with_wrong_size(service);
    nothing_to_put(service);
    walk_ended_early(service);
}

fn unknown_blob(service: &dyn BlobService) {
    let digest = Digest::of(b"contract: a blob that nobody puts");
    assert!(service.stat(&digest).expect("stat").is_none());
    let error = service.read_at(&digest, 0, 1).expect_err("read of an unknown blob");
    assert!(matches!(error, Error::BlobNotFound(unknown) if unknown == digest), "{error}");
    let error = service.copy_to(&digest, &mut io::sink()).expect_err("copy of an unknown blob");
    assert!(matches!(error, Error::BlobNotFound(unknown) if unknown == digest), "{error}");
}

fn known_vector(service: &dyn BlobService) {
    let (digest, size) = service.put(&mut &b"x86_64-linux"[..]).expect("put");
    assert_eq!(digest.to_string(), "b3:KOM3/IHEx7YfInAnlJpAElYezq0Sxn9fRz7xuClwNfA=");
    assert_eq!(size, 12);
    assert_eq!(&service.read_at(&digest, 0, 100).expect("read")[..], b"x86_64-linux");
}

fn blobs_of_all_sizes(service: &dyn BlobService) {
    for (seed, size) in (1..).zip(SIZES) {
        let blob = noise(seed, size);
        let put = service.put(&mut &blob[..]).expect("put");
        assert_eq!(put, (Digest::of(&blob), size as u64));
        let digest = put.0;

        assert_eq!(service.stat(&digest).expect("stat").expect("the blob put").size, size as u64);
        let mut copy = Vec::new();
        assert_eq!(service.copy_to(&digest, &mut copy).expect("copy"), size as u64);
        assert!(copy == blob, "{size} bytes came back otherwise");

        let starts = [0, 1, size / 3, size.saturating_sub(1), size, size + 1, size + 1_000_000];
        for start in starts {
            for len in [0, 1, 4096, 65_536, 200_000, usize::MAX] {
                let expected = &blob[start.min(size)..start.saturating_add(len).min(size).max(start.min(size))];
                let got = service.read_at(&digest, start as u64, len).expect("read");
                assert!(got == expected, "{len} bytes at {start} of {size} came back otherwise");
            }
        }
        assert!(service.read_at(&digest, u64::MAX, 10).expect("read far beyond the end").is_empty());
    }
}

fn chunks_make_the_blob(service: &dyn BlobService) {
    let blob = noise(77, 700_000);
    let (digest, size) = service.put(&mut &blob[..]).expect("put");
    let stat = service.stat(&digest).expect("stat").expect("the blob put");
    assert_eq!(stat.size, size);
    if stat.chunks.is_empty() {
        return; // the service knows of no chunks
    }
    let mut joined = Vec::new();
    for (chunk, length) in stat.chunks {
        assert_eq!(service.stat(&chunk).expect("stat").expect("a chunk is a blob, too").size, length);
        assert_eq!(service.copy_to(&chunk, &mut joined).expect("copy of a chunk"), length);
    }
    assert!(joined == blob, "the chunks do not make the blob");
}

fn same_blob_twice(service: &dyn BlobService) {
    for size in [10, 300_000] {
        let blob = noise(5, size);
        let first = service.put(&mut &blob[..]).expect("put");
        assert_eq!(service.put(&mut &blob[..]).expect("put again"), first);
        assert!(service.read_at(&first.0, 0, size).expect("read") == blob);
    }
}

fn reader_in_small_pieces(service: &dyn BlobService) {
    /// Gives seven bytes at a time, and is interrupted before each.
    struct Slow<'a>(&'a [u8], bool);
    impl Read for Slow<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.1 = !self.1;
            if self.1 {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let len = buffer.len().min(7);
            self.0.read(&mut buffer[..len])
        }
    }

    let blob = noise(6, 150_000);
    assert_eq!(service.put(&mut Slow(&blob, false)).expect("put").0, Digest::of(&blob));
}

fn reader_that_fails(service: &dyn BlobService) {
    struct Failing;
    impl Read for Failing {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::other("the source broke"))
        }
    }

    for size in [10, 300_000] {
        let blob = noise(8, size);
        service.put(&mut (&blob[..]).chain(Failing)).expect_err("put from a source that broke");
        assert!(service.stat(&Digest::of(&blob)).expect("stat").is_none(), "half a blob was stored");
    }
}

fn name(text: &str) -> NodeName {
    NodeName::try_from(text).expect("a name")
}

fn link(target: &str) -> Node {
    Node::Symlink { target: SymlinkTarget::try_from(target).expect("a target") }
}

fn directory(entries: impl IntoIterator<Item = (&'static str, Node)>) -> Directory {
    Directory::new(entries.into_iter().map(|(text, node)| (name(text), node))).expect("a directory")
}

fn unknown_directory(service: &dyn DirectoryService) {
    let digest = Digest::of(b"contract: a directory that nobody puts");
    assert!(service.get(&digest).expect("get").is_none());
    let error = service.get_recursive(&digest, &mut |_| ControlFlow::Continue(())).expect_err("unknown directory");
    assert!(matches!(error, Error::DirectoryNotFound(unknown) if unknown == digest), "{error}");
}

fn empty_directory(service: &dyn DirectoryService) {
    assert_eq!(service.put(&[Directory::default()]).expect("put"), Digest::EMPTY);
    assert!(service.get(&Digest::EMPTY).expect("get").expect("the directory put").is_empty());
}

fn tree_in_order(service: &dyn DirectoryService) {
    let leaf = directory([("leaf", link("a"))]);
    let file = Node::File { digest: Digest::of(b"file"), size: 4, executable: true };
    let middle = directory([("b", leaf.to_node()), ("a", leaf.to_node()), ("c", file)]);
    let root = directory([("middle", middle.to_node()), ("leaf", leaf.to_node()), ("z", link("z"))]);

    assert_eq!(service.put(&[leaf.clone(), middle.clone(), root.clone()]).expect("put"), root.digest());
    for put in [&leaf, &middle, &root] {
        assert_eq!(&*service.get(&put.digest()).expect("get").expect("the directory put"), put);
    }

    let mut walked = Vec::new();
    let mut each = |directory: std::sync::Arc<Directory>| {
        walked.push(directory.digest());
        ControlFlow::Continue(())
    };
    service.get_recursive(&root.digest(), &mut each).expect("walk");
    assert_eq!(walked[0], root.digest());
    assert_eq!(walked.len(), 3, "each directory once");
    assert_eq!(HashSet::from_iter(walked), HashSet::from([root.digest(), middle.digest(), leaf.digest()]));

    // A parent alone, once its children are here.
    let other = directory([("only", middle.to_node())]);
    assert_eq!(service.put(std::slice::from_ref(&other)).expect("put over what is here"), other.digest());
}

fn child_missing(service: &dyn DirectoryService) {
    let child = directory([("contract: never put", link("a"))]);
    let parent = directory([("child", child.to_node())]);
    service.put(std::slice::from_ref(&parent)).expect_err("put of a directory whose child is missing");
    service.put(&[parent.clone(), child]).expect_err("put of a parent before its child");
    assert!(service.get(&parent.digest()).expect("get").is_none(), "a directory without its child was stored");
}

fn child_with_wrong_size(service: &dyn DirectoryService) {
    let child = directory([("contract: wrong size", link("a"))]);
    let lie = Node::Directory { digest: child.digest(), size: 2 };
    let parent = directory([("child", lie)]);
    service.put(&[child, parent.clone()]).expect_err("put of a directory that lies about a size");
    assert!(service.get(&parent.digest()).expect("get").is_none(), "a lying directory was stored");
}

fn nothing_to_put(service: &dyn DirectoryService) {
    service.put(&[]).expect_err("put of nothing");
}

fn walk_ended_early(service: &dyn DirectoryService) {
    let leaf = directory([("l", link("early"))]);
    let root = directory([("r", leaf.to_node())]);
    service.put(&[leaf, root.clone()]).expect("put");
    let mut given = 0;
    let mut each = |_| {
        given += 1;
        ControlFlow::Break(())
    };
    service.get_recursive(&root.digest(), &mut each).expect("walk");
    assert_eq!(given, 1);
}
