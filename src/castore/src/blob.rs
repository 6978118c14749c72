//! Blobs out of the object store: finding the chunks of a range and putting them together.

use std::sync::Arc;

use bytes::Bytes;
use quick_cache::Weighter;
use quick_cache::sync::Cache;

use crate::chunk::ChunkList;
use crate::objects::{ObjectKey, ObjectKind, ObjectStore};
use crate::{BlobDamage, BlobStat, Digest, Error};

/// A list of this many bytes is a typical one; it sizes the tables of the cache.
const TYPICAL_LIST: u64 = 2048;

/// Reads blobs, with the chunk lists that were used lately decoded in memory.
pub(crate) struct Blobs {
    objects: Arc<ObjectStore>,
    lists: Cache<Digest, Arc<ChunkList>, ByMemory>,
}

#[derive(Clone)]
struct ByMemory;

impl Weighter<Digest, Arc<ChunkList>> for ByMemory {
    fn weight(&self, _: &Digest, list: &Arc<ChunkList>) -> u64 {
        list.memory() as u64
    }
}

/// How a blob is stored.
enum Stored {
    /// The whole blob is one chunk.
    Whole(Bytes),
    Chunked(Arc<ChunkList>),
}

impl Blobs {
    /// Reads from `objects`, with at most `cache_bytes` of decoded lists in memory.
    pub(crate) fn new(objects: Arc<ObjectStore>, cache_bytes: u64) -> Blobs {
        let lists = Cache::with_weighter((cache_bytes / TYPICAL_LIST).max(16) as usize, cache_bytes, ByMemory);
        Blobs { objects, lists }
    }

    pub(crate) fn stat(&self, digest: &Digest) -> Result<Option<BlobStat>, Error> {
        if *digest == Digest::EMPTY {
            return Ok(Some(BlobStat { size: 0, chunks: Vec::new() }));
        }
        if let Some(length) = self.objects.length(&chunk(digest))? {
            let size = u64::from(length);
            return Ok(Some(BlobStat { size, chunks: vec![(*digest, size)] }));
        }
        let list = self.list(digest)?;
        Ok(list.map(|list| BlobStat { size: list.size(), chunks: list.chunks().collect() }))
    }

    /// See [`BlobService::read_at`](crate::BlobService::read_at). A range within one chunk shares the chunk's memory;
    /// a longer one is copied together once.
    pub(crate) fn read_at(&self, digest: &Digest, offset: u64, len: usize) -> Result<Bytes, Error> {
        match self.stored(digest)? {
            Stored::Whole(blob) => Ok(slice(&blob, offset, len)),
            Stored::Chunked(list) => self.read_chunks(digest, &list, offset, len),
        }
    }

    fn stored(&self, digest: &Digest) -> Result<Stored, Error> {
        if *digest == Digest::EMPTY {
            return Ok(Stored::Whole(Bytes::new()));
        }
        // A list in memory spares the look into the index for a chunk that is not there.
        if let Some(list) = self.lists.get(digest) {
            return Ok(Stored::Chunked(list));
        }
        if let Some(blob) = self.objects.get(&chunk(digest))? {
            return Ok(Stored::Whole(blob));
        }
        self.list(digest)?.map(Stored::Chunked).ok_or(Error::BlobNotFound(*digest))
    }

    /// The chunk list of a blob, if it has one.
    pub(crate) fn list(&self, digest: &Digest) -> Result<Option<Arc<ChunkList>>, Error> {
        if let Some(list) = self.lists.get(digest) {
            return Ok(Some(list));
        }
        let Some(encoded) = self.objects.get(&chunk_list(digest))? else { return Ok(None) };
        let list = ChunkList::decode(&encoded)
            .map(Arc::new)
            .ok_or(Error::DamagedBlob { digest: *digest, damage: BlobDamage::ChunkList })?;
        self.lists.insert(*digest, Arc::clone(&list));
        Ok(Some(list))
    }

    /// Bytes of the decoded lists in memory.
    pub(crate) fn cached_bytes(&self) -> u64 {
        self.lists.weight()
    }

    /// Empties the cache.
    pub(crate) fn forget(&self) {
        self.lists.clear();
    }

    fn read_chunks(&self, digest: &Digest, list: &ChunkList, offset: u64, len: usize) -> Result<Bytes, Error> {
        // What is asked for and there; the allocation below is thus bounded by what is stored.
        let left = usize::try_from(list.size().saturating_sub(offset)).map_or(len, |left| left.min(len));
        let mut copy = Vec::new();
        for (chunk_digest, length, skip) in list.chunks_from(offset) {
            let wanted = left - copy.len();
            if wanted == 0 {
                break;
            }
            let damaged = |damage| Error::DamagedBlob { digest: *digest, damage };
            let chunk = self.objects.get(&chunk(&chunk_digest))?;
            let chunk = chunk.ok_or_else(|| damaged(BlobDamage::MissingChunk(chunk_digest)))?;
            if chunk.len() as u64 != length {
                return Err(damaged(BlobDamage::ChunkLength(chunk_digest)));
            }
            let piece = slice(&chunk, skip, wanted);
            if piece.len() == left {
                return Ok(piece);
            }
            if copy.is_empty() {
                copy.reserve_exact(left);
            }
            copy.extend_from_slice(&piece);
        }
        Ok(copy.into())
    }
}

/// Up to `len` bytes of `bytes` from `offset`, without a copy.
fn slice(bytes: &Bytes, offset: u64, len: usize) -> Bytes {
    let start = usize::try_from(offset).map_or(bytes.len(), |offset| offset.min(bytes.len()));
    bytes.slice(start..start.saturating_add(len).min(bytes.len()))
}

/// The key of the chunk, or whole small blob, of this digest.
pub(crate) fn chunk(digest: &Digest) -> ObjectKey {
    ObjectKey { kind: ObjectKind::Chunk, digest: *digest }
}

/// The key of the chunk list of the blob of this digest.
pub(crate) fn chunk_list(digest: &Digest) -> ObjectKey {
    ObjectKey { kind: ObjectKind::ChunkList, digest: *digest }
}

/// The key of the directory of this digest.
pub(crate) fn directory(digest: &Digest) -> ObjectKey {
    ObjectKey { kind: ObjectKind::Directory, digest: *digest }
}
