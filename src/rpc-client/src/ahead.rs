//! What is asked of a peer before it is needed: many questions at once, for one thread that takes the answers in the order
//! in which it needs them.
//!
//! The runtime talks; digests are computed by whoever waits, so never on its threads. What comes is checked before it is
//! given out. A call that the connection broke under is made again.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use castore::proto::{BlobChunk, GetDirectoryRequest, ReadBlobRequest, StatBlobRequest, get_directory_request::ByWhat};
use castore::{Digest, Directory};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;
use tokio_util::task::AbortOnDropHandle;
use tonic::Streaming;
use tonic::codec::CompressionEncoding;
use tonic::transport::Channel;

use crate::limits::MAX_MESSAGE_BYTES;
use crate::proto::castore::blob_service_client::BlobServiceClient;
use crate::proto::castore::directory_service_client::DirectoryServiceClient;
use crate::{ClientError, call, next};

const STAT: &str = "ask for a blob";
const READ: &str = "read a blob";
const GET: &str = "get a directory";

/// A blob or chunk that is fetched whole has at most this many bytes.
pub const MAX_PIECE: u64 = 1 << 20;
/// Calls under way at once, of one [`Ahead`]; the next ones wait here, where no time runs. So few that each gets on over a slow
/// connection, and enough for one with a long way.
const CALLS: usize = 32;
/// Time between two looks whether anybody still waits.
const LOOK: Duration = Duration::from_millis(100);
/// Time before a call is made again; it doubles with every further one.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// No pause is longer.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Asks a peer for what will be needed.
#[derive(Clone, Debug)]
pub struct Ahead {
    blobs: BlobServiceClient<Channel>,
    directories: DirectoryServiceClient<Channel>,
    runtime: Handle,
    calls: Arc<Semaphore>,
    attempts: u64,
}

/// Waits for an answer as long as the given function says that somebody wants it.
type Wait<T> = Box<dyn FnOnce(&dyn Fn() -> bool) -> Result<T, ClientError> + Send>;

/// An answer on its way. Dropped, it is not waited for any more, and the call ends.
pub struct Coming<T> {
    /// The call that is made in the background.
    call: AbortHandle,
    wait: Wait<T>,
}

impl<T> Coming<T> {
    /// Waits for it, as long as somebody wants it. Blocks.
    ///
    /// # Errors
    /// What the peer did, or that nobody wants it.
    pub fn wait(self, wanted: &dyn Fn() -> bool) -> Result<T, ClientError> {
        (self.wait)(wanted)
    }

    /// Whether nobody has to wait for it.
    pub fn is_ready(&self) -> bool {
        self.call.is_finished()
    }
}

impl Ahead {
    /// Asks the peer at the other end of `channel`, with `runtime` doing the talking. With `compressed` it may compress what
    /// it sends. A call that the connection breaks under is made `attempts` times at most.
    pub fn new(channel: Channel, runtime: Handle, compressed: bool, attempts: u64) -> Ahead {
        let mut blobs = BlobServiceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let mut directories = DirectoryServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        if compressed {
            blobs = blobs.accept_compressed(CompressionEncoding::Zstd);
            directories = directories.accept_compressed(CompressionEncoding::Zstd);
        }
        Ahead { blobs, directories, runtime, calls: Arc::new(Semaphore::new(CALLS)), attempts }
    }

    /// The chunks of a blob of `size` bytes, in order; only itself where the peer does not cut it.
    pub fn chunks(&self, digest: Digest, size: u64) -> Coming<Vec<(Digest, u64)>> {
        let (client, attempts) = (self.blobs.clone(), self.attempts);
        let ask = async move {
            let stat = || {
                let request = StatBlobRequest { digest: digest.into(), send_chunks: true, send_bao: false };
                let mut client = client.clone();
                async move { call(STAT, client.stat(request)).await }
            };
            let answer = again(attempts, stat).await?.ok_or(ClientError::Lacks { what: "blob", digest })?;
            Ok(answer.into_inner().chunks)
        };
        self.begin(ask, move |metas| {
            let mut chunks = Vec::with_capacity(metas.len());
            let mut sum = 0u64;
            for meta in metas {
                let chunk = Digest::try_from(&meta.digest[..]).map_err(|_| ClientError::Chunks(digest))?;
                sum = sum.checked_add(meta.size).ok_or(ClientError::Chunks(digest))?;
                // Without bytes it would be asked for in vain.
                if meta.size > 0 {
                    chunks.push((chunk, meta.size));
                }
            }
            match chunks.is_empty() {
                true => Ok(vec![(digest, size)]),
                false if sum == size => Ok(chunks),
                false => Err(ClientError::Chunks(digest)),
            }
        })
    }

    /// A blob or chunk of `size` bytes, at most [`MAX_PIECE`] of them, whole.
    pub fn piece(&self, digest: Digest, size: u64) -> Coming<Bytes> {
        let (client, attempts) = (self.blobs.clone(), self.attempts);
        let ask = async move { again(attempts, || collect(client.clone(), digest, size.min(MAX_PIECE))).await };
        self.begin(ask, move |pieces: Vec<Bytes>| {
            let whole = crate::joined(pieces);
            if whole.len() as u64 != size || Digest::of(&whole) != digest {
                return Err(ClientError::WrongDigest { action: READ, wanted: digest });
            }
            Ok(whole)
        })
    }

    /// A directory.
    pub fn directory(&self, digest: Digest) -> Coming<Directory> {
        let (client, attempts) = (self.directories.clone(), self.attempts);
        let ask = async move {
            let get = || {
                let by_what = Some(ByWhat::Digest(digest.into()));
                let mut client = client.clone();
                async move {
                    let request = GetDirectoryRequest { by_what, recursive: false };
                    let Some(answer) = call(GET, client.get(request)).await? else { return Ok(None) };
                    let mut stream = answer.into_inner();
                    let directory = next(GET, &mut stream).await?;
                    // A stream that is left before its end is a reset to the server, which cuts off who does that often.
                    while next(GET, &mut stream).await?.is_some() {}
                    Ok(directory)
                }
            };
            again(attempts, get).await?.ok_or(ClientError::Lacks { what: "directory", digest })
        };
        self.begin(ask, move |message| {
            let directory = Directory::try_from(message)?;
            match directory.digest() == digest {
                true => Ok(directory),
                false => Err(ClientError::WrongDigest { action: GET, wanted: digest }),
            }
        })
    }

    /// Gives `each` the bytes of a blob or chunk of any size, from `skip` on. They are checked at the end: an error then
    /// means that none of them can be believed. Blocks.
    ///
    /// # Errors
    /// What the peer did, or what `each` said.
    pub fn stream<E: From<ClientError>>(
        &self,
        digest: Digest,
        mut skip: u64,
        each: &mut dyn FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut client = self.blobs.clone();
        let request = ReadBlobRequest { digest: digest.into() };
        let answer = self.runtime.block_on(call(READ, client.read(request)))?;
        let mut stream = answer.ok_or(ClientError::Lacks { what: "blob", digest })?.into_inner();
        let mut hasher = blake3::Hasher::new();
        while let Some(BlobChunk { data }) = self.runtime.block_on(next(READ, &mut stream))? {
            hasher.update(&data);
            let first = usize::try_from(skip).map_or(data.len(), |skip| skip.min(data.len()));
            skip -= first as u64;
            each(&data[first..])?;
        }
        if Digest::from(hasher.finalize()) != digest {
            return Err(ClientError::WrongDigest { action: READ, wanted: digest }.into());
        }
        Ok(())
    }

    /// Begins to ask; `check` is for the thread that waits.
    fn begin<M: Send + 'static, T: 'static>(
        &self,
        ask: impl Future<Output = Result<M, ClientError>> + Send + 'static,
        check: impl FnOnce(M) -> Result<T, ClientError> + Send + 'static,
    ) -> Coming<T> {
        let runtime = self.runtime.clone();
        let calls = self.calls.clone();
        let task = runtime.spawn(async move {
            let _turn = calls.acquire_owned().await.map_err(|_| ClientError::Unwanted)?;
            ask.await
        });
        let call = task.abort_handle();
        let mut task = AbortOnDropHandle::new(task);
        let wait = move |wanted: &dyn Fn() -> bool| loop {
            let looked = runtime.block_on(async { tokio::time::timeout(LOOK, &mut task).await });
            match looked {
                Ok(Ok(answer)) => return check(answer?),
                Ok(Err(_)) => return Err(ClientError::Unwanted),
                Err(_) if !wanted() => return Err(ClientError::Unwanted),
                Err(_) => {}
            }
        };
        Coming { call, wait: Box::new(wait) }
    }
}

/// The pieces of a blob that has at most `limit` bytes.
async fn collect(
    mut client: BlobServiceClient<Channel>,
    digest: Digest,
    limit: u64,
) -> Result<Vec<Bytes>, ClientError> {
    let request = ReadBlobRequest { digest: digest.into() };
    let answer = call(READ, client.read(request)).await?.ok_or(ClientError::Lacks { what: "blob", digest })?;
    let mut stream: Streaming<BlobChunk> = answer.into_inner();
    let (mut pieces, mut length) = (Vec::new(), 0);
    while let Some(BlobChunk { data }) = next(READ, &mut stream).await? {
        length += data.len() as u64;
        if length > limit {
            return Err(ClientError::WrongDigest { action: READ, wanted: digest });
        }
        pieces.push(data);
    }
    Ok(pieces)
}

/// Asks until there is an answer, but not for ever.
async fn again<T, F: Future<Output = Result<T, ClientError>>>(
    attempts: u64,
    ask: impl Fn() -> F,
) -> Result<T, ClientError> {
    let mut pause = FIRST_PAUSE;
    for _ in 1..attempts {
        match ask().await {
            Err(error) if error.is_outage() => tracing::debug!("asking again: {error}"),
            answer => return answer,
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
    ask().await
}
