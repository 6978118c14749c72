//! Archives: one of stock Nix's, made-up ones, and broken ones.

use std::collections::BTreeMap;
use std::io::{self, Read};

use nix_compat::nar::{
    MAX_DEPTH, MAX_FILE_SIZE, MAX_NAME_LEN, MAX_TARGET_LEN, NameError, NarError, NarEvent, NarReader, NarWriter,
    WriteError,
};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

/// `nix-store --dump` of a small tree
const TREE: &[u8] = include_bytes!("../data/tree.nar");

/// A tree in memory.
#[derive(Debug, Clone, PartialEq)]
enum Node {
    File { executable: bool, contents: Vec<u8> },
    Symlink(Vec<u8>),
    Directory(BTreeMap<Vec<u8>, Node>),
}

fn read_node<R: Read>(reader: &mut NarReader<R>, first: NarEvent) -> Result<Node, NarError> {
    match first {
        NarEvent::Regular { executable, size } => {
            let mut contents = Vec::new();
            reader.contents().read_to_end(&mut contents).map_err(NarError::Io)?;
            assert_eq!(contents.len() as u64, size);
            Ok(Node::File { executable, contents })
        }
        NarEvent::Symlink { target } => Ok(Node::Symlink(target)),
        NarEvent::EnterDirectory => {
            let mut entries = BTreeMap::new();
            loop {
                match reader.next()? {
                    NarEvent::Entry { name } => {
                        let first = reader.next()?;
                        entries.insert(name, read_node(reader, first)?);
                    }
                    NarEvent::LeaveDirectory => return Ok(Node::Directory(entries)),
                    other => panic!("{other:?} in a directory"),
                }
            }
        }
        other => panic!("{other:?} is no node"),
    }
}

fn read(nar: impl Read) -> Result<Node, NarError> {
    let mut reader = NarReader::new(nar);
    let first = reader.next()?;
    let root = read_node(&mut reader, first)?;
    assert_eq!(reader.next()?, NarEvent::End);
    assert_eq!(reader.next()?, NarEvent::End);
    Ok(root)
}

/// Reads to the end or the first error, skipping all contents.
fn walk(nar: &[u8]) -> Result<(), NarError> {
    let mut reader = NarReader::new(nar);
    loop {
        match reader.next() {
            Ok(NarEvent::End) => return Ok(()),
            Ok(_) => {}
            Err(error) => {
                assert!(matches!(reader.next(), Err(NarError::Broken)));
                return Err(error);
            }
        }
    }
}

fn write_node(writer: &mut NarWriter<Vec<u8>>, node: &Node, piece: usize) -> Result<(), WriteError> {
    match node {
        Node::File { executable, contents } => {
            writer.regular_header(*executable, contents.len() as u64)?;
            contents.chunks(piece).try_for_each(|data| writer.contents(data))?;
            writer.end_regular()
        }
        Node::Symlink(target) => writer.symlink(target),
        Node::Directory(entries) => {
            writer.enter_directory()?;
            for (name, node) in entries {
                writer.entry(name)?;
                write_node(writer, node, piece)?;
            }
            writer.leave_directory()
        }
    }
}

fn write(node: &Node, piece: usize) -> Vec<u8> {
    let mut writer = NarWriter::new(Vec::new());
    write_node(&mut writer, node, piece).unwrap();
    writer.finish().unwrap()
}

/// A string of the format, written as its definition says.
fn string(bytes: impl AsRef<[u8]>) -> Vec<u8> {
    let bytes = bytes.as_ref();
    let padding = bytes.len().next_multiple_of(8) - bytes.len();
    [&(bytes.len() as u64).to_le_bytes(), bytes, &[0; 8][..padding]].concat()
}

/// Strings one after the other.
fn strings(texts: &[&str]) -> Vec<u8> {
    texts.iter().flat_map(string).collect()
}

/// An archive of `texts`, its magic before them.
fn archive(texts: &[&str]) -> Vec<u8> {
    [string("nix-archive-1"), strings(texts)].concat()
}

/// A directory with an empty file for each of `names`.
fn directory(names: &[&[u8]]) -> Vec<u8> {
    let mut nar = archive(&["(", "type", "directory"]);
    for name in names {
        nar.extend(strings(&["entry", "(", "name"]));
        nar.extend(string(name));
        nar.extend(strings(&["node", "(", "type", "regular", "contents", "", ")", ")"]));
    }
    nar.extend(string(")"));
    nar
}

/// Empty directories, so many of them one in the other.
fn nested(depth: usize) -> Vec<u8> {
    let mut nar = archive(&["(", "type", "directory"]);
    for _ in 1..depth {
        nar.extend(strings(&["entry", "(", "name", "a", "node", "(", "type", "directory"]));
    }
    nar.extend(string(")").repeat(2 * depth - 1));
    nar
}

#[test]
fn a_tree_of_stock_nix() {
    let file = |executable, contents: &[u8]| Node::File { executable, contents: contents.to_vec() };
    let directory = |entries: Vec<(&[u8], Node)>| {
        Node::Directory(entries.into_iter().map(|(name, node)| (name.to_vec(), node)).collect())
    };
    let tree = directory(vec![
        (b"A", directory(vec![(b"eight", file(false, b"12345678"))])),
        (
            b"a",
            directory(vec![
                (b"empty", directory(vec![])),
                (b"file", file(false, b"hello world")),
                (b"run", file(true, b"#!/bin/sh\necho hi\n")),
            ]),
        ),
        (b"a.b", file(false, b"x")),
        (b"b", directory(vec![(b"link", Node::Symlink(b"../a/file".to_vec())), (b"nothing", file(false, b""))])),
        (b"\xff\xfe", file(false, b"y")),
    ]);
    assert_eq!(read(TREE).unwrap(), tree);
    assert_eq!(write(&tree, 5), TREE);
    walk(TREE).unwrap();
}

/// Hands out one byte at a time, and fails a read beyond the end.
struct Dribble<'a>(&'a [u8]);

impl Read for Dribble<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        assert!(!self.0.is_empty(), "read beyond the archive's end");
        self.0.read(&mut buf[..1])
    }
}

#[test]
fn not_a_byte_beyond_the_end_is_read() {
    assert_eq!(read(Dribble(TREE)).unwrap(), read(TREE).unwrap());
    let followed = [TREE, b"more"].concat();
    let mut reader = NarReader::new(followed.as_slice());
    while reader.next().unwrap() != NarEvent::End {}
    assert_eq!(reader.position(), TREE.len() as u64);
    assert_eq!(reader.into_inner(), b"more");
}

#[test]
fn contents_go_straight_to_the_caller() {
    let contents = vec![7; 1 << 20];
    let nar = write(&Node::File { executable: false, contents }, 1 << 20);
    let mut reader = NarReader::new(nar.as_slice());
    reader.next().unwrap();
    let mut buf = vec![0; 1 << 21];
    assert_eq!(reader.contents().remaining(), 1 << 20);
    assert_eq!(reader.read_contents(&mut buf[..1000]).unwrap(), 1000);
    assert_eq!(reader.read_contents(&mut buf).unwrap(), (1 << 20) - 1000);
    assert_eq!(reader.read_contents(&mut buf).unwrap(), 0);
    assert_eq!(reader.next().unwrap(), NarEvent::End);
    assert_eq!(reader.read_contents(&mut buf).unwrap(), 0);
}

#[test]
fn every_beginning_of_an_archive_is_truncated() {
    for len in 0..TREE.len() {
        assert!(matches!(walk(&TREE[..len]), Err(NarError::Truncated { .. })), "{len}");
    }
    let mut reader = NarReader::new(&TREE[..TREE.len() / 2]);
    let error = loop {
        match reader.next() {
            Ok(NarEvent::Regular { .. }) => match io::copy(&mut reader.contents(), &mut io::sink()) {
                Ok(_) => {}
                Err(error) => break error.kind(),
            },
            Ok(_) => {}
            Err(NarError::Truncated { .. }) => break io::ErrorKind::UnexpectedEof,
            Err(error) => panic!("{error}"),
        }
    };
    assert_eq!(error, io::ErrorKind::UnexpectedEof);
}

#[test]
fn names() {
    walk(&directory(&[b"a", b"b", b"b0", b"ba"])).unwrap();
    walk(&directory(&[&[b'n'; MAX_NAME_LEN]])).unwrap();
    for (names, wanted) in [
        ([&b""[..], b"a"], NameError::Empty),
        ([b".", b"a"], NameError::Dots),
        ([b"..", b"a"], NameError::Dots),
        ([b"a/b", b"c"], NameError::IllegalByte),
        ([b"a\0", b"c"], NameError::IllegalByte),
        ([&[b'n'; MAX_NAME_LEN + 1], b"o"], NameError::TooLong),
        ([b"a", b"a"], NameError::Order),
        ([b"b", b"a"], NameError::Order),
        ([b"ab", b"a"], NameError::Order),
    ] {
        match walk(&directory(&names)) {
            Err(NarError::Name { error, .. }) => assert_eq!(error, wanted, "{names:?}"),
            other => panic!("{names:?}: {other:?}"),
        }
        let mut writer = NarWriter::new(Vec::new());
        writer.enter_directory().unwrap();
        let error = names.iter().find_map(|name| {
            let error = writer.entry(name).err();
            error.or_else(|| writer.symlink(b"x").err())
        });
        assert!(matches!(error, Some(WriteError::Name { error, .. }) if error == wanted), "{names:?}");
    }
}

#[test]
fn order_holds_per_directory() {
    let nar = archive(&[
        "(",
        "type",
        "directory",
        "entry",
        "(",
        "name",
        "b",
        "node",
        "(",
        "type",
        "directory", //
        "entry",
        "(",
        "name",
        "a",
        "node",
        "(",
        "type",
        "regular",
        "contents",
        "",
        ")",
        ")",
        ")",
        ")", //
        "entry",
        "(",
        "name",
        "a",
        "node",
        "(",
        "type",
        "regular",
        "contents",
        "",
        ")",
        ")",
        ")",
    ]);
    assert!(matches!(walk(&nar), Err(NarError::Name { error: NameError::Order, .. })));
}

/// Measured: 2.34.8 restores 64 directories one in the other, and nothing in the last of them.
#[test]
fn depth() {
    walk(&nested(MAX_DEPTH)).unwrap();
    assert!(matches!(walk(&nested(MAX_DEPTH + 1)), Err(NarError::Depth { .. })));
    assert!(matches!(walk(&nested(100_000)), Err(NarError::Depth { .. })));
    let mut writer = NarWriter::new(Vec::new());
    for _ in 1..MAX_DEPTH {
        writer.enter_directory().unwrap();
        writer.entry(b"a").unwrap();
    }
    writer.enter_directory().unwrap();
    assert!(matches!(writer.entry(b"a"), Err(WriteError::Depth)));
}

#[test]
fn targets() {
    for (target, legal) in
        [(vec![b't'; MAX_TARGET_LEN], true), (vec![b't'; MAX_TARGET_LEN + 1], false), (vec![], false), (vec![0], false)]
    {
        let nar = [archive(&["(", "type", "symlink", "target"]), string(&target), string(")")].concat();
        match walk(&nar) {
            Ok(()) => assert!(legal),
            Err(error) => assert!(!legal && matches!(error, NarError::Target { .. }), "{error}"),
        }
        assert_eq!(NarWriter::new(Vec::new()).symlink(&target).is_ok(), legal);
    }
}

/// None of these may be believed: an allocation of such a size would end the process.
#[test]
fn lengths_are_not_believed() {
    for len in [u64::MAX, u64::MAX - 7, 1 << 63, 1 << 62, 1 << 40] {
        let with = |texts: &[&str]| [archive(texts), len.to_le_bytes().to_vec(), vec![0; 64]].concat();
        let file = walk(&with(&["(", "type", "regular", "contents"]));
        match len > MAX_FILE_SIZE {
            true => assert!(matches!(file, Err(NarError::FileSize { size, .. }) if size == len), "{file:?}"),
            false => assert!(matches!(file, Err(NarError::Truncated { .. })), "{file:?}"),
        }
        let link = walk(&with(&["(", "type", "symlink", "target"]));
        assert!(matches!(link, Err(NarError::Target { .. })), "{link:?}");
        let name = walk(&with(&["(", "type", "directory", "entry", "(", "name"]));
        assert!(matches!(name, Err(NarError::Name { error: NameError::TooLong, .. })), "{name:?}");
        let tag = walk(&[len.to_le_bytes().to_vec(), vec![0; 64]].concat());
        assert!(matches!(tag, Err(NarError::Unexpected { .. })), "{tag:?}");
    }
}

#[test]
fn other_grammars_are_refused() {
    for texts in [
        &["(", "type", "socket", ")", ")"][..],
        &["(", "type", "regular", ")", "", ")"],
        &["(", "type", "regular", "executable", "x", "contents", "", ")"],
        &["(", "type", "regular", "contents", "", "executable", "", ")"],
        &["(", "type", "regular", "contents", "", "x"],
        &["(", "type", "symlink", "contents", "x", ")"],
        &["(", "type", "directory", "entry", "(", "node", "x", "name", "(", "type", "regular", "contents", "", ")"],
        &["(", "type", "directory", "x", ")", ")"],
        &["type", "(", "regular", "contents", "", ")"],
        &["(", "type", "directoryx", ")", ")"],
    ] {
        let nar = [archive(texts), vec![0; 128]].concat();
        assert!(matches!(walk(&nar), Err(NarError::Unexpected { .. })), "{texts:?}");
    }
    let magic = [string("nix-archive-2"), strings(&["(", "type", "regular", "contents", "", ")"])].concat();
    assert!(matches!(walk(&magic), Err(NarError::Unexpected { offset: 0, .. })));
}

#[test]
fn writers_calls_out_of_place_are_refused() {
    let new = || NarWriter::new(Vec::new());
    assert!(matches!(new().entry(b"a"), Err(WriteError::Misuse { .. })));
    assert!(matches!(new().leave_directory(), Err(WriteError::Misuse { .. })));
    assert!(matches!(new().contents(b"a"), Err(WriteError::Misuse { .. })));
    assert!(matches!(new().end_regular(), Err(WriteError::Misuse { .. })));
    assert!(matches!(new().finish(), Err(WriteError::Misuse { .. })));
    assert!(matches!(new().regular_header(false, u64::MAX), Err(WriteError::FileSize { .. })));
    let mut writer = new();
    writer.regular_header(true, 3).unwrap();
    writer.contents(b"ab").unwrap();
    assert!(matches!(writer.end_regular(), Err(WriteError::FileSize { size: 3 })));
    assert!(matches!(writer.contents(b"cd"), Err(WriteError::FileSize { size: 3 })));
    assert!(matches!(writer.symlink(b"x"), Err(WriteError::Misuse { .. })));
    writer.contents(b"c").unwrap();
    writer.end_regular().unwrap();
    assert!(matches!(writer.enter_directory(), Err(WriteError::Misuse { .. })));
    writer.finish().unwrap();
}

fn node() -> impl Strategy<Value = Node> {
    let leaf = prop_oneof![
        (any::<bool>(), vec(any::<u8>(), 0..40)).prop_map(|(executable, contents)| Node::File { executable, contents }),
        vec(1..=255u8, 1..20).prop_map(Node::Symlink),
    ];
    let name = vec(1..=255u8, 1..10)
        .prop_filter("a legal name", |name| !name.contains(&b'/') && name != b"." && name != b"..");
    leaf.prop_recursive(5, 40, 6, move |inner| btree_map(name.clone(), inner, 0..6).prop_map(Node::Directory))
}

/// What [`NarWriter`] should write, in the words of the format's definition.
fn definition(node: &Node) -> Vec<u8> {
    match node {
        Node::File { executable, contents } => {
            let marker = if *executable { strings(&["executable", ""]) } else { vec![] };
            [strings(&["(", "type", "regular"]), marker, string("contents"), string(contents), string(")")].concat()
        }
        Node::Symlink(target) => [strings(&["(", "type", "symlink", "target"]), string(target), string(")")].concat(),
        Node::Directory(entries) => {
            let entry = |(name, node): (&Vec<u8>, &Node)| {
                let (before, after) = (strings(&["entry", "(", "name"]), string(")"));
                [before, string(name), string("node"), definition(node), after].concat()
            };
            let entries: Vec<u8> = entries.iter().flat_map(entry).collect();
            [strings(&["(", "type", "directory"]), entries, string(")")].concat()
        }
    }
}

proptest! {
    #[test]
    fn trees_come_back(tree in node(), piece in 1usize..50) {
        let nar = write(&tree, piece);
        prop_assert_eq!(&nar[24..], definition(&tree));
        prop_assert_eq!(read(nar.as_slice()).unwrap(), tree);
    }

    /// Whatever is accepted is the one archive of what was read: no two archives mean the same.
    #[test]
    fn damage_is_found_or_means_something_else(at in 0..TREE.len(), byte: u8) {
        let mut nar = TREE.to_vec();
        nar[at] = byte;
        match read(nar.as_slice()) {
            Ok(tree) => prop_assert_eq!(write(&tree, 1000), nar),
            Err(_) => prop_assert_ne!(nar, TREE),
        }
    }
}
