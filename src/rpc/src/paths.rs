//! PathInfoService: store paths by hash part, and the rule about who may add one.

use std::sync::Arc;

use castore::Node;
use castore::proto::Node as NodeMessage;
use nix_compat::path_info::PathInfo;
use nix_compat::signature::PublicKey;
use nix_compat::store_path::StoreDir;
use store::nar_digest::NarFacts;
use store::view::ViewError;
use store::{Entry, NewPath, Signer};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::blocking::blocking;
use crate::connection::{Peer, Trust};
use crate::limits::{MAX_NARS, PATHS_PER_STEP, QUEUE_ITEMS};
use crate::status;
use rpc_client::path_info::{from_message, to_message};
use rpc_client::proto::store as message;
use rpc_client::proto::store::get_path_info_request::ByWhat;
use rpc_client::proto::store::path_info_service_server::PathInfoService;

/// What PathInfoService needs of a store. The methods block.
pub trait PathInfos: Send + Sync {
    /// The directory of the store's paths.
    fn store_dir(&self) -> &StoreDir;

    /// The valid path with this hash part.
    fn get(&self, digest: &[u8; 20]) -> Result<Option<Entry>, PathsError>;

    /// Up to `limit` valid paths with numbers above `after`, in the order of their numbers; none at the end.
    fn list(&self, after: u32, limit: usize) -> Result<Vec<Entry>, PathsError>;

    /// Makes a path valid whose contents are in the castore, if they are what the path info says.
    ///
    /// Whoever claims it was found trustworthy; everything that can be computed is checked here: that the contents are
    /// whole, their NAR's hash and size, the content address, the references.
    fn put(&self, path: NewPath) -> Result<(), PathsError>;

    /// Hash and size of the NAR of a tree in the castore.
    fn calculate_nar(&self, node: &Node) -> Result<NarFacts, PathsError>;
}

/// Why a store could not answer about its paths.
#[derive(Debug, thiserror::Error)]
pub enum PathsError {
    /// The store refused or failed.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The store could not list its paths.
    #[error(transparent)]
    View(#[from] ViewError),
}

/// Serves the path infos of a store.
pub(crate) struct Paths {
    store: Arc<dyn PathInfos>,
    trusted_keys: Vec<PublicKey>,
    signer: Arc<Signer>,
    nars: Arc<Semaphore>,
}

impl Paths {
    pub(crate) fn new(store: Arc<dyn PathInfos>, trusted_keys: Vec<PublicKey>, signer: Signer) -> Paths {
        Paths { store, trusted_keys, signer: Arc::new(signer), nars: Arc::new(Semaphore::new(MAX_NARS)) }
    }

    async fn with_store<T, F>(&self, work: F) -> Result<T, Status>
    where
        T: Send + 'static,
        F: FnOnce(&dyn PathInfos) -> Result<T, PathsError> + Send + 'static,
    {
        let store = self.store.clone();
        blocking(move || work(&*store).map_err(status::paths)).await
    }

    /// As [`Paths::with_store`], for work that reads a whole tree. It holds its place until it is finished, even when
    /// the client does not wait for that.
    async fn with_nar<T, F>(&self, work: F) -> Result<T, Status>
    where
        T: Send + 'static,
        F: FnOnce(&dyn PathInfos) -> Result<T, PathsError> + Send + 'static,
    {
        let place = self.nars.clone().acquire_owned().await.map_err(status::internal)?;
        self.with_store(move |store| {
            let _place = place;
            work(store)
        })
        .await
    }
}

#[tonic::async_trait]
impl PathInfoService for Paths {
    async fn get(&self, request: Request<message::GetPathInfoRequest>) -> Result<Response<message::PathInfo>, Status> {
        let Some(ByWhat::ByOutputHash(digest)) = request.into_inner().by_what else {
            return Err(Status::invalid_argument("the request names no path"));
        };
        let digest: [u8; 20] = digest[..]
            .try_into()
            .map_err(|_| status::invalid(format!("by_output_hash has {} bytes, not 20", digest.len())))?;
        let signer = self.signer.clone();
        let told =
            self.with_store(move |store| Ok(store.get(&digest)?.map(|entry| told(store, &signer, entry)))).await?;
        told.map(Response::new).ok_or_else(|| Status::not_found("no valid path has this hash part"))
    }

    async fn put(&self, request: Request<message::PathInfo>) -> Result<Response<message::PathInfo>, Status> {
        let trust = Peer::trust(&request);
        let path = from_message(request.into_inner()).map_err(status::invalid)?;
        may_add(&path.info, trust, &self.trusted_keys, self.store.store_dir())?;

        let (name, signer) = (path.info.path.clone(), self.signer.clone());
        let told = self
            .with_nar(move |store| {
                let digest = path.info.path.digest();
                store.put(path)?;
                Ok(store.get(&digest)?.map(|entry| told(store, &signer, entry)))
            })
            .await?;
        // Only a collection at this very moment can take it away again.
        let told = told.ok_or_else(|| Status::aborted("the path was deleted as soon as it was added"))?;
        tracing::info!(path = %name, "grpc: path added");
        Ok(Response::new(told))
    }

    async fn calculate_nar(
        &self,
        request: Request<NodeMessage>,
    ) -> Result<Response<message::CalculateNarResponse>, Status> {
        let (_, node) = request.into_inner().into_parts().map_err(status::invalid)?;
        let nar = self.with_nar(move |store| store.calculate_nar(&node)).await?;
        let nar_sha256 = nar.nar_hash.as_bytes().to_vec().into();
        Ok(Response::new(message::CalculateNarResponse { nar_size: nar.nar_size, nar_sha256 }))
    }

    type ListStream = ReceiverStream<Result<message::PathInfo, Status>>;

    async fn list(&self, _: Request<message::ListPathInfoRequest>) -> Result<Response<Self::ListStream>, Status> {
        let (sender, paths) = mpsc::channel(QUEUE_ITEMS);
        let (store, signer) = (self.store.clone(), self.signer.clone());
        // No thread waits for the client; see BlobService.Read.
        tokio::spawn(async move {
            let mut after = 0;
            loop {
                let (store, signer) = (store.clone(), signer.clone());
                let page = move || {
                    let entries = store.list(after, PATHS_PER_STEP).map_err(status::paths)?;
                    let last = entries.last().map(|entry| entry.number);
                    let page = entries.into_iter().map(|entry| told(&*store, &signer, entry));
                    Ok((last, page.collect::<Vec<_>>()))
                };
                let (last, page) = match blocking(page).await {
                    Ok(page) => page,
                    Err(error) => {
                        let _ = sender.send(Err(error)).await;
                        return;
                    }
                };
                let Some(last) = last else { return };
                after = last;
                for path in page {
                    if sender.send(Ok(path)).await.is_err() {
                        return;
                    }
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(paths)))
    }
}

/// What is told of a path: signed here as well, as it is over HTTP. The store keeps none of that.
fn told(store: &dyn PathInfos, signer: &Signer, mut entry: Entry) -> message::PathInfo {
    signer.sign(store.store_dir(), &mut entry.info);
    to_message(&entry.info, &entry.node)
}

/// The trust rule: a path info is a claim, and somebody or something must stand for it.
///
/// A content address stands for it when the path follows from it; that the contents have it is checked later, from the
/// contents.
fn may_add(info: &PathInfo, trust: Trust, keys: &[PublicKey], store_dir: &StoreDir) -> Result<(), Status> {
    if trust == Trust::Trusted || info.is_content_addressed(store_dir) || info.is_signed_by(store_dir, keys) {
        return Ok(());
    }
    Err(Status::permission_denied(format!(
        "cannot add path '{}': it has no signature by a trusted key and is not content-addressed, and the peer is not \
         trusted",
        store_dir.display(&info.path)
    )))
}
