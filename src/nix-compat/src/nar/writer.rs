//! From events to bytes.

use std::io::{self, Write};

use super::format::{
    CLOSE, CONTENTS, DIRECTORY, ENTRY, ENTRY_TO_NAME, EXECUTABLE, EXECUTABLE_TO_CONTENTS, MAGIC, NAME_TO_TYPE,
    NameError, OpenDirectories, REGULAR, SYMLINK, TARGET, WORD, padding,
};
use super::{MAX_DEPTH, MAX_FILE_SIZE, MAX_TARGET_LEN};

/// Bytes collected before they are handed to the sink. Contents larger than this are never copied.
const BUFFER_LEN: usize = 64 * 1024;

/// What [`NarWriter::empty_contents`] writes at a time: so much that it is never copied.
static ZEROS: [u8; 1 << 20] = [0; 1 << 20];

/// Why an archive cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The sink failed.
    #[error("writing a NAR")]
    Io(#[from] io::Error),
    /// A call at a place where the grammar has no such thing.
    #[error("'{call}' called where a NAR has {expected}")]
    Misuse {
        /// what was called
        call: &'static str,
        /// what could have been
        expected: &'static str,
    },
    /// A name that is no name, or out of order.
    #[error("'{}' cannot be the next entry: {error}", .name.escape_ascii())]
    Name {
        /// the name
        name: Vec<u8>,
        /// what is wrong with it
        error: NameError,
    },
    /// A symlink's target that is empty, longer than [`MAX_TARGET_LEN`] or has a NUL.
    #[error("illegal symlink target of {len} bytes")]
    Target {
        /// its length
        len: usize,
    },
    /// Contents that are longer or shorter than announced, or than [`MAX_FILE_SIZE`].
    #[error("a file's contents are not of the {size} bytes announced")]
    FileSize {
        /// the size announced
        size: u64,
    },
    /// More nodes inside each other than [`MAX_DEPTH`].
    #[error("more than {MAX_DEPTH} nodes inside each other")]
    Depth,
}

/// Writes an archive to `W`, and only a well-formed one: whatever order methods are called in, the result is either
/// what [`NarReader`](super::NarReader) reads back or an error.
///
/// After an error nothing more should be written. Nothing is flushed on drop.
pub struct NarWriter<W> {
    sink: W,
    buffer: Vec<u8>,
    /// Bytes that the sink has.
    handed_over: u64,
    state: State,
    directories: OpenDirectories,
}

#[derive(Clone, Copy)]
enum State {
    /// Before a node.
    Node,
    /// In a file with so many bytes still to come.
    Contents { left: u64, size: u64 },
    /// In a directory, between entries.
    Directory,
    /// Behind the root.
    End,
}

impl State {
    const fn expected(self) -> &'static str {
        match self {
            Self::Node => "a node",
            Self::Contents { .. } => "a file's contents",
            Self::Directory => "an entry or a directory's end",
            Self::End => "its end",
        }
    }
}

impl<W: Write> NarWriter<W> {
    /// Starts before the root node.
    pub fn new(sink: W) -> Self {
        let mut buffer = Vec::with_capacity(BUFFER_LEN);
        buffer.extend_from_slice(MAGIC);
        Self { sink, buffer, handed_over: 0, state: State::Node, directories: OpenDirectories::default() }
    }

    /// Bytes of the archive up to here, whether the sink has them already or not.
    pub fn position(&self) -> u64 {
        self.handed_over + self.buffer.len() as u64
    }

    /// A file of `size` bytes. They follow by [`contents`](Self::contents), then [`end_regular`](Self::end_regular).
    pub fn regular_header(&mut self, executable: bool, size: u64) -> Result<(), WriteError> {
        self.begin_node("regular_header")?;
        if size > MAX_FILE_SIZE {
            return Err(WriteError::FileSize { size });
        }
        self.put(REGULAR)?;
        if executable {
            self.put(EXECUTABLE)?;
            self.put(EXECUTABLE_TO_CONTENTS)?;
        } else {
            self.put(CONTENTS)?;
        }
        self.put(&size.to_le_bytes())?;
        self.state = State::Contents { left: size, size };
        Ok(())
    }

    /// The next piece of the present file.
    pub fn contents(&mut self, data: &[u8]) -> Result<(), WriteError> {
        let State::Contents { left, size } = self.state else { return Err(self.misuse("contents")) };
        let left = left.checked_sub(data.len() as u64).ok_or(WriteError::FileSize { size })?;
        self.state = State::Contents { left, size };
        self.put(data)
    }

    /// Zeros as the next `len` bytes of the present file: for a sink that counts bytes and does not look at these.
    pub fn empty_contents(&mut self, mut len: u64) -> Result<(), WriteError> {
        while len > 0 {
            let piece = usize::try_from(len).map_or(ZEROS.len(), |len| len.min(ZEROS.len()));
            self.contents(&ZEROS[..piece])?;
            len -= piece as u64;
        }
        Ok(())
    }

    /// Ends the present file, whose contents must be complete.
    pub fn end_regular(&mut self) -> Result<(), WriteError> {
        let State::Contents { left, size } = self.state else { return Err(self.misuse("end_regular")) };
        if left != 0 {
            return Err(WriteError::FileSize { size });
        }
        self.pad(size)?;
        self.end_node()
    }

    /// A symlink.
    pub fn symlink(&mut self, target: &[u8]) -> Result<(), WriteError> {
        self.begin_node("symlink")?;
        if target.is_empty() || target.len() > MAX_TARGET_LEN || target.contains(&0) {
            return Err(WriteError::Target { len: target.len() });
        }
        self.put(SYMLINK)?;
        self.put(TARGET)?;
        self.put_string(target)?;
        self.end_node()
    }

    /// Begins a directory.
    pub fn enter_directory(&mut self) -> Result<(), WriteError> {
        self.begin_node("enter_directory")?;
        self.put(DIRECTORY)?;
        self.directories.enter();
        self.state = State::Directory;
        Ok(())
    }

    /// The name of the innermost directory's next entry; its node is next.
    pub fn entry(&mut self, name: &[u8]) -> Result<(), WriteError> {
        let State::Directory = self.state else { return Err(self.misuse("entry")) };
        if self.directories.depth() >= MAX_DEPTH {
            return Err(WriteError::Depth);
        }
        self.directories.entry(name).map_err(|error| WriteError::Name { name: name.to_vec(), error })?;
        self.put(ENTRY)?;
        self.put(ENTRY_TO_NAME)?;
        self.put_string(name)?;
        self.put(NAME_TO_TYPE)?;
        self.state = State::Node;
        Ok(())
    }

    /// Ends the innermost directory.
    pub fn leave_directory(&mut self) -> Result<(), WriteError> {
        let State::Directory = self.state else { return Err(self.misuse("leave_directory")) };
        self.directories.leave();
        self.end_node()
    }

    /// Ends the archive: hands what is still collected to the sink and gives that back, not flushed.
    pub fn finish(mut self) -> Result<W, WriteError> {
        let State::End = self.state else { return Err(self.misuse("finish")) };
        self.sink.write_all(&self.buffer)?;
        Ok(self.sink)
    }

    fn begin_node(&self, call: &'static str) -> Result<(), WriteError> {
        match self.state {
            State::Node => Ok(()),
            _ => Err(self.misuse(call)),
        }
    }

    fn end_node(&mut self) -> Result<(), WriteError> {
        self.put(CLOSE)?;
        if self.directories.depth() == 0 {
            self.state = State::End;
        } else {
            self.put(CLOSE)?;
            self.state = State::Directory;
        }
        Ok(())
    }

    fn put_string(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        let len = bytes.len() as u64;
        self.put(&len.to_le_bytes())?;
        self.put(bytes)?;
        self.pad(len)
    }

    fn pad(&mut self, len: u64) -> Result<(), WriteError> {
        self.put(&[0; WORD][..padding(len)])
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        if self.buffer.len() + bytes.len() > BUFFER_LEN {
            self.sink.write_all(&self.buffer)?;
            self.handed_over += self.buffer.len() as u64;
            self.buffer.clear();
            if bytes.len() >= BUFFER_LEN {
                self.sink.write_all(bytes)?;
                self.handed_over += bytes.len() as u64;
                return Ok(());
            }
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    fn misuse(&self, call: &'static str) -> WriteError {
        WriteError::Misuse { call, expected: self.state.expected() }
    }
}
