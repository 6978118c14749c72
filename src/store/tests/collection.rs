//! Collecting garbage.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;

use common::{Fixture, add, gc, info, nar};
use nix_compat::content_address::{ContentAddress, Method};
use nix_compat::hash::{Algorithm, Hash, sha256};
use nix_compat::store_path::{StorePath, content_address_path};
use store::nar_digest::NarDigest;
use store::{AddOptions, Error, GcAction, NewPath, Store};

#[test]
fn collection_keeps_what_roots_reach() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let a = add(store, "a", &[]);
    let b = add(store, "b", &[&a]);
    let c = add(store, "c", &[&a]);
    let link = fixture.dir.path().join("result");
    std::os::unix::fs::symlink(store.store_dir().display(&b), &link).unwrap();
    store.add_indirect_root(&link).unwrap();
    assert!(
        store.find_roots().unwrap().iter().any(|root| root.path == b && root.link == link.to_str().unwrap().as_bytes())
    );

    let dead = store.collect_garbage(&gc(GcAction::ReturnDead)).unwrap().paths;
    assert_eq!(dead, BTreeSet::from([c.clone()]));
    let held = store.new_temp_roots();
    held.add(&c);
    assert!(store.collect_garbage(&gc(GcAction::DeleteDead)).unwrap().paths.is_empty());
    drop(held);
    assert_eq!(store.collect_garbage(&gc(GcAction::DeleteDead)).unwrap().paths, BTreeSet::from([c]));

    let refused = store.collect_garbage(&gc(GcAction::DeleteSpecific(BTreeSet::from([a.clone()]))));
    assert!(matches!(refused, Err(Error::Alive(_))));
    std::fs::remove_file(&link).unwrap();
    let outcome = store.collect_garbage(&gc(GcAction::DeleteDead)).unwrap();
    assert_eq!(outcome.paths, BTreeSet::from([a, b]));
    assert!(store.all_valid_paths().unwrap().is_empty());
}

#[test]
fn an_import_that_is_not_registered_survives_a_sweep_as_long_as_it_is_pinned() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let bytes = nar("pinned", 200_000);
    let ingested = store.import_nar(&mut &bytes[..], NarDigest::new(None, None)).unwrap();
    // Deleting something wakes the sweeper, which has to wait for the pin.
    add(store, "dead", &[]);
    store.collect_garbage(&gc(GcAction::DeleteDead)).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(300));
    let info = info("pinned", &bytes, &[]);
    let path = info.path.clone();
    store.register(vec![NewPath { info, node: ingested.node, pin: Some(ingested.pin) }]).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(500));
    let mut out = Vec::new();
    store.write_nar(&path, &mut out).unwrap();
    assert!(out == bytes);
}

#[test]
fn a_root_counts_however_deep_it_lies() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let a = add(store, "a", &[]);
    let mut dir = fixture.dir.path().join("gcroots");
    (0..40).for_each(|_| dir.push("deeper"));
    std::fs::create_dir_all(&dir).unwrap();
    std::os::unix::fs::symlink(store.store_dir().display(&a), dir.join("root")).unwrap();
    // A loop of links is not entered, and a file among the directories is no trouble.
    std::os::unix::fs::symlink(fixture.dir.path().join("gcroots"), dir.join("loop")).unwrap();
    std::fs::write(fixture.dir.path().join("profiles"), "").unwrap();
    assert!(store.collect_garbage(&gc(GcAction::DeleteDead)).unwrap().paths.is_empty());
    assert!(store.is_valid(&a).unwrap());
}

#[test]
fn a_dead_path_that_is_added_again_is_kept_by_the_roots_it_was_added_under() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let options = AddOptions {
        name: "text".into(),
        method: Method::Text,
        algorithm: Algorithm::Sha256,
        references: BTreeSet::new(),
    };
    let path = store.add(&options, &mut &b"contents"[..]).unwrap().path;
    let roots = store.new_temp_roots();
    assert_eq!(store.add_rooted(&options, &roots, &mut &b"contents"[..]).unwrap().path, path);
    assert!(store.collect_garbage(&gc(GcAction::DeleteDead)).unwrap().paths.is_empty());
    drop(roots);
    assert_eq!(store.collect_garbage(&gc(GcAction::DeleteDead)).unwrap().paths, BTreeSet::from([path]));
}

/// A derivation with a fixed output; `note` makes it another one with the same output.
fn fixed(store: &Store, note: &str, inputs: &[&StorePath]) -> (StorePath, StorePath) {
    let dir = store.store_dir();
    let ca = ContentAddress { method: Method::Flat, hash: Hash::Sha256(sha256(b"output")) };
    let output = content_address_path(dir, "d", &ca, &BTreeSet::new(), false).unwrap();
    let hex: String = sha256(b"output").iter().map(|byte| format!("{byte:02x}")).collect();
    let out = dir.display(&output);
    let inputs: BTreeSet<StorePath> = inputs.iter().map(|input| (*input).clone()).collect();
    let list: Vec<String> = inputs.iter().map(|input| format!(r#"("{}",["out"])"#, dir.display(input))).collect();
    let list = list.join(",");
    let text = format!(
        r#"Derive([("out","{out}","sha256","{hex}")],[{list}],[],"x","/b",[],[("note","{note}"),("out","{out}")])"#
    );
    let options =
        AddOptions { name: "d.drv".into(), method: Method::Text, algorithm: Algorithm::Sha256, references: inputs };
    (store.add(&options, &mut text.as_bytes()).unwrap().path, output)
}

#[test]
fn an_output_keeps_the_derivation_it_was_built_from_and_no_other() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let (built, output) = fixed(store, "built", &[]);
    let (other, _) = fixed(store, "other", &[]);
    let ingested = store.ingest_dump(
        |out| {
            let mut nar = nix_compat::nar::NarWriter::new(out);
            nar.regular_header(false, 6).map_err(std::io::Error::other)?;
            nar.contents(b"output").map_err(std::io::Error::other)?;
            nar.end_regular().map_err(std::io::Error::other)?;
            nar.finish().map(drop).map_err(std::io::Error::other)
        },
        None,
        None,
    );
    let ingested = ingested.unwrap();
    let mut info = info("d", b"", &[]);
    (info.path, info.nar_hash, info.nar_size) = (output.clone(), ingested.nar.nar_hash, ingested.nar.nar_size);
    info.deriver = Some(built.clone());
    store.register(vec![NewPath { info, node: ingested.node, pin: Some(ingested.pin) }]).unwrap();
    assert_eq!(store.valid_derivers(&output).unwrap().len(), 2);
    let roots = store.new_temp_roots();
    roots.add(&output);
    let dead = store.collect_garbage(&gc(GcAction::DeleteDead)).unwrap().paths;
    assert_eq!(dead, BTreeSet::from([other]));
    assert_eq!(store.valid_derivers(&output).unwrap().into_keys().collect::<Vec<_>>(), [built]);
}
