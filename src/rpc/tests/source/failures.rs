//! Sources that lie, lack something, or die.

use castore::Digest;
use castore::contract::noise;
use substitute::Outcome;

use crate::proxy::Proxy;
use crate::rig::{Node, Rig, Source, directory, file, key};
use crate::tree;

/// The client is told, nothing is valid, and the same comes from a source that is in order.
fn refused(source: &Source, rig: &Rig, node: &Node, name: &str, why: &str) {
    let path = source.add(name, node, &[]);
    let (outcome, told) = rig.fetch(&source.url(), &[], &path);
    assert_eq!(outcome, Outcome::Failed, "{}", told.lines());
    assert!(told.lines().contains(why), "{}", told.lines());
    source.watched.honest();
    assert_eq!(rig.fetch(&source.url(), &[], &path).0, Outcome::Substituted);
    assert_eq!(rig.nar(&path), source.nar(&path));
}

#[test]
fn what_nobody_signed_is_not_taken() {
    let source = Source::tcp();
    let path = source.add_signed("unsigned", &file(b"x".to_vec()), &[], &key(2));
    let rig = Rig::new();
    let (outcome, told) = rig.fetch(&source.url(), &[], &path);
    assert_eq!(outcome, Outcome::Unavailable);
    assert!(told.lines().contains("not signed by any of the keys"), "{}", told.lines());
    // Unless the client's settings trust the source, or ask for no signatures.
    let trusted = Rig::new();
    assert_eq!(trusted.fetch(&format!("{}?trusted=1", source.url()), &[], &path).0, Outcome::Substituted);
    assert_eq!(rig.fetch(&source.url(), &[("require-sigs", "false")], &path).0, Outcome::Substituted);
}

#[test]
fn altered_blobs_are_refused() {
    let (source, rig) = (Source::tcp(), Rig::new());
    let node = |seed, size| directory([("f".to_owned(), file(noise(seed, size)))]);
    // A small one, chunks of a large one, and one that is read as a stream.
    for (seed, size) in [(1, 1000), (2, 500_000)] {
        source.watched.lie();
        refused(&source, &rig, &node(seed, size), &format!("altered-{size}"), "does not have the digest");
    }
    source.watched.lie();
    source.watched.uncut();
    refused(&source, &rig, &node(3, 3_000_000), "altered-stream", "does not have the digest");
}

#[test]
fn a_missing_chunk_is_told_and_nothing_is_valid() {
    let (source, rig) = (Source::tcp(), Rig::new());
    let contents = noise(9, 400_000);
    let lacking = Source::chunks(&contents)[3];
    source.watched.lack(lacking);
    refused(&source, &rig, &file(contents), "lacking", &format!("the peer lacks blob {lacking}"));
    let small = b"small".to_vec();
    source.watched.lack(Digest::of(&small));
    refused(&source, &rig, &file(small), "lacking-small", "the peer lacks blob");
}

#[test]
fn contents_that_are_not_what_was_signed_are_refused() {
    let source = Source::tcp();
    // Signed for other contents; every digest below the root is right.
    let path = source.add_with_other_tree("swapped", &file(b"signed".to_vec()), &file(b"others".to_vec()));
    let rig = Rig::new();
    let (outcome, told) = rig.fetch(&source.url(), &[], &path);
    assert_eq!(outcome, Outcome::Failed, "{}", told.lines());
    assert!(told.lines().contains("hash mismatch"), "{}", told.lines());
}

#[test]
fn a_connection_that_breaks_is_made_again() {
    let source = Source::tcp();
    let path = source.add("broken", &tree(7), &[]);
    let proxy = Proxy::before(source.server.uri.strip_prefix("http://").unwrap());
    proxy.break_after(1_500_000, false);
    let rig = Rig::new();
    let (outcome, told) = rig.fetch(&proxy.url(), &[], &path);
    assert_eq!(outcome, Outcome::Substituted, "{}", told.lines());
    assert_eq!(rig.nar(&path), source.nar(&path));
    assert!(proxy.connections() > 1);
}

#[test]
fn a_source_that_dies_is_an_error_and_the_next_one_is_asked() {
    let source = Source::tcp();
    let path = source.add("dying", &tree(8), &[]);
    let proxy = Proxy::before(source.server.uri.strip_prefix("http://").unwrap());
    proxy.break_after(1_500_000, true);
    let rig = Rig::new();
    let few = [("download-attempts", "2")];
    let (outcome, told) = rig.fetch(&proxy.url(), &few, &path);
    assert_eq!(outcome, Outcome::Failed, "{}", told.lines());
    assert!(told.lines().contains("cannot copy from the castore"), "{}", told.lines());
    // It is left out, and whoever has it as well gives it.
    let both = format!("{}?priority=1 {}?priority=2", proxy.url(), source.url());
    assert_eq!(rig.fetch(&both, &few, &path).0, Outcome::Substituted);
    assert_eq!(rig.nar(&path), source.nar(&path));
}

#[test]
fn damaged_contents_of_ones_own_are_no_source() {
    let source = Source::tcp();
    let rig = Rig::new();
    let node = || file(noise(11, 60_000));
    let path = source.add("damaged", &node(), &[]);
    assert_eq!(rig.fetch(&source.url(), &[], &path).0, Outcome::Substituted);
    rig.damage();
    let rig = rig.reopened();
    assert!(rig.read(&path).is_err());
    let again = source.add("healed", &node(), &[]);
    let (outcome, told) = rig.fetch(&source.url(), &[], &again);
    assert_eq!(outcome, Outcome::Substituted, "{}", told.lines());
    assert_eq!(rig.nar(&again), source.nar(&again));
    assert_eq!(rig.nar(&path), source.nar(&path));
}
