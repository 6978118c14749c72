//! [`BlobService`] over gRPC.

use std::io::{Read, Write};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use castore::proto::{BlobChunk, ReadBlobRequest, StatBlobRequest};
use castore::{BlobService, BlobStat, Digest, Error};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

use crate::limits::{MAX_MESSAGE_BYTES, PIECE_BYTES, QUEUE_ITEMS};
use crate::proto::castore::blob_service_client::BlobServiceClient;
use crate::{ClientError, Runtime, call, joined, next};

const STAT: &str = "ask for a blob";
const READ: &str = "read a blob";
const PUT: &str = "put a blob";

/// Blobs and chunks up to this size are fetched whole, checked, and kept for a while, in bytes.
const MAX_KEPT: u64 = 4 << 20;
/// Memory for the contents that are kept, in bytes.
const KEPT_BYTES: u64 = 64 << 20;
/// What is kept tends to be a chunk: this many bytes. It sizes the table.
const TYPICAL_PIECE: u64 = 32 << 10;
/// Memory for the lists of chunks that are kept, in bytes.
const SHAPE_BYTES: u64 = 16 << 20;
/// A list of this many bytes is a typical one; it sizes the table.
const TYPICAL_SHAPE: u64 = 4 << 10;
/// Chunks of one read that are fetched at the same time.
const CHUNKS_AT_ONCE: usize = 16;

#[derive(Clone)]
struct ByLength;

impl Weighter<Digest, Bytes> for ByLength {
    fn weight(&self, _: &Digest, piece: &Bytes) -> u64 {
        (size_of::<Digest>() + piece.len()) as u64
    }
}

impl Weighter<Digest, Arc<BlobStat>> for ByLength {
    fn weight(&self, _: &Digest, shape: &Arc<BlobStat>) -> u64 {
        (size_of::<Digest>() + size_of::<BlobStat>() + shape.chunks.len() * size_of::<(Digest, u64)>()) as u64
    }
}

/// The blobs of a peer.
///
/// What arrives is checked before it is given out: a blob of up to 4 MiB against its digest, of a larger one each chunk
/// against the chunk's. Of which chunks a large blob is made is the peer's word until the whole blob has been copied
/// ([`BlobService::copy_to`]), which checks the blob's digest. What was read lately is kept, at most 64 MiB of it.
#[derive(Debug)]
pub struct RemoteBlobs {
    client: BlobServiceClient<Channel>,
    runtime: Runtime,
    /// Whole small blobs, and chunks of large ones.
    pieces: Cache<Digest, Bytes, ByLength>,
    /// Of which chunks the large ones are made.
    shapes: Cache<Digest, Arc<BlobStat>, ByLength>,
}

/// A blob as far as it is known here.
enum Known {
    Whole(Bytes),
    Chunked(Arc<BlobStat>),
}

impl RemoteBlobs {
    /// The blobs at the other end of `channel`, with `runtime` doing the talking.
    pub fn new(channel: Channel, runtime: Handle) -> RemoteBlobs {
        RemoteBlobs {
            client: BlobServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES),
            runtime: Runtime(runtime),
            pieces: Cache::with_weighter((KEPT_BYTES / TYPICAL_PIECE) as usize, KEPT_BYTES, ByLength),
            shapes: Cache::with_weighter((SHAPE_BYTES / TYPICAL_SHAPE) as usize, SHAPE_BYTES, ByLength),
        }
    }

    /// The chunks the peer names for a blob. `None` when it does not have it; no chunks when it names none.
    async fn ask(&self, digest: &Digest) -> Result<Option<BlobStat>, ClientError> {
        let request = StatBlobRequest { digest: (*digest).into(), send_chunks: true, send_bao: false };
        let Some(answer) = call(STAT, self.client.clone().stat(request)).await? else { return Ok(None) };
        let nonsense = || ClientError::Chunks(*digest);
        let mut size = 0u64;
        let mut chunks = Vec::new();
        for chunk in answer.into_inner().chunks {
            let chunk_digest = Digest::try_from(&chunk.digest[..]).map_err(|_| nonsense())?;
            size = size.checked_add(chunk.size).ok_or_else(nonsense)?;
            chunks.push((chunk_digest, chunk.size));
        }
        Ok(Some(BlobStat { size, chunks }))
    }

    /// The pieces of a blob or chunk as the peer sends them. `None` when it does not have it.
    async fn open(&self, digest: &Digest) -> Result<Option<Streaming<BlobChunk>>, ClientError> {
        let request = ReadBlobRequest { digest: (*digest).into() };
        Ok(call(READ, self.client.clone().read(request)).await?.map(tonic::Response::into_inner))
    }

    /// Gives `each` what is left of the pieces of a blob or chunk, of which `hasher` has seen the first. At the end it was
    /// whole, or this is an error.
    async fn rest(
        digest: &Digest,
        stream: &mut Streaming<BlobChunk>,
        hasher: &mut blake3::Hasher,
        each: &mut dyn FnMut(Bytes) -> Result<(), Error>,
    ) -> Result<(), Error> {
        while let Some(BlobChunk { data }) = next(READ, stream).await? {
            hasher.update(&data);
            each(data)?;
        }
        if Digest::from(hasher.finalize()) != *digest {
            return Err(ClientError::WrongDigest { action: READ, wanted: *digest }.into());
        }
        Ok(())
    }

    /// The same from the beginning; answers the length.
    async fn stream(&self, digest: &Digest, each: &mut dyn FnMut(Bytes) -> Result<(), Error>) -> Result<u64, Error> {
        let mut stream = self.open(digest).await?.ok_or(Error::BlobNotFound(*digest))?;
        let mut hasher = blake3::Hasher::new();
        Self::rest(digest, &mut stream, &mut hasher, each).await?;
        Ok(hasher.count())
    }

    /// What a blob is made of, or all of it when it is small. Small ones thus take one round trip.
    async fn discover(&self, digest: &Digest) -> Result<Known, Error> {
        let (shape, stream) = futures::join!(self.ask(digest), self.open(digest));
        let (Some(mut shape), Some(mut stream)) = (shape?, stream?) else { return Err(Error::BlobNotFound(*digest)) };
        if shape.chunks.len() < 2 || shape.size <= MAX_KEPT {
            let mut hasher = blake3::Hasher::new();
            let mut pieces = Vec::new();
            while let Some(BlobChunk { data }) = next(READ, &mut stream).await? {
                hasher.update(&data);
                pieces.push(data);
                if hasher.count() > MAX_KEPT {
                    break;
                }
            }
            let read = hasher.count();
            if read <= MAX_KEPT {
                Self::rest(digest, &mut stream, &mut hasher, &mut |_| Ok(())).await?;
                let whole = joined(pieces);
                self.pieces.insert(*digest, whole.clone());
                return Ok(Known::Whole(whole));
            }
            // Large, and the peer does not cut it, or not as it says: there is no other way to its length than to count.
            drop(pieces);
            Self::rest(digest, &mut stream, &mut hasher, &mut |_| Ok(())).await?;
            if shape.chunks.len() > 1 {
                return Err(ClientError::Chunks(*digest).into());
            }
            shape = BlobStat { size: hasher.count(), chunks: vec![(*digest, hasher.count())] };
        }
        let shape = Arc::new(shape);
        self.shapes.insert(*digest, shape.clone());
        Ok(Known::Chunked(shape))
    }

    /// Bytes of a chunk between two offsets.
    async fn chunk(&self, digest: &Digest, size: u64, from: u64, to: u64) -> Result<Bytes, Error> {
        if size > MAX_KEPT {
            // A peer that does not cut its blobs has to send all of it.
            return self.fetch(digest, size, from, to).await;
        }
        let chunk = self.pieces.get_or_insert_async(digest, self.fetch(digest, size, 0, size)).await?;
        if chunk.len() as u64 != size {
            return Err(ClientError::Chunks(*digest).into());
        }
        Ok(chunk.slice(from as usize..to as usize))
    }

    async fn fetch(&self, digest: &Digest, size: u64, from: u64, to: u64) -> Result<Bytes, Error> {
        let mut kept = BytesMut::new();
        let mut offset = 0u64;
        self.stream(digest, &mut |piece| {
            let len = piece.len() as u64;
            let (first, last) = (from.saturating_sub(offset).min(len), to.saturating_sub(offset).min(len));
            kept.extend_from_slice(&piece[first as usize..last as usize]);
            offset += len;
            // Whoever names a chunk names its length.
            if offset > size { Err(ClientError::Chunks(*digest).into()) } else { Ok(()) }
        })
        .await?;
        Ok(kept.freeze())
    }

    async fn read(&self, digest: &Digest, offset: u64, len: usize) -> Result<Bytes, Error> {
        let known = match (self.pieces.get(digest), self.shapes.get(digest)) {
            (Some(whole), _) => Known::Whole(whole),
            (None, Some(shape)) => Known::Chunked(shape),
            (None, None) => self.discover(digest).await?,
        };
        let shape = match known {
            Known::Whole(whole) => {
                let first = usize::try_from(offset).map_or(whole.len(), |offset| offset.min(whole.len()));
                return Ok(whole.slice(first..first.saturating_add(len).min(whole.len())));
            }
            Known::Chunked(shape) => shape,
        };
        let end = offset.saturating_add(len as u64).min(shape.size);
        let mut wanted = Vec::new();
        let mut start = 0u64;
        for (chunk, size) in &shape.chunks {
            let (from, to) = (offset.max(start), end.min(start + size));
            if from < to {
                wanted.push((*chunk, *size, from - start, to - start));
            }
            start += size;
            if start >= end {
                break;
            }
        }
        let fetching = wanted.iter().map(|(chunk, size, from, to)| self.chunk(chunk, *size, *from, *to));
        Ok(joined(stream::iter(fetching).buffered(CHUNKS_AT_ONCE).try_collect().await?))
    }
}

impl BlobService for RemoteBlobs {
    fn stat(&self, digest: &Digest) -> Result<Option<BlobStat>, Error> {
        self.runtime.0.block_on(async {
            let Some(mut stat) = self.ask(digest).await? else { return Ok(None) };
            if stat.chunks.is_empty() && *digest != Digest::EMPTY {
                // The answer has no size, so there is no other way than to count.
                stat.size = self.stream(digest, &mut |_| Ok(())).await?;
                stat.chunks.push((*digest, stat.size));
            }
            Ok(Some(stat))
        })
    }

    fn read_at(&self, digest: &Digest, offset: u64, len: usize) -> Result<Bytes, Error> {
        if *digest == Digest::EMPTY {
            return Ok(Bytes::new());
        }
        self.runtime.0.block_on(self.read(digest, offset, len))
    }

    fn put(&self, from: &mut dyn Read) -> Result<(Digest, u64), Error> {
        let (sender, pieces) = mpsc::channel(QUEUE_ITEMS);
        let mut client = self.client.clone();
        let call = self.runtime.0.spawn(async move { client.put(ReceiverStream::new(pieces)).await });

        let mut hasher = blake3::Hasher::new();
        loop {
            let mut piece = Vec::new();
            if let Err(error) = from.take(PIECE_BYTES as u64).read_to_end(&mut piece) {
                // The queue must outlive the call: to the peer its end would be the blob's.
                call.abort();
                let _ = self.runtime.0.block_on(call);
                drop(sender);
                return Err(Error::Input(error));
            }
            hasher.update(&piece);
            // When the call is over already, its result says why.
            if piece.is_empty() || sender.blocking_send(BlobChunk { data: piece.into() }).is_err() {
                break;
            }
        }
        drop(sender);
        let digest = Digest::from(hasher.finalize());
        let answer = self.runtime.0.block_on(call).map_err(|error| Error::Backend(Box::new(error)))?;
        let answer = answer.map_err(|status| ClientError::Call { action: PUT, status: Box::new(status) })?;
        if answer.into_inner().digest != digest.as_bytes()[..] {
            return Err(ClientError::WrongDigest { action: PUT, wanted: digest }.into());
        }
        Ok((digest, hasher.count()))
    }

    fn copy_to(&self, digest: &Digest, to: &mut dyn Write) -> Result<u64, Error> {
        // The pieces are written between the waits, never while the runtime's threads wait for them.
        let mut stream = self.runtime.0.block_on(self.open(digest))?.ok_or(Error::BlobNotFound(*digest))?;
        let mut hasher = blake3::Hasher::new();
        while let Some(BlobChunk { data }) = self.runtime.0.block_on(next(READ, &mut stream))? {
            hasher.update(&data);
            to.write_all(&data).map_err(|error| Error::Output { digest: *digest, error })?;
        }
        if Digest::from(hasher.finalize()) != *digest {
            return Err(ClientError::WrongDigest { action: READ, wanted: *digest }.into());
        }
        Ok(hasher.count())
    }
}
