//! Bytes in: a NAR (or one flat file) becomes castore objects in a single streaming pass.
//!
//! The parser drives. What it reads is hashed on the way ([`DigestingReader`]); file contents go to a castore
//! session, which hashes, chunks, looks up, and compresses only what is new; directories are built from the
//! leaves up ([`crate::nar_tree`]). Memory is bounded whatever the archive.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::sync::Arc;

use bytes::{Buf, Bytes};
use castore::Node;
use castore::engine::{Hold, Session};
use nix_compat::content_address::{ContentAddress, Method};
use nix_compat::hash::{Algorithm, Hash, Hasher};
use nix_compat::nar::NarReader;
use nix_compat::path_info::PathInfo;
use nix_compat::store_path::{StorePath, content_address_path};
use parking_lot::Mutex;

use crate::claims;
use crate::error::{Error, Result};
use crate::nar_digest::{Closed, Digester, DigestingReader, NarDigest, NarFacts};
use crate::nar_tree::read_tree;
use crate::register::NewPath;
use crate::scan::ReferenceScanner;
use crate::store::Store;
use crate::temp_roots::TempRoots;

/// Pieces a dumping thread may be ahead of the import.
const DUMP_PIECES: usize = 4;
/// Bytes of one such piece.
const DUMP_PIECE: usize = 256 * 1024;

/// Keeps the objects of an import from being swept while no valid path refers to them yet.
///
/// It is the castore's hold on them; a sweep waits for holds older than itself.
#[derive(Clone)]
pub struct Pin(#[expect(dead_code, reason = "held for its lifetime only")] Arc<Mutex<Hold>>);

impl From<Hold> for Pin {
    fn from(hold: Hold) -> Self {
        Self(Arc::new(Mutex::new(hold)))
    }
}

impl std::fmt::Debug for Pin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pin")
    }
}

/// Contents that are in the castore, and what was computed on the way.
#[derive(Debug)]
pub struct Ingested {
    /// The root of the tree.
    pub node: Node,
    /// Hashes, size and references of the NAR.
    pub nar: NarFacts,
    /// Must live until the contents are registered.
    pub pin: Pin,
}

/// How [`Store::add`] forms the store path.
#[derive(Clone, Debug)]
pub struct AddOptions {
    /// Name part of the store path.
    pub name: String,
    /// How the contents are hashed, which also tells their form: flat and text are raw bytes, else a NAR.
    pub method: Method,
    /// With which algorithm.
    pub algorithm: Algorithm,
    /// The valid paths it refers to.
    pub references: BTreeSet<StorePath>,
}

impl Store {
    /// Imports the NAR that `reader` gives, to its end and not a byte further.
    ///
    /// The objects are in the castore afterwards, but nothing refers to them yet.
    ///
    /// # Errors
    /// [`Error::Nar`] for a malformed archive or a broken stream.
    pub fn import_nar(&self, reader: &mut dyn Read, digest: NarDigest) -> Result<Ingested> {
        let imported = self.read_nar(reader, digest).and_then(Import::finish);
        imported.inspect_err(|error| self.give_back_if_full(error))
    }

    fn read_nar(&self, reader: &mut dyn Read, digest: NarDigest) -> Result<Import> {
        let mut session = self.engine.session();
        let mut nar = NarReader::new(DigestingReader::new(reader, digest));
        let node = read_tree(&mut nar, &mut session)?;
        let digest = nar.into_inner().close().map_err(hashing)?;
        Ok(Import { session, node, digest })
    }

    /// What an import has written that the disk was too small for is no use to anybody: a sweep takes it away.
    fn give_back_if_full(&self, error: &Error) {
        if castore::is_disk_full(error) {
            self.sweeper.wake();
        }
    }

    /// Imports what `dump` writes, a NAR, looking for references to `candidates`.
    ///
    /// `dump` runs on a thread of its own beside the import.
    ///
    /// # Errors
    /// Those of [`Store::import_nar`]; a failure of `dump` itself comes first.
    pub fn ingest_dump(
        &self,
        dump: impl FnOnce(&mut dyn Write) -> io::Result<()> + Send,
        other: Option<Algorithm>,
        candidates: Option<&BTreeSet<StorePath>>,
    ) -> Result<Ingested> {
        self.ingest_written(dump, NarDigest::new(other, candidates.map(ReferenceScanner::new)))
    }

    /// The same with all that is to be computed on the way.
    pub(crate) fn ingest_written(
        &self,
        dump: impl FnOnce(&mut dyn Write) -> io::Result<()> + Send,
        digest: NarDigest,
    ) -> Result<Ingested> {
        self.ingest_written_here(dump, digest).inspect_err(|error| self.give_back_if_full(error))
    }

    fn ingest_written_here(
        &self,
        dump: impl FnOnce(&mut dyn Write) -> io::Result<()> + Send,
        digest: NarDigest,
    ) -> Result<Ingested> {
        let (send, receive) = crossbeam_channel::bounded(DUMP_PIECES);
        std::thread::scope(|scope| {
            let dumping = scope.spawn(move || {
                let piece = Vec::with_capacity(DUMP_PIECE);
                let mut writer = PieceWriter { piece, digester: Digester::new(digest), send };
                dump(&mut writer)?;
                Ok::<_, io::Error>(writer.finish())
            });
            let mut nar = NarReader::new(PieceReader { piece: Bytes::new(), receive });
            let mut session = self.engine.session();
            let imported = read_tree(&mut nar, &mut session).and_then(|node| Ok((node, Pin::from(session.finish()?))));
            drop(nar);
            let failed = |source| Error::Stream { action: "read", what: "the tree to import".into(), source };
            match dumping.join() {
                Ok(Ok(facts)) => {
                    imported.and_then(|(node, pin)| Ok(Ingested { node, nar: facts.map_err(hashing)?, pin }))
                }
                // When the import stopped reading, the dump fails too, and the import's reason is the better one.
                Ok(Err(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
                    imported.and_then(|_| Err(failed(error)))
                }
                Ok(Err(error)) => Err(failed(error)),
                Err(_) => Err(failed(io::Error::other("the reading thread panicked"))),
            }
        })
    }

    /// Adds contents under the store path that follows from them, and registers it, as [`Store::add_rooted`] does; but
    /// a collection may take it at once.
    ///
    /// # Errors
    /// As there.
    pub fn add(&self, options: &AddOptions, reader: &mut dyn Read) -> Result<PathInfo> {
        self.add_rooted(options, &self.new_temp_roots(), reader)
    }

    /// Adds contents under the store path that follows from them, as `AddToStore` does, and registers it.
    ///
    /// Re-adding a valid path writes nothing and gives its info. The path is in `roots` before it is looked whether it
    /// is valid: it could be dead, and be collected after it was found.
    ///
    /// # Errors
    /// [`Error::Path`] when method, algorithm and references do not go together or the name is not one;
    /// those of the import and of the registration.
    pub fn add_rooted(&self, options: &AddOptions, roots: &TempRoots, reader: &mut dyn Read) -> Result<PathInfo> {
        let (ingested, hash) = self.ingest(options, reader)?;
        self.add_ingested_rooted(options, roots, ingested, hash)
    }

    /// The first half of [`Store::add_rooted`]: imports contents and hashes them as their store path wants it. Nothing
    /// is registered, so the caller may still refuse them.
    ///
    /// # Errors
    /// Those of the import.
    pub fn ingest(&self, options: &AddOptions, reader: &mut dyn Read) -> Result<(Ingested, Hash)> {
        match options.method {
            Method::Nar => {
                let ingested = self.import_nar(reader, NarDigest::new(Some(options.algorithm), None))?;
                let hash = ingested.nar.other.unwrap_or(Hash::Sha256(*ingested.nar.nar_hash.as_bytes()));
                Ok((ingested, hash))
            }
            Method::Git => {
                let ingested = self.import_nar(reader, NarDigest::new(None, None))?;
                let hash = self.git_hash(&ingested.node, options.algorithm)?;
                Ok((ingested, hash))
            }
            Method::Flat | Method::Text => self.import_flat(reader, options.algorithm),
        }
    }

    /// As [`Store::add_ingested_rooted`], but a collection may take the path at once.
    ///
    /// # Errors
    /// As for [`Store::add_rooted`].
    pub fn add_ingested(&self, options: &AddOptions, ingested: Ingested, hash: Hash) -> Result<PathInfo> {
        self.add_ingested_rooted(options, &self.new_temp_roots(), ingested, hash)
    }

    /// Registers contents that are in the castore under the store path that follows from `hash`, which is in `roots`
    /// first.
    ///
    /// # Errors
    /// As for [`Store::add_rooted`].
    pub fn add_ingested_rooted(
        &self,
        options: &AddOptions,
        roots: &TempRoots,
        ingested: Ingested,
        hash: Hash,
    ) -> Result<PathInfo> {
        let ca = ContentAddress { method: options.method, hash };
        let path = content_address_path(self.store_dir(), &options.name, &ca, &options.references, false)
            .map_err(|e| Error::Path { name: options.name.clone(), reason: e.to_string() })?;
        roots.add(&path);
        if let Some(info) = self.path_info(&path)? {
            return Ok(info);
        }
        let info = PathInfo {
            path: path.clone(),
            deriver: None,
            nar_hash: ingested.nar.nar_hash,
            references: options.references.clone(),
            registration_time: 0,
            nar_size: ingested.nar.nar_size,
            ultimate: false,
            signatures: BTreeSet::new(),
            ca: Some(ca),
        };
        self.register(vec![NewPath { info, node: ingested.node, pin: Some(ingested.pin) }])?;
        self.path_info(&path)?.ok_or_else(|| Error::path(self.store_dir(), &path))
    }

    /// Imports one file whose length is not known beforehand; gives its flat hash beside the NAR's.
    fn import_flat(&self, reader: &mut dyn Read, algorithm: Algorithm) -> Result<(Ingested, Hash)> {
        let mut session = self.engine.session();
        let mut hashing = HashingReader { inner: reader, hasher: Hasher::new(algorithm) };
        let (digest, size) = session.put_blob(&mut hashing)?;
        let pin = Pin::from(session.finish()?);
        let node = Node::File { digest, size, executable: false };
        // A NAR names the size before the contents, so its hash takes a second look at them.
        let nar = self.nar_facts(&node, None)?;
        Ok((Ingested { node, nar, pin }, hashing.hasher.finalize()))
    }

    /// Imports the contents of a path whose info is known, and registers it.
    ///
    /// The NAR's hash and size must be those of the info; a content address must match the contents and the
    /// path. Signatures are the caller's business ([`Store::check_signatures`]).
    ///
    /// # Errors
    /// [`Error::HashMismatch`], [`Error::SizeMismatch`], [`Error::ContentAddressMismatch`], those of the
    /// import and of the registration.
    pub fn add_with_info(&self, info: PathInfo, reader: &mut dyn Read) -> Result<()> {
        let new = self.import_with_info(info, reader)?;
        self.register(vec![new])
    }

    /// As [`Store::add_with_info`], but leaves the registration to the caller, who may batch it.
    ///
    /// # Errors
    /// As there.
    pub fn import_with_info(&self, info: PathInfo, reader: &mut dyn Read) -> Result<NewPath> {
        let ingested = self.import_nar(reader, NarDigest::new(claims::nar_algorithm(&info), None))?;
        self.new_path(info, ingested)
    }

    /// Contents as the path they are said to be, which they have to be.
    fn new_path(&self, info: PathInfo, ingested: Ingested) -> Result<NewPath> {
        self.check_claims(&info, &ingested.node, &ingested.nar)?;
        let info = PathInfo { nar_size: ingested.nar.nar_size, ..info };
        Ok(NewPath { info, node: ingested.node, pin: Some(ingested.pin) })
    }

    /// As [`Store::import_with_info`], but only reads: what has been read may still be under way to the disk and to the
    /// hash, so that the next archive of a stream can be read meanwhile.
    ///
    /// # Errors
    /// Those of [`Store::import_nar`].
    pub fn read_with_info(&self, info: PathInfo, reader: &mut dyn Read) -> Result<Reading> {
        let digest = NarDigest::new(claims::nar_algorithm(&info), None);
        let read = self.read_nar(reader, digest).and_then(|mut import| {
            import.session.close()?;
            Ok(import)
        });
        let import = read.inspect_err(|error| self.give_back_if_full(error))?;
        Ok(Reading { info, import })
    }

    /// Waits for what [`Store::read_with_info`] has left under way, and checks it.
    ///
    /// # Errors
    /// As for [`Store::import_with_info`].
    pub fn finish_reading(&self, reading: Reading) -> Result<NewPath> {
        let ingested = reading.import.finish().inspect_err(|error| self.give_back_if_full(error))?;
        self.new_path(reading.info, ingested)
    }

    /// As [`Store::import_with_info`], for what `dump` writes on a thread of its own.
    ///
    /// # Errors
    /// As there; a failure of `dump` itself comes first.
    pub fn import_dump_with_info(
        &self,
        info: PathInfo,
        dump: impl FnOnce(&mut dyn Write) -> io::Result<()> + Send,
    ) -> Result<NewPath> {
        let ingested = self.ingest_written(dump, NarDigest::new(claims::nar_algorithm(&info), None))?;
        self.new_path(info, ingested)
    }

    /// The hash of a single file's bytes; `what` names it in the error.
    ///
    /// # Errors
    /// [`Error::NotAFile`].
    pub fn flat_hash(&self, node: &Node, algorithm: Algorithm, what: &str) -> Result<Hash> {
        let Node::File { digest, size, .. } = node else { return Err(Error::NotAFile(what.to_owned())) };
        let mut hasher = Hasher::new(algorithm);
        self.for_each_piece(digest, *size, &mut |piece| {
            hasher.update(piece);
            Ok(())
        })?;
        Ok(hasher.finalize())
    }
}

/// An archive that has been read to its end, whose contents may be under way still.
struct Import {
    session: Session,
    node: Node,
    digest: Closed,
}

impl Import {
    fn finish(self) -> Result<Ingested> {
        let pin = Pin::from(self.session.finish()?);
        let nar = self.digest.wait().map_err(hashing)?;
        Ok(Ingested { node: self.node, nar, pin })
    }
}

/// The contents of a path that have been read and not been checked; see [`Store::read_with_info`].
///
/// Memory: the blocks on their way to the packs, and a few pieces of the archive on their way to the hash.
#[must_use = "nothing is known of contents that are not checked"]
pub struct Reading {
    info: PathInfo,
    import: Import,
}

impl Reading {
    /// The path it is said to be.
    #[must_use]
    pub fn path(&self) -> &StorePath {
        &self.info.path
    }
}

/// Reads the next bytes of a stream until its end, hashing them.
struct HashingReader<'a> {
    inner: &'a mut dyn Read,
    hasher: Hasher,
}

impl Read for HashingReader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.hasher.update(&buf[..n]);
        Ok(n)
    }
}

fn hashing(source: io::Error) -> Error {
    Error::Stream { action: "hash", what: "the archive".into(), source }
}

/// Writes into a channel in large pieces, and has the same pieces digested.
struct PieceWriter {
    piece: Vec<u8>,
    digester: Digester,
    send: crossbeam_channel::Sender<Bytes>,
}

impl PieceWriter {
    /// Sends the rest, and gives what the digest came to.
    fn finish(self) -> io::Result<NarFacts> {
        let last = Bytes::from(self.piece);
        // A reader that is gone has failed, or has the whole archive.
        let _ = self.send.send(last.clone());
        // It sees the end while the rest is hashed.
        drop(self.send);
        self.digester.finish(last)
    }
}

impl Write for PieceWriter {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.piece.extend_from_slice(buf);
        if self.piece.len() >= DUMP_PIECE {
            let piece = Bytes::from(std::mem::replace(&mut self.piece, Vec::with_capacity(DUMP_PIECE)));
            self.send.send(piece.clone()).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
            self.digester.feed(piece)?;
        }
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads what a [`PieceWriter`] wrote.
struct PieceReader {
    piece: Bytes,
    receive: crossbeam_channel::Receiver<Bytes>,
}

impl Read for PieceReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.receive.recv() {
                Ok(piece) => self.piece = piece,
                Err(_) => return Ok(0),
            }
        }
        let n = buf.len().min(self.piece.len());
        self.piece.split_to(n).copy_to_slice(&mut buf[..n]);
        Ok(n)
    }
}
