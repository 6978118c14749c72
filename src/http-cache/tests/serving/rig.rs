//! A store, a server over it, and a client that hides nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use http_cache::{Limits, Served, Server, Tokens};
use nix_compat::conf::Settings;
use nix_compat::hash::{NarHash, sha256};
use nix_compat::nar::NarWriter;
use nix_compat::path_info::PathInfo;
use nix_compat::store_path::{StoreDir, StorePath};
use store::{AutoGc, Config, Signer, Store};
use tokio::runtime::Runtime;
use tokio::sync::oneshot;

/// How long a client waits for bytes, where it expects some.
const PATIENCE: Duration = Duration::from_secs(20);
/// The key of the signer: made for these tests, and of no worth.
pub(crate) const SECRET: &str =
    "test:nWGxne/9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2DXWpgBgrEKt9VL/tPJZAc6DuFy89qmIyWvAhpo9wdRGg==";

/// What pushers know.
pub(crate) const TOKEN: &str = "a token for tests";

pub(crate) struct Rig {
    pub(crate) store: Arc<Store>,
    pub(crate) address: SocketAddr,
    pub(crate) signer: Signer,
    pub(crate) dir: tempfile::TempDir,
    stop: Option<oneshot::Sender<()>>,
    runtime: Runtime,
}

/// A path that was added, and its NAR.
pub(crate) struct Added {
    pub(crate) path: StorePath,
    pub(crate) nar: Vec<u8>,
    pub(crate) nar_hash: NarHash,
}

impl Rig {
    pub(crate) fn new() -> Self {
        Self::with(Limits::default())
    }

    pub(crate) fn with(limits: Limits) -> Self {
        Self::start(limits, false)
    }

    /// One that lets whoever knows [`TOKEN`] push.
    pub(crate) fn pushing(limits: Limits) -> Self {
        Self::start(limits, true)
    }

    fn start(limits: Limits, pushing: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(Config::new(StoreDir::default(), dir.path())).unwrap();
        let key = dir.path().join("key");
        std::fs::write(&key, SECRET).unwrap();
        let signer = Signer::new(&[key.to_str().unwrap().to_owned()]).unwrap();
        let tokens = dir.path().join("tokens");
        std::fs::write(&tokens, TOKEN).unwrap();
        let served = Served {
            store: store.clone(),
            signer: signer.clone(),
            log_dir: dir.path().join("log"),
            pushers: pushing.then(|| Tokens::read(&tokens).unwrap()),
            room: AutoGc::from(&Settings::default()),
        };
        let runtime = Runtime::new().unwrap();
        let server = runtime.block_on(async { Server::bind("127.0.0.1:0".parse().unwrap()) }).unwrap();
        let address = server.address().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        runtime.spawn(server.serve(served, limits, async {
            let _ = stopped.await;
        }));
        Self { store, address, signer, dir, stop: Some(stop), runtime }
    }

    /// Has the server end in order.
    pub(crate) fn stop(&mut self) {
        let _ = self.stop.take().unwrap().send(());
    }

    /// Adds a directory with an executable, a link and `size` bytes of data.
    pub(crate) fn add(&self, name: &str, references: &[&StorePath], size: usize) -> Added {
        self.add_nar(name, references, tree(name, size))
    }

    pub(crate) fn add_nar(&self, name: &str, references: &[&StorePath], nar: Vec<u8>) -> Added {
        let path = StorePath::from_parts(sha256(name.as_bytes())[..20].try_into().unwrap(), name).unwrap();
        let nar_hash = NarHash::from(sha256(&nar));
        let info = PathInfo {
            path: path.clone(),
            deriver: None,
            nar_hash,
            references: references.iter().map(|r| (*r).clone()).collect(),
            registration_time: 0,
            nar_size: nar.len() as u64,
            ultimate: false,
            signatures: BTreeSet::new(),
            ca: None,
        };
        self.store.add_with_info(info, &mut &nar[..]).unwrap();
        Added { path, nar, nar_hash }
    }

    pub(crate) fn connect(&self) -> Connection {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Connection { stream, read: Vec::new() }
    }

    pub(crate) fn get(&self, path: &str) -> Response {
        self.connect().ask("GET", path, &[])
    }

    pub(crate) fn get_with(&self, path: &str, headers: &[&str]) -> Response {
        self.connect().ask("GET", path, headers)
    }

    /// Where the NAR of a path is, by its narinfo.
    pub(crate) fn nar_url(&self, added: &Added) -> String {
        let narinfo = self.get(&format!("/{}.narinfo", added.path.hash_part())).text();
        let url = narinfo.lines().find_map(|line| line.strip_prefix("URL: ")).unwrap();
        format!("/{url}")
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.stop = None;
        let runtime = std::mem::replace(&mut self.runtime, Runtime::new().unwrap());
        runtime.shutdown_background();
    }
}

pub(crate) fn tree(seed: &str, size: usize) -> Vec<u8> {
    let mut nar = NarWriter::new(Vec::new());
    nar.enter_directory().unwrap();
    nar.entry(b"bin").unwrap();
    nar.enter_directory().unwrap();
    nar.entry(b"run").unwrap();
    nar.regular_header(true, seed.len() as u64).unwrap();
    nar.contents(seed.as_bytes()).unwrap();
    nar.end_regular().unwrap();
    nar.leave_directory().unwrap();
    nar.entry(b"data").unwrap();
    nar.regular_header(false, size as u64).unwrap();
    nar.contents(&(0..size).map(|i| (i * i / 7) as u8).collect::<Vec<u8>>()).unwrap();
    nar.end_regular().unwrap();
    nar.entry(b"link").unwrap();
    nar.symlink(b"bin/run").unwrap();
    nar.leave_directory().unwrap();
    nar.finish().unwrap()
}

pub(crate) struct Connection {
    pub(crate) stream: TcpStream,
    read: Vec<u8>,
}

#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: Vec<u8>,
    /// Whether the body has its end.
    pub(crate) whole: bool,
}

impl Response {
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
}

impl Connection {
    pub(crate) fn send(&mut self, method: &str, path: &str, headers: &[&str]) {
        let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
        // A server that refuses it may have closed the connection already; what it says is seen then.
        let _ = write!(self.stream, "{method} {path} HTTP/1.1\r\nHost: cache.test:80\r\n{headers}\r\n");
    }

    pub(crate) fn ask(&mut self, method: &str, path: &str, headers: &[&str]) -> Response {
        self.send(method, path, headers);
        self.receive(method == "HEAD").unwrap()
    }

    /// Puts a body whose length is told.
    pub(crate) fn put(&mut self, path: &str, headers: &[&str], body: &[u8]) -> Response {
        let length = format!("Content-Length: {}", body.len());
        self.send("PUT", path, &[headers, &[&length]].concat());
        // A server that refuses it may not read it.
        let _ = self.stream.write_all(body);
        self.receive(false).unwrap()
    }

    /// Takes what comes; false at the end.
    fn more(&mut self) -> bool {
        let mut piece = [0; 65536];
        match self.stream.read(&mut piece) {
            Ok(0) | Err(_) => false,
            Ok(n) => {
                self.read.extend_from_slice(&piece[..n]);
                true
            }
        }
    }

    fn line(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.read.windows(2).position(|two| two == b"\r\n") {
                let line: Vec<u8> = self.read.drain(..end + 2).collect();
                return Some(String::from_utf8(line[..end].to_vec()).unwrap());
            }
            if !self.more() {
                return None;
            }
        }
    }

    /// So many bytes, or those that there are.
    fn bytes(&mut self, count: usize) -> Vec<u8> {
        while self.read.len() < count && self.more() {}
        let count = count.min(self.read.len());
        self.read.drain(..count).collect()
    }

    /// The next response; `None` when the connection has ended.
    pub(crate) fn receive(&mut self, head_only: bool) -> Option<Response> {
        let status = self.line()?.split(' ').nth(1).unwrap().parse().unwrap();
        let mut headers = BTreeMap::new();
        loop {
            let line = self.line()?;
            let Some((name, value)) = line.split_once(": ") else { break };
            headers.insert(name.to_lowercase(), value.to_owned());
        }
        let (mut body, mut whole) = (Vec::new(), true);
        if head_only || status == 304 {
        } else if let Some(length) = headers.get("content-length") {
            let length: usize = length.parse().unwrap();
            body = self.bytes(length);
            whole = body.len() == length;
        } else {
            assert_eq!(headers["transfer-encoding"], "chunked");
            loop {
                let Some(line) = self.line() else {
                    whole = false;
                    break;
                };
                let length = usize::from_str_radix(&line, 16).unwrap();
                body.extend(self.bytes(length));
                self.line();
                if length == 0 {
                    break;
                }
            }
        }
        Some(Response { status, headers, body, whole })
    }

    /// Reads to the end of the connection; whether fewer bytes came than that.
    pub(crate) fn is_cut_before(&mut self, count: usize) -> bool {
        while self.more() {}
        self.read.len() < count
    }

    /// Whether the server closes the connection before patience ends.
    pub(crate) fn is_closed(&mut self) -> bool {
        let mut byte = [0];
        loop {
            match self.stream.read(&mut byte) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return error.kind() == std::io::ErrorKind::ConnectionReset,
            }
        }
    }
}
