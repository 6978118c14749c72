//! The castore's contract over gRPC: what holds for a local service holds for a remote one.

mod common;

use std::sync::Arc;

use castore::contract;
use common::{TestServer, castore_only, in_memory};
use rpc_client::{RemoteBlobs, RemoteDirectories};

fn keeps_the_contract(server: &TestServer) {
    contract::blobs(&RemoteBlobs::new(server.channel(), server.handle()));
    contract::directories(&RemoteDirectories::new(server.channel(), server.handle()));
}

#[test]
fn over_tcp() {
    keeps_the_contract(&TestServer::tcp(in_memory()));
}

#[test]
fn over_a_unix_socket() {
    let dir = tempfile::tempdir().unwrap();
    keeps_the_contract(&TestServer::unix(in_memory(), dir.path().join("grpc.socket")));
}

#[test]
fn through_a_second_server() {
    // A server whose castore is the first one's: every piece passes the bridge between async and blocking twice.

    let first = TestServer::tcp(in_memory());
    let blobs = RemoteBlobs::new(first.channel(), first.handle());
    let directories = RemoteDirectories::new(first.channel(), first.handle());
    let mut services = castore_only(Arc::new(castore::MemoryStore::new()));
    services.blobs = Arc::new(blobs);
    services.directories = Arc::new(directories);
    keeps_the_contract(&TestServer::tcp(services));
}

#[test]
fn over_the_engine() {
    let dir = tempfile::tempdir().unwrap();
    let engine = castore::engine::Engine::open(dir.path(), Default::default()).unwrap();
    keeps_the_contract(&TestServer::tcp(castore_only(engine)));
}
