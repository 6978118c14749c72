//! The export stream: store paths with their contents, as `nix-store --export` writes them.
//!
//! For each path the word [`MORE`], the path's NAR, and a trailer with what the NAR does not tell; then the word
//! [`END`]. References come before what refers to them.

use std::collections::BTreeSet;
use std::io::{self, Read};

use crate::store_path::{self, StoreDir, StorePath};
use crate::wire::Writer;

/// Another path follows.
pub const MORE: u64 = 1;
/// The stream ends here.
pub const END: u64 = 0;

/// Begins a trailer.
const MAGIC: u64 = 0x4558_494e;
/// Longest path accepted, in bytes.
const MAX_PATH: usize = 4096;
/// Longest signature of the old kind accepted, in bytes. It is ignored.
const MAX_OLD_SIGNATURE: usize = 64 * 1024;

/// What follows a path's NAR.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trailer {
    /// Which path it is.
    pub path: StorePath,
    /// What it refers to.
    pub references: BTreeSet<StorePath>,
    /// What built it.
    pub deriver: Option<StorePath>,
}

/// Why a trailer cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The stream failed or broke off.
    #[error("cannot read the export stream: {0}")]
    Io(#[from] io::Error),
    /// What follows the NAR is something else.
    #[error("input is not a Nix export: {0:#x} instead of the magic number")]
    Magic(u64),
    /// A string is longer than any that makes sense.
    #[error("a string of {length} bytes in an export stream; at most {limit} are accepted")]
    TooLong {
        /// Its announced length.
        length: u64,
        /// The limit it exceeds.
        limit: usize,
    },
    /// The bytes that fill a string up are not zero.
    #[error("non-zero padding")]
    Padding,
    /// A string is no store path.
    #[error(transparent)]
    Path(#[from] store_path::Error),
}

/// Appends the trailer of a path.
pub fn write_trailer(dir: &StoreDir, trailer: &Trailer, writer: &mut Writer) {
    writer.u64(MAGIC);
    writer.bytes(dir.display(&trailer.path));
    writer.list(&trailer.references, |writer, reference| writer.bytes(dir.display(reference)));
    writer.bytes(trailer.deriver.as_ref().map(|deriver| dir.display(deriver)).unwrap_or_default());
    // No signature of the old kind.
    writer.u64(0);
}

/// Reads the trailer behind a NAR, and not a byte further.
///
/// # Errors
/// [`ExportError`].
pub fn read_trailer(dir: &StoreDir, reader: &mut dyn Read) -> Result<Trailer, ExportError> {
    let magic = read_word(reader)?;
    if magic != MAGIC {
        return Err(ExportError::Magic(magic));
    }
    let path = dir.parse(&read_text(reader, MAX_PATH)?)?;
    let mut references = BTreeSet::new();
    for _ in 0..read_word(reader)? {
        references.insert(dir.parse(&read_text(reader, MAX_PATH)?)?);
    }
    let deriver = read_text(reader, MAX_PATH)?;
    let deriver = if deriver.is_empty() { None } else { Some(dir.parse(&deriver)?) };
    if read_word(reader)? != 0 {
        read_text(reader, MAX_OLD_SIGNATURE)?;
    }
    Ok(Trailer { path, references, deriver })
}

/// Reads an integer of the stream, such as [`MORE`].
///
/// # Errors
/// When the stream fails or ends.
pub fn read_word(reader: &mut dyn Read) -> io::Result<u64> {
    let mut word = [0; 8];
    reader.read_exact(&mut word)?;
    Ok(u64::from_le_bytes(word))
}

fn read_text(reader: &mut dyn Read, limit: usize) -> Result<String, ExportError> {
    let length = read_word(reader)?;
    let Some(fitting) = usize::try_from(length).ok().filter(|length| *length <= limit) else {
        return Err(ExportError::TooLong { length, limit });
    };
    let mut bytes = vec![0; fitting.next_multiple_of(8)];
    reader.read_exact(&mut bytes)?;
    if bytes[fitting..].iter().any(|b| *b != 0) {
        return Err(ExportError::Padding);
    }
    bytes.truncate(fitting);
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> (StoreDir, Trailer) {
        let path = |n: u8| StorePath::from_parts([n; 20], "x").unwrap();
        let trailer = Trailer { path: path(1), references: [path(2), path(3)].into(), deriver: Some(path(4)) };
        (StoreDir::default(), trailer)
    }

    #[test]
    fn what_is_written_is_read() {
        let (dir, trailer) = example();
        let mut writer = Writer::new();
        write_trailer(&dir, &trailer, &mut writer);
        writer.u64(MORE);
        let mut rest = writer.as_bytes();
        assert_eq!(read_trailer(&dir, &mut rest).unwrap(), trailer);
        assert_eq!(rest, MORE.to_le_bytes());
    }

    #[test]
    fn every_cut_is_an_error_and_nothing_is_allocated_by_a_length() {
        let (dir, trailer) = example();
        let mut writer = Writer::new();
        write_trailer(&dir, &trailer, &mut writer);
        for end in 0..writer.as_bytes().len() {
            assert!(read_trailer(&dir, &mut &writer.as_bytes()[..end]).is_err());
        }
        let huge = [MAGIC.to_le_bytes(), (u64::MAX - 7).to_le_bytes()].concat();
        assert!(matches!(read_trailer(&dir, &mut &huge[..]), Err(ExportError::TooLong { .. })));
    }
}
