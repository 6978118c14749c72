//! A store seen through gRPC: what a mount of another castored reads.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use castore::{BlobService, BlobStat, Digest, Error, Node, contract};
use common::{TestServer, castore_only, services_of};
use nix_compat::content_address::Method;
use nix_compat::hash::Algorithm;
use nix_compat::store_path::{StoreDir, StorePath};
use parking_lot::Mutex;
use rpc::Trust;
use rpc_client::{RemoteBlobs, RemoteView};
use store::view::{StoreEvent, StoreView};
use store::{AddOptions, Config, GcAction, GcOptions, GcScope, Store};

/// A store, its server, and it as seen from the other end.
struct Fixture {
    store: Arc<Store>,
    view: Arc<RemoteView>,
    server: TestServer,
    _dir: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(Config::new(StoreDir::default(), dir.path().join("state"))).unwrap();
        let services = services_of(&store, Trust::Untrusted);
        let server = TestServer::unix(services, dir.path().join("grpc.socket"));
        let view = RemoteView::new(server.channel(), server.handle(), StoreDir::default()).unwrap();
        Fixture { store, view, server, _dir: dir }
    }

    fn add(&self, name: &str, contents: &[u8]) -> StorePath {
        let options = AddOptions {
            name: name.into(),
            method: Method::Flat,
            algorithm: Algorithm::Sha256,
            references: BTreeSet::new(),
        };
        self.store.add(&options, &mut &contents[..]).unwrap().path
    }

    fn delete(&self, path: &StorePath) {
        let scope = GcScope::Paths { paths: BTreeSet::from([path.clone()]), with_referrers: false };
        let action = GcAction::DeleteSpecific;
        let options = GcOptions { action, scope, max_freed: u64::MAX, keep_derivations: false, keep_outputs: false };
        self.store.collect_garbage(&options).unwrap();
    }

    /// All paths that are listed, two at a time.
    fn listed(&self) -> BTreeSet<StorePath> {
        let mut listed = BTreeSet::new();
        let mut after = 0;
        loop {
            let page = self.view.list(after, 2).unwrap();
            let Some(last) = page.last() else { return listed };
            assert!(page.iter().all(|root| root.number > after) && page.is_sorted_by_key(|root| root.number));
            after = last.number;
            for root in page {
                assert_eq!(self.view.by_number(root.number).unwrap().unwrap().path, root.path);
                assert!(listed.insert(root.path));
            }
        }
    }
}

#[test]
fn paths_are_found_by_name_and_number() {
    let fixture = Fixture::new();
    fixture.view.probe().unwrap();
    let path = fixture.add("one", b"first");
    let found = fixture.view.lookup(path.base_name()).unwrap().unwrap();
    assert_eq!(found.path, path);
    let Node::File { digest, size: 5, executable: false } = found.node else { panic!("{:?}", found.node) };
    assert_eq!(fixture.view.read(&digest, 0, 100).unwrap(), "first");
    assert_eq!(fixture.view.by_number(found.number).unwrap().unwrap().path, path);
    assert_eq!(fixture.view.lookup(path.base_name()).unwrap().unwrap().number, found.number, "numbers stay");
    let other_name = path.base_name().replace("one", "two");
    assert!(fixture.view.lookup(&other_name).unwrap().is_none(), "the hash part alone is not enough");
    assert!(fixture.view.lookup("no store path").unwrap().is_none());
    assert!(fixture.view.by_number(found.number + 1).unwrap().is_none());
    assert!(fixture.view.by_number(0).unwrap().is_none());
}

#[test]
fn a_listing_follows_the_store_and_tells_what_is_gone() {
    let fixture = Fixture::new();
    let events = Arc::new(Mutex::new(Vec::new()));
    let told = events.clone();
    fixture.view.subscribe(Arc::new(move |news| told.lock().extend_from_slice(news)));
    assert_eq!(fixture.listed(), BTreeSet::new());
    let paths: Vec<_> = (0..5).map(|n| fixture.add(&format!("path-{n}"), format!("{n}").as_bytes())).collect();
    // Looked up in between, so that it has the first number.
    let number = fixture.view.lookup(paths[3].base_name()).unwrap().unwrap().number;
    std::thread::sleep(Duration::from_millis(600));
    assert_eq!(fixture.listed(), paths.iter().cloned().collect());
    assert_eq!(fixture.view.lookup(paths[3].base_name()).unwrap().unwrap().number, number);
    fixture.delete(&paths[3]);
    assert!(fixture.view.lookup(paths[3].base_name()).unwrap().is_none(), "names are asked for each time");
    std::thread::sleep(Duration::from_millis(600));
    assert_eq!(fixture.listed().len(), 4);
    let gone = StoreEvent::Removed { name: paths[3].base_name().to_owned(), number };
    let begun = Instant::now();
    while !events.lock().contains(&gone) {
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", events.lock());
        std::thread::sleep(Duration::from_millis(5));
    }
    // The same name again is another path to the mount.
    assert_eq!(fixture.add("path-3", b"3"), paths[3]);
    std::thread::sleep(Duration::from_millis(600));
    assert_eq!(fixture.listed().len(), 5);
    // And in the end it is told that a listing is old.
    while !events.lock().contains(&StoreEvent::Outdated) {
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", events.lock());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_peer_that_is_gone_is_an_error() {
    let fixture = Fixture::new();
    let path = fixture.add("file", &contract::noise(1, 100_000));
    let root = fixture.view.lookup(path.base_name()).unwrap().unwrap();
    let Node::File { digest, .. } = root.node else { panic!() };
    assert_eq!(fixture.view.read(&digest, 0, 10).unwrap().len(), 10);
    let (view, handle) = (fixture.view.clone(), fixture.server.handle());
    drop(handle);
    // The runtime goes on, the server does not.
    let Fixture { server, .. } = fixture;
    let talking = tokio::runtime::Runtime::new().unwrap();
    let uri = server.uri.clone();
    server.stop().unwrap();
    let channel = {
        let _inside = talking.enter();
        rpc_client::channel(uri).unwrap()
    };
    let late = RemoteView::new(channel, talking.handle().clone(), StoreDir::default()).unwrap();
    assert!(late.probe().is_err());
    assert!(late.lookup(path.base_name()).is_err());
    assert!(late.list(0, 10).is_err());
    assert!(late.read(&digest, 0, 10).is_err());
    drop(view);
}

/// A service that gives out other bytes than it was asked for, and counts what it is asked.
struct Liar {
    inner: castore::MemoryStore,
    lies: AtomicBool,
    reads: AtomicU64,
    /// Blobs are not cut.
    whole: bool,
}

impl BlobService for Liar {
    fn stat(&self, digest: &Digest) -> Result<Option<BlobStat>, Error> {
        let stat = BlobService::stat(&self.inner, digest)?;
        Ok(stat.map(|stat| if self.whole { BlobStat { size: stat.size, chunks: Vec::new() } } else { stat }))
    }

    fn read_at(&self, digest: &Digest, offset: u64, len: usize) -> Result<Bytes, Error> {
        if offset == 0 {
            self.reads.fetch_add(1, Ordering::SeqCst);
        }
        let mut bytes = BlobService::read_at(&self.inner, digest, offset, len)?.to_vec();
        if let Some(byte) = bytes.last_mut().filter(|_| self.lies.load(Ordering::SeqCst)) {
            *byte ^= 1;
        }
        Ok(bytes.into())
    }

    fn put(&self, from: &mut dyn std::io::Read) -> Result<(Digest, u64), Error> {
        BlobService::put(&self.inner, from)
    }
}

fn liar(whole: bool) -> (Arc<Liar>, TestServer, RemoteBlobs) {
    let inner = castore::MemoryStore::new();
    let liar = Arc::new(Liar { inner, lies: AtomicBool::new(true), reads: AtomicU64::new(0), whole });
    let mut services = castore_only(Arc::new(castore::MemoryStore::new()));
    services.blobs = liar.clone();
    let server = TestServer::tcp(services);
    let blobs = RemoteBlobs::new(server.channel(), server.handle());
    (liar, server, blobs)
}

#[test]
fn bytes_of_another_digest_are_refused_and_not_kept() {
    for whole in [false, true] {
        let (liar, _server, blobs) = liar(whole);
        for size in [1, 1000, 100_000, 6 << 20] {
            let contents = contract::noise(size as u64, size);
            let (digest, _) = liar.put(&mut &contents[..]).unwrap();
            liar.lies.store(true, Ordering::SeqCst);
            let error = blobs.read_at(&digest, 0, 1000).unwrap_err();
            assert!(error.to_string().contains("does not have the digest"), "{size}: {error}");
            liar.lies.store(false, Ordering::SeqCst);
            for offset in [0, size / 2, size - 1, size] {
                let found = blobs.read_at(&digest, offset as u64, 70_000).unwrap();
                assert!(found == contents[offset..size.min(offset + 70_000)], "{size} at {offset}");
            }
        }
    }
}

#[test]
fn what_was_read_lately_is_not_asked_for_again() {
    let (liar, _server, blobs) = liar(false);
    liar.lies.store(false, Ordering::SeqCst);
    let contents = contract::noise(3, 100_000);
    let (digest, _) = liar.put(&mut &contents[..]).unwrap();
    for _ in 0..10 {
        assert!(blobs.read_at(&digest, 10, 50_000).unwrap() == contents[10..50_010]);
    }
    assert_eq!(liar.reads.load(Ordering::SeqCst), 1);
}
