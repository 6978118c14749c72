//! The database's journal before the database reads it: a last batch that a crash tore is cut off.
//!
//! fjall cuts off a batch that ends too early. But pages of a batch that was not synced reach the disk in any order, so a
//! batch can have its end and lack a page before: inside of a long value that is a checksum that does not match, and fjall
//! then refuses to open the database at all. It also cuts off whatever follows a batch it cannot read the lengths of,
//! which in the middle of a journal is no torn batch but damage, and what follows had been durable.
//!
//! A batch is synced before the next is written ([`super::flusher`]), so only the last one of the newest journal can be
//! torn: it is cut off when no batch follows it, and is an error when one does.
//!
//! The bytes, all little-endian, by fjall 3.1 (`journal/entry.rs`; there is a test that its journals are read):
//!
//! | what | bytes |
//! |---|---|
//! | start | 1, number of items (4), sequence number (8) |
//! | item | 2, kind (1), compression (1, 0 for none), table (8), length of key (2), of value (4), of value as stored (4), key, value |
//! | clear | 4, table (8); counts as an item |
//! | end | 3, XXH3 of all items (8), `FJL`, 3 |

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use xxhash_rust::xxh3::Xxh3;

use super::IndexError;

const START: u8 = 1;
const ITEM: u8 = 2;
const END: u8 = 3;
const CLEAR: u8 = 4;
const TRAILER: [u8; 4] = *b"FJL\x03";
/// An item before its key: kind, compression, table, the three lengths.
const ITEM_HEADER: usize = 20;
/// The file a database locks, how often that is tried, and after which pause again.
const LOCK: &str = "lock";
const LOCK_ATTEMPTS: usize = 3;
const LOCK_PAUSE: Duration = Duration::from_millis(100);
/// Bytes read at a time.
const BUFFER: usize = 256 << 10;
/// What is looked through behind a torn batch, in bytes: more than any batch has. All that counts as torn is within it.
const MAX_TAIL: u64 = 256 << 20;

/// Looks at the newest journal in `dir`, if there is one.
pub(super) fn cut_torn_batch(dir: &Path) -> Result<(), IndexError> {
    let failed = |doing| move |error| IndexError::Database { doing, source: fjall::Error::Io(error) };
    let Some(path) = newest(dir).map_err(failed("looking for the journal"))? else { return Ok(()) };
    let _lock = lock(dir)?;
    let file = OpenOptions::new().read(true).write(true).open(&path).map_err(failed("opening the journal"))?;
    let mut reader = BufReader::with_capacity(BUFFER, &file);
    let mut offset = 0;
    while let Some(length) = batch(&mut reader).map_err(failed("reading the journal"))? {
        offset += length;
    }
    let tail = tail(&file, offset).map_err(failed("reading the journal"))?;
    // Space that was set aside and not written yet is zero.
    if tail.is_empty() {
        return Ok(());
    }
    for at in (1..tail.len()).filter(|&at| tail[at] == START) {
        if batch(&mut &tail[at..]).map_err(failed("reading the journal"))?.is_some() {
            return Err(IndexError::Journal { path, offset });
        }
    }
    tracing::info!(path = %path.display(), offset, bytes = tail.len(), "cutting a torn batch off the index's journal");
    file.set_len(offset).and_then(|()| file.sync_all()).map_err(failed("cutting off a torn batch of the journal"))
}

/// The database's own lock, lest the journal of one that is in use be cut. The database waits as long for it.
fn lock(dir: &Path) -> Result<Option<File>, IndexError> {
    let failed = |error| IndexError::Database { doing: "locking", source: fjall::Error::Io(error) };
    let file = match OpenOptions::new().read(true).write(true).open(dir.join(LOCK)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(failed)?,
    };
    for _ in 0..LOCK_ATTEMPTS {
        match file.try_lock() {
            Ok(()) => return Ok(Some(file)),
            Err(TryLockError::WouldBlock) => std::thread::sleep(LOCK_PAUSE),
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
    }
    Err(IndexError::Locked(dir.to_owned()))
}

/// The journal with the highest number.
fn newest(dir: &Path) -> io::Result<Option<PathBuf>> {
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        entries => entries?,
    };
    let mut newest = None;
    for entry in entries {
        let path = entry?.path();
        let number = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".jnl")?.parse::<u64>().ok());
        newest = newest.max(number.map(|number| (number, path)));
    }
    Ok(newest.map(|(_, path)| path))
}

/// What is in the file from `offset` on, up to the last byte that is not zero.
fn tail(mut file: &File, offset: u64) -> io::Result<Vec<u8>> {
    file.seek(SeekFrom::Start(offset))?;
    let mut tail = Vec::new();
    let (mut buffer, mut zeros) = (vec![0; BUFFER], 0);
    loop {
        let read = match file.read(&mut buffer) {
            Ok(0) => return Ok(tail),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => read?,
        };
        match buffer[..read].iter().rposition(|&byte| byte != 0) {
            None => zeros += read,
            Some(last) => {
                tail.resize(tail.len() + zeros, 0);
                tail.extend_from_slice(&buffer[..=last]);
                zeros = read - last - 1;
            }
        }
        if tail.len() as u64 + zeros as u64 >= MAX_TAIL {
            return Ok(tail);
        }
    }
}

/// The length of the batch that `reader` begins with, or None when there is no whole one. Only what is read is hashed, and
/// nothing is held of it.
fn batch(reader: &mut dyn Read) -> io::Result<Option<u64>> {
    match whole_batch(reader) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        result => result,
    }
}

fn whole_batch(reader: &mut dyn Read) -> io::Result<Option<u64>> {
    let start: [u8; 13] = array(reader)?;
    if start[0] != START {
        return Ok(None);
    }
    let mut length = start.len() as u64;
    let mut hasher = Xxh3::default();
    for _ in 0..u32::from_le_bytes([start[1], start[2], start[3], start[4]]) {
        let [tag] = array(reader)?;
        hasher.update(&[tag]);
        length += 1;
        match tag {
            ITEM => {
                let header: [u8; ITEM_HEADER] = array(reader)?;
                hasher.update(&header);
                let key = u16::from_le_bytes([header[10], header[11]]);
                let value = u32::from_le_bytes([header[16], header[17], header[18], header[19]]);
                let rest = u64::from(key) + u64::from(value);
                hash(reader, rest, &mut hasher)?;
                length += ITEM_HEADER as u64 + rest;
            }
            CLEAR => {
                hash(reader, 8, &mut hasher)?;
                length += 8;
            }
            _ => return Ok(None),
        }
    }
    let end: [u8; 13] = array(reader)?;
    let whole = end[0] == END && end[1..9] == hasher.digest().to_le_bytes() && end[9..] == TRAILER;
    Ok(whole.then_some(length + end.len() as u64))
}

fn array<const N: usize>(reader: &mut dyn Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    reader.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn hash(reader: &mut dyn Read, mut length: u64, hasher: &mut Xxh3) -> io::Result<()> {
    let mut buffer = [0; 4096];
    while length > 0 {
        let piece = &mut buffer[..length.min(4096) as usize];
        reader.read_exact(piece)?;
        hasher.update(piece);
        length -= piece.len() as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::index::{Batch, Index, IndexOptions};

    /// An index with batches that have long values; where each of them begins, and the journal.
    fn written(dir: &Path) -> (Vec<u64>, PathBuf) {
        let index = Index::open(dir, &IndexOptions::default()).unwrap();
        let table = index.table("notes").unwrap();
        for number in 0..4_u8 {
            let mut batch = Batch::new();
            batch.put(table, &[number], vec![0xa0 + number; 20_000]);
            batch.put(table, &[number, 0], vec![number]);
            index.commit(batch).unwrap();
            index.sync().unwrap();
        }
        drop(index);
        let path = newest(dir).unwrap().unwrap();
        let mut reader = BufReader::new(File::open(&path).unwrap());
        let mut starts = vec![0];
        while let Some(length) = batch(&mut reader).unwrap() {
            starts.push(starts.last().unwrap() + length);
        }
        (starts, path)
    }

    fn notes(dir: &Path) -> usize {
        let index = Index::open(dir, &IndexOptions::default()).unwrap();
        let table = index.table("notes").unwrap();
        (0..4_u8).filter(|number| index.get(&table, &[*number]).unwrap().is_some()).count()
    }

    #[test]
    fn journals_of_the_database_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let (starts, path) = written(&dir.path().join("index"));
        assert_eq!(starts.len(), 5, "four batches and the end: {starts:?}");
        assert!(tail(&File::open(path).unwrap(), *starts.last().unwrap()).unwrap().is_empty());
        assert_eq!(notes(&dir.path().join("index")), 4);
    }

    #[test]
    fn a_last_batch_that_lacks_a_page_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let index = dir.path().join("index");
        let (starts, path) = written(&index);
        let journal = OpenOptions::new().write(true).open(path).unwrap();
        journal.write_all_at(&[0; 4096], (starts[3] + 5000).next_multiple_of(4096)).unwrap();
        assert_eq!(notes(&index), 3);
        assert_eq!(notes(&index), 3, "and again");
    }

    #[test]
    fn what_was_durable_is_not_cut_off_with_damage_before_it() {
        for hit in [0, 3, 17, 30, 5000] {
            let dir = tempfile::tempdir().unwrap();
            let index = dir.path().join("index");
            let (starts, path) = written(&index);
            let journal = OpenOptions::new().read(true).write(true).open(path).unwrap();
            let mut byte = [0];
            journal.read_exact_at(&mut byte, starts[1] + hit).unwrap();
            journal.write_all_at(&[byte[0] ^ 0x40], starts[1] + hit).unwrap();
            match Index::open(&index, &IndexOptions::default()).map(drop) {
                Err(IndexError::Journal { offset, .. }) => assert_eq!(offset, starts[1]),
                other => panic!("{other:?}"),
            }
        }
    }
}
