//! What each byte costs that comes into the castore: BLAKE3, cutting, and for what is new compression and the pack.
//! `cargo bench -p castore`.

#![expect(clippy::unwrap_used, reason = "a benchmark that cannot go on may end")]

use castore::engine::{Engine, Options};
use divan::Bencher;
use divan::counter::BytesCount;

/// In a test run, where each is run once, a little will do.
const BLOB: usize = if cfg!(debug_assertions) { 1 << 20 } else { 64 << 20 };

fn main() {
    divan::main();
}

/// Bytes that cannot be compressed; others for each `seed`.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..length / 8).flat_map(|_| next().to_le_bytes()).collect()
}

/// Text of a few words, in an order that does not repeat.
fn text(seed: u64, length: usize) -> Vec<u8> {
    const WORDS: [&str; 8] = ["store ", "path ", "derivation ", "closure\n", "the ", "of ", "output ", "/nix/store/ "];
    let words = noise(seed, length / 4);
    words.iter().flat_map(|byte| WORDS[usize::from(byte % 8)].bytes()).take(length).collect()
}

fn put(engine: &Engine, mut bytes: &[u8]) {
    let mut session = engine.session();
    session.put_blob(&mut bytes).unwrap();
    session.flush().unwrap();
}

/// Cutting and hashing alone: nothing is written.
#[divan::bench]
fn known(bencher: Bencher<'_, '_>) {
    let dir = tempfile::tempdir().unwrap();
    let engine = Engine::open(dir.path(), Options::default()).unwrap();
    let blob = noise(1, BLOB);
    put(&engine, &blob);
    bencher.counter(BytesCount::new(BLOB)).bench(|| put(&engine, &blob));
}

#[divan::bench(args = ["noise", "text"], sample_count = 10)]
fn new(bencher: Bencher<'_, '_>, kind: &str) {
    let dir = tempfile::tempdir().unwrap();
    let engine = Engine::open(dir.path(), Options::default()).unwrap();
    let mut seed = 0;
    bencher
        .counter(BytesCount::new(BLOB))
        .with_inputs(|| {
            seed += 1;
            if kind == "text" { text(seed, BLOB) } else { noise(seed, BLOB) }
        })
        .bench_local_refs(|blob| put(&engine, blob));
}
