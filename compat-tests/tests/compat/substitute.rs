//! Binary caches that stock clients write, as sources of the daemon.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};

use compat_tests::Who;
use compat_tests::checks::expect_contains;
use compat_tests::ssh::executable;

use crate::builds::wait_until;
use crate::{Setup, derivation, setup};

/// Compressions that stock writes and castored reads.
const COMPRESSIONS: [&str; 9] = ["none", "xz", "bzip2", "gzip", "zstd", "br", "lz4", "lzip", "lzma"];

/// A made path that refers to another, both copied to a signed cache and deleted again.
pub(crate) struct Published {
    pub(crate) dir: PathBuf,
    url: String,
    pub(crate) key: String,
    pub(crate) outer: String,
    pub(crate) inner: String,
    expression: String,
}

impl Published {
    pub(crate) fn new(s: &Setup, name: &str, parameters: &str) -> Self {
        let secret = s.room.tmp(&format!("{name}.secret"));
        let public = s.room.tmp(&format!("{name}.public"));
        let key = s.nix(Who::Root, "nix-store").arg("--generate-binary-cache-key").arg(format!("{name}-1"));
        key.arg(&secret).arg(&public).ok().unwrap();
        let inner = derivation(&format!("{name}-inner"), "echo inner > $out", "");
        let outer = derivation(&format!("{name}-outer"), "echo $inner > $out", &format!("inner = {inner};"));
        let out = s.build(&outer).ok().unwrap().text();
        let inner = fs::read_to_string(&out).unwrap().trim().to_owned();
        let dir = s.room.tmp(&format!("{name}-cache"));
        let to = format!("file://{}?secret-key={}{parameters}", dir.display(), secret.display());
        s.nix(Who::Root, "nix").args(["copy", "--to", &to, &out]).ok().unwrap();
        s.nix(Who::Root, "nix-store").args(["--delete", &out, &inner]).ok().unwrap();
        assert!(!Path::new(&out).exists() && !Path::new(&inner).exists());
        Self {
            url: format!("file://{}", dir.display()),
            dir,
            key: fs::read_to_string(public).unwrap().trim().to_owned(),
            outer: out,
            inner,
            expression: outer,
        }
    }

    pub(crate) fn check(&self) {
        assert_eq!(fs::read_to_string(&self.outer).unwrap(), format!("{}\n", self.inner));
        assert_eq!(fs::read_to_string(&self.inner).unwrap(), "inner\n");
    }

    pub(crate) fn forget(&self, s: &Setup) {
        s.nix(Who::Root, "nix-store").args(["--delete", &self.outer, &self.inner]).ok().unwrap();
    }
}

/// Serves a directory until the test ends; gives its URL.
fn serve(dir: PathBuf) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let dir = dir.clone();
            std::thread::spawn(move || {
                let (mut head, mut byte) = (Vec::new(), [0]);
                while !head.ends_with(b"\r\n\r\n") && matches!(stream.read(&mut byte), Ok(1)) {
                    head.push(byte[0]);
                }
                let head = String::from_utf8_lossy(&head).into_owned();
                let path = head.split(' ').nth(1).unwrap_or("/").trim_start_matches('/').to_owned();
                let (status, body) = match fs::read(dir.join(path)) {
                    Ok(body) => ("200 OK", body),
                    Err(_) => ("404 Not Found", Vec::new()),
                };
                let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
                let _ = stream.write_all(&[head.as_bytes(), &body].concat());
            });
        }
    });
    url
}

#[test]
fn every_compression_that_stock_writes() {
    let Some(s) = setup("subst-forms") else { return };
    let daemon = s.start();
    for compression in COMPRESSIONS {
        let p = Published::new(&s, &format!("c-{compression}"), &format!("&compression={compression}"));
        let call = s.nix(Who::Root, "nix-store").args(["-r", &p.outer, "--option", "substituters", &p.url]);
        call.args(["--option", "trusted-public-keys", &p.key]).ok().unwrap();
        p.check();
    }
    daemon.stop().unwrap();
}

#[test]
fn all_releases_realise_from_a_server() {
    let Some(s) = setup("subst-http") else { return };
    let daemon = s.start();
    let p = Published::new(&s, "http", "");
    let url = serve(p.dir.clone());
    for release in &s.machine.releases {
        let options = ["--option", "substituters", &url, "--option", "trusted-public-keys", &p.key];
        let nix = |name| compat_tests::Call::nix(&s.room, Who::Root, release, name);
        nix("nix-store").args(["-r", &p.outer]).args(options).ok().unwrap();
        p.check();
        p.forget(&s);
        // What nix-build says beforehand, and that nothing is built.
        let build = nix("nix-build").args(["--no-out-link", "-E", &p.expression]).args(options);
        let said = build.args(["-j", "0"]).ok().unwrap();
        expect_contains(&said.all(), "will be fetched").unwrap();
        expect_contains(&said.all(), &format!("copying path '{}' from '{url}'", p.outer)).unwrap();
        p.check();
        p.forget(&s);
    }
    daemon.stop().unwrap();
}

/// A store of stock's own that has what was published.
pub(crate) struct Stock {
    pub(crate) dir: PathBuf,
    release: compat_tests::Release,
}

impl Stock {
    pub(crate) fn new(s: &Setup, version: &str, published: &Published) -> Self {
        let release = s.machine.release(version).unwrap().clone();
        let dir = s.room.dir().join(format!("stock-{version}"));
        fs::create_dir_all(dir.join("etc")).unwrap();
        let conf = "build-users-group =\nexperimental-features = nix-command\n";
        fs::write(dir.join("etc/nix.conf"), conf).unwrap();
        let stock = Self { dir, release };
        let copy = stock.script("nix", "");
        let copied = std::process::Command::new(copy)
            .args(["copy", "--no-check-sigs", "--from", &published.url, &published.outer])
            .output()
            .unwrap();
        assert!(copied.status.success(), "{}", String::from_utf8_lossy(&copied.stderr));
        stock
    }

    /// A command of the release for that store.
    pub(crate) fn script(&self, command: &str, variables: &str) -> PathBuf {
        let script = format!(
            "#!/bin/sh\nexec env -i PATH=/usr/bin:/bin HOME={0} NIX_CONF_DIR={0}/etc NIX_REMOTE='local?root={0}/root' \
             {variables} {1} \"$@\"\n",
            self.dir.display(),
            self.release.command(command).display()
        );
        let path = self.dir.join(command);
        executable(&path, &script).unwrap();
        path
    }
}

/// A daemon of that store's, until it is dropped.
struct Listening(std::process::Child);

impl Listening {
    fn start(stock: &Stock, socket: &Path) -> Self {
        let command = stock.script("nix-daemon", &format!("NIX_DAEMON_SOCKET_PATH={}", socket.display()));
        let listening = Self(std::process::Command::new(command).spawn().unwrap());
        let is_there = wait_until(std::time::Duration::from_secs(10), || socket.exists());
        assert!(is_there, "nobody listens at {}", socket.display());
        listening
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Over ssh with both protocols and over a socket; what no trusted key has signed is refused there too.
#[test]
fn stock_stores_are_sources() {
    let Some(s) = setup("subst-stores") else { return };
    let daemon = s.start();
    for (n, version) in ["2.3.7", "2.34.8"].into_iter().enumerate() {
        let p = Published::new(&s, &format!("stores-{n}"), "");
        let stock = Stock::new(&s, version, &p);
        let socket = stock.dir.join("socket");
        // 2.3.7's daemon listens only where it always does, and looks for what it sends outside of its own root.
        let listening = (version != "2.3.7").then(|| Listening::start(&stock, &socket));
        let program = |command: &str| format!("localhost?remote-program={}", stock.script(command, "").display());
        let mut urls = vec![format!("ssh://{}", program("nix-store"))];
        if listening.is_some() {
            urls.push(format!("ssh-ng://{}", program("nix-daemon")));
            urls.push(format!("unix://{}", socket.display()));
        }
        for url in &urls {
            let realise = |key: &str| {
                let call = s.nix(Who::Root, "nix-store").args(["-r", &p.outer, "--option", "substituters", url]);
                call.args(["--option", "trusted-public-keys", key])
            };
            expect_contains(&realise("").fails().unwrap().all(), "it's not signed by any of the keys").unwrap();
            assert!(!Path::new(&p.outer).exists());
            let said = realise(&p.key).ok().unwrap_or_else(|error| panic!("{version} {url}: {error}"));
            let place = url.split('?').next().unwrap();
            expect_contains(&said.all(), &format!("copying path '{}' from '{place}'", p.outer)).unwrap();
            p.check();
            p.forget(&s);
        }
    }
    daemon.stop().unwrap();
}

#[test]
fn an_untrusted_user_chooses_among_what_is_trusted() {
    let Some(s) = setup("subst-trust") else { return };
    let first = s.start();
    let p = Published::new(&s, "trust", "");
    let other = Published::new(&s, "other", "");
    first.stop().unwrap();
    let conf = compat_tests::subject::default_conf();
    let conf = format!("{conf}trusted-substituters = {}\nextra-trusted-public-keys = {}\n", p.url, p.key);
    let daemon = s.subject.start_with(&s.room, &conf).unwrap();
    let realise = |p: &Published, url: &str| {
        s.nix(Who::User, "nix-store")
            .args(["-r", &p.outer, "--option", "substituters", url, "--option"])
            .args(["trusted-public-keys", &p.key])
    };
    // Neither another cache nor another key counts.
    expect_contains(&realise(&other, &other.url).fails().unwrap().all(), "ignoring untrusted substituter").unwrap();
    assert!(!Path::new(&other.outer).exists());
    realise(&p, &p.url).ok().unwrap();
    p.check();
    daemon.stop().unwrap();
}

#[test]
fn a_cache_that_is_gone_halfway_fails_unless_one_may_build() {
    let Some(s) = setup("subst-fallback") else { return };
    let daemon = s.start();
    let p = Published::new(&s, "gone", "");
    for file in fs::read_dir(p.dir.join("nar")).unwrap() {
        fs::write(file.unwrap().path(), "not an archive").unwrap();
    }
    let options = ["--option", "substituters", &p.url, "--option", "trusted-public-keys", &p.key];
    let build = |more: &[&str]| {
        s.nix(Who::Root, "nix-build").args(["--no-out-link", "-E", &p.expression]).args(options).args(more)
    };
    let said = build(&[]).fails().unwrap().all();
    expect_contains(&said, "some substitutes for the outputs of derivation").unwrap();
    expect_contains(&said, "try '--fallback' to build derivation from source").unwrap();
    assert!(!Path::new(&p.outer).exists());
    build(&["--fallback"]).ok().unwrap();
    p.check();
    daemon.stop().unwrap();
}

#[test]
fn a_derivation_may_want_to_be_built() {
    let Some(s) = setup("subst-allow") else { return };
    let daemon = s.start();
    // The path of a fixed output depends neither on this attribute nor on the script.
    let fixed = |script: &str, more: &str| {
        let hash = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        let fixed = format!("outputHash = \"{hash}\"; outputHashAlgo = \"sha256\"; {more}");
        derivation("fixed", script, &fixed)
    };
    let out = s.build(&fixed("echo hello > $out", "")).ok().unwrap().text();
    let dir = s.room.tmp("allow-cache");
    let url = format!("file://{}", dir.display());
    s.nix(Who::Root, "nix").args(["copy", "--to", &url, &out]).ok().unwrap();
    let build = |more: &str, options: &[&str]| {
        s.nix(Who::Root, "nix-store").args(["--delete", &out]).ok().unwrap();
        let build = s.nix(Who::Root, "nix-build").args(["--no-out-link", "-E", &fixed("exit 1", more)]);
        build.args(["--option", "substituters", &url]).args(options)
    };
    // No signature is needed for what its contents name.
    expect_contains(&build("", &[]).ok().unwrap().all(), "copying path").unwrap();
    let refuses = "allowSubstitutes = false;";
    expect_contains(&build(refuses, &[]).fails().unwrap().all(), "failed with exit code 1").unwrap();
    s.build(&fixed("echo hello > $out", "")).ok().unwrap();
    build(refuses, &["--option", "always-allow-substitutes", "true"]).ok().unwrap();
    expect_contains(&build("", &["--option", "substitute", "false"]).fails().unwrap().all(), "exit code 1").unwrap();
    daemon.stop().unwrap();
}

/// The bar of `nix copy` lives: each path is an activity of its own, with its bytes.
#[test]
fn copies_into_the_store_show_their_progress() {
    let Some(s) = setup("subst-progress") else { return };
    let daemon = s.start();
    let published = Published::new(&s, "progress", "");
    let copy = s.nix(Who::Root, "nix").args(["copy", "--no-check-sigs", "--log-format", "internal-json"]);
    let copied = copy.args(["--from", &published.url, &published.outer]).ok().unwrap();
    published.check();
    let events: Vec<serde_json::Value> = copied
        .stderr
        .lines()
        .filter_map(|line| line.strip_prefix("@nix "))
        .map(|event| serde_json::from_str(event).unwrap())
        .collect();
    for path in [&published.outer, &published.inner] {
        let start = events.iter().find(|e| e["action"] == "start" && e["type"] == 100 && e["fields"][0] == **path);
        let id = &start.unwrap_or_else(|| panic!("no copyPath of {path}:\n{}", copied.stderr))["id"];
        // Done and expected bytes; an archive of one word has more than a hundred.
        let done = events.iter().filter(|e| e["action"] == "result" && e["type"] == 105 && e["id"] == *id);
        assert!(
            done.max_by_key(|e| e["fields"][0].as_u64()).unwrap()["fields"][0].as_u64().unwrap() > 100,
            "{}",
            copied.stderr
        );
        assert!(events.iter().any(|e| e["action"] == "stop" && e["id"] == *id));
    }
    daemon.stop().unwrap();
}
