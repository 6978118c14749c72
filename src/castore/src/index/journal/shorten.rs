//! Journals without what the database's tables have already.
//!
//! fjall keeps a journal until all of it is in tables, which is some 64 MB at the least, and at an opening goes through
//! every entry: in a million of them it spends a second, to find that most are not needed. So the entries that are needed,
//! which are those since a table's last one was written out, are copied to a new journal before it looks.
//!
//! **What is left out is what fjall would pass over**: an entry of a batch whose sequence number is not above the highest
//! that is in the table's files.
//!
//! The new journal is synced and takes the place of the newest one in one step; then the older ones are removed, the newer
//! first. After a crash in between, the oldest ones are there and the new one, which has some of their batches again:
//! batches that do not have a higher sequence number than all before are left out.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use lsm_tree::config::PinningPolicy;
use lsm_tree::{AbstractTree, SequenceNumberCounter};

use super::super::storage::TABLES;
use super::batch::{self, Batch};

/// Journals that have less than this together, in bytes, are left as they are.
const WORTH_IT: u64 = 4 << 20;
/// The name of the new journal until it is whole.
const UNFINISHED: &str = "shortened.tmp";

/// A new journal in the making, or the reason why there is none.
pub(super) struct Shortened(Option<Work>);

struct Work {
    dir: PathBuf,
    place: PathBuf,
    out: BufWriter<File>,
    /// For each table the highest sequence number that is in its files.
    persisted: HashMap<u64, Option<u64>>,
    last: Option<u64>,
    items: Vec<u8>,
    kept: u64,
    left_out: u64,
}

impl Shortened {
    /// Begins if it is worth it. That it cannot be done (the disk is full) is no failure: opening takes longer then.
    pub(super) fn begin(dir: &Path, journals: &[PathBuf]) -> Self {
        let _ = fs::remove_file(dir.join(UNFINISHED));
        // What is set aside and not written takes no space.
        let bytes: u64 =
            journals.iter().filter_map(|path| fs::metadata(path).ok()).map(|meta| meta.blocks() * 512).sum();
        if bytes < WORTH_IT {
            return Self(None);
        }
        let place = dir.join(UNFINISHED);
        let begun = persisted(dir).and_then(|persisted| {
            let out = BufWriter::with_capacity(super::BUFFER, File::create(&place)?);
            let (dir, items) = (dir.to_owned(), Vec::new());
            Ok(Work { dir, place, out, persisted, last: None, items, kept: 0, left_out: 0 })
        });
        Self(begun.map_err(|error| no_matter(&error)).ok())
    }

    /// Takes the next batch.
    pub(super) fn add(&mut self, batch: Batch<'_>) {
        let Some(work) = &mut self.0 else { return };
        match work.add(batch) {
            Ok(true) => {}
            Ok(false) => self.0 = None,
            Err(error) => {
                no_matter(&error);
                self.0 = None;
            }
        }
    }

    /// Replaces the journals by the new one.
    pub(super) fn put_in_place(mut self, journals: &[PathBuf]) {
        if let Some(work) = &mut self.0
            && let Err(error) = work.put_in_place(journals)
        {
            no_matter(&error);
        }
    }
}

fn no_matter(error: &io::Error) {
    tracing::warn!(%error, "the index's journals are not shortened, so opening it takes longer");
}

impl Work {
    /// Whether to go on.
    fn add(&mut self, batch: Batch<'_>) -> io::Result<bool> {
        if self.last.is_some_and(|last| batch.sequence <= last) {
            return Ok(true);
        }
        self.last = Some(batch.sequence);
        self.items.clear();
        let mut count = 0;
        for item in batch.items() {
            // Nothing here clears a table; whoever did must have it done in its order.
            let Some(table) = item.table else { return Ok(false) };
            let known = self.persisted.get(&table).copied().flatten();
            if known.is_some_and(|known| batch.sequence <= known) {
                self.left_out += 1;
            } else {
                self.items.extend_from_slice(item.bytes);
                count += 1;
            }
        }
        self.kept += u64::from(count);
        if count > 0 {
            batch::write(batch.sequence, count, &self.items, &mut self.out)?;
        }
        Ok(true)
    }

    fn put_in_place(&mut self, journals: &[PathBuf]) -> io::Result<()> {
        let Some((newest, older)) = journals.split_last() else { return Ok(()) };
        self.out.flush()?;
        self.out.get_ref().sync_all()?;
        fs::rename(&self.place, newest)?;
        let dir = File::open(&self.dir)?;
        dir.sync_all()?;
        for journal in older.iter().rev() {
            fs::remove_file(journal)?;
            dir.sync_all()?;
        }
        tracing::info!(kept = self.kept, left_out = self.left_out, "shortened the index's journals");
        Ok(())
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // It is not there any more if all went well.
        let _ = fs::remove_file(&self.place);
    }
}

/// For each table of the database in `dir` the highest sequence number that is in its files.
fn persisted(dir: &Path) -> io::Result<HashMap<u64, Option<u64>>> {
    let mut persisted = HashMap::new();
    for entry in fs::read_dir(dir.join(TABLES))? {
        let path = entry?.path();
        let number = path.file_name().and_then(|name| name.to_str()?.parse::<u64>().ok());
        // One that was not created to the end has no files. The database sees to it.
        let Some(number) = number.filter(|_| path.join("current").exists()) else { continue };
        // Only what stands in each file's head is wanted.
        let config = lsm_tree::Config::new(&path, SequenceNumberCounter::default(), SequenceNumberCounter::default())
            .filter_block_pinning_policy(PinningPolicy::all(false))
            .index_block_pinning_policy(PinningPolicy::all(false));
        let tree = config.open().map_err(io::Error::other)?;
        persisted.insert(number, tree.get_highest_persisted_seqno());
    }
    Ok(persisted)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::ops::ControlFlow;
    use std::time::{Duration, Instant};

    use super::super::prepare;
    use super::*;
    use crate::index::{Batch, Index, IndexOptions, Table};

    const OPTIONS: IndexOptions =
        IndexOptions { cache_bytes: 1 << 20, overlay_bytes: 1 << 20, memtable_bytes: 1 << 20 };

    type Rows = BTreeMap<Vec<u8>, Vec<u8>>;

    fn rows(index: &Index, table: Table) -> Rows {
        let mut rows = Rows::new();
        let mut each = |key: &[u8], value: &[u8]| {
            rows.insert(key.to_vec(), value.to_vec());
            ControlFlow::Continue(())
        };
        index.scan_prefix(&table, &[], &mut each).unwrap();
        rows
    }

    fn opened(dir: &Path) -> [Rows; 2] {
        let index = Index::open(dir, &OPTIONS).unwrap();
        ["many", "few"].map(|name| rows(&index, index.table(name).unwrap()))
    }

    fn journals(dir: &Path) -> Vec<(PathBuf, u64)> {
        let found = super::super::journals(dir).unwrap().into_iter();
        found.map(|path| (path.clone(), fs::metadata(path).unwrap().blocks() * 512)).collect()
    }

    fn copy(from: &Path, to: &Path) {
        let copied = std::process::Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
        assert!(copied.success());
    }

    /// A directory as a process leaves it that is killed, with what was durable: rows that were written out, rows that were
    /// not, some changed and removed since, and a table of which nothing was.
    fn killed(dir: &Path) -> [Rows; 2] {
        let index = Index::open(&dir.join("at-work"), &OPTIONS).unwrap();
        let [many, few] = ["many", "few"].map(|name| index.table(name).unwrap());
        for round in 0..60_u32 {
            let mut batch = Batch::new();
            for number in 0..100_u32 {
                let key = (round * 70 + number).to_be_bytes();
                batch.put(many, &key, [&round.to_le_bytes()[..], &vec![number as u8; 1000]].concat());
            }
            batch.delete(many, &(round * 35).to_be_bytes());
            batch.put(few, &(round % 50).to_be_bytes(), round.to_le_bytes().to_vec());
            index.commit(batch).unwrap();
            index.sync().unwrap();
        }
        // Until its threads have nothing more to write out or to merge: a copy takes a moment.
        let files = || {
            let list = std::process::Command::new("find").arg(dir.join("at-work/keyspaces")).output().unwrap();
            String::from_utf8(list.stdout).unwrap()
        };
        let began = Instant::now();
        loop {
            let before = files();
            std::thread::sleep(Duration::from_millis(300));
            if before == files() && before.matches("/tables/").count() > 3 {
                break;
            }
            assert!(began.elapsed() < Duration::from_secs(20), "nothing is written out");
        }
        copy(&dir.join("at-work"), &dir.join("killed"));
        [rows(&index, many), rows(&index, few)]
    }

    #[test]
    fn nothing_is_lost_and_little_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let expected = killed(dir.path());
        assert!(expected[0].len() > 4000 && expected[1].len() == 50);
        let index = dir.path().join("killed");
        let before = journals(&index);
        prepare(&index).unwrap();
        let after = journals(&index);
        assert!(after.len() == 1 && after[0].0 == before.last().unwrap().0, "{before:?} {after:?}");
        assert!(after[0].1 < before[0].1 / 2, "{before:?} {after:?}");
        assert_eq!(opened(&index), expected);
        assert_eq!(opened(&index), expected, "and again");
    }

    #[test]
    fn a_crash_after_the_new_journal_is_in_place_does_no_harm() {
        let dir = tempfile::tempdir().unwrap();
        let expected = killed(dir.path());
        let index = dir.path().join("killed");
        let (first, _) = journals(&index).remove(0);
        let original = dir.path().join("original");
        copy(&first, &original);
        let number: u64 = first.file_stem().unwrap().to_str().unwrap().parse().unwrap();
        let newest = first.with_file_name(format!("{}.jnl", number + 1));
        File::create(&newest).unwrap().set_len(64 << 20).unwrap();
        prepare(&index).unwrap();
        assert!(newest.exists() && !first.exists());
        // The older one had not been removed yet.
        copy(&original, &first);
        prepare(&index).unwrap();
        assert_eq!(journals(&index).len(), 1);
        assert_eq!(opened(&index), expected);
    }
}
