//! The store paths of a peer.

use castore::Node;
use nix_compat::store_path::StorePath;
use store::NewPath;
use tokio::runtime::Handle;
use tonic::transport::Channel;

use crate::limits::MAX_MESSAGE_BYTES;
use crate::path_info::{from_message, root_of};
use crate::proto::store::path_info_service_client::PathInfoServiceClient;
use crate::proto::store::{GetPathInfoRequest, ListPathInfoRequest, get_path_info_request::ByWhat};
use crate::{ClientError, Runtime};

const GET: &str = "ask for a store path";
const LIST: &str = "list store paths";

/// The valid paths of a peer.
#[derive(Debug)]
pub struct RemotePaths {
    client: PathInfoServiceClient<Channel>,
    runtime: Runtime,
}

impl RemotePaths {
    /// The paths at the other end of `channel`, with `runtime` doing the talking.
    pub fn new(channel: Channel, runtime: Handle) -> RemotePaths {
        let client = PathInfoServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        RemotePaths { client, runtime: Runtime(runtime) }
    }

    /// The path with this hash part and the tree it holds; `None` when the peer does not have it.
    ///
    /// # Errors
    /// When the peer cannot be asked, or answers with something else.
    pub fn get(&self, digest: &[u8; 20]) -> Result<Option<(StorePath, Node)>, ClientError> {
        let request = GetPathInfoRequest { by_what: Some(ByWhat::ByOutputHash(digest.to_vec().into())) };
        let Some(answer) = self.runtime.call(GET, self.client.clone().get(request))? else { return Ok(None) };
        let root = root_of(answer.into_inner().node).map_err(|error| ClientError::Path(error.to_string()))?;
        if root.0.digest() != *digest {
            return Err(ClientError::OtherPath(root.0));
        }
        Ok(Some(root))
    }

    /// All that the peer says of the path with this hash part, and the tree it holds. It is a claim, of which nothing but
    /// the form was checked.
    ///
    /// # Errors
    /// As for [`RemotePaths::get`].
    pub fn info(&self, digest: &[u8; 20]) -> Result<Option<NewPath>, ClientError> {
        let request = GetPathInfoRequest { by_what: Some(ByWhat::ByOutputHash(digest.to_vec().into())) };
        let Some(answer) = self.runtime.call(GET, self.client.clone().get(request))? else { return Ok(None) };
        let said = from_message(answer.into_inner()).map_err(|error| ClientError::Path(error.to_string()))?;
        if said.info.path.digest() != *digest {
            return Err(ClientError::OtherPath(said.info.path));
        }
        Ok(Some(said))
    }

    /// Gives `each` every path of the peer until it fails.
    ///
    /// # Errors
    /// As for [`RemotePaths::get`], and what `each` says.
    pub fn list(&self, each: &mut dyn FnMut(StorePath, Node) -> Result<(), ClientError>) -> Result<(), ClientError> {
        let Some(answer) = self.runtime.call(LIST, self.client.clone().list(ListPathInfoRequest {}))? else {
            return Ok(());
        };
        let mut stream = answer.into_inner();
        while let Some(info) = self.runtime.next(LIST, &mut stream)? {
            let (path, node) = root_of(info.node).map_err(|error| ClientError::Path(error.to_string()))?;
            each(path, node)?;
        }
        Ok(())
    }
}
