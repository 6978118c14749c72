//! DirectoryService: Merkle directories by digest.

use std::collections::HashSet;
use std::sync::Arc;

use castore::proto::{self, GetDirectoryRequest, PutDirectoryResponse, get_directory_request::ByWhat};
use castore::{Digest, Directory, DirectoryService};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::blocking::blocking;
use crate::limits::{
    DIRECTORIES_PER_PUT, DIRECTORIES_PER_STEP, DIRECTORY_BYTES_PER_PUT, MAX_DIRECTORIES_PER_GET,
    MAX_DIRECTORIES_PER_PUT, MAX_DIRECTORY_UPLOADS, QUEUE_ITEMS,
};
use crate::status;
use crate::upload::Messages;
use rpc_client::proto::castore::directory_service_server;

/// Serves the directories of a castore.
pub(crate) struct Directories {
    service: Arc<dyn DirectoryService>,
    uploads: Semaphore,
}

impl Directories {
    pub(crate) fn new(service: Arc<dyn DirectoryService>) -> Directories {
        Directories { service, uploads: Semaphore::new(MAX_DIRECTORY_UPLOADS) }
    }

    async fn store(&self, directories: Vec<Directory>) -> Result<(), Status> {
        if directories.is_empty() {
            return Ok(());
        }
        let service = self.service.clone();
        blocking(move || service.put(&directories).map(drop).map_err(status::castore)).await
    }
}

#[tonic::async_trait]
impl directory_service_server::DirectoryService for Directories {
    type GetStream = ReceiverStream<Result<proto::Directory, Status>>;

    async fn get(&self, request: Request<GetDirectoryRequest>) -> Result<Response<Self::GetStream>, Status> {
        let GetDirectoryRequest { by_what, recursive } = request.into_inner();
        let Some(ByWhat::Digest(digest)) = by_what else {
            return Err(Status::invalid_argument("the request names no directory"));
        };
        let digest = status::digest(&digest)?;

        let mut walk = Walk::new(self.service.clone(), digest, recursive);
        let first = walk.step(1).await?;
        let (sender, directories) = mpsc::channel(QUEUE_ITEMS);
        // No thread waits for the client; see BlobService.Read.
        tokio::spawn(async move {
            let mut step = Ok(first);
            loop {
                let (directories, failure) = match step {
                    Ok(directories) => (directories, None),
                    Err(failure) => (Vec::new(), Some(failure)),
                };
                let done = directories.is_empty();
                for directory in directories {
                    if sender.send(Ok(proto::Directory::from(&*directory))).await.is_err() {
                        return;
                    }
                }
                if let Some(failure) = failure {
                    let _ = sender.send(Err(failure)).await;
                }
                if done {
                    return;
                }
                step = walk.step(DIRECTORIES_PER_STEP).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(directories)))
    }

    async fn put(
        &self,
        request: Request<Streaming<proto::Directory>>,
    ) -> Result<Response<PutDirectoryResponse>, Status> {
        let _place = self.uploads.acquire().await.map_err(status::internal)?;

        let mut messages = Messages::of(request);
        let mut upload = Upload::default();
        while let Some(message) = messages.next().await? {
            let directory = Directory::try_from(message).map_err(status::invalid)?;
            upload.add(directory).map_err(status::invalid)?;
            if upload.is_batch_full() {
                self.store(upload.take_batch()).await?;
            }
        }
        let root = upload.root().map_err(status::invalid)?;
        self.store(upload.take_batch()).await?;
        tracing::debug!(%root, "grpc: directories stored");
        Ok(Response::new(PutDirectoryResponse { root_digest: root.into() }))
    }
}

/// A walk from a root to its leaves that stops between steps: parents before children, each digest once.
struct Walk {
    service: Arc<dyn DirectoryService>,
    recursive: bool,
    seen: HashSet<Digest>,
    waiting: Vec<Digest>,
}

impl Walk {
    fn new(service: Arc<dyn DirectoryService>, root: Digest, recursive: bool) -> Walk {
        Walk { service, recursive, seen: HashSet::from([root]), waiting: vec![root] }
    }

    /// Up to `count` further directories; none when there are no more.
    async fn step(&mut self, count: usize) -> Result<Vec<Arc<Directory>>, Status> {
        let service = self.service.clone();
        let digests = self.waiting.split_off(self.waiting.len().saturating_sub(count));
        let fetch = move || digests.iter().map(|digest| fetch(&*service, digest)).collect::<Result<Vec<_>, _>>();
        let directories = blocking(fetch).await?;
        if self.recursive {
            let children = directories.iter().flat_map(|directory| directory.directories());
            self.waiting.extend(children.map(|(child, _)| *child).filter(|child| self.seen.insert(*child)));
            if self.seen.len() > MAX_DIRECTORIES_PER_GET {
                let error = format!("more than {MAX_DIRECTORIES_PER_GET} directories; ask for parts of the tree");
                return Err(Status::resource_exhausted(error));
            }
        }
        Ok(directories)
    }
}

fn fetch(service: &dyn DirectoryService, digest: &Digest) -> Result<Arc<Directory>, Status> {
    let directory = service.get(digest).map_err(status::castore)?;
    directory.ok_or_else(|| Status::not_found(format!("directory {digest} is not here")))
}

/// Directories as they come, children before parents.
///
/// The service checks that the children of each are known. What it cannot see is whether everything hangs together:
/// every directory but the last must have a parent that comes after it, so that what is stored is one tree.
#[derive(Default)]
struct Upload {
    /// Not stored yet.
    batch: Vec<Directory>,
    batch_bytes: usize,
    /// Came, and no parent came yet.
    orphans: HashSet<Digest>,
    /// Came, and so did a parent. Some clients send a directory again each time they meet it.
    adopted: HashSet<Digest>,
    last: Option<Digest>,
}

/// Why directories are not an upload.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum UploadError {
    #[error("no directory was sent")]
    Empty,
    #[error("directory {orphan} is not below {root}, which was sent last and so is the root")]
    NotConnected { orphan: Digest, root: Digest },
    #[error("more than {MAX_DIRECTORIES_PER_PUT} directories; send parts of the tree")]
    TooMany,
}

impl Upload {
    fn add(&mut self, directory: Directory) -> Result<(), UploadError> {
        let encoded = directory.encode();
        let digest = Digest::of(&encoded);
        for (child, _) in directory.directories() {
            if let Some(child) = self.orphans.take(child) {
                self.adopted.insert(child);
            }
        }
        if !self.adopted.contains(&digest) {
            self.orphans.insert(digest);
        }
        if self.orphans.len() + self.adopted.len() > MAX_DIRECTORIES_PER_PUT {
            return Err(UploadError::TooMany);
        }
        self.last = Some(digest);
        self.batch_bytes += encoded.len();
        self.batch.push(directory);
        Ok(())
    }

    fn is_batch_full(&self) -> bool {
        self.batch.len() >= DIRECTORIES_PER_PUT || self.batch_bytes >= DIRECTORY_BYTES_PER_PUT
    }

    fn take_batch(&mut self) -> Vec<Directory> {
        self.batch_bytes = 0;
        std::mem::take(&mut self.batch)
    }

    /// The digest of the last directory, which everything else is below.
    fn root(&self) -> Result<Digest, UploadError> {
        let root = self.last.ok_or(UploadError::Empty)?;
        match self.orphans.iter().find(|orphan| **orphan != root) {
            Some(orphan) => Err(UploadError::NotConnected { orphan: *orphan, root }),
            None => Ok(root),
        }
    }
}

#[cfg(test)]
mod tests {
    use castore::{Node, NodeName, SymlinkTarget};

    use super::*;

    fn leaf(target: &str) -> Directory {
        let target = SymlinkTarget::try_from(target).unwrap();
        Directory::new([(NodeName::try_from("link").unwrap(), Node::Symlink { target })]).unwrap()
    }

    fn parent(children: &[(&str, &Directory)]) -> Directory {
        let entries = children.iter().map(|(name, child)| (NodeName::try_from(*name).unwrap(), child.to_node()));
        Directory::new(entries).unwrap()
    }

    fn upload(directories: &[&Directory]) -> Result<Digest, UploadError> {
        let mut upload = Upload::default();
        for directory in directories {
            upload.add((*directory).clone())?;
        }
        upload.root()
    }

    #[test]
    fn the_last_of_a_tree_is_its_root() {
        let (a, b) = (leaf("a"), leaf("b"));
        let middle = parent(&[("a", &a)]);
        let root = parent(&[("a", &a), ("b", &b), ("middle", &middle)]);
        assert_eq!(upload(&[&a, &b, &middle, &root]), Ok(root.digest()));
        assert_eq!(upload(&[&a, &middle, &a, &b, &root]), Ok(root.digest()), "one may come again");
        assert_eq!(upload(&[&root]), Ok(root.digest()), "children may be in the store already");
    }

    #[test]
    fn everything_must_be_below_the_root() {
        let (a, b) = (leaf("a"), leaf("b"));
        let root = parent(&[("a", &a)]);
        let error = UploadError::NotConnected { orphan: b.digest(), root: root.digest() };
        assert_eq!(upload(&[&a, &b, &root]), Err(error));
        let error = UploadError::NotConnected { orphan: root.digest(), root: b.digest() };
        assert_eq!(upload(&[&a, &root, &b]), Err(error));
        assert_eq!(upload(&[]), Err(UploadError::Empty));
    }
}
