//! A server on a free port, with its own runtime, for as long as a test holds it.

#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

use std::path::PathBuf;
use std::sync::Arc;

use castore::{BlobService, DirectoryService, MemoryStore, Node};
use nix_compat::store_path::StoreDir;
use rpc::{Listen, Listeners, PathInfos, PathsError, Services, Trust};
use store::nar_digest::NarFacts;
use store::{Entry, NewPath, Signer, Store};
use tokio::runtime::{Handle, Runtime};
use tokio::sync::oneshot;
use tonic::transport::Channel;

pub struct TestServer {
    runtime: Runtime,
    pub uri: String,
    stop: Option<oneshot::Sender<()>>,
    serving: Option<tokio::task::JoinHandle<Result<(), rpc::ServeError>>>,
}

/// All services over one store, which trust every peer so much and no key.
pub fn services_of(store: &Arc<Store>, trust: Trust) -> Services {
    Services {
        blobs: store.engine().clone(),
        directories: store.engine().clone(),
        paths: store.clone(),
        trusted_keys: Vec::new(),
        signer: Signer::default(),
        trust_of: Arc::new(move |_| Some(trust)),
    }
}

impl TestServer {
    pub fn tcp(services: Services) -> TestServer {
        let listen = Listen { tcp: Some("127.0.0.1:0".parse().unwrap()), unix: None };
        TestServer::start(services, &listen)
    }

    pub fn unix(services: Services, path: PathBuf) -> TestServer {
        TestServer::start(services, &Listen { tcp: None, unix: Some(path) })
    }

    fn start(services: Services, listen: &Listen) -> TestServer {
        let runtime = Runtime::new().unwrap();
        let listeners = runtime.block_on(async { Listeners::bind(listen) }).unwrap();
        let uri = match listeners.tcp_address() {
            Some(address) => format!("http://{address}"),
            None => format!("unix://{}", listen.unix.as_ref().unwrap().display()),
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = runtime.spawn(async move {
            listeners
                .serve(services, async {
                    let _ = stopped.await;
                })
                .await
        });
        TestServer { runtime, uri, stop: Some(stop), serving: Some(serving) }
    }

    pub fn channel(&self) -> Channel {
        let _in_runtime = self.runtime.enter();
        rpc_client::channel(self.uri.clone()).unwrap()
    }

    pub fn handle(&self) -> Handle {
        self.runtime.handle().clone()
    }

    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    /// Stops it and gives what `serve` returned.
    pub fn stop(mut self) -> Result<(), rpc::ServeError> {
        drop(self.stop.take());
        self.runtime.block_on(self.serving.take().unwrap()).unwrap()
    }
}

/// Services over a castore, without any store paths.
pub fn castore_only<S>(castore: Arc<S>) -> Services
where
    S: BlobService + DirectoryService + 'static,
{
    Services {
        blobs: castore.clone(),
        directories: castore,
        paths: Arc::new(NoPaths),
        trusted_keys: Vec::new(),
        signer: Signer::default(),
        trust_of: Arc::new(|_| Some(Trust::Untrusted)),
    }
}

pub fn in_memory() -> Services {
    castore_only(Arc::new(MemoryStore::new()))
}

/// A store with nothing in it.
struct NoPaths;

impl PathInfos for NoPaths {
    fn store_dir(&self) -> &StoreDir {
        unreachable!("nothing is put into it")
    }

    fn get(&self, _: &[u8; 20]) -> Result<Option<Entry>, PathsError> {
        Ok(None)
    }

    fn list(&self, _: u32, _: usize) -> Result<Vec<Entry>, PathsError> {
        Ok(Vec::new())
    }

    fn put(&self, _: NewPath) -> Result<(), PathsError> {
        unreachable!("nothing is put into it")
    }

    fn calculate_nar(&self, _: &Node) -> Result<NarFacts, PathsError> {
        unreachable!("nothing is in it")
    }
}
