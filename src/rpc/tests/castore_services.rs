//! BlobService and DirectoryService as a client meets them: known bytes, both names, bad input, clients that go away.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use castore::proto::{
    self, BlobChunk, DirectoryNode, FileNode, GetDirectoryRequest, PutBlobResponse, ReadBlobRequest, StatBlobRequest,
    SymlinkNode, get_directory_request::ByWhat,
};
use castore::{BlobService as _, Digest, Directory, MemoryStore, Node, NodeName, SymlinkTarget, contract};
use common::{TestServer, castore_only, in_memory};
use rpc::limits::PIECE_BYTES;
use rpc_client::proto::castore::blob_service_client::BlobServiceClient;
use rpc_client::proto::castore::directory_service_client::DirectoryServiceClient;
use tokio_stream::StreamExt as _;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;

const VECTOR: &[u8] = b"x86_64-linux";
const VECTOR_DIGEST: &str = "b3:KOM3/IHEx7YfInAnlJpAElYezq0Sxn9fRz7xuClwNfA=";

fn chunk(data: &'static [u8]) -> BlobChunk {
    BlobChunk { data: Bytes::from_static(data) }
}

async fn put(client: &mut BlobServiceClient<Channel>, pieces: Vec<BlobChunk>) -> Digest {
    let answer = client.put(tokio_stream::iter(pieces)).await.unwrap().into_inner();
    Digest::try_from(&answer.digest[..]).unwrap()
}

async fn read(client: &mut BlobServiceClient<Channel>, digest: Digest) -> Result<Vec<Bytes>, Status> {
    let stream = client.read(ReadBlobRequest { digest: digest.into() }).await?.into_inner();
    stream.map(|piece| piece.map(|piece| piece.data)).collect().await
}

#[test]
fn known_vector() {
    let server = TestServer::tcp(in_memory());
    let mut client = BlobServiceClient::new(server.channel());
    server.block_on(async {
        let digest = put(&mut client, vec![chunk(b"x86"), chunk(b""), chunk(b"_64-linux")]).await;
        assert_eq!(digest.to_string(), VECTOR_DIGEST);
        assert_eq!(read(&mut client, digest).await.unwrap().concat(), VECTOR);
    });
}

#[test]
fn snix_names_reach_the_same_services() {
    async fn ready(channel: &Channel) -> Grpc<Channel> {
        let mut grpc = Grpc::new(channel.clone());
        grpc.ready().await.unwrap();
        grpc
    }

    let server = TestServer::tcp(in_memory());
    let channel = server.channel();
    server.block_on(async {
        let path = PathAndQuery::from_static("/snix.castore.v1.BlobService/Put");
        let request = Request::new(tokio_stream::iter([chunk(VECTOR)]));
        let codec = ProstCodec::<BlobChunk, PutBlobResponse>::default();
        let answer = ready(&channel).await.client_streaming(request, path, codec).await.unwrap().into_inner();
        assert_eq!(Digest::try_from(&answer.digest[..]).unwrap().to_string(), VECTOR_DIGEST);

        let mut tvix = BlobServiceClient::new(channel.clone());
        assert_eq!(read(&mut tvix, VECTOR_DIGEST.parse().unwrap()).await.unwrap().concat(), VECTOR);

        let path = PathAndQuery::from_static("/snix.castore.v1.DirectoryService/Put");
        let request = Request::new(tokio_stream::iter([proto::Directory::default()]));
        let codec = ProstCodec::<proto::Directory, proto::PutDirectoryResponse>::default();
        let answer = ready(&channel).await.client_streaming(request, path, codec).await.unwrap().into_inner();
        assert_eq!(answer.root_digest, Digest::EMPTY.as_bytes()[..]);
    });
}

#[test]
fn large_blobs_come_in_bounded_pieces() {
    let server = TestServer::tcp(in_memory());
    let mut client = BlobServiceClient::new(server.channel());
    let blob = contract::noise(1, 3 * PIECE_BYTES + 5);
    server.block_on(async {
        let pieces = blob.chunks(700_000).map(|piece| BlobChunk { data: Bytes::copy_from_slice(piece) });
        let digest = put(&mut client, pieces.collect()).await;
        let pieces = read(&mut client, digest).await.unwrap();
        assert!(pieces.iter().all(|piece| piece.len() <= PIECE_BYTES), "a piece is larger than {PIECE_BYTES}");
        assert!(pieces.concat() == blob);
    });
}

#[test]
fn stat_tells_chunks_when_asked() {
    let server = TestServer::tcp(in_memory());
    let mut client = BlobServiceClient::new(server.channel());
    server.block_on(async {
        let digest = put(&mut client, vec![chunk(VECTOR)]).await;
        let mut request = StatBlobRequest { digest: digest.into(), send_chunks: false, send_bao: true };
        let answer = client.stat(request.clone()).await.unwrap().into_inner();
        assert!(answer.chunks.is_empty() && answer.bao.is_empty());
        request.send_chunks = true;
        let answer = client.stat(request).await.unwrap().into_inner();
        assert_eq!(answer.chunks.iter().map(|chunk| chunk.size).sum::<u64>(), VECTOR.len() as u64);
    });
}

#[test]
fn unknown_and_malformed_digests() {
    let server = TestServer::tcp(in_memory());
    let mut blobs = BlobServiceClient::new(server.channel());
    let mut directories = DirectoryServiceClient::new(server.channel());
    server.block_on(async {
        let unknown = Bytes::from(Digest::of(b"unknown"));
        for (digest, code) in [(unknown, Code::NotFound), (Bytes::from_static(b"short"), Code::InvalidArgument)] {
            let stat = StatBlobRequest { digest: digest.clone(), ..Default::default() };
            assert_eq!(blobs.stat(stat).await.unwrap_err().code(), code);
            assert_eq!(blobs.read(ReadBlobRequest { digest: digest.clone() }).await.unwrap_err().code(), code);
            let get = GetDirectoryRequest { by_what: Some(ByWhat::Digest(digest)), recursive: true };
            assert_eq!(directories.get(get).await.unwrap_err().code(), code);
        }
        let get = GetDirectoryRequest::default();
        assert_eq!(directories.get(get).await.unwrap_err().code(), Code::InvalidArgument);
    });
}

#[test]
fn a_broken_upload_stores_nothing() {
    let castore = Arc::new(MemoryStore::new());
    let server = TestServer::tcp(castore_only(castore.clone()));
    let mut client = BlobServiceClient::new(server.channel());
    server.block_on(async {
        // The request never ends, so the client gives up in the middle of it.
        let endless = tokio_stream::iter([chunk(VECTOR)]).chain(tokio_stream::pending());
        let given_up = tokio::time::timeout(Duration::from_millis(300), client.put(endless)).await;
        assert!(given_up.is_err(), "an upload that did not end was answered");

        // The connection still serves, and by now the server knows of the end of the other call.
        let digest = put(&mut client, vec![chunk(b"another")]).await;
        assert_eq!(read(&mut client, digest).await.unwrap().concat(), b"another");
    });
    assert!(castore.stat(&VECTOR_DIGEST.parse().unwrap()).unwrap().is_none(), "half an upload was stored");
}

#[test]
fn a_reader_that_stops_does_not_hold_the_server() {
    let server = TestServer::tcp(in_memory());
    let mut client = BlobServiceClient::new(server.channel());
    let blob = Bytes::from(contract::noise(2, 16 * PIECE_BYTES));
    let started = Instant::now();
    server.block_on(async {
        let digest =
            put(&mut client, blob.chunks(PIECE_BYTES).map(|p| BlobChunk { data: blob.slice_ref(p) }).collect()).await;
        // More readers than a blocking pool or a connection's window could serve if they held anything for long.
        let mut stalled = Vec::new();
        for _ in 0..32 {
            let request = ReadBlobRequest { digest: digest.into() };
            let mut own = BlobServiceClient::new(server_channel(&server.uri));
            let mut stream = own.read(request).await.unwrap().into_inner();
            stream.next().await.unwrap().unwrap();
            stalled.push((own, stream));
        }
        assert_eq!(read(&mut client, digest).await.unwrap().concat(), blob);
        drop(stalled);
        assert_eq!(read(&mut client, digest).await.unwrap().concat(), blob);
    });
    server.stop().unwrap();
    assert!(started.elapsed() < Duration::from_secs(60));
}

fn server_channel(uri: &str) -> Channel {
    rpc_client::channel(uri.to_owned()).unwrap()
}

fn link_in(name: &str) -> Directory {
    let target = SymlinkTarget::try_from("target").unwrap();
    Directory::new([(NodeName::try_from(name).unwrap(), Node::Symlink { target })]).unwrap()
}

fn parent_of(children: &[(&str, &Directory)]) -> Directory {
    let entries = children.iter().map(|(name, child)| (NodeName::try_from(*name).unwrap(), child.to_node()));
    Directory::new(entries).unwrap()
}

#[test]
fn directories_must_be_canonical_and_connected() {
    let server = TestServer::tcp(in_memory());
    let mut client = DirectoryServiceClient::new(server.channel());

    let symlink = |name: &'static [u8]| SymlinkNode { name: name.into(), target: Bytes::from_static(b"t") };
    let links = |names: &[&'static [u8]]| proto::Directory {
        symlinks: names.iter().map(|name| symlink(name)).collect(),
        ..Default::default()
    };
    let file = FileNode { name: Bytes::from_static(b"a"), digest: Digest::of(b"").into(), size: 0, executable: false };
    let missing = DirectoryNode { name: Bytes::from_static(b"m"), digest: Digest::of(b"missing").into(), size: 0 };
    let lying = DirectoryNode { name: Bytes::from_static(b"l"), digest: Digest::EMPTY.into(), size: 3 };
    let (a, b) = (link_in("a"), link_in("b"));
    let over_a = parent_of(&[("a", &a)]);

    let cases: Vec<(&str, Vec<proto::Directory>)> = vec![
        ("nothing", vec![]),
        ("out of order", vec![links(&[b"b", b"a"])]),
        ("one name twice", vec![links(&[b"a", b"a"])]),
        ("one name in two lists", vec![proto::Directory { files: vec![file.clone()], ..links(&[b"a"]) }]),
        ("a name with a slash", vec![links(&[b"a/b"])]),
        ("dot dot", vec![links(&[b".."])]),
        ("no name", vec![links(&[b""])]),
        (
            "a digest that is none",
            vec![proto::Directory {
                files: vec![FileNode { digest: Bytes::from_static(b"short"), ..file }],
                ..Default::default()
            }],
        ),
        ("an unknown child", vec![proto::Directory { directories: vec![missing], ..Default::default() }]),
        (
            "a wrong size",
            vec![proto::Directory::default(), proto::Directory { directories: vec![lying], ..Default::default() }],
        ),
        ("the parent first", vec![(&over_a).into(), (&a).into()]),
        ("one that is not below the root", vec![(&a).into(), (&b).into(), (&over_a).into()]),
    ];
    server.block_on(async {
        for (what, directories) in cases {
            let status = client.put(tokio_stream::iter(directories)).await.expect_err(what);
            assert_eq!(status.code(), Code::InvalidArgument, "{what}: {status}");
            assert!(!status.message().is_empty(), "{what}");
        }
        // The connection still serves.
        let tree = [proto::Directory::from(&a), (&over_a).into()];
        let answer = client.put(tokio_stream::iter(tree)).await.unwrap().into_inner();
        assert_eq!(answer.root_digest, over_a.digest().as_bytes()[..]);
    });
}

#[test]
fn recursive_get_goes_from_the_root_to_the_leaves() {
    let server = TestServer::tcp(in_memory());
    let mut client = DirectoryServiceClient::new(server.channel());
    // Wider than what one step fetches, and with a directory that many others share.
    let shared = link_in("shared");
    let names: Vec<String> = (0..200).map(|i| format!("d{i:03}")).collect();
    let middles: Vec<Directory> =
        names.iter().map(|name| parent_of(&[("shared", &shared), (name, &link_in(name))])).collect();
    let leaves: Vec<Directory> = names.iter().map(|name| link_in(name)).collect();
    let entries: Vec<(&str, &Directory)> = names.iter().map(String::as_str).zip(&middles).collect();
    let root = parent_of(&entries);

    let all: Vec<proto::Directory> =
        [&shared].into_iter().chain(&leaves).chain(&middles).chain([&root]).map(Into::into).collect();
    let count = all.len();
    server.block_on(async {
        client.put(tokio_stream::iter(all)).await.unwrap();

        let mut request = GetDirectoryRequest { by_what: Some(ByWhat::Digest(root.digest().into())), recursive: true };
        let stream = client.get(request.clone()).await.unwrap().into_inner();
        let got: Vec<Directory> = stream.map(|message| Directory::try_from(message.unwrap()).unwrap()).collect().await;
        assert_eq!(got.len(), count, "each once");
        let mut announced = vec![root.digest()];
        for directory in &got {
            assert!(announced.contains(&directory.digest()), "a directory came before its parent");
            announced.extend(directory.directories().map(|(child, _)| *child));
        }

        request.recursive = false;
        let stream = client.get(request).await.unwrap().into_inner();
        assert_eq!(stream.collect::<Vec<_>>().await.len(), 1);
    });
}
