//! The formats that every byte or every request goes through: NARs and the worker protocol. `cargo bench -p nix-compat`.

#![expect(clippy::unwrap_used, reason = "a benchmark that cannot go on may end")]

use std::hint::black_box;
use std::io::Read;

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use nix_compat::nar::{NarReader, NarWriter};
use nix_compat::path_info::PathInfo;
use nix_compat::store_path::{StoreDir, StorePath};
use nix_compat::wire::{Reader, Writer};
use nix_compat::worker::{Features, Protocol, Request, Response};

/// A NAR has so many bytes of contents. In a test run, where each is run once, a little will do.
const CONTENTS: usize = if cfg!(debug_assertions) { 1 << 20 } else { 16 << 20 };
/// Requests in one buffer.
const REQUESTS: usize = 1000;

fn main() {
    divan::main();
}

fn contents(size: usize) -> Vec<u8> {
    (0..size).map(|n| (n * n / 7) as u8).collect()
}

/// One directory of files with these contents, [`CONTENTS`] bytes of them in all, put into `out` in place of what is there.
fn nar(contents: &[u8], mut out: Vec<u8>) -> Vec<u8> {
    out.clear();
    let mut nar = NarWriter::new(out);
    nar.enter_directory().unwrap();
    for number in 0..CONTENTS / contents.len() {
        nar.entry(format!("file-{number:06}").as_bytes()).unwrap();
        nar.regular_header(false, contents.len() as u64).unwrap();
        nar.contents(contents).unwrap();
        nar.end_regular().unwrap();
    }
    nar.leave_directory().unwrap();
    nar.finish().unwrap()
}

#[divan::bench(args = [1 << 10, 16 << 10, CONTENTS])]
fn read_nar(bencher: Bencher<'_, '_>, file: usize) {
    let nar = nar(&contents(file), Vec::new());
    bencher.counter(BytesCount::new(nar.len())).bench(|| {
        let (mut reader, mut buffer) = (NarReader::new(nar.as_slice()), vec![0; 256 << 10]);
        loop {
            use nix_compat::nar::NarEvent as E;
            match reader.next().unwrap() {
                // Whoever reads has a use for the bytes, or they would not be copied.
                E::Regular { .. } => while reader.contents().read(black_box(&mut buffer)).unwrap() > 0 {},
                E::End => break,
                _ => {}
            }
        }
    });
}

#[divan::bench(args = [1 << 10, 16 << 10, CONTENTS])]
fn write_nar(bencher: Bencher<'_, '_>, file: usize) {
    let contents = contents(file);
    // New memory would cost more than writing does.
    let mut out = nar(&contents, Vec::new());
    let write = || out = nar(black_box(&contents), std::mem::take(&mut out));
    bencher.counter(BytesCount::new(CONTENTS)).bench_local(write);
}

fn protocol() -> Protocol {
    Protocol { minor: 38, features: Features::ALL, store_dir: StoreDir::default() }
}

fn path(number: usize) -> StorePath {
    StorePath::from_parts([number as u8; 20], &format!("a-package-{number}")).unwrap()
}

#[divan::bench]
fn decode_requests(bencher: Bencher<'_, '_>) {
    let mut writer = Writer::new();
    for number in 0..REQUESTS {
        Request::QueryPathInfo(path(number)).encode(&protocol(), &mut writer);
    }
    let protocol = protocol();
    bencher.counter(ItemsCount::new(REQUESTS)).bench(|| {
        let mut reader = Reader::new(writer.as_bytes());
        for _ in 0..REQUESTS {
            black_box(Request::decode(&mut reader, &protocol).unwrap());
        }
    });
}

#[divan::bench]
fn encode_path_infos(bencher: Bencher<'_, '_>) {
    let response = Response::PathInfo(Some(PathInfo {
        path: path(0),
        deriver: Some(path(1)),
        nar_hash: [7; 32].into(),
        references: (2..22).map(path).collect(),
        registration_time: 1,
        nar_size: 123_456,
        ultimate: false,
        signatures: [].into(),
        ca: None,
    }));
    let protocol = protocol();
    bencher.counter(ItemsCount::new(REQUESTS)).bench(|| {
        let mut writer = Writer::new();
        for _ in 0..REQUESTS {
            response.encode(&protocol, &mut writer);
        }
        writer
    });
}
