//! A castore as a source of paths: what crosses the wire, and what is refused.

#![allow(clippy::unwrap_used, missing_docs, unreachable_pub)]

#[path = "../common/mod.rs"]
mod common;
mod failures;
mod lazy;
mod proxy;
mod rig;

use castore::contract::noise;
use substitute::Outcome;

use rig::{Node, Rig, Source, directory, file};

/// A tree with something of everything; `seed` makes its large files others.
fn tree(seed: u64) -> Node {
    let many = |from: usize, to: usize| {
        directory((from..to).map(|n| (format!("{n:03}"), file(format!("file {n}\n").repeat(n).into_bytes()))))
    };
    directory([
        ("bin".to_owned(), directory([("tool".to_owned(), Node::File { contents: noise(seed, 700_000), exec: true })])),
        ("empty".to_owned(), directory([])),
        ("large".to_owned(), file(noise(seed + 1, 5_000_000))),
        ("link".to_owned(), Node::Link("bin/tool".to_owned())),
        ("none".to_owned(), file(Vec::new())),
        ("share".to_owned(), directory([("a".to_owned(), many(0, 150)), ("b".to_owned(), many(100, 200))])),
        ("zeros".to_owned(), file(vec![0; 2_000_000])),
    ])
}

#[test]
fn a_path_comes_whole_over_both_transports() {
    for source in [Source::tcp(), Source::unix()] {
        let inner = source.add("inner", &file(b"inner".to_vec()), &[]);
        let outer = source.add("outer", &tree(1), &[&inner]);
        let rig = Rig::new();
        let (outcome, told) = rig.fetch(&source.url(), &[], &outer);
        assert_eq!(outcome, Outcome::Substituted, "{}", told.lines());
        for path in [&inner, &outer] {
            assert_eq!(rig.nar(path), source.nar(path));
            assert_eq!(rig.store.path_info(path).unwrap().unwrap().signatures.len(), 1);
        }
        // Each chunk is read once, however often it is in the tree.
        let read = source.watched.read.lock().clone();
        assert!(read.values().all(|times| *times == 1), "{read:?}");
    }
}

#[test]
fn only_what_is_not_here_is_fetched() {
    let source = Source::tcp();
    let first = source.add("first", &tree(1), &[]);
    let rig = Rig::new();
    assert_eq!(rig.fetch(&source.url(), &[], &first).0, Outcome::Substituted);

    // The same contents under another name.
    let same = source.add("same", &tree(1), &[]);
    source.watched.read.lock().clear();
    assert_eq!(rig.fetch(&source.url(), &[], &same).0, Outcome::Substituted);
    assert!(source.watched.read.lock().is_empty());
    assert_eq!(rig.nar(&same), source.nar(&same));

    // A byte in the middle of the large file.
    let mut contents = noise(2, 5_000_000);
    contents[2_500_000] ^= 1;
    let changed = source.add("changed", &file(contents), &[]);
    assert_eq!(rig.fetch(&source.url(), &[], &changed).0, Outcome::Substituted);
    assert_eq!(rig.nar(&changed), source.nar(&changed));
    let bytes: u64 = source.watched.bytes();
    assert!((1..=2 * 128 * 1024).contains(&bytes), "{bytes} of 5000000 bytes were fetched");
}

#[test]
fn a_castore_that_does_not_cut_its_blobs_serves_too() {
    let source = Source::tcp();
    let path = source.add("uncut", &tree(5), &[]);
    source.watched.uncut();
    let rig = Rig::new();
    let (outcome, told) = rig.fetch(&source.url(), &[], &path);
    assert_eq!(outcome, Outcome::Substituted, "{}", told.lines());
    assert_eq!(rig.nar(&path), source.nar(&path));
}

#[test]
fn what_is_asked_of_a_source_is_answered() {
    let source = Source::tcp();
    let path = source.add("asked", &file(vec![7; 100_000]), &[]);
    let rig = Rig::new();
    let info = rig.info(&source.url(), &path).unwrap();
    assert_eq!((info.nar_size, info.references.len()), (source.nar(&path).len() as u64, 0));
    assert!(rig.info(&source.url(), &rig::store_path("nobody has it")).is_none());
}
