//! Realisations, and collections that look at some paths only.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;

use common::{Fixture, add, gc, gc_of};
use nix_compat::content_address::{ContentAddress, Method};
use nix_compat::derivation::{HashModulo, OutputName};
use nix_compat::hash::{Algorithm, Hash, sha256};
use nix_compat::realisation::{DrvOutput, Realisation};
use nix_compat::store_path::{StorePath, content_address_path};
use store::{AddOptions, Error, GcAction, SignaturePolicy, Store};

fn by_hash(byte: u8) -> DrvOutput {
    DrvOutput::Modulo { hash: [byte; 32], output: "out".parse().unwrap() }
}

fn by_path(name: &str) -> DrvOutput {
    let drv = StorePath::from_parts([9; 20], &format!("{name}.drv")).unwrap();
    DrvOutput::Path { drv, output: "out".parse().unwrap() }
}

fn register(store: &Store, id: DrvOutput, path: &StorePath) -> Result<(), Error> {
    store.register_realisation(&Realisation::new(id, path.clone()), SignaturePolicy::DontCheck)
}

#[test]
fn a_realisation_is_known_under_its_own_name_also_after_reopening() {
    let mut fixture = Fixture::new();
    let path = add(fixture.store(), "a", &[]);
    for id in [by_hash(1), by_path("a")] {
        assert_eq!(fixture.store().realisation(&id).unwrap(), None);
        register(fixture.store(), id, &path).unwrap();
    }
    fixture.store().sync().unwrap();
    fixture.reopen();
    for id in [by_hash(1), by_path("a")] {
        let known = fixture.store().realisation(&id).unwrap().unwrap();
        assert_eq!(known, Realisation::new(id, path.clone()));
    }
    assert_eq!(fixture.store().realisation(&by_hash(2)).unwrap(), None);
    // The same digest, another derivation.
    assert_eq!(fixture.store().realisation(&by_path("b")).unwrap(), None);
}

#[test]
fn signatures_add_up_and_another_path_is_a_conflict() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let (a, b) = (add(store, "a", &[]), add(store, "b", &[]));
    let mut all = BTreeSet::new();
    for text in ["one:AAAA", "two:AAAA", "one:AAAA"] {
        let mut realisation = Realisation::new(by_hash(1), a.clone());
        realisation.signatures.insert(text.parse().unwrap());
        store.register_realisation(&realisation, SignaturePolicy::DontCheck).unwrap();
        all.extend(realisation.signatures);
    }
    assert_eq!(store.realisation(&by_hash(1)).unwrap().unwrap().signatures, all);
    assert!(matches!(register(store, by_hash(1), &b), Err(Error::RealisationConflict { .. })));
    assert_eq!(store.realisation(&by_hash(1)).unwrap().unwrap().out_path, a);
}

#[test]
fn an_unsigned_claim_and_an_invalid_path_are_refused() {
    let fixture = Fixture::new();
    let path = add(fixture.store(), "a", &[]);
    let mut claim = Realisation::new(by_hash(1), path);
    claim.signatures.insert("somebody:AAAA".parse().unwrap());
    let refused = fixture.store().register_realisation(&claim, SignaturePolicy::Require(&[]));
    assert!(matches!(refused, Err(Error::UntrustedRealisation(_))));
    let nowhere = StorePath::from_parts([1; 20], "nowhere").unwrap();
    assert!(matches!(register(fixture.store(), by_hash(1), &nowhere), Err(Error::NotValid(_))));
    assert_eq!(fixture.store().realisation(&by_hash(1)).unwrap(), None);
}

#[test]
fn realisations_go_with_their_path_and_only_with_it() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let (gone, kept) = (add(store, "gone", &[]), add(store, "kept", &[]));
    for (id, path) in [(by_hash(1), &gone), (by_path("x"), &gone), (by_hash(2), &kept)] {
        register(store, id, path).unwrap();
    }
    let held = store.new_temp_roots();
    held.add(&kept);
    assert_eq!(store.collect_garbage(&gc(GcAction::DeleteDead)).unwrap().paths, BTreeSet::from([gone.clone()]));
    assert_eq!(store.realisation(&by_hash(1)).unwrap(), None);
    assert_eq!(store.realisation(&by_path("x")).unwrap(), None);
    assert!(store.realisation(&by_hash(2)).unwrap().is_some());
    // The name is free for another path now.
    register(store, by_hash(1), &kept).unwrap();
}

fn add_derivation(store: &Store, name: &str, text: &str) -> StorePath {
    let (method, algorithm) = (Method::Text, Algorithm::Sha256);
    let options = AddOptions { name: name.to_owned(), method, algorithm, references: BTreeSet::new() };
    store.add(&options, &mut text.as_bytes()).unwrap().path
}

#[test]
fn a_floating_output_is_known_by_its_realisation() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let text = r#"Derive([("out","","r:sha256","")],[],[],"x","/b",[],[("out","")])"#;
    let drv = add_derivation(store, "floating.drv", text);
    let out: OutputName = "out".parse().unwrap();
    assert_eq!(store.output_map(&drv).unwrap()[&out], None);
    let path = add(store, "a", &[]);
    register(store, DrvOutput::Path { drv: drv.clone(), output: out.clone() }, &path).unwrap();
    assert_eq!(store.output_map(&drv).unwrap()[&out], Some(path));
}

#[test]
fn what_was_registered_by_hash_is_found_by_a_valid_derivation() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let dir = store.store_dir();
    let ca = ContentAddress { method: Method::Flat, hash: Hash::Sha256(sha256(b"x")) };
    let out_path = content_address_path(dir, "d", &ca, &BTreeSet::new(), false).unwrap();
    let (shown, hex) = (dir.display(&out_path), ca.hash.to_base16());
    let text = format!(r#"Derive([("out","{shown}","sha256","{hex}")],[],[],"x","/b",[],[("out","{shown}")])"#);
    let drv = add_derivation(store, "d.drv", &text);
    let out: OutputName = "out".parse().unwrap();
    let HashModulo::Fixed(hashes) = store.hash_modulo(&drv).unwrap() else { panic!() };
    let by_path = DrvOutput::Path { drv, output: out.clone() };
    let path = add(store, "a", &[]);
    assert_eq!(store.realisation(&by_path).unwrap(), None);
    register(store, DrvOutput::Modulo { hash: hashes[&out], output: out }, &path).unwrap();
    assert_eq!(store.realisation(&by_path).unwrap(), Some(Realisation::new(by_path, path)));
}

#[test]
fn a_collection_of_some_paths_leaves_the_others_alone() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let a = add(store, "a", &[]);
    let b = add(store, "b", &[&a]);
    let c = add(store, "c", &[&b]);
    let other = add(store, "other", &[]);
    let collect = |options| store.collect_garbage(&options).unwrap().paths;
    assert_eq!(collect(gc_of(GcAction::ReturnDead, [&b], false)), BTreeSet::from([b.clone()]));
    let dead = BTreeSet::from([b.clone(), c.clone()]);
    assert_eq!(collect(gc_of(GcAction::ReturnDead, [&b], true)), dead);
    // Without its referrers it cannot go, and that is no error for the dead among given paths.
    assert!(collect(gc_of(GcAction::DeleteDead, [&b], false)).is_empty());
    let held = store.new_temp_roots();
    held.add(&c);
    assert!(collect(gc_of(GcAction::DeleteDead, [&b], true)).is_empty());
    let refused = store.collect_garbage(&gc_of(GcAction::DeleteSpecific, [&b], true));
    assert!(matches!(refused, Err(Error::Alive(_))));
    drop(held);
    assert_eq!(collect(gc_of(GcAction::DeleteSpecific, [&b], true)), dead);
    assert_eq!(store.all_valid_paths().unwrap(), BTreeSet::from([a, other]));
}
