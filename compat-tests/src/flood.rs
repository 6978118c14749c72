//! Gigabytes of data made as they are read: always the same for the same salt, cheap to make, and neither all new nor
//! all alike, so that a store that cuts and compresses has its usual work and the disk is not filled.

use std::io::{self, Read};

/// Bytes of the part that comes again and again.
const BLOCK: usize = 32 << 20;
/// Each piece of this length differs from all others in its first bytes.
const PIECE: usize = 1 << 20;
/// Bytes that differ.
const MARK: usize = 16;

/// What all floods have in common; make it once.
#[derive(Debug)]
pub struct Source {
    block: Vec<u8>,
}

impl Default for Source {
    fn default() -> Self {
        // xorshift64: nothing that can be compressed.
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut block = Vec::with_capacity(BLOCK);
        while block.len() < BLOCK {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            block.extend_from_slice(&state.to_le_bytes());
        }
        Self { block }
    }
}

impl Source {
    /// `size` bytes, which must be whole pieces of 1 MiB.
    pub fn data(&self, salt: u64, size: u64) -> Flood<'_> {
        Flood { source: self, salt, pieces: size / PIECE as u64, number: 0, piece: Vec::new(), at: 0, tail: None }
    }

    /// The same as the archive of one file.
    pub fn archive(&self, salt: u64, size: u64) -> Flood<'_> {
        Flood { piece: archive_head(size), tail: Some(archive_tail()), ..self.data(salt, size) }
    }
}

/// Bytes of the archive of a file of `size` bytes, whole pieces.
pub fn archive_size(size: u64) -> u64 {
    archive_head(size).len() as u64 + size + archive_tail().len() as u64
}

fn archive_head(size: u64) -> Vec<u8> {
    let mut head = Vec::new();
    for string in [b"nix-archive-1".as_slice(), b"(", b"type", b"regular", b"contents"] {
        crate::nar::put(&mut head, string);
    }
    head.extend_from_slice(&size.to_le_bytes());
    head
}

fn archive_tail() -> Vec<u8> {
    let mut tail = Vec::new();
    crate::nar::put(&mut tail, b")");
    tail
}

/// Gives the data piece by piece.
#[derive(Debug)]
pub struct Flood<'a> {
    source: &'a Source,
    salt: u64,
    pieces: u64,
    number: u64,
    piece: Vec<u8>,
    at: usize,
    tail: Option<Vec<u8>>,
}

impl Read for Flood<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.piece.len() {
            self.at = 0;
            self.piece.clear();
            if self.number < self.pieces {
                let at = (self.number as usize * PIECE) % BLOCK;
                self.piece.extend_from_slice(&self.source.block[at..at + PIECE]);
                self.piece[..8].copy_from_slice(&self.salt.to_le_bytes());
                self.piece[8..MARK].copy_from_slice(&self.number.to_le_bytes());
                self.number += 1;
            } else {
                self.piece = self.tail.take().unwrap_or_default();
            }
        }
        let n = buffer.len().min(self.piece.len() - self.at);
        buffer[..n].copy_from_slice(&self.piece[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nar::Tree;

    #[test]
    fn archives_are_those_of_the_data() {
        let (source, size) = (Source::default(), 3 << 20);
        let mut data = Vec::new();
        source.data(7, size).read_to_end(&mut data).unwrap();
        let expected = Tree::File(data).archive();
        assert_eq!(expected.len() as u64, archive_size(size));
        let mut read = Vec::new();
        source.archive(7, size).read_to_end(&mut read).unwrap();
        assert!(read == expected);
    }
}
