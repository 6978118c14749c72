//! NAR.

use std::io::{self, Read};

use nix_compat::nar::{NarError, NarEvent, NarReader, NarWriter};

/// Gives at most so many bytes at a time.
struct Pieces<R>(R, usize);

impl<R: Read> Read for Pieces<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let length = buf.len().min(self.1);
        self.0.read(&mut buf[..length])
    }
}

/// An archive. The first byte says in what pieces it arrives.
pub fn nar(input: &[u8]) {
    let [piece, archive @ ..] = input else { return };
    let mut source = archive;
    let whole = copy(&mut source);
    let consumed = archive.len() - source.len();
    let in_pieces = copy(Pieces(archive, usize::from(*piece) + 1));
    let skipped = skim(archive);
    match whole {
        Ok((written, events, position)) => {
            assert_eq!(position as usize, consumed, "not what was said was read");
            assert_eq!(written, archive[..consumed], "an archive has two forms");
            assert_eq!(skipped.unwrap(), (events.clone(), position));
            let (written_again, events_again, position_again) = in_pieces.unwrap();
            assert_eq!((written_again, events_again, position_again), (written, events, position));
            assert!(matches!(skim(&archive[..consumed - 1]), Err(NarError::Truncated { .. })));
        }
        Err(error) => {
            assert_eq!(error.to_string(), in_pieces.unwrap_err().to_string());
            assert!(skipped.is_err());
        }
    }
}

type Copied = (Vec<u8>, Vec<NarEvent>, u64);

/// Reads an archive, writing it down again.
fn copy(source: impl Read) -> Result<Copied, NarError> {
    let (mut reader, mut writer, mut events) = (NarReader::new(source), NarWriter::new(Vec::new()), Vec::new());
    loop {
        let event = match reader.next() {
            Ok(event) => event,
            Err(error) => {
                assert!(matches!(reader.next(), Err(NarError::Broken)), "reading goes on after an error");
                return Err(error);
            }
        };
        match &event {
            NarEvent::Regular { executable, size } => {
                writer.regular_header(*executable, *size).unwrap();
                let mut piece = [0; 1000];
                loop {
                    match reader.read_contents(&mut piece) {
                        Ok(0) => break,
                        Ok(length) => writer.contents(&piece[..length]).unwrap(),
                        Err(error) => return Err(NarError::Io(error)),
                    }
                }
                writer.end_regular().unwrap();
            }
            NarEvent::Symlink { target } => writer.symlink(target).unwrap(),
            NarEvent::EnterDirectory => writer.enter_directory().unwrap(),
            NarEvent::Entry { name } => writer.entry(name).unwrap(),
            NarEvent::LeaveDirectory => writer.leave_directory().unwrap(),
            NarEvent::End => {
                assert!(matches!(reader.next(), Ok(NarEvent::End)));
                return Ok((writer.finish().unwrap(), events, reader.position()));
            }
        }
        events.push(event);
    }
}

/// Reads an archive without looking at contents.
fn skim(archive: &[u8]) -> Result<(Vec<NarEvent>, u64), NarError> {
    let (mut reader, mut events) = (NarReader::new(archive), Vec::new());
    loop {
        match reader.next()? {
            NarEvent::End => return Ok((events, reader.position())),
            event => events.push(event),
        }
    }
}
