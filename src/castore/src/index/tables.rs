//! The database's tables before the database opens them: lengths in them that it would take memory by are checked.
//!
//! A table of fjall 3.1 is a tree of lsm-tree 3.1, in a directory of its own under `keyspaces/`. Both kinds of its files are
//! sections with a table of contents behind them (sfa 1.0). All integers are little-endian:
//!
//! | what | bytes |
//! |---|---|
//! | contents | `TOC!`, number of entries (4), the entries: position (8), length (8), length of name (2), name |
//! | trailer, the file's end | `SFA!`, 1, 0, XXH3-128 of the contents (16), position of the contents (8), their length (8) |
//! | `current` | number of the manifest `v<number>` (8), XXH3-128 of all of it (16), 0 |
//!
//! The database takes memory for as many entries as a file says to have before it compares the checksum, and never
//! compares the one in `current`: one flipped bit is 64 GiB, and the end of the process.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::xxh3_128;

use super::IndexError;

const CURRENT: &str = "current";
const CURRENT_LENGTH: usize = 8 + 16 + 1;
/// Bytes of a manifest: 33 for each file of the table, so more than any has.
const MAX_MANIFEST: u64 = 64 << 20;
const TRAILER: [u8; 6] = *b"SFA!\x01\x00";
const TRAILER_LENGTH: usize = TRAILER.len() + 16 + 8 + 8;
const CONTENTS: [u8; 4] = *b"TOC!";
/// An entry of the contents without its name.
const MIN_ENTRY: u64 = 8 + 8 + 2;

/// Looks at every table below `keyspaces`. What is not there, or was not written whole, is the database's affair.
pub(super) fn check(keyspaces: &Path) -> Result<(), IndexError> {
    for table in entries(keyspaces)? {
        check_manifest(&table)?;
        for file in entries(&table.join("tables"))? {
            check_contents(&file)?;
        }
    }
    Ok(())
}

fn check_manifest(table: &Path) -> Result<(), IndexError> {
    let current = table.join(CURRENT);
    let Some((file, length)) = open(&current)? else { return Ok(()) };
    let mut bytes = [0; CURRENT_LENGTH];
    if length != CURRENT_LENGTH as u64 {
        return Err(IndexError::Damaged { path: current });
    }
    file.read_exact_at(&mut bytes, 0).map_err(failed)?;
    let (number, checksum) = (word(&bytes), u128::from_le_bytes(array(&bytes[8..])));
    let path = table.join(format!("v{number}"));
    let Some((file, length)) = open(&path)? else { return Err(IndexError::Damaged { path: current }) };
    if length > MAX_MANIFEST {
        return Err(IndexError::Damaged { path });
    }
    // Not more than `MAX_MANIFEST`, and there: the file has that length.
    let mut manifest = vec![0; usize::try_from(length).unwrap_or(0)];
    file.read_exact_at(&mut manifest, 0).map_err(failed)?;
    if xxh3_128(&manifest) == checksum { Ok(()) } else { Err(IndexError::Damaged { path }) }
}

/// That the file's contents have room for the entries they claim. A file that has no contents is one that a crash kept
/// from being finished; the database removes it.
fn check_contents(path: &Path) -> Result<(), IndexError> {
    let Some((file, length)) = open(path)? else { return Ok(()) };
    let mut trailer = [0; TRAILER_LENGTH];
    let Some(end) = length.checked_sub(TRAILER_LENGTH as u64) else { return Ok(()) };
    file.read_exact_at(&mut trailer, end).map_err(failed)?;
    let start = word(&trailer[TRAILER.len() + 16..]);
    let mut head = [0; CONTENTS.len() + 4];
    let Some(room) = start.checked_add(head.len() as u64).and_then(|start| end.checked_sub(start)) else {
        return Ok(());
    };
    file.read_exact_at(&mut head, start).map_err(failed)?;
    let entries = u64::from(u32::from_le_bytes(array(&head[CONTENTS.len()..])));
    let claims = trailer.starts_with(&TRAILER) && head.starts_with(&CONTENTS);
    if claims && entries > room / MIN_ENTRY { Err(IndexError::Damaged { path: path.to_owned() }) } else { Ok(()) }
}

/// What is in a directory; nothing when there is none.
fn entries(dir: &Path) -> Result<Vec<PathBuf>, IndexError> {
    match std::fs::read_dir(dir) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(Vec::new()),
        entries => entries
            .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>())
            .map_err(failed),
    }
}

fn open(path: &Path) -> Result<Option<(File, u64)>, IndexError> {
    match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        file => file
            .and_then(|file| {
                let length = file.metadata()?.len();
                Ok(Some((file, length)))
            })
            .map_err(failed),
    }
}

fn word(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(array(bytes))
}

/// The first bytes of what is at least as long.
fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.first_chunk().copied().unwrap_or([0; N])
}

fn failed(source: io::Error) -> IndexError {
    IndexError::Database { doing: "checking the tables", source: fjall::Error::Io(source) }
}

#[cfg(test)]
mod tests {
    use super::super::{Batch, Index, IndexOptions};
    use super::*;

    /// An index that has written a table; its files `v*` that are current, and its tables' files.
    fn written(dir: &Path) -> (Vec<PathBuf>, Vec<PathBuf>) {
        for round in 0..3u8 {
            let options = IndexOptions { memtable_bytes: 1 << 10, ..IndexOptions::default() };
            let index = Index::open(dir, &options).unwrap();
            let table = index.table("one").unwrap();
            let mut batch = Batch::new();
            batch.put(table, &[round], vec![round; 100_000]);
            index.commit(batch).unwrap();
            index.sync().unwrap();
        }
        let (mut manifests, mut files) = (Vec::new(), Vec::new());
        for table in entries(&dir.join("keyspaces")).unwrap() {
            let current = std::fs::read(table.join(CURRENT)).unwrap();
            manifests.push(table.join(format!("v{}", word(&current))));
            files.extend(entries(&table.join("tables")).unwrap());
        }
        assert!(!files.is_empty(), "no table was written");
        (manifests, files)
    }

    /// Flips these bits of a file, one at a time, each a byte and a bit of it: none is opened.
    fn refused(dir: &Path, path: &Path, bits: impl Iterator<Item = (u64, u64)>) {
        let file = File::options().write(true).open(path).unwrap();
        let bytes = std::fs::read(path).unwrap();
        for (at, bit) in bits {
            let was = bytes[at as usize];
            file.write_all_at(&[was ^ (1 << bit)], at).unwrap();
            match Index::open(dir, &IndexOptions::default()).map(drop) {
                Err(IndexError::Damaged { path: damaged }) => assert_eq!(damaged, path),
                other => panic!("byte {at} of {}: {other:?}", path.display()),
            }
            file.write_all_at(&[was], at).unwrap();
        }
    }

    #[test]
    fn a_count_that_cannot_be_takes_no_memory() {
        let dir = tempfile::tempdir().unwrap();
        let index = dir.path().join("index");
        let (_, files) = written(&index);
        for file in files {
            let bytes = std::fs::read(&file).unwrap();
            let contents = word(&bytes[bytes.len() - 16..]);
            refused(&index, &file, (0..8).map(|bit| (contents + 7, bit)));
        }
        Index::open(&index, &IndexOptions::default()).unwrap();
    }

    #[test]
    fn a_manifest_is_what_was_written_or_refused() {
        let dir = tempfile::tempdir().unwrap();
        let index = dir.path().join("index");
        let (manifests, _) = written(&index);
        for manifest in manifests {
            refused(&index, &manifest, (0..manifest.metadata().unwrap().len()).map(|at| (at, at % 8)));
        }
        Index::open(&index, &IndexOptions::default()).unwrap();
    }

    #[test]
    fn a_table_that_was_not_finished_is_no_damage() {
        let dir = tempfile::tempdir().unwrap();
        let index = dir.path().join("index");
        let (_, files) = written(&index);
        for bytes in [&b""[..], &[0; 100], &[0xff; 100]] {
            std::fs::write(files[0].with_file_name("1000"), bytes).unwrap();
            Index::open(&index, &IndexOptions::default()).unwrap();
        }
    }
}
