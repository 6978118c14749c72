//! The search for references, which sees every byte of an output. `cargo bench -p store`.

#![expect(clippy::unwrap_used, reason = "a benchmark that cannot go on may end")]

use divan::Bencher;
use divan::counter::BytesCount;
use nix_compat::store_path::StorePath;
use store::ReferenceScanner;

/// In a test run, where each is run once, a little will do.
const BYTES: usize = if cfg!(debug_assertions) { 1 << 20 } else { 64 << 20 };
const PIECE: usize = 256 << 10;

fn main() {
    divan::main();
}

/// In text most characters can be part of a hash, so the search cannot skip as far as in a program.
#[divan::bench(args = [("binary", 10), ("binary", 1000), ("text", 10), ("text", 1000)])]
fn references(bencher: Bencher<'_, '_>, (kind, candidates): (&str, usize)) {
    let paths: Vec<_> =
        (0..candidates).map(|n| StorePath::from_parts(*disorder(n).first_chunk().unwrap(), "name").unwrap()).collect();
    let bytes: Vec<u8> = (0..BYTES / 32).flat_map(disorder).collect();
    let bytes = match kind {
        "text" => bytes.iter().map(|byte| b"0123456789abcdfghijklmnpqrsvwxyz"[usize::from(byte % 32)]).collect(),
        _ => bytes,
    };
    bencher.counter(BytesCount::new(BYTES)).bench(|| {
        let mut scanner = ReferenceScanner::new(&paths);
        bytes.chunks(PIECE).for_each(|piece| scanner.feed(piece));
        scanner.into_found()
    });
}

/// Bytes without an order, others for each number.
fn disorder(number: usize) -> [u8; 32] {
    let mut state = (number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    std::array::from_fn(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    })
}
