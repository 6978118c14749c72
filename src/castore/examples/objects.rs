//! Prints how fast objects go into a store and come out: `cargo run -p castore --example objects [DIR]`.
//!
//! The objects are pieces of the files below DIR (default `/usr/lib`), at most [`BYTES`] in all, hashed beforehand.

use std::path::Path;
use std::time::Instant;

use castore::Digest;
use castore::objects::{ObjectKey, ObjectKind, ObjectStore, Options};

const BYTES: usize = 512 << 20;
const PIECE: usize = 32 << 10;
const TINY: usize = 2000;

fn gather(dir: &Path, objects: &mut Vec<(ObjectKey, Vec<u8>)>, left: &mut usize) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() {
            gather(&entry.path(), objects, left);
        } else if kind.is_file()
            && let Ok(contents) = std::fs::read(entry.path())
        {
            for piece in contents.chunks(PIECE) {
                if *left < piece.len() {
                    return;
                }
                *left -= piece.len();
                let key = ObjectKey { kind: ObjectKind::Chunk, digest: Digest::of(piece) };
                objects.push((key, piece.to_vec()));
            }
        }
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let source = std::env::args().nth(1).unwrap_or_else(|| "/usr/lib".into());
    let mut objects = Vec::new();
    gather(Path::new(&source), &mut objects, &mut { BYTES });
    let bytes: usize = objects.iter().map(|(_, contents)| contents.len()).sum();
    let dir = std::env::temp_dir().join(format!("castore-objects-{}", std::process::id()));
    let report = |what: &str, began: Instant, count: usize, bytes: usize| {
        let seconds = began.elapsed().as_secs_f64();
        let rate = bytes as f64 / 1e6 / seconds;
        println!("{what:28} {seconds:7.3} s {rate:8.1} MB/s {:10.0} objects/s", count as f64 / seconds);
    };

    let store = ObjectStore::open(&dir, Options::default())?;
    let began = Instant::now();
    let mut writer = store.writer();
    for (key, contents) in &objects {
        writer.put(*key, contents)?;
    }
    writer.flush()?;
    report("put", began, objects.len(), bytes);
    let began = Instant::now();
    store.sync()?;
    report("sync", began, 1, 0);
    let began = Instant::now();
    for (key, contents) in &objects {
        writer.put(*key, contents)?;
    }
    writer.flush()?;
    report("put again", began, objects.len(), bytes);

    let read_all = |what: &str, store: &ObjectStore| -> Result<(), castore::objects::ObjectError> {
        let began = Instant::now();
        for (key, _) in &objects {
            std::hint::black_box(store.get(key)?);
        }
        report(what, began, objects.len(), bytes);
        Ok(())
    };
    read_all("get in order", &store)?;
    println!("{:?}", store.stats());
    drop((writer, store));
    let began = Instant::now();
    let store = ObjectStore::open(&dir, Options::default())?;
    report("open", began, 1, 0);
    read_all("get in order, reopened", &store)?;

    let mut order: Vec<usize> = (0..objects.len()).collect();
    order.sort_by_key(|&number| Digest::of(&number.to_le_bytes()).as_bytes()[0..8].to_vec());
    order.truncate(4000);
    let began = Instant::now();
    let mut read = 0;
    for &number in &order {
        read += store.get(&objects[number].0)?.map_or(0, |contents| contents.len());
    }
    report("get at random", began, order.len(), read);

    for (what, durable) in [("tiny imports", false), ("tiny imports, each durable", true)] {
        let began = Instant::now();
        for number in 0..TINY {
            let contents = format!("{what} {number}").into_bytes();
            let key = ObjectKey { kind: ObjectKind::Chunk, digest: Digest::of(&contents) };
            let mut writer = store.writer();
            writer.put(key, &contents)?;
            writer.flush()?;
            if durable {
                store.sync()?;
            }
        }
        report(what, began, TINY, 0);
    }
    drop(store);
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}
