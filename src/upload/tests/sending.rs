//! What is queued arrives, whatever the destination does meanwhile.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fetch::DownloadOptions;
use nix_compat::conf::Settings;
use nix_compat::hash::{NarHash, sha256};
use nix_compat::nar::NarWriter;
use nix_compat::narinfo::NarInfo;
use nix_compat::path_info::PathInfo;
use nix_compat::store_path::{StoreDir, StorePath};
use store::{Config, Signer, Store};
use upload::{Uploads, Waiting};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Made for these tests, and of no worth.
const SECRET: &str = "test:nWGxne/9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2DXWpgBgrEKt9VL/tPJZAc6DuFy89qmIyWvAhpo9wdRGg==";

struct Rig {
    store: Arc<Store>,
    signer: Signer,
    dir: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(Config::new(StoreDir::default(), dir.path())).unwrap();
        let key = dir.path().join("key");
        std::fs::write(&key, SECRET).unwrap();
        let signer = Signer::new(&[key.to_str().unwrap().to_owned()]).unwrap();
        Self { store, signer, dir }
    }

    fn start(&self, url: &str) -> Uploads {
        let settings = Settings { stalled_download_timeout: 2, download_attempts: 1, ..Settings::default() };
        Uploads::start(&self.store, &[url.to_owned()], &self.signer, &DownloadOptions::new(&settings)).unwrap()
    }

    /// As a build makes a path valid.
    fn build(&self, name: &str, references: &[&StorePath], size: usize) -> StorePath {
        let path = StorePath::from_parts(sha256(name.as_bytes())[..20].try_into().unwrap(), name).unwrap();
        let coming = self.store.queue_uploads([&path]).unwrap();
        self.add(&path, references, size);
        drop(coming);
        path
    }

    fn add(&self, path: &StorePath, references: &[&StorePath], size: usize) {
        let nar = nar(path.name(), size);
        let info = PathInfo {
            path: path.clone(),
            deriver: None,
            nar_hash: NarHash::from(sha256(&nar)),
            references: references.iter().map(|path| (*path).clone()).collect(),
            registration_time: 0,
            nar_size: nar.len() as u64,
            ultimate: true,
            signatures: BTreeSet::new(),
            ca: None,
        };
        self.store.add_with_info(info, &mut &nar[..]).unwrap();
    }

    /// Holds what a cache has of a path, told by `file`, against the store.
    fn check(&self, path: &StorePath, file: &dyn Fn(&str) -> Option<Vec<u8>>) {
        let text = file(&format!("{}.narinfo", path.hash_part())).unwrap();
        let narinfo = NarInfo::parse(self.store.store_dir(), std::str::from_utf8(&text).unwrap()).unwrap();
        let (info, ours) = (&narinfo.info, self.store.path_info(path).unwrap().unwrap());
        assert_eq!((&info.path, info.nar_hash, &info.references), (path, ours.nar_hash, &ours.references));
        assert!(info.is_signed_by(self.store.store_dir(), &self.signer.public_keys()));
        let contents = file(narinfo.url()).unwrap();
        assert_eq!(narinfo.file_size, Some(contents.len() as u64));
        assert_eq!(narinfo.file_hash.unwrap(), nix_compat::hash::Hash::Sha256(sha256(&contents)));
        let mut nar = Vec::new();
        substitute::decompressed(narinfo.compression, &contents[..]).unwrap().unwrap().read_to_end(&mut nar).unwrap();
        assert_eq!(NarHash::from(sha256(&nar)), ours.nar_hash);
    }
}

fn nar(seed: &str, size: usize) -> Vec<u8> {
    let mut nar = NarWriter::new(Vec::new());
    let contents: Vec<u8> = seed.bytes().cycle().zip(0..size).map(|(byte, i)| byte ^ (i * i / 5) as u8).collect();
    nar.regular_header(false, contents.len() as u64).unwrap();
    nar.contents(&contents).unwrap();
    nar.end_regular().unwrap();
    nar.finish().unwrap()
}

/// Waits until it is told of the only destination.
fn until(uploads: &Uploads, told: impl Fn(&Waiting) -> bool) -> Waiting {
    let start = Instant::now();
    loop {
        let waiting = uploads.waiting().remove(0);
        if told(&waiting) {
            return waiting;
        }
        assert!(start.elapsed() < PATIENCE, "{waiting:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn is_done(waiting: &Waiting) -> bool {
    waiting.waiting == 0 && waiting.failure.is_none()
}

#[test]
fn closures_are_written_into_a_directory() {
    for (parameters, ending) in
        [("", ".nar.xz"), ("?compression=none", ".nar"), ("?compression=zstd&compression-level=5", ".nar.zst")]
    {
        let rig = Rig::new();
        let cache = rig.dir.path().join("some cache");
        let url = format!("file://{}{parameters}", cache.display().to_string().replace(' ', "%20"));
        let uploads = rig.start(&url);
        // Nobody has built this, but somebody needs it.
        let source = StorePath::from_parts([7; 20], "source").unwrap();
        rig.add(&source, &[], 10);
        let inner = rig.build("inner", &[&source], 300_000);
        let outer = rig.build("outer", &[&inner, &source], 5);
        until(&uploads, is_done);
        let file = |name: &str| std::fs::read(cache.join(name)).ok();
        for path in [&source, &inner, &outer] {
            rig.check(path, &file);
        }
        assert_eq!(file("nix-cache-info").unwrap(), b"StoreDir: /nix/store\n");
        let names: Vec<String> = std::fs::read_dir(cache.join("nar"))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        assert!(names.len() == 3 && names.iter().all(|name| name.ends_with(ending)), "{names:?}");
        // What is there is not sent again.
        let other = rig.build("other", &[&outer], 5);
        let told = until(&uploads, |waiting| waiting.sent == 4 && is_done(waiting));
        assert_eq!(told.url, fetch::without_password(url.as_str()));
        rig.check(&other, &file);
    }
}

#[test]
fn a_directory_for_another_store_is_left_alone() {
    let rig = Rig::new();
    let cache = rig.dir.path().join("cache");
    std::fs::create_dir(&cache).unwrap();
    std::fs::write(cache.join("nix-cache-info"), "StoreDir: /other/store\n").unwrap();
    let uploads = rig.start(&format!("file://{}", cache.display()));
    rig.build("path", &[], 5);
    let told = until(&uploads, |waiting| waiting.failure.is_some());
    assert!(told.waiting == 1 && told.failure.unwrap().contains("/other/store"));
    assert_eq!(std::fs::read_dir(&cache).unwrap().count(), 1);
}

/// What a server does with what is put.
#[derive(Clone, Debug, PartialEq)]
enum Mood {
    Good,
    /// Says 503.
    Busy,
    /// Says 401.
    Closed,
    /// Reads a bit of a body and closes the connection.
    Dying,
    /// Reads a bit of a body and then nothing.
    Stalling,
    /// Refuses the narinfo of this hash.
    Picky(String),
}

/// A cache on a server of moods.
#[derive(Clone)]
struct Server {
    address: SocketAddr,
    mood: Arc<Mutex<Mood>>,
    files: Arc<Mutex<BTreeMap<String, Vec<u8>>>>,
}

impl Server {
    fn start(address: &str, mood: Mood) -> Self {
        let listener = TcpListener::bind(address).unwrap();
        let address = listener.local_addr().unwrap();
        let server = Self { address, mood: Arc::new(Mutex::new(mood)), files: Arc::default() };
        let (serving, files) = (server.clone(), server.files.clone());
        files.lock().unwrap().insert("nix-cache-info".into(), b"StoreDir: /nix/store\n".to_vec());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let serving = serving.clone();
                std::thread::spawn(move || while serving.answer(&stream).is_some() {});
            }
        });
        server
    }

    fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    fn file(&self, name: &str) -> Option<Vec<u8>> {
        self.files.lock().unwrap().get(name).cloned()
    }

    /// One request; `None` at the connection's end.
    fn answer(&self, mut stream: &TcpStream) -> Option<()> {
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            stream.read_exact(&mut byte).ok()?;
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).unwrap();
        let mut words = head.split(' ');
        let (method, name) = (words.next().unwrap(), words.next().unwrap().trim_start_matches('/').to_owned());
        let out = stream;
        let say = |status: &str, body: &[u8]| {
            let mut stream = out;
            write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n", body.len()).ok()?;
            stream.write_all(body).ok()
        };
        if method == "GET" {
            return match self.file(&name) {
                Some(body) => say("200 OK", &body),
                None => say("404 Not Found", b""),
            };
        }
        let length = head.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
        let mut body = vec![0; length.unwrap()];
        let mood = self.mood.lock().unwrap().clone();
        if matches!(mood, Mood::Dying | Mood::Stalling) {
            let part = body.len() / 2;
            stream.read_exact(&mut body[..part]).ok()?;
            while mood == Mood::Stalling && *self.mood.lock().unwrap() == mood {
                std::thread::sleep(Duration::from_millis(10));
            }
            return None;
        }
        stream.read_exact(&mut body).ok()?;
        match mood {
            Mood::Busy => return say("503 Service Unavailable", b""),
            Mood::Closed => return say("401 Unauthorized", b"who are you?"),
            Mood::Picky(hash) if name.starts_with(&hash) => return say("400 Bad Request", b"not this"),
            _ => {}
        }
        self.files.lock().unwrap().insert(name, body);
        say("201 Created", b"")
    }
}

#[test]
fn a_server_in_any_mood_gets_everything_in_the_end() {
    for mood in [Mood::Busy, Mood::Closed, Mood::Dying, Mood::Stalling] {
        let rig = Rig::new();
        let server = Server::start("127.0.0.1:0", mood.clone());
        let uploads = rig.start(&format!("http://me:secret@{}?compression=zstd", server.address));
        let path = rig.build("path", &[], 2_000_000);
        let told = until(&uploads, |waiting| waiting.failure.is_some());
        assert_eq!((told.waiting, told.sent), (1, 0), "{mood:?}");
        assert!(!told.url.contains("secret") && !told.failure.unwrap().contains("secret"));
        assert!(server.file(&format!("{}.narinfo", path.hash_part())).is_none());
        server.set(Mood::Good);
        assert_eq!(until(&uploads, is_done).sent, 1, "{mood:?}");
        rig.check(&path, &|name| server.file(name));
        let left = std::fs::read_dir(rig.dir.path().join("castored/upload")).unwrap().count();
        assert_eq!(left, 0, "nothing is left of what was compressed");
    }
}

#[test]
fn a_path_that_is_refused_holds_up_no_other() {
    let rig = Rig::new();
    // Queued before there is anybody who sends, so that all of them are there at once.
    let server = Server::start("127.0.0.1:0", Mood::Busy);
    let uploads = rig.start(&format!("http://{}?compression=none", server.address));
    let paths: Vec<StorePath> = (0..100).map(|number| rig.build(&format!("p{number}"), &[], 10)).collect();
    let first = paths.iter().min_by_key(|path| path.digest()).unwrap();
    server.set(Mood::Picky(first.hash_part().to_string()));
    let told = until(&uploads, |waiting| waiting.waiting == 1 && waiting.again_in.is_some());
    assert!(told.sent == 99 && told.failure.unwrap().contains("not this"));
    server.set(Mood::Good);
    until(&uploads, is_done);
    paths.iter().for_each(|path| rig.check(path, &|name| server.file(name)));
}

#[test]
fn what_is_queued_when_all_ends_is_sent_later() {
    let rig = Rig::new();
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let url = format!("http://{address}?compression=none");
    let uploads = rig.start(&url);
    let (kept, gone) = (rig.build("kept", &[], 10), StorePath::from_parts([9; 20], "gone").unwrap());
    drop(rig.store.queue_uploads([&gone]).unwrap());
    let told = until(&uploads, |waiting| waiting.failure.is_some());
    assert_eq!(told.waiting, 2);
    drop(uploads);
    rig.store.sync().unwrap();
    let Rig { store, signer, dir } = rig;
    let start = Instant::now();
    // The sender has it until it notices.
    let mut store = Some(store);
    while Arc::strong_count(store.as_ref().unwrap()) > 1 {
        assert!(start.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(store.take());
    let store = Store::open(Config::new(StoreDir::default(), dir.path())).unwrap();
    let rig = Rig { store, signer, dir };
    let server = Server::start(&address.to_string(), Mood::Good);
    let uploads = rig.start(&url);
    until(&uploads, is_done);
    rig.check(&kept, &|name| server.file(name));
    assert_eq!(server.file(&format!("{}.narinfo", gone.hash_part())), None);
    drop(uploads);
    // Another destination is none of these.
    let elsewhere = rig.dir.path().join("elsewhere");
    let uploads = rig.start(&format!("file://{}", elsewhere.display()));
    assert_eq!(uploads.waiting()[0].waiting, 0);
    assert!(!Path::new(&elsewhere).exists());
}
