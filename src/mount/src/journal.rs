//! Names in the store directory that changed shortly before a server died.
//!
//! The kernel remembers names for good, and after a crash it may remember wrongly: a registration that was visible but
//! not yet durable is lost, and a deletion may have become durable with the kernel not told. So each name is written
//! down before its change is committed, in memory that outlives the server, and the successor makes the kernel forget
//! all recent ones. The file is a ring of slots: milliseconds since boot (8 bytes), a length (1), a name.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use nix::time::{ClockId, clock_gettime};
use parking_lot::Mutex;

use crate::kept::JOURNAL;

/// Bytes of a slot; a base name has at most 244.
const SLOT: usize = 256;
/// Slots in the ring: 4 MiB.
const SLOTS: u64 = 16_384;
/// What changed this long before the last change is settled: durable, and the kernel has been told. Milliseconds.
const SETTLED: u64 = 10_000;
/// Bytes of time and length.
const PREFIX: usize = 9;

/// Writes names down.
#[derive(Debug)]
pub(crate) struct Journal {
    file: File,
    next: Mutex<u64>,
}

/// What the last server left.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Recent {
    pub(crate) names: BTreeSet<String>,
    /// There may have been more.
    pub(crate) overflown: bool,
}

impl Journal {
    /// The journal in that file, to be written on. What earlier servers wrote stays until it is overwritten: a successor may
    /// die before it has made the kernel forget it, and then the next one has to.
    pub(crate) fn open(file: File) -> io::Result<Journal> {
        let next = behind(&slots(&read(&file)?));
        Ok(Journal { file, next: Mutex::new(next) })
    }

    /// Writes down that these names are about to change.
    pub(crate) fn note<'a>(&self, names: impl Iterator<Item = &'a str>) -> io::Result<()> {
        let time = clock_gettime(ClockId::CLOCK_BOOTTIME)?;
        let time = time.tv_sec() as u64 * 1000 + time.tv_nsec() as u64 / 1_000_000;
        let mut next = self.next.lock();
        for name in names {
            let name = &name.as_bytes()[..name.len().min(SLOT - PREFIX)];
            let mut slot = [0; SLOT];
            slot[..8].copy_from_slice(&time.to_le_bytes());
            slot[8] = name.len() as u8;
            slot[PREFIX..PREFIX + name.len()].copy_from_slice(name);
            self.file.write_all_at(&slot[..PREFIX + name.len()], JOURNAL + *next * SLOT as u64)?;
            *next = (*next + 1) % SLOTS;
        }
        Ok(())
    }

    /// What the last server wrote into the file.
    pub(crate) fn recent(file: &File) -> io::Result<Recent> {
        let bytes = read(file)?;
        let slots = slots(&bytes);
        let newest = newest(&slots);
        let recent = |time: u64| time + SETTLED >= newest;
        let names: Vec<&str> =
            slots.iter().flatten().filter(|(time, _)| recent(*time)).map(|(_, name)| *name).collect();
        Ok(Recent { overflown: names.len() as u64 == SLOTS, names: names.into_iter().map(str::to_owned).collect() })
    }
}

/// When a name was noted, and which; nothing where nothing was.
type Slot<'a> = Option<(u64, &'a str)>;

fn read(file: &File) -> io::Result<Vec<u8>> {
    let length = file.metadata()?.len().saturating_sub(JOURNAL).min(SLOTS * SLOT as u64) as usize;
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, JOURNAL)?;
    Ok(bytes)
}

fn slots(bytes: &[u8]) -> Vec<Slot<'_>> {
    bytes.chunks(SLOT).map(slot).collect()
}

fn slot(bytes: &[u8]) -> Slot<'_> {
    let time = u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?);
    let length = usize::from(*bytes.get(8)?);
    let name = std::str::from_utf8(bytes.get(PREFIX..PREFIX + length)?).ok()?;
    (time > 0).then_some((time, name))
}

fn newest(slots: &[Slot<'_>]) -> u64 {
    slots.iter().flatten().map(|(time, _)| *time).max().unwrap_or(0)
}

/// Where the ring goes on: behind the last slot that was written.
fn behind(slots: &[Slot<'_>]) -> u64 {
    let count = slots.len();
    if (count as u64) < SLOTS {
        return count as u64;
    }
    let newest = newest(slots);
    let is_newest = |at: usize| slots[at % count].is_some_and(|(time, _)| time == newest);
    let last = (0..count).find(|&at| is_newest(at) && !is_newest(at + 1));
    last.map_or(0, |last| (last as u64 + 1) % SLOTS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> File {
        tempfile::tempfile().unwrap()
    }

    #[test]
    fn the_successor_reads_what_was_noted_and_goes_on_behind_it() {
        let file = file();
        let journal = Journal::open(file.try_clone().unwrap()).unwrap();
        assert_eq!(Journal::recent(&file).unwrap().names.len(), 0);
        journal.note(["a", "b"].into_iter()).unwrap();
        let recent = Journal::recent(&file).unwrap();
        assert_eq!(recent, Recent { names: ["a".to_owned(), "b".to_owned()].into(), overflown: false });
        // It dies before it has done anything about that, but for a name of its own.
        let journal = Journal::open(file.try_clone().unwrap()).unwrap();
        assert_eq!(Journal::recent(&file).unwrap(), recent);
        journal.note(["c"].into_iter()).unwrap();
        assert_eq!(Journal::recent(&file).unwrap().names.into_iter().collect::<Vec<_>>(), ["a", "b", "c"]);
    }

    #[test]
    fn the_ring_goes_on_where_it_was() {
        let file = file();
        let journal = Journal::open(file.try_clone().unwrap()).unwrap();
        let many: Vec<String> = (0..SLOTS).map(|n| n.to_string()).collect();
        journal.note(many.iter().map(String::as_str)).unwrap();
        // All of that was long ago, and five more were noted now.
        for slot in 0..SLOTS {
            file.write_all_at(&1_u64.to_le_bytes(), JOURNAL + slot * SLOT as u64).unwrap();
        }
        journal.note(["a", "b", "c", "d", "e"].into_iter()).unwrap();
        let journal = Journal::open(file.try_clone().unwrap()).unwrap();
        assert_eq!(*journal.next.lock(), 5);
        journal.note(["f"].into_iter()).unwrap();
        let names = Journal::recent(&file).unwrap().names;
        assert_eq!(names.into_iter().collect::<Vec<_>>(), ["a", "b", "c", "d", "e", "f"]);
    }

    #[test]
    fn what_is_settled_is_left_out_and_too_much_at_once_is_noticed() {
        let file = file();
        let journal = Journal::open(file.try_clone().unwrap()).unwrap();
        let many: Vec<String> = (0..SLOTS + 1).map(|n| n.to_string()).collect();
        journal.note(many.iter().map(String::as_str)).unwrap();
        assert!(Journal::recent(&file).unwrap().overflown);
        // One of them is an hour old.
        file.write_all_at(&1_u64.to_le_bytes(), JOURNAL + 7 * SLOT as u64).unwrap();
        let recent = Journal::recent(&file).unwrap();
        assert!(!recent.overflown && !recent.names.contains("7") && recent.names.contains("8"));
    }
}
