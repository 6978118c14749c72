//! The services as a reflection client (evans, grpcurl) sees them.

use std::path::Path;

use compat_tests::grpc::Server;
use compat_tests::subject::{Daemon, GRPC_VARIABLE, SOCKET, default_conf};
use compat_tests::{Who, machine};
use data_encoding::BASE64;
use serde_json::json;

use crate::{Setup, castored_setup};

/// BLAKE3 of the bytes `x86_64-linux`: the vector that snix's documentation uses as well.
const DIGEST: &str = "KOM3/IHEx7YfInAnlJpAElYezq0Sxn9fRz7xuClwNfA=";

/// An address that nobody listens on.
pub(crate) fn free_address() -> String {
    machine::free_address().unwrap().to_string()
}

/// A daemon that serves gRPC on this address.
pub(crate) fn start_on(s: &Setup, address: &str) -> Daemon {
    let mut command = s.subject.command(&s.room, &default_conf()).unwrap();
    command.env(GRPC_VARIABLE, address);
    Daemon::spawn(command, &s.room, Path::new(SOCKET)).unwrap()
}

fn start(s: &Setup) -> (Daemon, Server) {
    let free = free_address();
    let daemon = start_on(s, &free);
    (daemon, Server::connect(&free).unwrap())
}

#[test]
fn reflection_names_every_service_under_both_packages() {
    let Some(s) = castored_setup("reflection") else { return };
    let (daemon, server) = start(&s);
    let services = server.services().unwrap();
    println!("{services:#?}");
    for package in ["tvix", "snix"] {
        for service in ["castore.v1.BlobService", "castore.v1.DirectoryService", "store.v1.PathInfoService"] {
            assert!(services.contains(&format!("{package}.{service}")), "{package}.{service}");
        }
    }
    assert!(services.iter().any(|s| s == "grpc.health.v1.Health"));
    let mut older = server.services_v1alpha().unwrap();
    older.retain(|s| !s.starts_with("grpc.reflection."));
    assert!(older.iter().all(|s| services.contains(s)) && older.len() >= 6, "{older:?}");
    daemon.stop().unwrap();
}

#[test]
fn a_blob_put_by_one_package_is_read_by_the_other() {
    let Some(s) = castored_setup("blobs") else { return };
    let (daemon, server) = start(&s);
    let data = BASE64.encode(b"x86_64-linux");
    let put = server.call("tvix.castore.v1.BlobService", "Put", &[json!({ "data": data })]).unwrap();
    assert_eq!(put, [json!({ "digest": DIGEST })]);
    for package in ["tvix", "snix"] {
        let service = format!("{package}.castore.v1.BlobService");
        let read = server.call(&service, "Read", &[json!({ "digest": DIGEST })]).unwrap();
        assert_eq!(read, [json!({ "data": data })], "{package}");
    }
    let missing = BASE64.encode(&[0; 32]);
    let error = server.call("tvix.castore.v1.BlobService", "Read", &[json!({ "digest": missing })]).unwrap_err();
    assert!(error.to_string().contains("NotFound") || error.to_string().contains("not found"), "{error}");
    daemon.stop().unwrap();
}

#[test]
fn what_a_client_added_can_be_looked_at() {
    let Some(s) = castored_setup("path-info") else { return };
    let (daemon, server) = start(&s);
    let tree = s.room.tmp("looked-at");
    std::fs::create_dir_all(&tree).unwrap();
    std::fs::write(tree.join("system"), "x86_64-linux").unwrap();
    let path = s.nix(Who::User, "nix-store").arg("--add").arg(&tree).ok().unwrap().text();
    let base = path.trim_start_matches("/nix/store/");
    let list = server.call("tvix.store.v1.PathInfoService", "List", &[json!({})]).unwrap();
    assert_eq!(list.len(), 1, "{list:?}");
    let directory = &list[0]["node"]["directory"];
    assert_eq!(BASE64.decode(directory["name"].as_str().unwrap().as_bytes()).unwrap(), base.as_bytes());
    let get = json!({ "digest": directory["digest"] });
    let found = server.call("tvix.castore.v1.DirectoryService", "Get", &[get]).unwrap();
    assert_eq!(found[0]["files"][0]["digest"], DIGEST);
    daemon.stop().unwrap();
}

#[test]
fn a_path_info_that_nobody_vouches_for_is_refused() {
    let Some(s) = castored_setup("claims") else { return };
    let (daemon, server) = start(&s);
    let data = BASE64.encode(b"x86_64-linux");
    server.call("tvix.castore.v1.BlobService", "Put", &[json!({ "data": data })]).unwrap();
    let name = BASE64.encode(b"0123456789abcdfghijklmnpqrsvwxyz-claimed");
    let nar = compat_tests::nar::Tree::File(b"x86_64-linux".to_vec()).archive();
    let claim = json!({
        "node": { "file": { "name": name, "digest": DIGEST, "size": "12", "executable": false } },
        "narinfo": { "narSize": nar.len().to_string(), "narSha256": BASE64.encode(&compat_tests::nar::sha256(&nar)) },
    });
    let error = server.call("tvix.store.v1.PathInfoService", "Put", &[claim]).unwrap_err();
    println!("{error}");
    assert!(server.call("tvix.store.v1.PathInfoService", "List", &[json!({})]).unwrap().is_empty());
    daemon.stop().unwrap();
}
