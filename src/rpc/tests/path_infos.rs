//! PathInfoService over a real store: who may add what, and what is checked whoever adds it.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use castore::proto::{self, BlobChunk};
use castore::{Directory, Node, NodeName};
use common::{TestServer, services_of};
use nix_compat::hash::NarHash;
use nix_compat::path_info::PathInfo;
use nix_compat::signature::SecretKey;
use nix_compat::store_path::{StoreDir, StorePath, source_path};
use rpc::{Services, Trust};
use rpc_client::proto::castore::blob_service_client::BlobServiceClient;
use rpc_client::proto::castore::directory_service_client::DirectoryServiceClient;
use rpc_client::proto::store::get_path_info_request::ByWhat;
use rpc_client::proto::store::nar_info::{Ca, Signature};
use rpc_client::proto::store::path_info_service_client::PathInfoServiceClient;
use rpc_client::proto::store::{self as message, GetPathInfoRequest, ListPathInfoRequest, NarInfo};
use store::{Config, Signer, Store};
use tokio_stream::StreamExt as _;
use tonic::Code;
use tonic::transport::Channel;

/// The seed and public key of RFC 8032, section 7.1, test 1.
const SECRET_KEY: &str =
    "test-1:nWGxne/9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2DXWpgBgrEKt9VL/tPJZAc6DuFy89qmIyWvAhpo9wdRGg==";

struct Fixture {
    server: TestServer,
    store: Arc<Store>,
    client: PathInfoServiceClient<Channel>,
    _dir: tempfile::TempDir,
}

impl Fixture {
    /// A server whose Unix socket gives every peer this trust.
    fn new(trust: Trust) -> Fixture {
        Fixture::signing(trust, Signer::default())
    }

    /// The same, that signs what it tells.
    fn signing(trust: Trust, signer: Signer) -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(Config::new(StoreDir::default(), dir.path().join("state"))).unwrap();
        let trusted_keys = vec![SecretKey::parse(SECRET_KEY).unwrap().public_key()];
        let services = Services { trusted_keys, signer, ..services_of(&store, trust) };
        let server = TestServer::unix(services, dir.path().join("grpc.socket"));
        let client = PathInfoServiceClient::new(server.channel());
        Fixture { server, store, client, _dir: dir }
    }

    /// Uploads a directory with one file.
    fn upload(&self, contents: &'static [u8]) -> Node {
        let mut blobs = BlobServiceClient::new(self.server.channel());
        let mut directories = DirectoryServiceClient::new(self.server.channel());
        let chunk = BlobChunk { data: Bytes::from_static(contents) };
        self.server.block_on(async {
            blobs.put(tokio_stream::iter([chunk])).await.unwrap();
            let directory = directory_with(contents, contents.len() as u64);
            directories.put(tokio_stream::iter([proto::Directory::from(&directory)])).await.unwrap();
            directory.to_node()
        })
    }

    fn nar(&mut self, node: &Node) -> (NarHash, u64) {
        let node = proto::Node::new(Bytes::new(), node);
        let answer = self.server.block_on(self.client.calculate_nar(node)).unwrap().into_inner();
        let hash: [u8; 32] = answer.nar_sha256[..].try_into().unwrap();
        (hash.into(), answer.nar_size)
    }

    /// What the server tells of the path that [`Fixture::claim`] is about, and of all.
    fn told(&mut self) -> (message::PathInfo, Vec<message::PathInfo>) {
        let request = GetPathInfoRequest { by_what: Some(ByWhat::ByOutputHash(vec![7; 20].into())) };
        let got = self.server.block_on(self.client.get(request)).unwrap().into_inner();
        let listed = self.server.block_on(async {
            let stream = self.client.list(ListPathInfoRequest {}).await.unwrap().into_inner();
            stream.map(Result::unwrap).collect().await
        });
        (got, listed)
    }

    /// What a client says of an input-addressed path that it uploaded.
    fn claim(&mut self, name: &str, contents: &'static [u8]) -> message::PathInfo {
        let node = self.upload(contents);
        let (nar_hash, nar_size) = self.nar(&node);
        message_for(&path(name), &node, nar_hash, nar_size)
    }

    fn put(&mut self, path_info: message::PathInfo) -> Result<message::PathInfo, tonic::Status> {
        self.server.block_on(self.client.put(path_info)).map(tonic::Response::into_inner)
    }

    fn refused(&mut self, path_info: message::PathInfo, code: Code, why: &str) {
        let status = self.put(path_info).unwrap_err();
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(why), "{status}");
        assert_eq!(self.store.all_valid_paths().unwrap(), BTreeSet::new(), "{why}: registered all the same");
    }
}

fn directory_with(contents: &[u8], size: u64) -> Directory {
    let file = Node::File { digest: castore::Digest::of(contents), size, executable: false };
    Directory::new([(NodeName::try_from("file").unwrap(), file)]).unwrap()
}

fn path(name: &str) -> StorePath {
    StorePath::from_parts([7; 20], name).unwrap()
}

fn message_for(path: &StorePath, node: &Node, nar_hash: NarHash, nar_size: u64) -> message::PathInfo {
    let nar_sha256 = Bytes::copy_from_slice(nar_hash.as_bytes());
    message::PathInfo {
        node: Some(proto::Node::new(path.base_name().to_owned().into(), node)),
        references: Vec::new(),
        narinfo: Some(NarInfo { nar_size, nar_sha256, ..Default::default() }),
    }
}

fn narinfo(path_info: &mut message::PathInfo) -> &mut NarInfo {
    path_info.narinfo.as_mut().unwrap()
}

fn sign(path_info: &mut message::PathInfo, path: &StorePath) {
    let narinfo = narinfo(path_info);
    let nar_hash: [u8; 32] = narinfo.nar_sha256[..].try_into().unwrap();
    let info = PathInfo {
        path: path.clone(),
        deriver: None,
        nar_hash: nar_hash.into(),
        references: BTreeSet::new(),
        registration_time: 0,
        nar_size: narinfo.nar_size,
        ultimate: false,
        signatures: BTreeSet::new(),
        ca: None,
    };
    let signature = SecretKey::parse(SECRET_KEY).unwrap().sign(info.fingerprint(&StoreDir::default()).as_bytes());
    let data = Bytes::copy_from_slice(signature.data());
    narinfo.signatures = vec![Signature { name: signature.name().to_owned(), data }];
}

#[test]
fn a_trusted_peer_adds_gets_and_lists() {
    let mut fixture = Fixture::new(Trust::Trusted);
    let claim = fixture.claim("trusted", b"trusted contents");
    let stored = fixture.put(claim.clone()).unwrap();
    assert_eq!(stored, claim);

    let (got, listed) = fixture.told();
    assert_eq!(got, claim);
    assert_eq!(listed, [claim]);
    let info = fixture.store.path_info(&path("trusted")).unwrap().unwrap();
    assert!(!info.ultimate && info.registration_time > 0);
}

#[test]
fn what_is_told_is_signed_and_the_store_keeps_none_of_it() {
    let key = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(key.path(), SECRET_KEY).unwrap();
    let signer = Signer::new(&[key.path().to_str().unwrap().to_owned()]).unwrap();
    let mut fixture = Fixture::signing(Trust::Trusted, signer);
    let claim = fixture.claim("signed", b"contents");
    let mut signed = claim.clone();
    sign(&mut signed, &path("signed"));
    assert_eq!(fixture.put(claim).unwrap(), signed);

    let (got, listed) = fixture.told();
    assert_eq!(got, signed);
    assert_eq!(listed, [signed]);
    assert_eq!(fixture.store.path_info(&path("signed")).unwrap().unwrap().signatures, BTreeSet::new());
}

#[test]
fn unknown_and_malformed_hash_parts() {
    let mut fixture = Fixture::new(Trust::Trusted);
    for (hash, code) in [(vec![9; 20], Code::NotFound), (vec![9; 19], Code::InvalidArgument)] {
        let request = GetPathInfoRequest { by_what: Some(ByWhat::ByOutputHash(hash.into())) };
        let status = fixture.server.block_on(fixture.client.get(request)).unwrap_err();
        assert_eq!(status.code(), code);
    }
    let request = GetPathInfoRequest { by_what: None };
    let status = fixture.server.block_on(fixture.client.get(request)).unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
}

#[test]
fn an_untrusted_peer_needs_a_signature() {
    let mut fixture = Fixture::new(Trust::Untrusted);
    let mut claim = fixture.claim("signed", b"signed contents");
    fixture.refused(claim.clone(), Code::PermissionDenied, "no signature by a trusted key");

    sign(&mut claim, &path("another"));
    fixture.refused(claim.clone(), Code::PermissionDenied, "no signature by a trusted key");

    sign(&mut claim, &path("signed"));
    fixture.put(claim).unwrap();
    assert!(fixture.store.is_valid(&path("signed")).unwrap());
}

#[test]
fn an_untrusted_peer_may_add_what_is_content_addressed() {
    let mut fixture = Fixture::new(Trust::Untrusted);
    let node = fixture.upload(b"addressed by contents");
    let (nar_hash, nar_size) = fixture.nar(&node);
    let none = BTreeSet::new();
    let path = source_path(&StoreDir::default(), "source", nar_hash.as_bytes(), &none, false).unwrap();
    let ca = |digest: &[u8]| Some(Ca { r#type: 0, digest: Bytes::copy_from_slice(digest) });

    // The path follows from the address, but the contents do not have it.
    let forged = source_path(&StoreDir::default(), "forged", &[1; 32], &none, false).unwrap();
    let mut claim = message_for(&forged, &node, nar_hash, nar_size);
    narinfo(&mut claim).ca = ca(&[1; 32]);
    fixture.refused(claim, Code::InvalidArgument, "ca hash mismatch");

    // The contents have the address, but the path does not follow from it.
    let mut claim = message_for(&self::path("other"), &node, nar_hash, nar_size);
    narinfo(&mut claim).ca = ca(nar_hash.as_bytes());
    fixture.refused(claim, Code::PermissionDenied, "not content-addressed");

    // The same for one that leaves references to itself out.
    let own = source_path(&StoreDir::default(), "own", &[2; 32], &none, true).unwrap();
    let mut claim = message_for(&own, &node, nar_hash, nar_size);
    claim.references = vec![Bytes::copy_from_slice(&own.digest())];
    narinfo(&mut claim).reference_names = vec![own.base_name().to_owned()];
    narinfo(&mut claim).ca = ca(&[2; 32]);
    fixture.refused(claim, Code::InvalidArgument, "ca hash mismatch");

    let mut claim = message_for(&path, &node, nar_hash, nar_size);
    narinfo(&mut claim).ca = ca(nar_hash.as_bytes());
    assert_eq!(fixture.put(claim.clone()).unwrap(), claim);
}

#[test]
fn tcp_peers_are_not_trusted() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(Config::new(StoreDir::default(), dir.path())).unwrap();
    let server = TestServer::tcp(services_of(&store, Trust::Trusted));
    let mut client = PathInfoServiceClient::new(server.channel());
    let node = Node::Directory { digest: castore::Digest::EMPTY, size: 0 };
    let claim = message_for(&path("empty"), &node, [0; 32].into(), 96);
    let status = server.block_on(client.put(claim)).unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
}

#[test]
fn what_can_be_computed_is_checked_whoever_claims_it() {
    let mut fixture = Fixture::new(Trust::Trusted);
    let good = fixture.claim("checked", b"checked contents");

    let mut claim = good.clone();
    narinfo(&mut claim).nar_size += 1;
    fixture.refused(claim, Code::InvalidArgument, "size mismatch");

    let mut claim = good.clone();
    narinfo(&mut claim).nar_sha256 = vec![0; 32].into();
    fixture.refused(claim, Code::InvalidArgument, "hash mismatch");

    let mut claim = good.clone();
    let reference = StorePath::from_parts([8; 20], "nowhere").unwrap();
    claim.references = vec![Bytes::copy_from_slice(&reference.digest())];
    narinfo(&mut claim).reference_names = vec![reference.base_name().to_owned()];
    fixture.refused(claim, Code::InvalidArgument, "not valid");

    let missing = Node::File { digest: castore::Digest::of(b"never sent"), size: 10, executable: false };
    let claim = message_for(&path("checked"), &missing, [0; 32].into(), 120);
    fixture.refused(claim, Code::NotFound, "is not here");

    // A directory that says a file is shorter than its blob: its NAR could be written, but nobody else has such a file.
    let lying = directory_with(b"checked contents", 3);
    let mut directories = DirectoryServiceClient::new(fixture.server.channel());
    let upload = tokio_stream::iter([proto::Directory::from(&lying)]);
    fixture.server.block_on(directories.put(upload)).unwrap();
    let claim = message_for(&path("checked"), &lying.to_node(), [0; 32].into(), 120);
    fixture.refused(claim, Code::InvalidArgument, "3 bytes");

    fixture.put(good).unwrap();
}
