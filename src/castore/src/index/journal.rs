//! The database's journals before the database reads them: they are checked, a last batch that a crash tore is cut off, and
//! what is in the database's tables already is left out ([`shorten`]).
//!
//! fjall cuts off a batch that ends too early. But pages of a batch that was not synced reach the disk in any order, so a
//! batch can have its end and lack a page before: inside of a long value that is a checksum that does not match, and fjall
//! then refuses to open the database at all. It also cuts off whatever follows a batch it cannot read the lengths of,
//! which in the middle of a journal is no torn batch but damage, and what follows had been durable.
//!
//! A batch is synced before the next is written ([`super::flusher`]), so only the last one of the newest journal can be
//! torn: it is cut off when no batch follows it, and is an error when one does. An older journal was synced whole before
//! the next was begun, so anything in it that cannot be read is damage. fjall would cut it off there, and go on.

mod batch;
mod shorten;

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::storage::TABLES;
use super::{IndexError, tables};
use batch::{Batches, MAX_BATCH, START, is_batch};
use shorten::Shortened;

/// The file a database locks, how often that is tried, and after which pause again.
const LOCK: &str = "lock";
const LOCK_ATTEMPTS: usize = 3;
const LOCK_PAUSE: Duration = Duration::from_millis(100);
/// Bytes read at a time.
const BUFFER: usize = 256 << 10;
/// What is looked through behind a torn batch, in bytes: all that counts as torn is within it.
const MAX_TAIL: u64 = MAX_BATCH;

/// Brings the journals in `dir` into a state in which the database reads them rightly, and quickly.
pub(super) fn prepare(dir: &Path) -> Result<(), IndexError> {
    let failed = |doing| move |error| IndexError::Database { doing, source: fjall::Error::Io(error) };
    let journals = journals(dir).map_err(failed("looking for the journal"))?;
    let Some(newest) = journals.last() else { return Ok(()) };
    let _lock = lock(dir)?;
    // Before anybody opens a table, and under the lock: who has the database open changes them.
    tables::check(&dir.join(TABLES))?;
    let mut shortened = Shortened::begin(dir, &journals);
    let mut torn = None;
    for path in &journals {
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(failed("opening the journal"))?;
        let mut batches = Batches::new(&file);
        while let Some(batch) = batches.next().map_err(failed("reading the journal"))? {
            shortened.add(batch);
        }
        let offset = batches.offset();
        // Space that was set aside and not written yet is zero.
        let tail = tail(&file, offset).map_err(failed("reading the journal"))?;
        if tail.is_empty() {
            continue;
        }
        let starts = (1..tail.len()).filter(|&at| tail[at] == START);
        let followed = starts.map(|at| is_batch(&tail[at..])).find(|whole| !matches!(whole, Ok(false)));
        if path != newest || followed.transpose().map_err(failed("reading the journal"))?.is_some() {
            return Err(IndexError::Journal { path: path.clone(), offset });
        }
        torn = Some((file, offset, tail.len()));
    }
    if let Some((file, offset, bytes)) = torn {
        tracing::info!(path = %newest.display(), offset, bytes, "cutting a torn batch off the index's journal");
        file.set_len(offset)
            .and_then(|()| file.sync_all())
            .map_err(failed("cutting off a torn batch of the journal"))?;
    }
    shortened.put_in_place(&journals);
    Ok(())
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

/// The journals, the newest last.
fn journals(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut numbered = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let number = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".jnl")?.parse::<u64>().ok());
        numbered.extend(number.map(|number| (number, path)));
    }
    numbered.sort();
    Ok(numbered.into_iter().map(|(_, path)| path).collect())
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
        let path = journals(dir).unwrap().pop().unwrap();
        let file = File::open(&path).unwrap();
        let mut batches = Batches::new(&file);
        let mut starts = vec![0];
        while batches.next().unwrap().is_some() {
            starts.push(batches.offset());
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

    /// A journal that has a successor, as after 64 MB: here it is made by hand.
    #[test]
    fn a_journal_before_the_newest_is_whole_or_the_index_is_not_opened() {
        for hit in [None, Some(0), Some(5000), Some(19_990)] {
            let dir = tempfile::tempdir().unwrap();
            let index = dir.path().join("index");
            let (starts, path) = written(&index);
            let number: u64 = path.file_stem().unwrap().to_str().unwrap().parse().unwrap();
            File::create(path.with_file_name(format!("{}.jnl", number + 1))).unwrap().set_len(64 << 20).unwrap();
            if let Some(hit) = hit {
                // Of the last batch: nothing whole follows it, and in the newest journal it would be cut off.
                let journal = OpenOptions::new().write(true).open(&path).unwrap();
                journal.write_all_at(&[0xff; 7], starts[3] + hit).unwrap();
            }
            match (hit, Index::open(&index, &IndexOptions::default()).map(drop)) {
                (None, opened) => {
                    opened.unwrap();
                    assert_eq!(notes(&index), 4);
                }
                (Some(_), Err(IndexError::Journal { path: told, offset })) => {
                    assert_eq!((told, offset), (path, starts[3]));
                }
                (Some(_), other) => panic!("{other:?}"),
            }
        }
    }
}
