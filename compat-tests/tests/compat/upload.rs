//! What is built is sent elsewhere, in the background.

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use compat_tests::checks::expect_contains;
use compat_tests::ssh::{HOST, stand_in};
use compat_tests::{Call, Daemon, Who};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::builds::wait_until;
use crate::http_cache::free_address;
use crate::{Setup, castored_setup, derivation};

/// How long uploads may take; after failures they pause.
const PATIENCE: Duration = Duration::from_secs(120);

/// A key, its public half, and a daemon's configuration that signs with it and uploads.
fn configured(s: &Setup, upload_to: &str, more: &str) -> (String, String) {
    let (secret, public) = (s.room.tmp("secret"), s.room.tmp("public"));
    if !secret.exists() {
        let make_key = s.nix(Who::Root, "nix-store").args(["--generate-binary-cache-key", "test-1"]);
        make_key.arg(&secret).arg(&public).ok().unwrap();
    }
    let conf = compat_tests::subject::default_conf();
    let conf = format!("{conf}upload-to = {upload_to}\nsecret-key-files = {}\n{more}", secret.display());
    (conf, fs::read_to_string(public).unwrap().trim().to_owned())
}

/// Builds a path that refers to another.
fn build(s: &Setup, name: &str) -> (String, String) {
    let inner = derivation(&format!("{name}-inner"), "echo inner > $out", "");
    let outer = derivation(name, "echo $inner > $out", &format!("inner = {inner};"));
    let outer = s.build(&outer).ok().unwrap().text();
    let inner = fs::read_to_string(&outer).unwrap().trim().to_owned();
    (outer, inner)
}

/// What the daemon tells; nothing while it is being started again.
fn status(s: &Setup) -> String {
    let program = s.subject.copy_into(&s.room).unwrap();
    let told = Call::new(&s.room, Who::Root, &program).args(["status", "--json"]).quiet().ok();
    told.map(|told| told.text()).unwrap_or_default()
}

fn wait_for_empty_queue(s: &Setup) {
    let is_empty = || {
        let Ok(status) = serde_json::from_str::<serde_json::Value>(&status(s)) else { return false };
        let uploads = status["uploads"].as_array().unwrap();
        !uploads.is_empty() && uploads.iter().all(|upload| upload["waiting"] == 0)
    };
    assert!(wait_until(PATIENCE, is_empty), "{}", status(s));
}

/// A castored of its own that serves another store and takes what is pushed.
struct Other {
    serving: Child,
    url: String,
}

impl Other {
    const TOKEN: &str = "token-of-the-pushers";

    fn start(s: &Setup, address: &str, state: &Path) -> Self {
        let tokens = s.room.write("tokens", Self::TOKEN).unwrap();
        let program = s.subject.copy_into(&s.room).unwrap();
        let serve = Call::new(&s.room, Who::Root, &program).args(["serve", "--listen", address]);
        let serve = serve.env("NIX_STATE_DIR", state);
        let serve = serve.env("NIX_CONFIG", format!("http-push-token-file = {}", tokens.display()));
        let serving = serve.spawn().unwrap();
        assert!(wait_until(Duration::from_secs(20), || TcpStream::connect(address).is_ok()), "it does not answer");
        Self { serving, url: format!("http://{address}") }
    }

    fn stop(mut self) {
        kill(Pid::from_raw(i32::try_from(self.serving.id()).unwrap()), Signal::SIGTERM).unwrap();
        assert!(self.serving.wait().unwrap().success());
    }
}

/// Has a client copy a path from a cache into a store of its own, by signatures.
fn copy(s: &Setup, from: &str, key: &str, path: &str, own: &str) -> PathBuf {
    let own = s.room.tmp(own);
    let copy = s.nix(Who::Root, "nix").args(["copy", "--from", from, "--to"]).arg(&own).arg(path);
    copy.args(["--option", "trusted-public-keys", key]).ok().unwrap();
    own.join(path.trim_start_matches('/'))
}

fn netrc(s: &Setup) -> String {
    let text = format!("machine 127.0.0.1 login castored password {}\n", Other::TOKEN);
    format!("netrc-file = {}\n", s.room.write("netrc", text).unwrap().display())
}

#[test]
fn closures_arrive_in_directories_that_all_releases_read() {
    let Some(s) = castored_setup("upload-files") else { return };
    let dirs = ["none", "xz", "zstd"].map(|compression| (compression, s.room.tmp(&format!("cache-{compression}"))));
    let urls = dirs.clone().map(|(compression, dir)| format!("file://{}?compression={compression}", dir.display()));
    let (conf, key) = configured(&s, &urls.join(" "), "");
    let daemon = s.subject.start_with(&s.room, &conf).unwrap();
    let (outer, inner) = build(&s, "outer");
    wait_for_empty_queue(&s);
    for (compression, dir) in &dirs {
        for release in s.machine.releases.iter().filter(|release| *compression != "zstd" || !release.is_2_3()) {
            let own = s.room.tmp(&format!("own-{compression}-{}", release.version));
            let from = format!("file://{}", dir.display());
            let copy = Call::nix(&s.room, Who::Root, release, "nix").args(["copy", "--from", &from, "--to"]);
            copy.arg(&own).arg(&outer).args(["--option", "trusted-public-keys", &key]).ok().unwrap();
            assert_eq!(fs::read_to_string(own.join(inner.trim_start_matches('/'))).unwrap(), "inner\n");
        }
    }
    daemon.stop().unwrap();
}

#[test]
fn a_destination_that_is_gone_gets_everything_when_it_is_back() {
    let Some(s) = castored_setup("upload-gone") else { return };
    let address = free_address().to_string();
    let (conf, key) = configured(&s, &format!("http://{address}?compression=zstd"), &netrc(&s));
    let daemon = s.subject.start_with(&s.room, &conf).unwrap();
    let (outer, _) = build(&s, "outer");
    let failed = || status(&s).contains("unable to");
    assert!(wait_until(PATIENCE, failed), "{}", status(&s));
    // Nobody waits for it, and a restart changes nothing.
    let (other_outer, _) = build(&s, "other");
    daemon.stop().unwrap();
    let daemon = s.subject.start_with(&s.room, &conf).unwrap();
    let other = Other::start(&s, &address, &s.room.tmp("other-state"));
    wait_for_empty_queue(&s);
    for path in [&outer, &other_outer] {
        copy(&s, &other.url, &key, path, "own");
    }
    let program = s.subject.copy_into(&s.room).unwrap();
    let told = Call::new(&s.room, Who::Root, &program).args(["status"]).ok().unwrap().text();
    expect_contains(&told, &format!("http://{address}?compression=zstd  0 built paths wait, ")).unwrap();
    daemon.stop().unwrap();
    other.stop();
}

#[test]
fn what_was_built_arrives_though_castored_is_killed_again_and_again() {
    let Some(s) = castored_setup("upload-kill") else { return };
    let address = free_address().to_string();
    let (conf, key) = configured(&s, &format!("http://{address}?compression=none"), &netrc(&s));
    let daemon = s.subject.start_with(&s.room, &conf).unwrap();
    let mut built = Vec::new();
    let mut other: Option<Other> = None;
    for round in 0..6 {
        for number in 0..3 {
            built.push(build(&s, &format!("p{round}-{number}")).0);
        }
        // The first rounds end with all of it queued, later ones in the middle.
        if round == 2 {
            other = Some(Other::start(&s, &address, &s.room.tmp("other-state")));
        }
        daemon.kill_server().unwrap();
    }
    wait_for_empty_queue(&s);
    let other = other.unwrap();
    for path in &built {
        assert!(copy(&s, &other.url, &key, path, "own").exists());
    }
    daemon.stop().unwrap();
    other.stop();
}

#[test]
fn stores_that_speak_a_protocol() {
    let Some(s) = castored_setup("upload-stores") else { return };
    let release = s.machine.newest();
    // The far store is one of stock's, in which the far end's command finds itself.
    let far = s.room.tmp("far");
    let path = stand_in(&s.room, &compat_tests::Subject::stock(release), release).unwrap();
    let url = format!("ssh-ng://{HOST}?remote-store=local%3Froot%3D{}", far.display());
    let (conf, _) = configured(&s, &url, "");
    let daemon = start_with_path(&s, &conf, &path);
    let (outer, inner) = build(&s, "outer");
    wait_for_empty_queue(&s);
    for path in [&outer, &inner] {
        assert!(far.join(path.trim_start_matches('/')).exists(), "{path} did not arrive: {}", status(&s));
    }
    daemon.stop().unwrap();
}

/// A daemon that finds commands (ssh) where `path` says.
fn start_with_path(s: &Setup, conf: &str, path: &str) -> Daemon {
    let mut command = s.subject.command(&s.room, conf).unwrap();
    command.env("PATH", path);
    Daemon::spawn(command, &s.room, Path::new("/nix/var/nix/daemon-socket/socket")).unwrap()
}

/// What a cache in a directory says of outputs: id and path.
fn realisations(dir: &Path) -> BTreeMap<String, String> {
    let files = fs::read_dir(dir.join("realisations")).unwrap().map(|entry| entry.unwrap().path());
    let read = |file: PathBuf| {
        let text = fs::read_to_string(&file).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        let field = |name: &str| json[name].as_str().unwrap().to_owned();
        assert_eq!(file.file_name().unwrap().to_str().unwrap(), format!("{}.doi", field("id")));
        (field("id"), field("outPath"))
    };
    files.map(read).collect()
}

#[test]
fn what_outputs_of_content_addressed_derivations_are() {
    let Some(s) = castored_setup("upload-ca") else { return };
    const CA: [&str; 2] = ["--extra-experimental-features", "nix-command ca-derivations"];
    let release = s.machine.newest();
    let (dir, far, address) = (s.room.tmp("cache"), s.room.tmp("far"), free_address().to_string());
    let path = stand_in(&s.room, &compat_tests::Subject::stock(release), release).unwrap();
    let stock = format!("ssh-ng://{HOST}?remote-store=local%3Froot%3D{}", far.display());
    let urls = format!("file://{} http://{address}?compression=zstd {stock}", dir.display());
    let (conf, key) = configured(&s, &urls, &format!("{}extra-experimental-features = ca-derivations\n", netrc(&s)));
    let other = Other::start(&s, &address, &s.room.tmp("other-state"));
    let daemon = start_with_path(&s, &conf, &path);
    let more = "__contentAddressed = true; outputHashMode = \"recursive\"; outputHashAlgo = \"sha256\";";
    let inner = derivation("inner", "echo inner > $out", more);
    // Built as what it becomes once the path of the other is known.
    let outer = derivation("outer", "echo $inner > $out", &format!("{more} inner = {inner};"));
    let built = s.build(&outer).args(CA).ok().unwrap().text();
    wait_for_empty_queue(&s);

    // As the client itself would have copied it, and a second one for what was built in the place of the outer one.
    let copied = s.room.tmp("copied");
    let to = format!("file://{}", copied.display());
    let expression = s.room.write("outer.nix", outer.clone()).unwrap();
    s.nix(Who::Root, "nix").args(["copy", "--to", &to, "--file"]).arg(&expression).args(CA).ok().unwrap();
    let (theirs, ours) = (realisations(&copied), realisations(&dir));
    assert!(!theirs.is_empty() && theirs.iter().all(|(id, path)| ours.get(id) == Some(path)), "{theirs:?} {ours:?}");
    assert_eq!(ours.len(), 3, "{ours:?}");

    let from_directory = format!("file://{}", dir.display());
    for (place, url) in [("directory", from_directory.as_str()), ("server", other.url.as_str())] {
        for release in s.machine.releases.iter().filter(|release| !release.is_2_3()) {
            let own = s.room.tmp(&format!("own-{place}-{}", release.version));
            let build = Call::nix(&s.room, Who::Root, release, "nix-build").arg("--store").arg(&own).args(CA);
            let build = build.args(["--no-out-link", "-j", "0", "-E", &outer]);
            let options = ["--option", "substituters", url, "--option", "trusted-public-keys", &key];
            assert_eq!(build.args(options).ok().unwrap().text(), built, "{place} {}", release.version);
            assert!(own.join(built.trim_start_matches('/')).exists());
        }
    }
    // Stock's daemon was told as well.
    let far_store = format!("local?root={}", far.display());
    let build = s.nix(Who::Root, "nix-build").args(["--store", &far_store]).args(CA);
    let build = build.args(["--no-out-link", "-j", "0", "-E", &outer, "--option", "substitute", "false"]);
    assert_eq!(build.ok().unwrap().text(), built);
    daemon.stop().unwrap();
    other.stop();
}

#[test]
fn a_setting_that_cannot_be_is_told_and_no_more() {
    let Some(s) = castored_setup("upload-wrong") else { return };
    let (conf, _) = configured(&s, "s3://bucket", "");
    let daemon = s.subject.start_with(&s.room, &conf).unwrap();
    expect_contains(&daemon.log(), "going on without uploads").unwrap();
    build(&s, "outer");
    daemon.stop().unwrap();
}
