//! Inputs that fuzzing found worth keeping (see `fuzz/README.md`), put to the same demands again.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::fs;
use std::path::Path;

#[path = "../fuzz/src/lib.rs"]
#[expect(unreachable_pub, reason = "it is the whole of a crate elsewhere")]
mod properties;

/// Runs a target on each of its inputs.
fn replay(target: &str, property: fn(&[u8])) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(target);
    let mut inputs = 0;
    for entry in fs::read_dir(&directory).unwrap() {
        let file = entry.unwrap().path();
        // Shown only when it fails.
        println!("{}", file.display());
        property(&fs::read(&file).unwrap());
        inputs += 1;
    }
    assert!(inputs > 0, "no inputs in {}", directory.display());
}

macro_rules! targets {
    ($($target:ident,)*) => {
        const TARGETS: &[&str] = &[$(stringify!($target),)*];
        $(#[test]
        fn $target() {
            replay(stringify!($target), properties::$target);
        })*
    };
}

targets! {
    conf, content_address, derivation, frames, machines, nar, narinfo, request, serve, signature, store_path,
}

/// A target has inputs here and a binary there; nothing else lies about.
#[test]
fn every_target_is_replayed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let names = |directory: &Path| {
        let stem = |entry: fs::DirEntry| entry.path().file_stem().unwrap().to_str().unwrap().to_owned();
        let mut names: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| stem(entry.unwrap())).collect();
        names.sort();
        names
    };
    assert_eq!(names(&root.join("tests/corpus")), TARGETS);
    assert_eq!(names(&root.join("fuzz/fuzz_targets")), TARGETS);
}
