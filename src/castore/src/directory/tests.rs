use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use prost::Message;

use super::*;
use crate::{SymlinkTarget, proto};

fn name() -> impl Strategy<Value = NodeName> {
    // Few letters, so that common beginnings and clashes happen.
    vec(prop_oneof![Just(b'a'), Just(b'.'), Just(b'-'), Just(0xff), any::<u8>()], 1..6)
        .prop_filter_map("not a name", |bytes| NodeName::new(bytes).ok())
}

fn node() -> impl Strategy<Value = Node> {
    let digest = any::<[u8; 32]>().prop_map(Digest::from);
    let size = prop_oneof![Just(0), 0u64..300, 0..u64::MAX / 64];
    let target = vec(1u8.., 1..20).prop_map(|bytes| SymlinkTarget::new(bytes).unwrap());
    prop_oneof![
        (digest.clone(), size.clone()).prop_map(|(digest, size)| Node::Directory { digest, size }),
        (digest, size, any::<bool>()).prop_map(|(digest, size, executable)| Node::File { digest, size, executable }),
        target.prop_map(|target| Node::Symlink { target }),
    ]
}

fn directory() -> impl Strategy<Value = Directory> {
    btree_map(name(), node(), 0..40).prop_map(|entries| Directory::new(entries).unwrap())
}

/// A tree with everything in it, so that positions can be counted.
#[derive(Clone, Debug)]
enum Tree {
    Leaf,
    Directory(Vec<Tree>),
}

fn tree() -> impl Strategy<Value = Tree> {
    Just(Tree::Leaf).prop_recursive(5, 200, 8, |inner| vec(inner, 0..8).prop_map(Tree::Directory))
}

/// What a walk of the tree numbers: every directory made, and for each position the names that lead to it.
struct Walk {
    directories: std::collections::HashMap<Digest, Directory>,
    paths: Vec<Vec<usize>>,
}

impl Walk {
    fn node(&mut self, tree: &Tree, path: Vec<usize>) -> Node {
        self.paths.push(path.clone());
        let Tree::Directory(children) = tree else {
            return Node::File { digest: Digest::EMPTY, size: 0, executable: false };
        };
        let entries: Vec<_> = children
            .iter()
            .enumerate()
            .map(|(index, child)| {
                let below = [&path[..], &[index]].concat();
                (NodeName::try_from(&[b'a' + index as u8][..]).unwrap(), self.node(child, below))
            })
            .collect();
        let directory = Directory::new(entries).unwrap();
        let node = directory.to_node();
        self.directories.insert(directory.digest(), directory);
        node
    }
}

proptest! {
    #[test]
    fn decodes_what_it_encodes(directory in directory()) {
        prop_assert_eq!(Directory::decode(&directory.encode()), Ok(directory));
    }

    #[test]
    fn encodes_as_the_generated_messages_do(directory in directory()) {
        prop_assert_eq!(directory.encode(), proto::Directory::from(&directory).encode_to_vec());
    }

    #[test]
    fn any_bytes_are_refused_or_canonical(bytes in vec(any::<u8>(), 0..100)) {
        if let Ok(directory) = Directory::decode(&bytes) {
            prop_assert_eq!(directory.encode(), bytes);
        }
    }

    #[test]
    fn a_changed_encoding_is_refused_or_canonical(directory in directory(), at in any::<prop::sample::Index>(), byte: u8) {
        let mut encoded = directory.encode();
        prop_assume!(!encoded.is_empty());
        let at = at.index(encoded.len());
        encoded[at] = byte;
        if let Ok(directory) = Directory::decode(&encoded) {
            prop_assert_eq!(directory.encode(), encoded);
        }
    }

    #[test]
    fn finds_every_name(directory in directory(), other in name()) {
        for (index, (name, node)) in directory.entries().enumerate() {
            prop_assert_eq!(directory.find(name), Some((index, node)));
            prop_assert_eq!(directory.entry(index), Some((name, node)));
        }
        let there = directory.entries().any(|(name, _)| *name == other);
        prop_assert_eq!(directory.find(&other).is_some(), there);
        prop_assert!(directory.entries().is_sorted_by(|left, right| left.0 < right.0));
    }

    #[test]
    fn positions_are_those_of_a_walk(tree in tree()) {
        let tree = Tree::Directory(vec![tree.clone(), Tree::Leaf, tree]);
        let mut walk = Walk { directories: Default::default(), paths: Vec::new() };
        let root = walk.node(&tree, Vec::new());
        prop_assert_eq!(root.span(), Some(walk.paths.len() as u64));

        let directory_of = |node: &Node| match node {
            Node::Directory { digest, .. } => &walk.directories[digest],
            _ => panic!("not a directory"),
        };
        for (position, path) in walk.paths.iter().enumerate() {
            // Down by names: positions add up.
            let (mut node, mut sum) = (&root, 0);
            for &index in path {
                let directory = directory_of(node);
                sum += directory.position(index);
                node = directory.entry(index).unwrap().1;
            }
            prop_assert_eq!(sum, position as u64);

            // Down by position: the same entries.
            let (mut node, mut rest, mut found) = (&root, position as u64, Vec::new());
            while rest > 0 {
                let directory = directory_of(node);
                let (index, below) = directory.locate(rest).unwrap();
                found.push(index);
                node = directory.entry(index).unwrap().1;
                rest = below;
            }
            prop_assert_eq!(&found, path);
        }
        let root = directory_of(&root);
        prop_assert_eq!(root.locate(0), None);
        prop_assert_eq!(root.locate(root.size() + 1), None);
        prop_assert_eq!(root.locate(u64::MAX), None);
    }
}

fn entry(name: &str, node: Node) -> (NodeName, Node) {
    (NodeName::try_from(name).unwrap(), node)
}

fn file() -> Node {
    Node::File { digest: Digest::EMPTY, size: 0, executable: false }
}

#[test]
fn empty_encodes_to_nothing() {
    let empty = Directory::new([]).unwrap();
    assert_eq!(empty.encode(), b"");
    assert_eq!(empty.digest(), Digest::EMPTY);
    assert_eq!((empty.size(), empty.locate(1)), (0, None));
}

#[test]
fn encoding_byte_for_byte() {
    let directory = Directory::new([
        entry("link", Node::Symlink { target: SymlinkTarget::try_from("to").unwrap() }),
        entry("run", Node::File { digest: Digest::from([2; 32]), size: 300, executable: true }),
        entry("d", Node::Directory { digest: Digest::from([1; 32]), size: 0 }),
    ])
    .unwrap();
    let expected = [
        &b"\x0a\x25\x0a\x01d\x12\x20"[..],
        &[1; 32],
        b"\x12\x2c\x0a\x03run\x12\x20",
        &[2; 32],
        b"\x18\xac\x02\x20\x01",
        b"\x1a\x0a\x0a\x04link\x12\x02to",
    ];
    assert_eq!(directory.encode(), expected.concat());
}

#[test]
fn refuses_a_name_twice_even_of_two_kinds() {
    let link = Node::Symlink { target: SymlinkTarget::try_from("t").unwrap() };
    let error = Directory::new([entry("a", file()), entry("b", file()), entry("a", link)]).unwrap_err();
    assert_eq!(error, DirectoryError::Duplicate(NodeName::try_from("a").unwrap()));
}

#[test]
fn refuses_sizes_that_overflow() {
    let half = |name| entry(name, Node::Directory { digest: Digest::EMPTY, size: u64::MAX / 2 });
    assert_eq!(Directory::new([half("a")]).unwrap().size(), u64::MAX / 2 + 1);
    let name = |text| NodeName::try_from(text).unwrap();
    assert_eq!(Directory::new([half("a"), half("b")]).unwrap_err(), DirectoryError::SizeOverflow(name("b")));

    let all = Node::Directory { digest: Digest::EMPTY, size: u64::MAX };
    assert_eq!(Directory::new([entry("a", all)]).unwrap_err(), DirectoryError::SizeOverflow(name("a")));
}

#[test]
fn decode_is_strict() {
    let message = |files: &[&str]| proto::Directory {
        files: files
            .iter()
            .map(|name| proto::FileNode {
                name: Bytes::copy_from_slice(name.as_bytes()),
                digest: Digest::EMPTY.into(),
                size: 0,
                executable: false,
            })
            .collect(),
        ..Default::default()
    };
    let decode = |files: &[&str]| Directory::decode(&message(files).encode_to_vec());
    let name = |text| NodeName::try_from(text).unwrap();

    assert_eq!(decode(&["a", "b"]).unwrap().len(), 2);
    assert_eq!(decode(&["b", "a"]), Err(DecodeError::Unsorted(name("a"))));
    assert_eq!(decode(&["a", "a"]), Err(DirectoryError::Duplicate(name("a")).into()));
    assert_eq!(decode(&[".."]), Err(DirectoryError::Name(NameError::Invalid(Bytes::from(".."))).into()));
    assert_eq!(decode(&[""]), Err(DirectoryError::Name(NameError::Empty).into()));

    let good = message(&["a"]).encode_to_vec();
    assert_eq!(Directory::decode(&[&good[..], b"\x22\x00"].concat()), Err(DecodeError::NotCanonical), "unknown field");
    let spelled_out = [b"\x12\x27", &good[2..], b"\x18\x00"].concat();
    assert_eq!(Directory::decode(&spelled_out), Err(DecodeError::NotCanonical), "a default value written");
    assert!(matches!(Directory::decode(&good[..good.len() - 1]), Err(DecodeError::Protobuf(_))));
}
