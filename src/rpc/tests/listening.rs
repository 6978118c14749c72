//! Sockets: what is listened on, what is refused, what is left behind.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::UnixListener;

use common::{TestServer, in_memory};
use rpc::{Listen, Listeners, ServeError};
use rpc_client::proto::castore::blob_service_client::BlobServiceClient;

fn bind(listen: &Listen) -> Result<Listeners, ServeError> {
    tokio::runtime::Runtime::new().unwrap().block_on(async { Listeners::bind(listen) })
}

#[test]
fn only_loopback() {
    for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:8000"] {
        let address = address.parse().unwrap();
        let error = bind(&Listen { tcp: Some(address), unix: None }).unwrap_err();
        assert!(matches!(error, ServeError::NotLoopback { address: refused } if refused == address), "{error}");
    }
    assert_eq!(Listen::default().tcp.unwrap().to_string(), "127.0.0.1:8000");
}

#[test]
fn a_taken_port_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let error = bind(&Listen { tcp: Some(address), unix: None }).unwrap_err();
    assert!(error.to_string().contains(&address.to_string()), "{error}");
}

#[test]
fn a_socket_is_for_everybody_and_goes_with_the_server() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("grpc.socket");
    // As a killed server leaves it.
    drop(UnixListener::bind(&path).unwrap());

    let server = TestServer::unix(in_memory(), path.clone());
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o666);
    let mut client = BlobServiceClient::new(server.channel());
    server.block_on(client.put(tokio_stream::empty())).unwrap();
    drop(client);

    server.stop().unwrap();
    assert!(!path.exists());
}

#[test]
fn what_is_in_use_or_no_socket_stays() {
    let dir = tempfile::tempdir().unwrap();
    let (used, file) = (dir.path().join("used"), dir.path().join("file"));
    let _listener = UnixListener::bind(&used).unwrap();
    fs::write(&file, "precious").unwrap();

    for path in [&used, &file] {
        let error = bind(&Listen { tcp: None, unix: Some(path.clone()) }).unwrap_err();
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");
    }
    assert!(fs::metadata(&used).unwrap().file_type().is_socket());
    assert_eq!(fs::read(&file).unwrap(), b"precious");
}
