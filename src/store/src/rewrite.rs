//! Self-references: the address of contents that mention their own path, and putting a path in the place of another.
//!
//! A content-addressed output is built under a provisional path and moved to the one that follows from its contents. What
//! it says of itself and of its fellow outputs is replaced on the way; for its address its own hash part counts as zeros.

use std::collections::HashMap;
use std::io::{self, Write};

use castore::Node;
use nix_compat::hash::{Algorithm, Hash, Hasher};
use nix_compat::store_path::StorePath;

use crate::error::{Error, Result};
use crate::nar_digest::NarDigest;
use crate::nar_in::Ingested;
use crate::scan::{HASH_PART, windows_of_digits};
use crate::store::Store;

/// Replaces hash parts in the bytes written to it by others of the same length.
struct Rewriter<'a, W> {
    out: W,
    replacements: HashMap<[u8; HASH_PART], [u8; HASH_PART]>,
    /// What may be the beginning of a hash part.
    tail: Vec<u8>,
    /// Offset in the stream of the first byte of `tail`.
    position: u64,
    matches: &'a mut dyn FnMut(u64),
}

impl<'a, W: Write> Rewriter<'a, W> {
    fn new(out: W, replacements: HashMap<[u8; HASH_PART], [u8; HASH_PART]>, matches: &'a mut dyn FnMut(u64)) -> Self {
        Self { out, replacements, tail: Vec::new(), position: 0, matches }
    }

    fn finish(mut self) -> io::Result<W> {
        self.out.write_all(&self.tail)?;
        Ok(self.out)
    }
}

impl<W: Write> Write for Rewriter<'_, W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let mut bytes = std::mem::take(&mut self.tail);
        bytes.extend_from_slice(buf);
        let mut found = Vec::new();
        windows_of_digits(&bytes, &mut |at, window| {
            found.extend(self.replacements.get(window).map(|new| (at, *new)));
        });
        // Two that overlap cannot both be meant: the first counts, as in stock.
        let mut end = 0;
        for (at, new) in found {
            if at >= end {
                bytes[at..at + HASH_PART].copy_from_slice(&new);
                (self.matches)(self.position + at as u64);
                end = at + HASH_PART;
            }
        }
        let done = bytes.len().saturating_sub(HASH_PART - 1).max(end);
        self.out.write_all(&bytes[..done])?;
        self.position += done as u64;
        bytes.drain(..done);
        self.tail = bytes;
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

fn hash_part(path: &StorePath) -> Option<[u8; HASH_PART]> {
    path.hash_part().as_bytes().try_into().ok()
}

/// The hashes of contents with the references to themselves taken out.
pub(crate) struct ModuloItself {
    /// As Nix 2.26.3 and 2.34.8 make it.
    pub(crate) plain: Hash,
    /// As Nix 2.8.0 makes it: behind the contents comes `|<offset>` for each place.
    pub(crate) with_places: Hash,
}

/// Hashes what is written to it.
struct HashSink(Hasher);

impl Write for HashSink {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.update(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Store {
    /// The hash of a tree's NAR in which the hash part of `itself` counts as zeros: what content addresses of trees with
    /// references to themselves are made of.
    ///
    /// # Errors
    /// Failures of the castore.
    pub fn hash_modulo_itself(&self, node: &Node, itself: &StorePath, algorithm: Algorithm) -> Result<Hash> {
        Ok(self.hashes_modulo_itself(node, itself, algorithm)?.plain)
    }

    /// The same in both forms that are found.
    pub(crate) fn hashes_modulo_itself(
        &self,
        node: &Node,
        itself: &StorePath,
        algorithm: Algorithm,
    ) -> Result<ModuloItself> {
        let mut places = Vec::new();
        let mut note = |at| places.push(at);
        let zeros = hash_part(itself).map(|part| (part, [0; HASH_PART]));
        let mut rewriter = Rewriter::new(HashSink(Hasher::new(algorithm)), zeros.into_iter().collect(), &mut note);
        self.write_nar_of(node, &mut rewriter)?;
        let failed = |source| Error::Stream { action: "hash", what: format!("the contents of {itself}"), source };
        let mut hasher = rewriter.finish().map_err(failed)?.0;
        let plain = hasher.clone().finalize();
        for at in places {
            hasher.update(format!("|{at}").as_bytes());
        }
        Ok(ModuloItself { plain, with_places: hasher.finalize() })
    }

    /// Imports a tree of the castore once more, with hash parts replaced in file contents, link targets and names.
    ///
    /// # Errors
    /// Those of [`Store::import_nar`]: names that are not sorted any more, for one.
    pub fn rewrite(
        &self,
        node: &Node,
        replacements: &[(StorePath, StorePath)],
        other: Option<Algorithm>,
    ) -> Result<Ingested> {
        let parts = replacements.iter().filter_map(|(from, to)| Some((hash_part(from)?, hash_part(to)?)));
        let parts: HashMap<_, _> = parts.collect();
        self.ingest_written(
            |out| {
                let mut ignore = |_| ();
                let mut rewriter = Rewriter::new(out, parts, &mut ignore);
                self.write_nar_of(node, &mut rewriter).map_err(io::Error::other)?;
                rewriter.finish().map(drop)
            },
            NarDigest::new(other, None),
        )
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use nix_compat::content_address::{ContentAddress, Method};
    use nix_compat::store_path::{StoreDir, content_address_path};

    use super::*;
    use crate::nar_in::AddOptions;
    use crate::store::Config;

    fn rewrite(pieces: &[&[u8]], replacements: &[([u8; HASH_PART], [u8; HASH_PART])]) -> (Vec<u8>, Vec<u64>) {
        let mut places = Vec::new();
        let mut note = |at| places.push(at);
        let mut rewriter = Rewriter::new(Vec::new(), replacements.iter().copied().collect(), &mut note);
        pieces.iter().for_each(|piece| rewriter.write_all(piece).unwrap());
        (rewriter.finish().unwrap(), places)
    }

    #[test]
    fn both_forms_of_an_address_are_those_of_stock() {
        // What `nix store make-content-addressed` of 2.34.8 and 2.8.0 makes of the output of
        // `echo me $out and $out again > $out`.
        let before = StorePath::from_base_name("l6spxr2p5vivgckryl21kxa3ps4yzqjr-selfy").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(Config::new(StoreDir::default(), dir.path())).unwrap();
        let path = store.store_dir().display(&before);
        let text = format!("me {path} and {path} again\n");
        let options = AddOptions {
            name: "selfy".into(),
            method: Method::Flat,
            algorithm: Algorithm::Sha256,
            references: BTreeSet::new(),
        };
        let (ingested, _) = store.ingest(&options, &mut text.as_bytes()).unwrap();
        let hashes = store.hashes_modulo_itself(&ingested.node, &before, Algorithm::Sha256).unwrap();
        let path = |hash| {
            let ca = ContentAddress { method: Method::Nar, hash };
            content_address_path(store.store_dir(), "selfy", &ca, &BTreeSet::new(), true).unwrap().to_string()
        };
        assert_eq!(path(hashes.plain), "kqhzm21p3wz2c87lqlg12djacbh3x4zd-selfy");
        assert_eq!(path(hashes.with_places), "6w04fjjcq946vs36v4vgfy7qvrybd20h-selfy");
    }

    #[test]
    fn the_cutting_into_pieces_does_not_matter() {
        let (a, b) = ([b'a'; HASH_PART], [b'b'; HASH_PART]);
        let mut text = b"see /nix/store/".to_vec();
        text.extend(a);
        text.extend(b"-x and 0123");
        text.extend(a);
        text.extend(a);
        text.push(b'a');
        let expected = [&b"see /nix/store/"[..], &b, b"-x and 0123", &b, &b, b"a"].concat();
        for size in [1, 7, 31, 32, 33, 1000] {
            let pieces: Vec<&[u8]> = text.chunks(size).collect();
            assert_eq!(rewrite(&pieces, &[(a, b)]), (expected.clone(), vec![15, 58, 90]), "{size}");
        }
        assert_eq!(rewrite(&[b"short"], &[(a, b)]), (b"short".to_vec(), vec![]));
    }
}
