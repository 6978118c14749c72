//! A note of how much of each pack was durable when a store was opened or closed or last began a pack, beside the packs.
//!
//! What a pack holds beyond its committed length is cut off at the next opening, as left over from a crash. A damaged
//! index that has forgotten what it knew would have good data cut off; the note tells the two apart. And when the index is
//! made anew from the packs, the note tells which of them are missing.
//!
//! A second note of the same form has the packs that were missing when that began, until it is done: it may have to be
//! begun again.
//!
//! One line for each pack: its number in 8 hexadecimal digits, a space, the length; then a line with the xxh3 of all that,
//! in 16 hexadecimal digits. A note that is torn or damaged is none.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::xxh3_64;

use super::{PackError, at};

/// What the name of the packs' directory is extended with.
const EXTENSION: &str = "durable";
/// The same for the packs that were missing.
const MISSING: &str = "missing";
/// The longest note that is read, in bytes: a million packs.
const MAX_NOTE: u64 = 32 << 20;

/// The note of the packs in `dir`; empty when there is none.
pub(super) fn read(dir: &Path) -> BTreeMap<u32, u64> {
    read_file(&dir.with_extension(EXTENSION))
}

/// Which packs were missing in `dir`, with the lengths they had.
pub(super) fn read_missing(dir: &Path) -> BTreeMap<u32, u64> {
    read_file(&dir.with_extension(MISSING))
}

fn read_file(path: &Path) -> BTreeMap<u32, u64> {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(MAX_NOTE).read_to_string(&mut text));
    read.ok().and_then(|_| parse(&text)).unwrap_or_default()
}

fn parse(text: &str) -> Option<BTreeMap<u32, u64>> {
    let (lines, checksum) = text.trim_end_matches('\n').rsplit_once('\n').unwrap_or(("", text.trim_end_matches('\n')));
    let lines = if lines.is_empty() { String::new() } else { format!("{lines}\n") };
    if format!("{:016x}", xxh3_64(lines.as_bytes())) != checksum {
        return None;
    }
    let row = |line: &str| {
        let (number, length) = line.split_once(' ')?;
        Some((u32::from_str_radix(number, 16).ok()?, length.parse().ok()?))
    };
    lines.lines().map(row).collect()
}

/// Writes the note, in one step.
pub(super) fn write(dir: &Path, lengths: &BTreeMap<u32, u64>) -> Result<(), PackError> {
    write_file(&dir.with_extension(EXTENSION), lengths)
}

/// Writes down which packs are missing.
pub(super) fn write_missing(dir: &Path, lengths: &BTreeMap<u32, u64>) -> Result<(), PackError> {
    write_file(&dir.with_extension(MISSING), lengths)
}

fn write_file(place: &Path, lengths: &BTreeMap<u32, u64>) -> Result<(), PackError> {
    let mut text = String::new();
    for (number, length) in lengths {
        text.push_str(&format!("{number:08x} {length}\n"));
    }
    text.push_str(&format!("{:016x}\n", xxh3_64(text.as_bytes())));
    let mut new = place.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    let written = File::create(&new).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_data()
    });
    written.map_err(at("writing", &new))?;
    std::fs::rename(&new, place).map_err(at("putting in place", &new))
}

/// Removes the note.
pub(super) fn remove(dir: &Path) -> Result<(), PackError> {
    remove_file(&dir.with_extension(EXTENSION))
}

/// Removes the note of missing packs.
pub(super) fn remove_missing(dir: &Path) -> Result<(), PackError> {
    remove_file(&dir.with_extension(MISSING))
}

fn remove_file(place: &Path) -> Result<(), PackError> {
    match std::fs::remove_file(place) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(at("removing", place)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_read_as_it_was_written_or_not_at_all() {
        let root = tempfile::tempdir().unwrap();
        let dir = &root.path().join("packs");
        assert!(read(dir).is_empty());
        write(dir, &BTreeMap::new()).unwrap();
        assert!(read(dir).is_empty());
        let lengths = BTreeMap::from([(0, 32), (0xabc, u64::MAX)]);
        write(dir, &lengths).unwrap();
        assert_eq!(read(dir), lengths);
        let note = dir.with_extension(EXTENSION);
        let text = std::fs::read(&note).unwrap();
        for at in 0..text.len() {
            let mut flipped = text.clone();
            flipped[at] ^= 1;
            std::fs::write(&note, &flipped).unwrap();
            assert!(read(dir).is_empty() || at == text.len() - 1, "byte {at}");
            std::fs::write(&note, &text[..at]).unwrap();
            assert!(read(dir).is_empty() || at == text.len() - 1, "{at} bytes");
        }
    }
}
