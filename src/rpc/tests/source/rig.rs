//! A castore that is a source, and stores that fetch from it.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use castore::engine::Engine;
use castore::{BlobService, BlobStat, Digest, Error};
use nix_compat::conf::Settings;
use nix_compat::hash::{NarHash, sha256};
use nix_compat::nar::NarWriter;
use nix_compat::path_info::PathInfo;
use nix_compat::signature::SecretKey;
use nix_compat::store_path::{StoreDir, StorePath};
use nix_compat::worker::SubstitutableInfo;
use nix_compat::worker::stderr::Verbosity;
use parking_lot::Mutex;
use rpc::Trust;
use store::{Config, NewPath, Store};
use substitute::{Client, Copying, Lazy, Outcome, Substituter, Substituters, Wanted, Watch};
use tokio::runtime::Runtime;

use crate::common::{TestServer, services_of};

/// A tree.
pub enum Node {
    File { contents: Vec<u8>, exec: bool },
    Link(String),
    Directory(BTreeMap<String, Node>),
}

pub fn file(contents: Vec<u8>) -> Node {
    Node::File { contents, exec: false }
}

pub fn directory(entries: impl IntoIterator<Item = (String, Node)>) -> Node {
    Node::Directory(entries.into_iter().collect())
}

fn write(node: &Node, nar: &mut NarWriter<Vec<u8>>) {
    match node {
        Node::File { contents, exec } => {
            nar.regular_header(*exec, contents.len() as u64).unwrap();
            nar.contents(contents).unwrap();
            nar.end_regular().unwrap();
        }
        Node::Link(target) => nar.symlink(target.as_bytes()).unwrap(),
        Node::Directory(entries) => {
            nar.enter_directory().unwrap();
            for (name, node) in entries {
                nar.entry(name.as_bytes()).unwrap();
                write(node, nar);
            }
            nar.leave_directory().unwrap();
        }
    }
}

fn nar_of(node: &Node) -> Vec<u8> {
    let mut nar = NarWriter::new(Vec::new());
    write(node, &mut nar);
    nar.finish().unwrap()
}

/// Different for each number.
pub fn key(seed: u8) -> SecretKey {
    let public = ed25519_dalek::SigningKey::from_bytes(&[seed; 32]).verifying_key();
    let both = [[seed; 32], public.to_bytes()].concat();
    SecretKey::parse(&format!("key-{seed}:{}", data_encoding::BASE64.encode(&both))).unwrap()
}

pub fn store_path(name: &str) -> StorePath {
    StorePath::from_parts(sha256(name.as_bytes())[..20].try_into().unwrap(), &name.replace(' ', "-")).unwrap()
}

fn info_of(name: &str, nar: &[u8], references: &[&StorePath], key: &SecretKey) -> PathInfo {
    let mut info = PathInfo {
        path: store_path(name),
        deriver: None,
        nar_hash: NarHash::from(sha256(nar)),
        references: references.iter().map(|path| (*path).clone()).collect(),
        registration_time: 0,
        nar_size: nar.len() as u64,
        ultimate: false,
        signatures: BTreeSet::new(),
        ca: None,
    };
    info.signatures.insert(key.sign(info.fingerprint(&StoreDir::default()).as_bytes()));
    info
}

/// The blobs of a castore that is watched, and may lie.
pub struct Watched {
    inner: Arc<Engine>,
    /// How often each was read from its beginning.
    pub read: Mutex<BTreeMap<[u8; 32], u64>>,
    lies: AtomicBool,
    uncut: AtomicBool,
    lacks: Mutex<HashSet<Digest>>,
}

impl Watched {
    pub fn lie(&self) {
        self.lies.store(true, Ordering::SeqCst);
    }

    pub fn uncut(&self) {
        self.uncut.store(true, Ordering::SeqCst);
    }

    pub fn lack(&self, digest: Digest) {
        self.lacks.lock().insert(digest);
    }

    pub fn honest(&self) {
        self.lies.store(false, Ordering::SeqCst);
        self.uncut.store(false, Ordering::SeqCst);
        self.lacks.lock().clear();
    }

    /// Of all that was read.
    pub fn bytes(&self) -> u64 {
        let size = |digest: &[u8; 32]| self.inner.stat(&Digest::from(*digest)).unwrap().unwrap().size;
        self.read.lock().iter().map(|(digest, times)| times * size(digest)).sum()
    }
}

impl BlobService for Watched {
    fn stat(&self, digest: &Digest) -> Result<Option<BlobStat>, Error> {
        if self.lacks.lock().contains(digest) {
            return Ok(None);
        }
        let stat = self.inner.stat(digest)?;
        let uncut = self.uncut.load(Ordering::SeqCst);
        Ok(stat.map(|stat| if uncut { BlobStat { size: stat.size, chunks: Vec::new() } } else { stat }))
    }

    fn read_at(&self, digest: &Digest, offset: u64, len: usize) -> Result<Bytes, Error> {
        if offset == 0 {
            *self.read.lock().entry(*digest.as_bytes()).or_default() += 1;
        }
        let mut bytes = self.inner.read_at(digest, offset, len)?.to_vec();
        if let Some(byte) = bytes.last_mut().filter(|_| self.lies.load(Ordering::SeqCst)) {
            *byte ^= 1;
        }
        Ok(bytes.into())
    }

    fn put(&self, from: &mut dyn std::io::Read) -> Result<(Digest, u64), Error> {
        self.inner.put(from)
    }
}

/// A store that is served.
pub struct Source {
    store: Arc<Store>,
    pub watched: Arc<Watched>,
    pub server: TestServer,
    _dir: tempfile::TempDir,
}

impl Source {
    pub fn tcp() -> Source {
        Source::new(|services, _| TestServer::tcp(services))
    }

    pub fn unix() -> Source {
        Source::new(|services, dir| TestServer::unix(services, dir.join("socket")))
    }

    fn new(start: impl FnOnce(rpc::Services, &Path) -> TestServer) -> Source {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(Config::new(StoreDir::default(), dir.path().join("state"))).unwrap();
        let watched = Arc::new(Watched {
            inner: store.engine().clone(),
            read: Mutex::default(),
            lies: AtomicBool::new(false),
            uncut: AtomicBool::new(false),
            lacks: Mutex::default(),
        });
        let mut services = services_of(&store, Trust::Untrusted);
        services.blobs = watched.clone();
        Source { server: start(services, dir.path()), store, watched, _dir: dir }
    }

    pub fn url(&self) -> String {
        format!("grpc+{}", self.server.uri)
    }

    /// Adds a path, signed with key 1.
    pub fn add(&self, name: &str, node: &Node, references: &[&StorePath]) -> StorePath {
        self.add_signed(name, node, references, &key(1))
    }

    pub fn add_signed(&self, name: &str, node: &Node, references: &[&StorePath], key: &SecretKey) -> StorePath {
        let nar = nar_of(node);
        let info = info_of(name, &nar, references, key);
        let path = info.path.clone();
        self.store.add_with_info(info, &mut &nar[..]).unwrap();
        path
    }

    /// Adds a file whose path follows from its contents; nobody signs it.
    pub fn add_by_contents(&self, name: &str, contents: &[u8]) -> StorePath {
        let options = store::AddOptions {
            name: name.to_owned(),
            method: nix_compat::content_address::Method::Flat,
            algorithm: nix_compat::hash::Algorithm::Sha256,
            references: BTreeSet::new(),
        };
        self.store.add(&options, &mut &contents[..]).unwrap().path
    }

    /// Adds a path whose info is that of one tree, and the contents those of another.
    pub fn add_with_other_tree(&self, name: &str, said: &Node, real: &Node) -> StorePath {
        let (said, real) = (nar_of(said), nar_of(real));
        let digest = store::nar_digest::NarDigest::new(None, None);
        let ingested = self.store.import_nar(&mut &real[..], digest).unwrap();
        let info = info_of(name, &said, &[], &key(1));
        let path = info.path.clone();
        self.store.register(vec![NewPath { info, node: ingested.node, pin: Some(ingested.pin) }]).unwrap();
        path
    }

    pub fn nar(&self, path: &StorePath) -> Vec<u8> {
        let mut nar = Vec::new();
        self.store.write_nar(path, &mut nar).unwrap();
        nar
    }

    /// The digests of the chunks that these contents have in a castore.
    pub fn chunks(contents: &[u8]) -> Vec<Digest> {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(Config::new(StoreDir::default(), dir.path())).unwrap();
        let (digest, _) = store.engine().put(&mut &contents[..]).unwrap();
        let stat = store.engine().stat(&digest).unwrap().unwrap();
        stat.chunks.into_iter().map(|(chunk, _)| chunk).collect()
    }
}

/// What a client was told.
#[derive(Default)]
pub struct Told(Mutex<Vec<String>>);

impl Told {
    pub fn lines(&self) -> String {
        self.0.lock().join("\n")
    }
}

impl Watch for Told {
    fn log(&self, _: Verbosity, text: String) {
        self.0.lock().push(text);
    }
    fn expect(&self, _: u64, _: u64, _: u64) {}
    fn began(&self, _: &Copying) {}
    fn progress(&self, _: &Copying, _: u64, _: u64, _: u64) {}
    fn ended(&self, _: &Copying) {}
    fn done(&self, _: bool, _: u64, _: u64) {}
}

/// A store and its substituter.
pub struct Rig {
    pub store: Arc<Store>,
    substituters: Substituters,
    /// Before the runtime, which does the talking.
    pub lazy: Lazy,
    runtime: Runtime,
    dir: tempfile::TempDir,
}

impl Rig {
    pub fn new() -> Rig {
        Rig::open(tempfile::tempdir().unwrap())
    }

    pub fn open(dir: tempfile::TempDir) -> Rig {
        let store = Store::open(Config::new(StoreDir::default(), dir.path())).unwrap();
        let runtime = Runtime::new().unwrap();
        let in_runtime = runtime.enter();
        let lazy = Lazy::start(&store, &Settings::default()).unwrap();
        drop(in_runtime);
        Rig { substituters: Substituters::new(store.clone()), store, lazy, runtime, dir }
    }

    /// The same store, opened anew.
    pub fn reopened(self) -> Rig {
        Rig::open(self.closed())
    }

    /// What is left of the store when nobody has it open.
    pub fn closed(self) -> tempfile::TempDir {
        let Rig { store, substituters, lazy, runtime, dir } = self;
        store.sync().unwrap();
        drop((lazy, substituters, runtime, store));
        dir
    }

    /// Turns bytes in the middle of the largest pack over.
    pub fn damage(&self) {
        self.store.sync().unwrap();
        let packs = std::fs::read_dir(self.dir.path().join("castored/packs")).unwrap().flatten();
        let pack = packs.max_by_key(|pack| pack.metadata().unwrap().len()).unwrap().path();
        let mut bytes = std::fs::read(&pack).unwrap();
        let length = bytes.len();
        for at in (length / 3..2 * length / 3).step_by(10_000) {
            bytes[at] ^= 1;
        }
        std::fs::write(pack, bytes).unwrap();
    }

    fn client(&self, sources: &str, extra: &[(&str, &str)]) -> (Client, Arc<Told>) {
        let mut settings = Settings::default();
        let public = key(1).public_key().to_string();
        let own = [("substituters", sources), ("trusted-public-keys", &public), ("connect-timeout", "2")];
        for (name, value) in own.iter().chain(extra) {
            assert!(settings.set(name, value).unwrap());
        }
        let told = Arc::new(Told::default());
        let roots = Arc::new(self.store.new_temp_roots());
        (Client::new(Arc::new(settings), roots, told.clone()), told)
    }

    pub fn fetch(&self, sources: &str, extra: &[(&str, &str)], path: &StorePath) -> (Outcome, Arc<Told>) {
        let (client, told) = self.client(sources, extra);
        let wanted = Wanted::explicitly(path.clone());
        let outcome = self.runtime.block_on(self.substituters.substitute(&client, wanted));
        assert_eq!(outcome.is_valid(), self.store.is_valid(path).unwrap(), "{}", told.lines());
        (outcome, told)
    }

    /// What would repair a path.
    pub fn contents(&self, sources: &str, path: &StorePath) -> substitute::Contents {
        let (client, _) = self.client(sources, &[]);
        self.runtime.block_on(self.substituters.contents(&client, Wanted::explicitly(path.clone())))
    }

    pub fn info(&self, sources: &str, path: &StorePath) -> Option<SubstitutableInfo> {
        let (client, _) = self.client(sources, &[]);
        self.runtime.block_on(self.substituters.mass_info(&client, Wanted::explicitly(path.clone())))
    }

    pub fn read(&self, path: &StorePath) -> store::Result<Vec<u8>> {
        let mut nar = Vec::new();
        self.store.write_nar(path, &mut nar)?;
        Ok(nar)
    }

    pub fn nar(&self, path: &StorePath) -> Vec<u8> {
        self.read(path).unwrap()
    }
}
