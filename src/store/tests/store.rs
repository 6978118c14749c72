//! The store as its users see it, over a real castore on disk.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::ops::ControlFlow;

mod common;

use common::{Fixture, add, gc, info, nar};
use nix_compat::content_address::{ContentAddress, Method};
use nix_compat::hash::{Algorithm, Hash, NarHash, sha256};
use nix_compat::nar::NarWriter;
use nix_compat::path_info::PathInfo;
use nix_compat::signature::Signature;
use nix_compat::store_path::{StorePath, content_address_path};
use store::nar_digest::NarDigest;
use store::view::StoreView;
use store::{AddOptions, Error, GcAction, MAX_SIGNATURE_LENGTH, MAX_SIGNATURES, NewPath, SignaturePolicy};

#[test]
fn what_goes_in_comes_out_also_after_reopening() {
    let mut fixture = Fixture::new();
    let bytes = nar("hello", 300_000);
    let info = info("hello", &bytes, &[]);
    fixture.store().add_with_info(info.clone(), &mut &bytes[..]).unwrap();
    for _ in 0..2 {
        let mut out = Vec::new();
        fixture.store().write_nar(&info.path, &mut out).unwrap();
        assert!(out == bytes);
        let known = fixture.store().path_info(&info.path).unwrap().unwrap();
        assert_eq!(PathInfo { registration_time: 0, ..known }, info);
        fixture.reopen();
    }
}

#[test]
fn a_wrong_hash_or_size_registers_nothing() {
    let fixture = Fixture::new();
    let bytes = nar("x", 10);
    let good = info("x", &bytes, &[]);
    let bad = PathInfo { nar_hash: NarHash::from([7; 32]), ..good.clone() };
    assert!(matches!(fixture.store().add_with_info(bad, &mut &bytes[..]), Err(Error::HashMismatch { .. })));
    let bad = PathInfo { nar_size: good.nar_size + 8, ..good.clone() };
    assert!(matches!(fixture.store().add_with_info(bad, &mut &bytes[..]), Err(Error::SizeMismatch { .. })));
    assert!(!fixture.store().is_valid(&good.path).unwrap());
    assert!(matches!(fixture.store().add_with_info(good, &mut &bytes[..bytes.len() - 8]), Err(Error::Nar(_))));
    assert!(fixture.store().all_valid_paths().unwrap().is_empty());
}

#[test]
fn references_must_be_valid_and_are_found_backwards() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let nowhere = StorePath::from_parts([1; 20], "nowhere").unwrap();
    let bytes = nar("y", 10);
    let refused = store.add_with_info(info("y", &bytes, &[&nowhere]), &mut &bytes[..]);
    assert!(matches!(refused, Err(Error::InvalidReference { .. })));
    let a = add(store, "a", &[]);
    let b = add(store, "b", &[&a]);
    assert_eq!(store.referrers(&a).unwrap(), BTreeSet::from([b.clone()]));
    assert_eq!(store.closure([&b]).unwrap(), BTreeSet::from([a, b]));
}

#[test]
fn content_addresses_follow_from_the_contents() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let options = |method, algorithm| AddOptions { name: "f".into(), method, algorithm, references: BTreeSet::new() };
    for algorithm in [Algorithm::Md5, Algorithm::Sha1, Algorithm::Sha256, Algorithm::Sha512] {
        let flat = store.add(&options(Method::Flat, algorithm), &mut &b"contents"[..]).unwrap();
        assert_eq!(store.add(&options(Method::Flat, algorithm), &mut &b"contents"[..]).unwrap(), flat);
        assert!(flat.is_content_addressed(store.store_dir()));
        let bytes = nar("f", 1000);
        let tree = store.add(&options(Method::Nar, algorithm), &mut &bytes[..]).unwrap();
        assert!(tree.is_content_addressed(store.store_dir()));
        assert_ne!(flat.path, tree.path);
    }
}

#[test]
fn an_unsigned_path_is_for_trusted_clients_only() {
    let fixture = Fixture::new();
    let bytes = nar("z", 10);
    let unsigned = info("z", &bytes, &[]);
    assert!(fixture.store().check_signatures(&unsigned, SignaturePolicy::DontCheck).is_ok());
    let refused = fixture.store().check_signatures(&unsigned, SignaturePolicy::Require(&[]));
    assert!(matches!(refused, Err(Error::Untrusted(_))));
}

#[test]
fn an_address_with_references_to_itself_is_checked_against_the_contents() {
    let fixture = Fixture::new();
    let (store, name) = (fixture.store(), "z");
    // Where the contents would be, if their own hash part were the digits of this text.
    let provisional = StorePath::from_base_name("00000000000000000000000000000000-z").unwrap();
    let contents = |hash_part: &str| nar(&format!("#! /nix/store/{hash_part}-z"), 10);
    let ingested = store.import_nar(&mut &contents(provisional.hash_part())[..], NarDigest::new(None, None)).unwrap();
    let hash = store.hash_modulo_itself(&ingested.node, &provisional, Algorithm::Sha256).unwrap();
    let ca = ContentAddress { method: Method::Nar, hash };
    let path = content_address_path(store.store_dir(), name, &ca, &BTreeSet::new(), true).unwrap();
    let moved = store.rewrite(&ingested.node, &[(provisional.clone(), path.clone())], None).unwrap();
    let bytes = contents(path.hash_part());
    assert_eq!(*moved.nar.nar_hash.as_bytes(), sha256(&bytes));

    let info = PathInfo { path: path.clone(), references: [path].into(), ca: Some(ca), ..info(name, &bytes, &[]) };
    store.check_signatures(&info, SignaturePolicy::Require(&[])).unwrap();
    let other = contents(provisional.hash_part());
    let lie = PathInfo { nar_hash: NarHash::from(sha256(&other)), ..info.clone() };
    let refused = store.add_with_info(lie, &mut &other[..]);
    assert!(matches!(refused, Err(Error::ContentAddressMismatch { .. })), "{refused:?}");
    store.add_with_info(info, &mut &bytes[..]).unwrap();
}

#[test]
fn numbers_are_never_used_twice() {
    let mut fixture = Fixture::new();
    let a = add(fixture.store(), "a", &[]);
    let first = fixture.store().entry(&a).unwrap().unwrap().number;
    fixture.store().collect_garbage(&gc(GcAction::DeleteDead)).unwrap();
    let b = add(fixture.store(), "b", &[]);
    fixture.reopen();
    let c = add(fixture.store(), "c", &[]);
    let numbers: Vec<u32> = [&b, &c].iter().map(|p| fixture.store().entry(p).unwrap().unwrap().number).collect();
    assert!(first < numbers[0] && numbers[0] < numbers[1], "{first} {numbers:?}");
    let listed: Vec<u32> = fixture.store().list(0, 10).unwrap().iter().map(|root| root.number).collect();
    assert_eq!(listed, numbers);
    assert_eq!(fixture.store().by_number(numbers[1]).unwrap().unwrap().path, c);
    assert!(fixture.store().by_number(first).unwrap().is_none());
}

#[test]
fn a_wrong_output_path_in_a_derivation_is_refused() {
    let fixture = Fixture::new();
    let text = br#"Derive([("out","/nix/store/00000000000000000000000000000000-d","","")],[],[],"x","/b",[],[("out","/nix/store/00000000000000000000000000000000-d")])"#;
    let options = AddOptions {
        name: "d.drv".into(),
        method: Method::Text,
        algorithm: Algorithm::Sha256,
        references: BTreeSet::new(),
    };
    assert!(matches!(fixture.store().add(&options, &mut &text[..]), Err(Error::Derivation { .. })));
    assert!(fixture.store().all_valid_paths().unwrap().is_empty());
}

#[test]
fn dumps_are_scanned_for_references() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let a = add(store, "a", &[]);
    let b = add(store, "b", &[]);
    let text = format!("uses {}/bin/run", store.store_dir().display(&a));
    let dump = |out: &mut dyn Write| -> io::Result<()> {
        let mut nar = NarWriter::new(out);
        nar.regular_header(false, text.len() as u64).map_err(io::Error::other)?;
        nar.contents(text.as_bytes()).map_err(io::Error::other)?;
        nar.end_regular().map_err(io::Error::other)?;
        nar.finish().map_err(io::Error::other)?;
        Ok(())
    };
    let ingested = store.ingest_dump(dump, None, Some(&BTreeSet::from([a.clone(), b]))).unwrap();
    assert_eq!(ingested.nar.references, BTreeSet::from([a]));
}

#[test]
fn verification_finds_nothing_wrong_with_a_good_store() {
    let fixture = Fixture::new();
    let a = add(fixture.store(), "a", &[]);
    add(fixture.store(), "b", &[&a]);
    assert!(fixture.store().verify(true, &mut |_| ControlFlow::Continue(())).unwrap().is_empty());
}

#[test]
fn a_content_address_that_does_not_give_the_path_is_not_registered() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let bytes = nar("ca", 10);
    let ingested = store.import_nar(&mut &bytes[..], NarDigest::new(None, None)).unwrap();
    let ca = ContentAddress { method: Method::Nar, hash: Hash::Sha256(sha256(&bytes)) };
    let wrong = PathInfo { ca: Some(ca.clone()), ..info("ca", &bytes, &[]) };
    let register = |info: PathInfo| {
        store.register(vec![NewPath { info, node: ingested.node.clone(), pin: Some(ingested.pin.clone()) }])
    };
    assert!(matches!(register(wrong.clone()), Err(Error::ContentAddressMismatch { .. })));
    assert!(!store.is_valid(&wrong.path).unwrap());
    // Nor is one taken on by a path that is valid without it.
    register(PathInfo { ca: None, ..wrong.clone() }).unwrap();
    assert!(matches!(register(wrong.clone()), Err(Error::ContentAddressMismatch { .. })));
    assert_eq!(store.path_info(&wrong.path).unwrap().unwrap().ca, None);
    for refers_to_itself in [false, true] {
        let path = content_address_path(store.store_dir(), "ca", &ca, &BTreeSet::new(), refers_to_itself).unwrap();
        let references = refers_to_itself.then(|| path.clone()).into_iter().collect();
        register(PathInfo { path, references, ..wrong.clone() }).unwrap();
    }
}

#[test]
fn the_signatures_of_a_path_have_a_bound() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let path = add(store, "signed", &[]);
    let signature = |n: usize| Signature::from_parts(&format!("key-{n}"), &[7; 64]).unwrap();
    let long = Signature::from_parts(&"k".repeat(MAX_SIGNATURE_LENGTH), b"x").unwrap();
    assert!(matches!(store.add_signatures(&path, [long]), Err(Error::SignatureTooLong { .. })));
    store.add_signatures(&path, (0..MAX_SIGNATURES).map(signature)).unwrap();
    store.add_signatures(&path, [signature(0)]).unwrap();
    assert!(matches!(store.add_signatures(&path, [signature(1000)]), Err(Error::TooManySignatures { .. })));
    let count = || store.path_info(&path).unwrap().unwrap().signatures.len();
    assert_eq!(count(), MAX_SIGNATURES);

    // Registering it again succeeds, but is no way around the bound.
    let again = |signatures| {
        let entry = store.valid_entry(&path).unwrap();
        let info = PathInfo { signatures, ..entry.info };
        store.register(vec![NewPath { info, node: entry.node, pin: None }])
    };
    again(BTreeSet::from([signature(1000)])).unwrap();
    assert_eq!(count(), MAX_SIGNATURES);
    let refused = again((0..=MAX_SIGNATURES).map(signature).collect());
    assert!(matches!(refused, Err(Error::TooManySignatures { .. })));
}
