//! A cache with made-up paths, and stores that fetch from it.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use nix_compat::conf::Settings;
use nix_compat::content_address::{ContentAddress, Method};
use nix_compat::hash::{Algorithm, Hash, NarHash, sha256};
use nix_compat::narinfo::{Compression, NarInfo};
use nix_compat::path_info::PathInfo;
use nix_compat::signature::SecretKey;
use nix_compat::store_path::{StoreDir, StorePath, content_address_path};
use nix_compat::worker::stderr::Verbosity;
use store::{Config, Store};
use substitute::{Client, Copying, Outcome, Substituter, Substituters, Wanted, Watch};

/// A directory with a cache.
pub(crate) struct Cache {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) store_dir: StoreDir,
}

/// A path as it is published.
pub(crate) struct Entry {
    pub(crate) narinfo: NarInfo,
    pub(crate) contents: Vec<u8>,
}

impl Entry {
    pub(crate) fn path(&self) -> &StorePath {
        &self.narinfo.info.path
    }
}

/// Different for each number.
pub(crate) fn key(seed: u8) -> SecretKey {
    let public = ed25519_dalek::SigningKey::from_bytes(&[seed; 32]).verifying_key();
    let both = [[seed; 32], public.to_bytes()].concat();
    SecretKey::parse(&format!("key-{seed}:{}", data_encoding::BASE64.encode(&both))).unwrap()
}

/// The archive of one file.
pub(crate) fn nar(contents: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut word = |bytes: &[u8]| {
        out.extend((bytes.len() as u64).to_le_bytes());
        out.extend(bytes);
        out.resize(out.len().next_multiple_of(8), 0);
    };
    for text in [&b"nix-archive-1"[..], b"(", b"type", b"regular", b"contents", contents, b")"] {
        word(text);
    }
    out
}

pub(crate) fn compress(compression: Compression, bytes: &[u8]) -> Vec<u8> {
    match compression {
        Compression::None => bytes.to_vec(),
        Compression::Xz => {
            let mut out = liblzma::write::XzEncoder::new(Vec::new(), 1);
            out.write_all(bytes).unwrap();
            out.finish().unwrap()
        }
        Compression::Lzma => {
            let options = liblzma::stream::LzmaOptions::new_preset(1).unwrap();
            let stream = liblzma::stream::Stream::new_lzma_encoder(&options).unwrap();
            let mut out = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
            out.write_all(bytes).unwrap();
            out.finish().unwrap()
        }
        Compression::Bzip2 => {
            let mut out = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
            out.write_all(bytes).unwrap();
            out.finish().unwrap()
        }
        Compression::Gzip => {
            let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            out.write_all(bytes).unwrap();
            out.finish().unwrap()
        }
        Compression::Zstd => zstd::stream::encode_all(bytes, 1).unwrap(),
        Compression::Lz4 => {
            let mut out = lz4_flex::frame::FrameEncoder::new(Vec::new());
            out.write_all(bytes).unwrap();
            out.finish().unwrap()
        }
        other => panic!("no encoder for {other}"),
    }
}

impl Cache {
    pub(crate) fn new() -> Self {
        Self::of(StoreDir::default())
    }

    pub(crate) fn of(store_dir: StoreDir) -> Self {
        let cache = Self { dir: tempfile::tempdir().unwrap(), store_dir };
        cache.say("Priority: 30\nWantMassQuery: 1\n");
        std::fs::create_dir(cache.dir.path().join("nar")).unwrap();
        std::fs::create_dir(cache.dir.path().join("realisations")).unwrap();
        cache
    }

    /// What it says of itself.
    pub(crate) fn say(&self, more: &str) {
        let text = format!("StoreDir: {}\n{more}", self.store_dir.as_str());
        std::fs::write(self.dir.path().join("nix-cache-info"), text).unwrap();
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().to_owned()
    }

    pub(crate) fn url(&self) -> String {
        format!("file://{}", self.dir.path().display())
    }

    /// A path of this name, signed with key 1.
    pub(crate) fn entry(&self, name: &str, contents: &[u8], references: &[&Entry]) -> Entry {
        let digest = sha256(name.as_bytes())[..20].try_into().unwrap();
        let path = StorePath::from_parts(digest, name).unwrap();
        let archive = nar(contents);
        let references = references.iter().map(|entry| entry.path().clone()).collect();
        let mut info = self.info(path, &archive, references, None);
        info.signatures.insert(key(1).sign(info.fingerprint(&self.store_dir).as_bytes()));
        Self::described(info, contents, Compression::Zstd)
    }

    /// A path that follows from its contents, unsigned.
    pub(crate) fn by_contents(&self, name: &str, contents: &[u8]) -> Entry {
        let ca = ContentAddress { method: Method::Flat, hash: Hash::of(Algorithm::Sha256, contents) };
        let path = content_address_path(&self.store_dir, name, &ca, &BTreeSet::new(), false).unwrap();
        Self::described(self.info(path, &nar(contents), BTreeSet::new(), Some(ca)), contents, Compression::Zstd)
    }

    fn info(
        &self,
        path: StorePath,
        archive: &[u8],
        references: BTreeSet<StorePath>,
        ca: Option<ContentAddress>,
    ) -> PathInfo {
        PathInfo {
            path,
            deriver: None,
            nar_hash: NarHash::from(sha256(archive)),
            references,
            registration_time: 0,
            nar_size: archive.len() as u64,
            ultimate: false,
            signatures: BTreeSet::new(),
            ca,
        }
    }

    pub(crate) fn described(info: PathInfo, contents: &[u8], compression: Compression) -> Entry {
        let url = format!("nar/{}.nar.{compression}", info.path.hash_part());
        Entry { narinfo: NarInfo::new(info, url, compression).unwrap(), contents: contents.to_vec() }
    }

    /// Publishes it with the right sizes and hashes.
    pub(crate) fn publish(&self, entry: &mut Entry) {
        let file = compress(entry.narinfo.compression, &nar(&entry.contents));
        entry.narinfo.file_hash = Some(Hash::of(Algorithm::Sha256, &file));
        entry.narinfo.file_size = Some(file.len() as u64);
        std::fs::write(self.dir.path().join(entry.narinfo.url()), file).unwrap();
        self.describe(entry);
    }

    /// Writes the narinfo only.
    pub(crate) fn describe(&self, entry: &Entry) {
        let name = format!("{}.narinfo", entry.path().hash_part());
        std::fs::write(self.dir.path().join(name), entry.narinfo.to_text(&self.store_dir)).unwrap();
    }

    /// A published path.
    pub(crate) fn add(&self, name: &str, contents: &[u8], references: &[&Entry]) -> Entry {
        let mut entry = self.entry(name, contents, references);
        self.publish(&mut entry);
        entry
    }
}

/// What a client was told.
#[derive(Default)]
pub(crate) struct Told {
    pub(crate) log: Mutex<Vec<String>>,
    pub(crate) copied: Mutex<Vec<String>>,
    pub(crate) expected: Mutex<(u64, u64, u64)>,
}

impl Told {
    pub(crate) fn lines(&self) -> String {
        self.log.lock().unwrap().join("\n")
    }
}

impl Watch for Told {
    fn log(&self, _: Verbosity, text: String) {
        self.log.lock().unwrap().push(text);
    }
    fn expect(&self, paths: u64, download: u64, nar: u64) {
        *self.expected.lock().unwrap() = (paths, download, nar);
    }
    fn began(&self, copying: &Copying) {
        self.copied.lock().unwrap().push(copying.path.clone());
    }
    fn progress(&self, _: &Copying, _: u64, _: u64, _: u64) {}
    fn ended(&self, _: &Copying) {}
    fn done(&self, _: bool, _: u64, _: u64) {}
}

/// A store and its substituter.
pub(crate) struct Rig {
    dir: tempfile::TempDir,
    pub(crate) store: Arc<Store>,
    pub(crate) substituters: Substituters,
}

impl Rig {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(Config::new(StoreDir::default(), dir.path())).unwrap();
        Self { dir, substituters: Substituters::new(store.clone()), store }
    }

    /// The same store, opened anew, without the paths it had.
    pub(crate) fn again(self) -> Self {
        let Self { dir, store, substituters } = self;
        let (weak, _) = (Arc::downgrade(&store), drop((store, substituters)));
        assert!(weak.upgrade().is_none(), "somebody holds the store");
        let other = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("castored"), other.path().join("castored"));
        std::fs::create_dir(&to).unwrap();
        for file in std::fs::read_dir(from).unwrap().map(|entry| entry.unwrap().path()) {
            let name = file.file_name().unwrap();
            if name.to_str().unwrap().starts_with("narinfos.sqlite") {
                std::fs::copy(&file, to.join(name)).unwrap();
            }
        }
        let store = Store::open(Config::new(StoreDir::default(), other.path())).unwrap();
        Self { dir: other, substituters: Substituters::new(store.clone()), store }
    }

    /// A client that trusts key 1 and uses these sources.
    pub(crate) fn client(&self, sources: &[&str], extra: &[(&str, &str)]) -> (Client, Arc<Told>) {
        let mut settings = Settings::default();
        let public = key(1).public_key().to_string();
        let urls = sources.join(" ");
        let own = [("substituters", urls.as_str()), ("trusted-public-keys", &public), ("connect-timeout", "2")];
        for (name, value) in own.iter().chain(extra) {
            assert!(settings.set(name, value).unwrap());
        }
        let told = Arc::new(Told::default());
        let roots = Arc::new(self.store.new_temp_roots());
        (Client::new(Arc::new(settings), roots, told.clone()), told)
    }

    pub(crate) async fn fetch(&self, sources: &[&str], extra: &[(&str, &str)], entry: &Entry) -> (Outcome, Arc<Told>) {
        let (client, told) = self.client(sources, extra);
        let outcome = self.substituters.substitute(&client, entry.path().clone().into()).await;
        assert_eq!(outcome.is_valid(), self.store.is_valid(entry.path()).unwrap(), "{}", told.lines());
        (outcome, told)
    }

    pub(crate) async fn get(&self, client: &Client, path: &StorePath) -> Outcome {
        self.substituters.substitute(client, Wanted::from(path.clone())).await
    }

    pub(crate) fn has(&self, entry: &Entry) -> bool {
        let valid = self.store.is_valid(entry.path()).unwrap();
        if valid {
            let mut read = Vec::new();
            self.store.write_nar(entry.path(), &mut read).unwrap();
            assert_eq!(read, nar(&entry.contents));
        }
        valid
    }
}
