//! `grpc+https://`: a peer is known by its certificate, or not talked to.

#![allow(clippy::unwrap_used)]

use nix_compat::store_path::StoreDir;
use rpc_client::proto::store::path_info_service_server::{PathInfoService, PathInfoServiceServer};
use rpc_client::proto::store::{CalculateNarResponse, GetPathInfoRequest, ListPathInfoRequest, PathInfo};
use rpc_client::{RemoteView, open};
use tokio::net::TcpListener;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status};

/// A store that has nothing.
struct Nothing;

#[tonic::async_trait]
impl PathInfoService for Nothing {
    async fn get(&self, _: Request<GetPathInfoRequest>) -> Result<Response<PathInfo>, Status> {
        Err(Status::not_found("nothing is here"))
    }

    async fn put(&self, _: Request<PathInfo>) -> Result<Response<PathInfo>, Status> {
        Err(Status::unimplemented("put"))
    }

    async fn calculate_nar(&self, _: Request<castore::proto::Node>) -> Result<Response<CalculateNarResponse>, Status> {
        Err(Status::unimplemented("calculate"))
    }

    type ListStream = ReceiverStream<Result<PathInfo, Status>>;

    async fn list(&self, _: Request<ListPathInfoRequest>) -> Result<Response<Self::ListStream>, Status> {
        Ok(Response::new(ReceiverStream::new(tokio::sync::mpsc::channel(1).1)))
    }
}

#[test]
fn who_shows_no_certificate_that_is_known_is_not_talked_to() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let own = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let other = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let (certificate, key) = (own.cert.pem(), own.signing_key.serialize_pem());
    let address = runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let tls = ServerTlsConfig::new().identity(Identity::from_pem(&certificate, key));
        let server = Server::builder().tls_config(tls).unwrap().add_service(PathInfoServiceServer::new(Nothing));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        address
    });
    let probe = |scheme: &str, authorities: &str| {
        let url = format!("{scheme}://localhost:{}", address.port());
        let channel = {
            let _inside = runtime.enter();
            open(&url, authorities.as_bytes()).unwrap()
        };
        RemoteView::new(channel, runtime.handle().clone(), StoreDir::default()).unwrap().probe()
    };
    probe("grpc+https", &certificate).unwrap();
    assert!(probe("grpc+https", &other.cert.pem()).is_err(), "another's certificate");
    assert!(probe("grpc+http", "").is_err(), "without encryption");
}
