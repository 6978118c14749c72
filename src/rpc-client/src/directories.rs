//! [`DirectoryService`] over gRPC.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::sync::Arc;

use castore::proto::{self, GetDirectoryRequest, get_directory_request::ByWhat};
use castore::{Digest, Directory, DirectoryService, Error};
use tokio::runtime::Handle;
use tonic::Streaming;
use tonic::transport::Channel;

use crate::limits::MAX_MESSAGE_BYTES;
use crate::proto::castore::directory_service_client::DirectoryServiceClient;
use crate::{ClientError, Runtime};

const GET: &str = "get a directory";
const PUT: &str = "put directories";

/// The directories of a peer.
#[derive(Debug)]
pub struct RemoteDirectories {
    client: DirectoryServiceClient<Channel>,
    runtime: Runtime,
}

impl RemoteDirectories {
    /// The directories at the other end of `channel`, with `runtime` doing the talking.
    pub fn new(channel: Channel, runtime: Handle) -> RemoteDirectories {
        let client = DirectoryServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        RemoteDirectories { client, runtime: Runtime(runtime) }
    }

    fn stream(&self, digest: &Digest, recursive: bool) -> Result<Option<Streaming<proto::Directory>>, ClientError> {
        let request = GetDirectoryRequest { by_what: Some(ByWhat::Digest((*digest).into())), recursive };
        let call = self.runtime.call(GET, self.client.clone().get(request))?;
        Ok(call.map(tonic::Response::into_inner))
    }

    fn next(&self, stream: &mut Streaming<proto::Directory>) -> Result<Option<(Digest, Directory)>, ClientError> {
        let Some(message) = self.runtime.next(GET, stream)? else { return Ok(None) };
        let directory = Directory::try_from(message)?;
        Ok(Some((directory.digest(), directory)))
    }

    fn put_tree(&self, directories: &[Directory]) -> Result<Digest, Error> {
        let root = directories.last().ok_or(Error::NoDirectory)?.digest();
        let owned = directories.to_vec();
        let messages = tokio_stream::iter(owned.into_iter().map(|directory| proto::Directory::from(&directory)));
        let answer = self.runtime.0.block_on(self.client.clone().put(messages));
        let answer = answer.map_err(|status| ClientError::Call { action: PUT, status: Box::new(status) })?;
        if answer.into_inner().root_digest != root.as_bytes()[..] {
            return Err(ClientError::WrongDigest { action: PUT, wanted: root }.into());
        }
        Ok(root)
    }
}

impl DirectoryService for RemoteDirectories {
    fn get(&self, digest: &Digest) -> Result<Option<Arc<Directory>>, Error> {
        let Some(mut stream) = self.stream(digest, false)? else { return Ok(None) };
        let Some((actual, directory)) = self.next(&mut stream)? else { return Ok(None) };
        if actual != *digest {
            return Err(ClientError::WrongDigest { action: GET, wanted: *digest }.into());
        }
        // A stream that is left before its end is a reset to the server, which cuts off who does that often.
        while self.next(&mut stream)?.is_some() {}
        Ok(Some(Arc::new(directory)))
    }

    fn put(&self, directories: &[Directory]) -> Result<Digest, Error> {
        // An upload is one tree, but these need not be.
        let children: HashSet<_> =
            directories.iter().flat_map(Directory::directories).map(|(child, _)| *child).collect();
        let is_tree = match directories.split_last() {
            Some((_, below)) => below.iter().all(|directory| children.contains(&directory.digest())),
            None => return Err(Error::NoDirectory),
        };
        if is_tree {
            return self.put_tree(directories);
        }
        let mut last = Err(Error::NoDirectory);
        for directory in directories {
            last = Ok(self.put_tree(std::slice::from_ref(directory))?);
        }
        last
    }

    fn get_recursive(
        &self,
        digest: &Digest,
        each: &mut dyn FnMut(Arc<Directory>) -> ControlFlow<()>,
    ) -> Result<(), Error> {
        let mut stream = self.stream(digest, true)?.ok_or(Error::DirectoryNotFound(*digest))?;
        let mut awaited = HashSet::from([*digest]);
        let mut seen = HashSet::new();
        while let Some((actual, directory)) = self.next(&mut stream)? {
            if !awaited.remove(&actual) {
                return Err(ClientError::WrongDigest { action: GET, wanted: *digest }.into());
            }
            seen.insert(actual);
            awaited.extend(directory.directories().map(|(child, _)| *child).filter(|child| !seen.contains(child)));
            if each(Arc::new(directory)).is_break() {
                return Ok(());
            }
        }
        awaited.into_iter().next().map_or(Ok(()), |missing| Err(Error::DirectoryNotFound(missing)))
    }
}
