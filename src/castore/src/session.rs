//! One import: bytes and directories in, digests out.

use std::io::{self, Read};

use crate::blob::{chunk, chunk_list, directory as directory_key};
use crate::chunk::{ChunkListBuilder, Cutter, MAX_CHUNK, WHOLE};
use crate::objects::{ObjectKey, ObjectWriter};
use crate::{Digest, Directory, Error};

/// Bytes of a large blob in memory at a time. Much larger than a chunk, so that few bytes are moved to the front.
const WINDOW: usize = 1024 * 1024;
/// Most files are shorter. An import of one such file does without the memory for a longer one, and without clearing it.
const SMALL: usize = 8 * 1024;
/// Bytes of new contents after which it is looked whether the disk still has room.
const ROOM_STEP: u64 = 1 << 20;

/// Puts the blobs and directories of one import.
///
/// What was put is visible after [`flush`](Session::flush) and durable after [`Engine::sync`]. Nothing is stored twice:
/// what is here already is only remembered as used.
///
/// **No collection takes away what a session put or found to be here, until the session, or the [`Hold`] it ends in, is
/// dropped.** So one of the two is kept until whatever names the contents is committed. A session that is dropped
/// before that leaves garbage, which the next collection removes.
///
/// Memory: a window of 1 MiB, the blocks on their way to the packs, and 36 bytes per chunk of the blob under way.
///
/// [`Engine::sync`]: crate::engine::Engine::sync
pub struct Session {
    writer: ObjectWriter,
    /// New contents since it was last looked whether there is room.
    since_room: u64,
    cutter: Cutter,
    /// The bytes being read; as long as it had to be so far.
    window: Vec<u8>,
}

/// Keeps what a session put from being collected until it is dropped.
#[must_use = "what it holds can be collected once it is dropped"]
pub struct Hold {
    writer: ObjectWriter,
}

impl Hold {
    /// Holds nothing yet.
    pub(crate) fn new(writer: ObjectWriter) -> Hold {
        Hold { writer }
    }

    /// Holds the object from now on; false when it is not here.
    pub(crate) fn add(&mut self, key: &ObjectKey) -> Result<bool, Error> {
        Ok(self.writer.touch(key)?)
    }
}

impl Session {
    pub(crate) fn new(writer: ObjectWriter) -> Session {
        Session { writer, since_room: 0, cutter: Cutter::new(), window: Vec::new() }
    }

    /// Stores what `from` gives up to its end as one blob. Returns its digest and length in bytes.
    ///
    /// # Errors
    /// [`Error::Input`] when `from` fails: nothing can be read under the digest then.
    pub fn put_blob(&mut self, from: &mut dyn Read) -> Result<(Digest, u64), Error> {
        let mut window = std::mem::take(&mut self.window);
        let result = self.put_through(&mut window, from);
        self.window = window;
        result
    }

    fn put_through(&mut self, window: &mut Vec<u8>, from: &mut dyn Read) -> Result<(Digest, u64), Error> {
        let mut filled = 0;
        for most in [SMALL, WHOLE] {
            grow(window, most + 1);
            filled += fill(&mut window[filled..most + 1], from)?;
            if filled <= most {
                return self.put_whole(&window[..filled]);
            }
        }
        // An import of small files, of which there can be many at a time, never comes here.
        grow(window, WINDOW);

        let mut blob = ChunkedBlob::default();
        let mut hashed = 0;
        loop {
            let read = fill(&mut window[filled..], from)?;
            let ended = filled + read < window.len();
            filled += read;
            blob.hasher.update(&window[hashed..filled]);

            let cut = self.put_chunks(&mut blob, &window[..filled], ended)?;
            if ended {
                return self.finish_blob(blob);
            }
            window.copy_within(cut..filled, 0);
            filled -= cut;
            hashed = filled;
        }
    }

    /// Stores `bytes` as one blob. Returns its digest.
    pub fn put_blob_bytes(&mut self, bytes: &[u8]) -> Result<Digest, Error> {
        if bytes.len() <= WHOLE {
            return Ok(self.put_whole(bytes)?.0);
        }
        let mut blob = ChunkedBlob::default();
        blob.hasher.update(bytes);
        self.put_chunks(&mut blob, bytes, true)?;
        Ok(self.finish_blob(blob)?.0)
    }

    /// An import that does not fit ends before the disk is full to the last byte: others need some of it, the index first.
    fn put(&mut self, key: ObjectKey, contents: &[u8]) -> Result<(), Error> {
        if self.writer.put(key, contents)? {
            self.since_room += contents.len() as u64;
            if self.since_room >= ROOM_STEP {
                self.since_room = 0;
                self.writer.check_room()?;
            }
        }
        Ok(())
    }

    fn put_whole(&mut self, bytes: &[u8]) -> Result<(Digest, u64), Error> {
        let digest = Digest::of(bytes);
        // The empty blob is known to everybody and never stored.
        if !bytes.is_empty() {
            self.put(chunk(&digest), bytes)?;
        }
        Ok((digest, bytes.len() as u64))
    }

    /// Puts the chunks `bytes` begin with, all of them when the blob `ended`; else a rest is left that a chunk's end may
    /// lie behind. Returns how many bytes were put.
    fn put_chunks(&mut self, blob: &mut ChunkedBlob, bytes: &[u8], ended: bool) -> Result<usize, Error> {
        let keep = if ended { 0 } else { MAX_CHUNK };
        let mut at = 0;
        while bytes.len() - at > keep {
            let length = self.cutter.next(&bytes[at..]);
            let contents = &bytes[at..at + length];
            let digest = Digest::of(contents);
            self.put(chunk(&digest), contents)?;
            if !blob.list.push(&digest, length as u32) {
                return Err(Error::BlobTooLarge { limit: blob.hasher.count() });
            }
            at += length;
        }
        Ok(at)
    }

    fn finish_blob(&mut self, blob: ChunkedBlob) -> Result<(Digest, u64), Error> {
        let digest = Digest::from(blob.hasher.finalize());
        // Without a list there is one chunk, and it has the blob's digest.
        if let Some(list) = blob.list.finish() {
            self.put(chunk_list(&digest), &list)?;
        }
        Ok((digest, blob.hasher.count()))
    }

    /// Stores a directory and returns its digest. The caller vouches for its children: that they are put or here, and
    /// have the sizes the directory says.
    pub fn put_directory(&mut self, directory: &Directory) -> Result<Digest, Error> {
        let encoded = directory.encode();
        let digest = Digest::of(&encoded);
        // The empty directory, as the empty blob, is known to everybody.
        if !encoded.is_empty() {
            self.put(directory_key(&digest), &encoded)?;
        }
        Ok(digest)
    }

    /// Makes everything put so far visible.
    pub fn flush(&mut self) -> Result<(), Error> {
        Ok(self.writer.flush()?)
    }

    /// Nothing more is put: what was becomes visible while the caller does something else, until it
    /// [finishes](Session::finish).
    pub fn close(&mut self) -> Result<(), Error> {
        self.window = Vec::new();
        Ok(self.writer.start_flush()?)
    }

    /// Makes everything put visible and ends the session; the answer keeps it from being collected.
    pub fn finish(mut self) -> Result<Hold, Error> {
        self.flush()?;
        Ok(Hold::new(self.writer))
    }
}

/// A blob of more than one chunk on its way.
#[derive(Default)]
struct ChunkedBlob {
    /// Over all bytes, chunks or not.
    hasher: blake3::Hasher,
    list: ChunkListBuilder,
}

/// Makes `window` at least `length` bytes long.
fn grow(window: &mut Vec<u8>, length: usize) {
    if window.len() < length {
        window.resize(length, 0);
    }
}

/// Reads until `buffer` is full or `from` ends; how many bytes.
fn fill(buffer: &mut [u8], from: &mut dyn Read) -> Result<usize, Error> {
    let mut filled = 0;
    while filled < buffer.len() {
        match from.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::Input(error)),
        }
    }
    Ok(filled)
}
