//! [`BlobService`] over gRPC.

use std::io::{Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use castore::proto::{BlobChunk, ReadBlobRequest, StatBlobRequest};
use castore::{BlobService, BlobStat, Digest, Error};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

use super::{ClientError, Runtime};
use crate::limits::{MAX_MESSAGE_BYTES, PIECE_BYTES, QUEUE_ITEMS};
use crate::proto::castore::blob_service_client::BlobServiceClient;

const STAT: &str = "ask for a blob";
const READ: &str = "read a blob";
const PUT: &str = "put a blob";

/// Chunks up to this size are fetched whole and kept while they are the one last read from.
const MAX_KEPT_CHUNK: u64 = 4 << 20;

/// The blobs of a peer.
///
/// Every chunk is checked against its digest. Of which chunks a blob is made is the peer's word until the whole blob
/// has been copied ([`BlobService::copy_to`]), which checks the blob's digest.
#[derive(Debug)]
pub struct RemoteBlobs {
    client: BlobServiceClient<Channel>,
    runtime: Runtime,
    recent: Mutex<Recent>,
}

/// What sequential reads of one blob ask for again and again.
#[derive(Debug, Default)]
struct Recent {
    stat: Option<(Digest, Arc<BlobStat>)>,
    chunk: Option<(Digest, Bytes)>,
}

impl RemoteBlobs {
    /// The blobs at the other end of `channel`, with `runtime` doing the talking.
    pub fn new(channel: Channel, runtime: Handle) -> RemoteBlobs {
        let client = BlobServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        RemoteBlobs { client, runtime: Runtime(runtime), recent: Mutex::default() }
    }

    fn recent(&self) -> MutexGuard<'_, Recent> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self, digest: &Digest) -> Result<Option<Arc<BlobStat>>, Error> {
        if let Some((_, stat)) = self.recent().stat.as_ref().filter(|(recent, _)| recent == digest) {
            return Ok(Some(stat.clone()));
        }
        let Some(stat) = self.ask(digest)? else { return Ok(None) };
        let stat = Arc::new(stat);
        self.recent().stat = Some((*digest, stat.clone()));
        Ok(Some(stat))
    }

    fn ask(&self, digest: &Digest) -> Result<Option<BlobStat>, Error> {
        let request = StatBlobRequest { digest: (*digest).into(), send_chunks: true, send_bao: false };
        let Some(answer) = self.runtime.call(STAT, self.client.clone().stat(request))? else { return Ok(None) };

        let nonsense = || ClientError::Chunks(*digest);
        let mut size = 0u64;
        let mut chunks = Vec::new();
        for chunk in answer.into_inner().chunks {
            let chunk_digest = Digest::try_from(&chunk.digest[..]).map_err(|_| nonsense())?;
            size = size.checked_add(chunk.size).ok_or_else(nonsense)?;
            chunks.push((chunk_digest, chunk.size));
        }
        if chunks.is_empty() && *digest != Digest::EMPTY {
            // The answer has no size, so there is no other way than to count.
            size = self.stream(digest, &mut |_| Ok(()))?;
            chunks.push((*digest, size));
        }
        Ok(Some(BlobStat { size, chunks }))
    }

    /// Gives `each` the pieces of a blob or chunk. At the end it was whole, or this is an error.
    fn stream(&self, digest: &Digest, each: &mut dyn FnMut(Bytes) -> Result<(), Error>) -> Result<u64, Error> {
        let request = ReadBlobRequest { digest: (*digest).into() };
        let call = self.runtime.call(READ, self.client.clone().read(request))?;
        let mut stream: Streaming<BlobChunk> = call.ok_or(Error::BlobNotFound(*digest))?.into_inner();
        let mut hasher = blake3::Hasher::new();
        while let Some(BlobChunk { data }) = self.runtime.next(READ, &mut stream)? {
            hasher.update(&data);
            each(data)?;
        }
        if Digest::from(hasher.finalize()) != *digest {
            return Err(ClientError::WrongDigest { action: READ, wanted: *digest }.into());
        }
        Ok(hasher.count())
    }

    /// Bytes of a chunk between two offsets.
    fn chunk(&self, digest: &Digest, size: u64, from: u64, to: u64) -> Result<Bytes, Error> {
        let kept = self.recent().chunk.as_ref().filter(|(kept, _)| kept == digest).map(|(_, chunk)| chunk.clone());
        let chunk = match kept {
            Some(chunk) => chunk,
            None if size <= MAX_KEPT_CHUNK => {
                let chunk = self.fetch(digest, 0, size)?;
                self.recent().chunk = Some((*digest, chunk.clone()));
                chunk
            }
            // A peer that does not cut its blobs has to send all of it.
            None => return self.fetch(digest, from, to),
        };
        if chunk.len() as u64 != size {
            return Err(ClientError::Chunks(*digest).into());
        }
        Ok(chunk.slice(from as usize..to as usize))
    }

    fn fetch(&self, digest: &Digest, from: u64, to: u64) -> Result<Bytes, Error> {
        let mut kept = BytesMut::new();
        let mut offset = 0u64;
        self.stream(digest, &mut |piece| {
            let len = piece.len() as u64;
            let (first, last) = (from.saturating_sub(offset).min(len), to.saturating_sub(offset).min(len));
            kept.extend_from_slice(&piece[first as usize..last as usize]);
            offset += len;
            Ok(())
        })?;
        Ok(kept.freeze())
    }
}

impl BlobService for RemoteBlobs {
    fn stat(&self, digest: &Digest) -> Result<Option<BlobStat>, Error> {
        self.ask(digest)
    }

    fn read_at(&self, digest: &Digest, offset: u64, len: usize) -> Result<Bytes, Error> {
        let stat = self.known(digest)?.ok_or(Error::BlobNotFound(*digest))?;
        let end = offset.saturating_add(len as u64).min(stat.size);
        let mut parts = Vec::new();
        let mut start = 0;
        for (chunk, size) in &stat.chunks {
            let (from, to) = (offset.max(start), end.min(start + size));
            if from < to {
                parts.push(self.chunk(chunk, *size, from - start, to - start)?);
            }
            start += size;
            if start >= end {
                break;
            }
        }
        Ok(if parts.len() == 1 { parts.remove(0) } else { parts.concat().into() })
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
        self.stream(digest, &mut |piece| to.write_all(&piece).map_err(|error| Error::Output { digest: *digest, error }))
    }
}
