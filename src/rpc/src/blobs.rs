//! BlobService: file contents by digest.

use std::sync::Arc;

use bytes::Bytes;
use castore::proto::stat_blob_response::ChunkMeta;
use castore::proto::{BlobChunk, PutBlobResponse, ReadBlobRequest, StatBlobRequest, StatBlobResponse};
use castore::{BlobService, BlobStat, Digest};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::blocking::blocking;
use crate::limits::{COMPRESSED_PIECE_BYTES, MAX_BLOB_UPLOADS, PIECE_BYTES, QUEUE_ITEMS};
use crate::status;
use crate::upload::{Messages, upload};
use rpc_client::proto::castore::blob_service_server;

/// Serves the blobs of a castore.
pub(crate) struct Blobs {
    service: Arc<dyn BlobService>,
    uploads: Semaphore,
}

impl Blobs {
    pub(crate) fn new(service: Arc<dyn BlobService>) -> Blobs {
        Blobs { service, uploads: Semaphore::new(MAX_BLOB_UPLOADS) }
    }

    async fn known(&self, digest: Digest) -> Result<BlobStat, Status> {
        let service = self.service.clone();
        let look = move || match service.stat(&digest) {
            // What is expected from elsewhere comes when it is read.
            Ok(None) if service.read_at(&digest, 0, 1).is_ok() => service.stat(&digest),
            stat => stat,
        };
        let stat = blocking(move || look().map_err(status::castore)).await?;
        stat.ok_or_else(|| Status::not_found(format!("blob {digest} is not here")))
    }
}

/// Whether an answer will be compressed.
fn takes_compressed<T>(request: &Request<T>) -> bool {
    let accepted = request.metadata().get("grpc-accept-encoding").and_then(|value| value.to_str().ok());
    accepted.is_some_and(|encodings| encodings.split(',').any(|encoding| encoding.trim() == "zstd"))
}

#[tonic::async_trait]
impl blob_service_server::BlobService for Blobs {
    async fn stat(&self, request: Request<StatBlobRequest>) -> Result<Response<StatBlobResponse>, Status> {
        let StatBlobRequest { digest, send_chunks, send_bao: _ } = request.into_inner();
        let stat = self.known(status::digest(&digest)?).await?;
        let chunks = if send_chunks { stat.chunks } else { Vec::new() };
        let chunks = chunks.into_iter().map(|(digest, size)| ChunkMeta { digest: digest.into(), size }).collect();
        Ok(Response::new(StatBlobResponse { chunks, bao: Bytes::new() }))
    }

    type ReadStream = ReceiverStream<Result<BlobChunk, Status>>;

    async fn read(&self, request: Request<ReadBlobRequest>) -> Result<Response<Self::ReadStream>, Status> {
        // Compressing is done by the connection's task, so it gets a little at a time.
        let piece_bytes = if takes_compressed(&request) { COMPRESSED_PIECE_BYTES } else { PIECE_BYTES };
        let digest = status::digest(&request.into_inner().digest)?;
        self.known(digest).await?;

        // Reading and sending take turns, so that a client which reads slowly holds a piece or two and no thread. When
        // it goes away the stream is dropped, and the next send ends the task.
        let (sender, pieces) = mpsc::channel(QUEUE_ITEMS);
        let service = self.service.clone();
        tokio::spawn(async move {
            let mut offset = 0;
            loop {
                let service = service.clone();
                let read = move || service.read_at(&digest, offset, piece_bytes).map_err(status::castore);
                let piece = blocking(read).await;
                let last = match &piece {
                    Ok(data) if data.is_empty() => return,
                    Ok(data) => {
                        offset += data.len() as u64;
                        false
                    }
                    Err(_) => true,
                };
                if sender.send(piece.map(|data| BlobChunk { data })).await.is_err() || last {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(pieces)))
    }

    async fn put(&self, request: Request<Streaming<BlobChunk>>) -> Result<Response<PutBlobResponse>, Status> {
        let _place = self.uploads.acquire().await.map_err(status::internal)?;

        let (writer, mut reader) = upload();
        let service = self.service.clone();
        let storing = blocking(move || service.put(&mut reader).map_err(status::castore));
        let storing = tokio::spawn(storing);
        writer.pass_on(Messages::of(request)).await?;
        let (digest, size) = storing.await.map_err(status::internal)??;
        tracing::debug!(%digest, size, "grpc: blob stored");
        Ok(Response::new(PutBlobResponse { digest: digest.into() }))
    }
}
