//! castored as a binary cache over HTTP, read by stock clients.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use compat_tests::checks::expect_contains;
use compat_tests::{Call, Daemon, Release, Who, machine};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::builds::wait_until;
use crate::{Setup, castored_setup, derivation};

/// An address on which nobody listens.
pub(crate) fn free_address() -> SocketAddr {
    machine::free_address().unwrap()
}

/// A daemon that serves what has been built, a path that refers to another, over HTTP.
struct Cache {
    url: String,
    daemon: Daemon,
    /// What the clients of the cache trust.
    key: String,
    outer: String,
    inner: String,
}

impl Cache {
    /// Builds without a key, so that no path has a signature of its own; the cache then signs, or not.
    fn start(s: &Setup, signing: bool) -> Self {
        Self::start_with(s, signing, "")
    }

    /// The same with more in the daemon's nix.conf.
    fn start_with(s: &Setup, signing: bool, more: &str) -> Self {
        let (secret, public) = (s.room.tmp("secret"), s.room.tmp("public"));
        let make_key = s.nix(Who::Root, "nix-store").args(["--generate-binary-cache-key", "test-1"]);
        make_key.arg(&secret).arg(&public).ok().unwrap();
        let conf = format!("{}{more}", compat_tests::subject::default_conf());
        let daemon = s.subject.start_with(&s.room, &conf).unwrap();
        let inner = derivation("inner", "echo a line of the log; echo inner > $out", "");
        let outer =
            derivation("outer", "/bin/sh -c 'echo run > $out' && echo $inner >> $out", &format!("inner = {inner};"));
        let outer = s.build(&outer).ok().unwrap().text();
        let inner = fs::read_to_string(&outer).unwrap().lines().nth(1).unwrap().to_owned();
        daemon.stop().unwrap();
        let address = free_address();
        let mut conf = format!("{conf}http-listen = {address}\n");
        if signing {
            conf += &format!("secret-key-files = {}\n", secret.display());
        }
        let daemon = s.subject.start_with(&s.room, &conf).unwrap();
        let key = fs::read_to_string(public).unwrap().trim().to_owned();
        Self { url: format!("http://{address}"), daemon, key, outer, inner }
    }

    /// Has a client of this release copy the path from the cache into an empty store of its own, which is given.
    fn copy(&self, s: &Setup, release: &Release) -> (Call, PathBuf) {
        let own = s.room.tmp(&format!("own-{}", release.version));
        let call = Call::nix(&s.room, Who::Root, release, "nix").args(["copy", "--from", &self.url, "--to"]);
        (call.arg(&own).arg(&self.outer).args(["--option", "trusted-public-keys", &self.key]), own)
    }
}

fn in_store(own: &Path, path: &str) -> PathBuf {
    own.join(path.trim_start_matches('/'))
}

#[test]
fn all_releases_take_what_is_signed() {
    let Some(s) = castored_setup("http-signed") else { return };
    let cache = Cache::start(&s, true);
    // Newer clients take NARs in zstd, made while they are sent.
    let numbers: Vec<u8> = (0..2_000_000u32).flat_map(|number| (number / 3).to_le_bytes()).collect();
    let large =
        s.nix(Who::User, "nix-store").arg("--add").arg(s.room.write("large", &numbers).unwrap()).ok().unwrap().text();
    for release in &s.machine.releases {
        let (copy, own) = cache.copy(&s, release);
        copy.arg(&large).ok().unwrap();
        assert!(fs::read(in_store(&own, &large)).unwrap() == numbers, "by {}", release.version);
        assert_eq!(fs::read_to_string(in_store(&own, &cache.inner)).unwrap(), "inner\n");
        let contents = fs::read_to_string(in_store(&own, &cache.outer)).unwrap();
        assert_eq!(contents, format!("run\n{}\n", cache.inner));
        let verify = Call::nix(&s.room, Who::Root, release, "nix-store").arg("--store").arg(&own);
        verify.args(["--verify", "--check-contents"]).ok().unwrap();
        // The same as a substituter.
        let own = s.room.tmp(&format!("realised-{}", release.version));
        let realise =
            Call::nix(&s.room, Who::Root, release, "nix-store").arg("--store").arg(&own).args(["-r", &cache.outer]);
        let options = ["--option", "substituters", &cache.url, "--option", "trusted-public-keys", &cache.key];
        let said = realise.args(options).ok().unwrap().all();
        expect_contains(&said, &format!("copying path '{}' from '{}'", cache.outer, cache.url)).unwrap();
        assert!(in_store(&own, &cache.inner).exists());
    }
    cache.daemon.stop().unwrap();
}

#[test]
fn all_releases_refuse_what_is_not_signed() {
    let Some(s) = castored_setup("http-unsigned") else { return };
    let cache = Cache::start(&s, false);
    for release in &s.machine.releases {
        let (copy, own) = cache.copy(&s, release);
        let said = copy.fails().unwrap().all();
        expect_contains(&said, "signature").unwrap();
        assert!(!in_store(&own, &cache.inner).exists() && !in_store(&own, &cache.outer).exists());
    }
    // It is there; only nobody vouches for it.
    let (copy, own) = cache.copy(&s, s.machine.newest());
    copy.arg("--no-check-sigs").ok().unwrap();
    assert!(in_store(&own, &cache.outer).exists());
    cache.daemon.stop().unwrap();
}

#[test]
fn all_releases_look_into_it() {
    let Some(s) = castored_setup("http-look") else { return };
    let cache = Cache::start(&s, true);
    for release in &s.machine.releases {
        let nix =
            |args: &[&str]| Call::nix(&s.room, Who::User, release, "nix").args(args).args(["--store", &cache.url]);
        let infos = nix(&["path-info", "-r", "--json", &cache.outer]).ok().unwrap().text();
        for part in [&cache.outer, &cache.inner, "test-1:"] {
            let part = part.trim_start_matches("/nix/store/");
            expect_contains(&infos, part).unwrap();
        }
        let log = nix(&["log", &cache.inner]).ok().unwrap().text();
        assert_eq!(log, "a line of the log");
        let (ls, cat) =
            if release.is_2_3() { (&["ls-store"][..], "cat-store") } else { (&["store", "ls"][..], "store") };
        let listed = nix(&[ls, &["-l", &cache.inner]].concat()).ok().unwrap().text();
        expect_contains(&listed, "6").unwrap();
        let cat = if release.is_2_3() { vec![cat, &cache.inner] } else { vec![cat, "cat", &cache.inner] };
        assert_eq!(nix(&cat).ok().unwrap().text(), "inner");
    }
    cache.daemon.stop().unwrap();
}

/// A file of a cache over HTTP, by a client that is not stock's.
fn get(url: &str) -> Vec<u8> {
    let (host, path) = url.trim_start_matches("http://").split_once('/').unwrap();
    let mut stream = TcpStream::connect(host).unwrap();
    write!(stream, "GET /{path} HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert!(answer.starts_with(b"HTTP/1.0 200"), "{}", String::from_utf8_lossy(&answer));
    let head = answer.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
    answer.split_off(head + 4)
}

#[test]
fn narinfos_and_listings_are_those_that_stock_writes() {
    let Some(s) = castored_setup("http-files") else { return };
    let cache = Cache::start(&s, true);
    let tree = s.room.dir().join("tree");
    fs::create_dir_all(tree.join("sub/empty")).unwrap();
    fs::write(tree.join("sub/file"), "x".repeat(1000)).unwrap();
    fs::write(tree.join("run"), "#!/bin/sh\n").unwrap();
    fs::write(tree.join("nothing"), "").unwrap();
    fs::set_permissions(tree.join("run"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    std::os::unix::fs::symlink("sub/\"é", tree.join("link")).unwrap();
    let tree = s.nix(Who::Root, "nix-store").arg("--add").arg(&tree).ok().unwrap().text();
    let secret = s.room.tmp("secret");
    let dir = s.room.tmp("stock-cache");
    let to =
        format!("file://{}?compression=none&write-nar-listing=true&secret-key={}", dir.display(), secret.display());
    s.nix(Who::Root, "nix").args(["copy", "--to", &to, &tree, &cache.outer]).ok().unwrap();
    for path in [&tree, &cache.outer, &cache.inner] {
        let hash = &path.trim_start_matches("/nix/store/")[..32];
        let stocks = fs::read_to_string(dir.join(format!("{hash}.narinfo"))).unwrap();
        let ours = String::from_utf8(get(&format!("{}/{hash}.narinfo", cache.url))).unwrap();
        let without_url =
            |text: &str| text.lines().filter(|l| !l.starts_with("URL:")).map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(without_url(&ours), without_url(&stocks));
        let nar = |text: &str| text.lines().find_map(|line| line.strip_prefix("URL: ").map(str::to_owned)).unwrap();
        let stocks_nar = fs::read(dir.join(nar(&stocks))).unwrap();
        assert!(get(&format!("{}/{}", cache.url, nar(&ours))) == stocks_nar);
        let stocks: Value = serde_json::from_slice(&fs::read(dir.join(format!("{hash}.ls"))).unwrap()).unwrap();
        let ours: Value = serde_json::from_slice(&get(&format!("{}/{hash}.ls", cache.url))).unwrap();
        assert_eq!(ours, stocks);
    }
    cache.daemon.stop().unwrap();
}

#[test]
fn a_store_without_a_daemon_is_served_and_one_with_is_not_served_twice() {
    let Some(s) = castored_setup("http-serve") else { return };
    let cache = Cache::start(&s, false);
    let address = free_address().to_string();
    let program = s.subject.copy_into(&s.room).unwrap();
    let config = format!("secret-key-files = {}", s.room.tmp("secret").display());
    let serve =
        || Call::new(&s.room, Who::Root, &program).args(["serve", "--listen", &address]).env("NIX_CONFIG", &config);
    expect_contains(&serve().fails().unwrap().all(), "http-listen").unwrap();
    cache.daemon.stop().unwrap();
    let mut serving = serve().spawn().unwrap();
    assert!(wait_until(Duration::from_secs(20), || TcpStream::connect(&address).is_ok()), "it does not answer");
    let cache_url = format!("http://{address}");
    let own = s.room.tmp("own");
    let copy = s.nix(Who::Root, "nix").args(["copy", "--from", &cache_url, "--to"]).arg(&own).arg(&cache.outer);
    copy.args(["--option", "trusted-public-keys", &cache.key]).ok().unwrap();
    assert_eq!(fs::read_to_string(in_store(&own, &cache.inner)).unwrap(), "inner\n");
    kill(Pid::from_raw(i32::try_from(serving.id()).unwrap()), Signal::SIGTERM).unwrap();
    assert!(serving.wait().unwrap().success());
}

#[test]
fn the_port_outlives_the_serving_process() {
    let Some(s) = castored_setup("http-kept") else { return };
    let cache = Cache::start(&s, true);
    let info = format!("{}/nix-cache-info", cache.url);
    let expected = b"StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 30\n";
    assert_eq!(get(&info), expected);
    cache.daemon.kill_server().unwrap();
    // Whoever comes meanwhile waits.
    assert_eq!(get(&info), expected);
    cache.daemon.stop().unwrap();
}

#[test]
fn realisations_of_content_addressed_outputs() {
    let Some(s) = castored_setup("http-ca") else { return };
    const CA: [&str; 2] = ["--extra-experimental-features", "nix-command ca-derivations"];
    let cache = Cache::start_with(&s, true, "extra-experimental-features = ca-derivations\n");
    let more = "__contentAddressed = true; outputHashMode = \"recursive\"; outputHashAlgo = \"sha256\";";
    let floating = derivation("floating", "echo floating > $out", more);
    let built = s.build(&floating).args(CA).ok().unwrap().text();
    for release in s.machine.releases.iter().filter(|release| !release.is_2_3()) {
        let own = s.room.tmp(&format!("ca-{}", release.version));
        let build = Call::nix(&s.room, Who::Root, release, "nix-build").arg("--store").arg(&own).args(CA);
        let build = build.args(["--no-out-link", "-j", "0", "-E", &floating]);
        let options = ["--option", "substituters", &cache.url, "--option", "trusted-public-keys", &cache.key];
        let said = build.args(options).ok().unwrap();
        assert_eq!(said.text(), built, "{}", release.version);
        assert_eq!(fs::read_to_string(in_store(&own, &built)).unwrap(), "floating\n");
    }
    cache.daemon.stop().unwrap();
}

#[test]
fn castored_substitutes_from_castored() {
    let Some(s) = castored_setup("http-own") else { return };
    let cache = Cache::start(&s, true);
    cache.daemon.stop().unwrap();
    // The same store directory over another state.
    fs::rename("/nix/var/nix", "/nix/var/first").unwrap();
    let address = free_address().to_string();
    let program = s.subject.copy_into(&s.room).unwrap();
    let serve = Call::new(&s.room, Who::Root, &program).args(["serve", "--listen", &address]);
    let serve = serve.env("NIX_STATE_DIR", "/nix/var/first");
    let config = format!("secret-key-files = {}", s.room.tmp("secret").display());
    let mut serving = serve.env("NIX_CONFIG", &config).spawn().unwrap();
    assert!(wait_until(Duration::from_secs(20), || TcpStream::connect(&address).is_ok()), "it does not answer");
    let daemon = s.start();
    assert!(!Path::new(&cache.outer).exists());
    let url = format!("http://{address}");
    let realise =
        || s.nix(Who::Root, "nix-store").args(["-r", &cache.outer, "--option", "substituters", &url, "--option"]);
    // A key of the same name that is another's.
    let other = "test-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=";
    realise().args(["trusted-public-keys", other]).fails().unwrap();
    assert!(!Path::new(&cache.outer).exists());
    realise().args(["trusted-public-keys", &cache.key]).ok().unwrap();
    assert_eq!(fs::read_to_string(&cache.inner).unwrap(), "inner\n");
    daemon.stop().unwrap();
    kill(Pid::from_raw(i32::try_from(serving.id()).unwrap()), Signal::SIGTERM).unwrap();
    assert!(serving.wait().unwrap().success());
}

#[test]
fn without_its_key_the_daemon_serves_all_but_http() {
    let Some(s) = castored_setup("http-keyless") else { return };
    let address = free_address();
    let conf = compat_tests::subject::default_conf();
    let conf = format!("{conf}http-listen = {address}\nsecret-key-files = /nowhere/secret\n");
    let daemon = s.subject.start_with(&s.room, &conf).unwrap();
    expect_contains(&daemon.log(), "going on without HTTP").unwrap();
    assert!(TcpStream::connect(address).is_err());
    let file = s.room.write("file", "x\n").unwrap();
    s.nix(Who::User, "nix-store").arg("--add").arg(&file).ok().unwrap();
    daemon.stop().unwrap();
}
