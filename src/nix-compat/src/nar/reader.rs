//! From bytes to events.

use std::io::{self, Read};

use super::format::{
    CLOSE, CONTENTS, DIRECTORY, ENTRY, ENTRY_TO_NAME, EXECUTABLE, EXECUTABLE_TO_CONTENTS, MAGIC, NAME_TO_TYPE,
    NameError, OpenDirectories, REGULAR, SYMLINK, TARGET, WORD, padding,
};
use super::{MAX_DEPTH, MAX_FILE_SIZE, MAX_NAME_LEN, MAX_TARGET_LEN};

/// What comes next in an archive.
///
/// A node is [`Regular`](Self::Regular), [`Symlink`](Self::Symlink), or a directory: [`EnterDirectory`](Self::EnterDirectory), then for each entry
/// [`Entry`](Self::Entry) and its node, then [`LeaveDirectory`](Self::LeaveDirectory). An archive is one node, then [`End`](Self::End).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NarEvent {
    /// A file. Its contents can now be read; what is not read is skipped.
    Regular {
        /// whether it has the executable bit
        executable: bool,
        /// length of its contents in bytes
        size: u64,
    },
    /// A symlink.
    Symlink {
        /// where it points; neither empty nor with a NUL
        target: Vec<u8>,
    },
    /// A directory begins.
    EnterDirectory,
    /// An entry of the innermost directory; its node is the next event.
    Entry {
        /// its name: legal, and after all before it
        name: Vec<u8>,
    },
    /// The innermost directory ends.
    LeaveDirectory,
    /// The archive is complete, and not one byte more than it has been read.
    End,
}

/// Why an archive cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum NarError {
    /// The source failed.
    #[error("reading a NAR")]
    Io(#[source] io::Error),
    /// The source ended before the archive.
    #[error("NAR ends early, after {offset} bytes")]
    Truncated {
        /// bytes read before the piece that is missing
        offset: u64,
    },
    /// Something else than what the grammar has here.
    #[error("NAR has something else than {expected} at byte {offset}")]
    Unexpected {
        /// what should be there
        expected: &'static str,
        /// where
        offset: u64,
    },
    /// Padding that is not zero.
    #[error("NAR has non-zero padding before byte {offset}")]
    Padding {
        /// where the padding ends
        offset: u64,
    },
    /// A name that is no name, or out of order.
    #[error("NAR has an entry '{}' before byte {offset}: {error}", .name.escape_ascii())]
    Name {
        /// the name, its beginning if it is too long
        name: Vec<u8>,
        /// what is wrong with it
        error: NameError,
        /// where the name ends
        offset: u64,
    },
    /// A symlink's target that is empty, longer than [`MAX_TARGET_LEN`] or has a NUL.
    #[error("NAR has an illegal symlink target of {len} bytes at byte {offset}")]
    Target {
        /// its length
        len: u64,
        /// where
        offset: u64,
    },
    /// A file larger than [`MAX_FILE_SIZE`].
    #[error("NAR has a file of {size} bytes at byte {offset}")]
    FileSize {
        /// its length
        size: u64,
        /// where
        offset: u64,
    },
    /// More nodes inside each other than [`MAX_DEPTH`].
    #[error("NAR nests more than {MAX_DEPTH} deep at byte {offset}")]
    Depth {
        /// where
        offset: u64,
    },
    /// An error was reported before; there is no way to go on from it.
    #[error("NAR was found broken before")]
    Broken,
}

/// Reads an archive from `R`.
///
/// Never reads a byte beyond the archive's end, so that a protocol may go on behind it, and asks for the pieces between
/// variable parts in one call each. Put a [`BufReader`](io::BufReader) below it where calls are dear and reading ahead
/// is harmless.
pub struct NarReader<R> {
    source: R,
    offset: u64,
    state: State,
    directories: OpenDirectories,
}

/// What was read last. Only the variants' own bytes are still to be interpreted.
enum State {
    Start,
    /// `node ( type` and the first 16 bytes of the type.
    Type([u8; 16]),
    /// A file's length; so many bytes of its contents are still to come.
    Contents {
        left: u64,
        padding: usize,
    },
    /// A node with its `)`.
    Closed,
    /// `directory`.
    Entered,
    End,
    Broken,
}

impl<R: Read> NarReader<R> {
    /// Starts before the archive's first byte.
    pub fn new(source: R) -> Self {
        Self { source, offset: 0, state: State::Start, directories: OpenDirectories::default() }
    }

    /// How many bytes of the archive have been read.
    pub fn position(&self) -> u64 {
        self.offset
    }

    /// How many nodes lie around the present one.
    pub fn depth(&self) -> usize {
        self.directories.depth()
    }

    /// Gives the source back.
    pub fn into_inner(self) -> R {
        self.source
    }

    /// The next event. After [`NarEvent::End`] it is that forever, after an error [`NarError::Broken`].
    // Not an Iterator: that could not lend out a file's contents between two items.
    #[expect(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Result<NarEvent, NarError> {
        let state = std::mem::replace(&mut self.state, State::Broken);
        match state {
            State::Start => self.start(),
            State::Type(kind) => self.node(kind),
            State::Contents { left, padding } => {
                self.skip(left)?;
                self.end_contents(padding)
            }
            State::Closed => self.after_node(),
            State::Entered => {
                let tag = self.read_array()?;
                self.directory(tag)
            }
            State::End => {
                self.state = State::End;
                Ok(NarEvent::End)
            }
            State::Broken => Err(NarError::Broken),
        }
    }

    /// Reads some of the present file's contents straight into `buf`; 0 means there are no more.
    pub fn read_contents(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let State::Contents { left, .. } = &mut self.state else { return Ok(0) };
        let wanted = usize::try_from(*left).map_or(buf.len(), |left| left.min(buf.len()));
        if wanted == 0 {
            return Ok(0);
        }
        let read = self.source.read(&mut buf[..wanted])?;
        if read == 0 {
            let error = NarError::Truncated { offset: self.offset };
            self.state = State::Broken;
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, error));
        }
        *left -= read as u64;
        self.offset += read as u64;
        Ok(read)
    }

    /// The present file's contents as a reader.
    pub fn contents(&mut self) -> Contents<'_, R> {
        Contents(self)
    }

    fn start(&mut self) -> Result<NarEvent, NarError> {
        self.expect::<56>(MAGIC, "'nix-archive-1' and a node")?;
        let kind = self.read_array()?;
        self.node(kind)
    }

    fn node(&mut self, kind: [u8; 16]) -> Result<NarEvent, NarError> {
        if &kind == REGULAR {
            self.regular()
        } else if &kind == SYMLINK {
            self.symlink()
        } else if kind == DIRECTORY[..16] {
            self.expect::<8>(&DIRECTORY[16..], "'directory'")?;
            self.directories.enter();
            self.state = State::Entered;
            Ok(NarEvent::EnterDirectory)
        } else {
            Err(self.unexpected("a node type", kind.len()))
        }
    }

    fn regular(&mut self) -> Result<NarEvent, NarError> {
        let tag: [u8; 24] = self.read_array()?;
        let (executable, size) = if tag[..16] == CONTENTS[..] {
            (false, word(&tag[16..]))
        } else if &tag == EXECUTABLE {
            let rest: [u8; 32] = self.read_array()?;
            if rest[..24] != EXECUTABLE_TO_CONTENTS[..] {
                return Err(self.unexpected("an empty string and 'contents'", rest.len()));
            }
            (true, word(&rest[24..]))
        } else {
            return Err(self.unexpected("'executable' or 'contents'", tag.len()));
        };
        if size > MAX_FILE_SIZE {
            return Err(NarError::FileSize { size, offset: self.offset });
        }
        self.state = State::Contents { left: size, padding: padding(size) };
        Ok(NarEvent::Regular { executable, size })
    }

    fn end_contents(&mut self, padding: usize) -> Result<NarEvent, NarError> {
        let mut tail = [0; WORD + CLOSE.len()];
        let tail = &mut tail[..padding + CLOSE.len()];
        self.read(tail)?;
        if tail[..padding].iter().any(|&byte| byte != 0) {
            return Err(NarError::Padding { offset: self.offset - CLOSE.len() as u64 });
        }
        self.check_close(&tail[padding..])?;
        self.after_node()
    }

    fn symlink(&mut self) -> Result<NarEvent, NarError> {
        let head: [u8; 24] = self.read_array()?;
        if head[..16] != TARGET[..] {
            return Err(self.unexpected("'target'", head.len()));
        }
        let (size, offset) = (word(&head[16..]), self.offset);
        let illegal = || NarError::Target { len: size, offset };
        let len = usize::try_from(size).ok().filter(|len| (1..=MAX_TARGET_LEN).contains(len)).ok_or_else(illegal)?;
        let padded = len + padding(size);
        let mut target = vec![0; padded + CLOSE.len()];
        self.read(&mut target)?;
        self.check_close(&target[padded..])?;
        self.check_padding(&target[len..padded])?;
        target.truncate(len);
        if target.contains(&0) {
            return Err(illegal());
        }
        self.state = State::Closed;
        Ok(NarEvent::Symlink { target })
    }

    /// Behind a node's `)`: the end, or the `)` of the entry it was in and what follows there.
    fn after_node(&mut self) -> Result<NarEvent, NarError> {
        if self.directories.depth() == 0 {
            self.state = State::End;
            return Ok(NarEvent::End);
        }
        let both: [u8; 32] = self.read_array()?;
        self.check_close(&both[..16])?;
        let mut tag = [0; 16];
        tag.copy_from_slice(&both[16..]);
        self.directory(tag)
    }

    fn directory(&mut self, tag: [u8; 16]) -> Result<NarEvent, NarError> {
        if &tag == CLOSE {
            self.directories.leave();
            self.state = State::Closed;
            Ok(NarEvent::LeaveDirectory)
        } else if &tag == ENTRY {
            self.entry()
        } else {
            Err(self.unexpected("'entry' or ')'", tag.len()))
        }
    }

    fn entry(&mut self) -> Result<NarEvent, NarError> {
        if self.directories.depth() >= MAX_DEPTH {
            return Err(NarError::Depth { offset: self.offset });
        }
        let head: [u8; 40] = self.read_array()?;
        if head[..32] != ENTRY_TO_NAME[..] {
            return Err(self.unexpected("an entry's name", head.len()));
        }
        let size = word(&head[32..]);
        let len = usize::try_from(size).ok().filter(|&len| len <= MAX_NAME_LEN).ok_or(NarError::Name {
            name: Vec::new(),
            error: NameError::TooLong,
            offset: self.offset,
        })?;
        let padded = len + padding(size);
        let mut rest = [0; MAX_NAME_LEN + WORD + NAME_TO_TYPE.len() + 16];
        let rest = &mut rest[..padded + NAME_TO_TYPE.len() + 16];
        self.read(rest)?;
        let (name, rest) = rest.split_at(len);
        let (pad, rest) = rest.split_at(padded - len);
        let (node, kind) = rest.split_at(NAME_TO_TYPE.len());
        self.check_padding(pad)?;
        if node != NAME_TO_TYPE {
            return Err(self.unexpected("an entry's node", rest.len()));
        }
        if let Err(error) = self.directories.entry(name) {
            let offset = self.offset - rest.len() as u64;
            return Err(NarError::Name { name: name.to_vec(), error, offset });
        }
        let mut first = [0; 16];
        first.copy_from_slice(kind);
        self.state = State::Type(first);
        Ok(NarEvent::Entry { name: name.to_vec() })
    }

    fn skip(&mut self, left: u64) -> Result<(), NarError> {
        let skipped = io::copy(&mut (&mut self.source).take(left), &mut io::sink()).map_err(NarError::Io)?;
        self.offset += skipped;
        if skipped < left { Err(NarError::Truncated { offset: self.offset }) } else { Ok(()) }
    }

    fn read(&mut self, buf: &mut [u8]) -> Result<(), NarError> {
        self.source.read_exact(buf).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => NarError::Truncated { offset: self.offset },
            _ => NarError::Io(error),
        })?;
        self.offset += buf.len() as u64;
        Ok(())
    }

    fn read_array<const N: usize>(&mut self) -> Result<[u8; N], NarError> {
        let mut bytes = [0; N];
        self.read(&mut bytes)?;
        Ok(bytes)
    }

    fn expect<const N: usize>(&mut self, wanted: &[u8], what: &'static str) -> Result<(), NarError> {
        let bytes: [u8; N] = self.read_array()?;
        if bytes == *wanted { Ok(()) } else { Err(self.unexpected(what, N)) }
    }

    fn check_close(&self, tag: &[u8]) -> Result<(), NarError> {
        if tag == CLOSE { Ok(()) } else { Err(self.unexpected("')'", tag.len())) }
    }

    fn check_padding(&self, padding: &[u8]) -> Result<(), NarError> {
        if padding.iter().all(|&byte| byte == 0) { Ok(()) } else { Err(NarError::Padding { offset: self.offset }) }
    }

    fn unexpected(&self, expected: &'static str, back: usize) -> NarError {
        NarError::Unexpected { expected, offset: self.offset - back as u64 }
    }
}

/// The contents of the file a [`NarReader`] is at, until their end.
pub struct Contents<'a, R>(&'a mut NarReader<R>);

impl<R> Contents<'_, R> {
    /// How many bytes are still to come.
    pub fn remaining(&self) -> u64 {
        match self.0.state {
            State::Contents { left, .. } => left,
            _ => 0,
        }
    }
}

impl<R: Read> Read for Contents<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read_contents(buf)
    }
}

fn word(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte))
}
