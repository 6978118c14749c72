//! Stock clients that push into castored over HTTP, as into any binary cache that can be written to.

use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use compat_tests::checks::expect_contains;
use compat_tests::{Call, Daemon, Release, Who};

use crate::builds::wait_until;
use crate::http_cache::free_address;
use crate::{Setup, castored_setup, derivation};

/// What pushers know.
const TOKEN: &str = "token-of-the-pushers";

/// A daemon that lets pushers push, and two paths that only a client's own store has.
struct Pushing {
    daemon: Daemon,
    url: String,
    /// Where the client has its paths.
    own: PathBuf,
    netrc: PathBuf,
    outer: String,
    inner: String,
}

impl Pushing {
    fn start(s: &Setup) -> Self {
        let address = free_address();
        let tokens = s.room.write("tokens", format!("{TOKEN}\n")).unwrap();
        let conf = compat_tests::subject::default_conf();
        let conf = format!("{conf}http-listen = {address}\nhttp-push-token-file = {}\n", tokens.display());
        let daemon = s.subject.start_with(&s.room, &conf).unwrap();
        let inner = derivation("inner", "echo inner > $out", "");
        // Beside a reference something that has to be compressed.
        let script = "/bin/sh -c 'echo run > $out' && echo $inner >> $out && for i in 1 2 3 4 5 6 7 8 9; do echo $i$i$i >> $out; done";
        let outer = s.build(&derivation("outer", script, &format!("inner = {inner};"))).ok().unwrap().text();
        let inner = fs::read_to_string(&outer).unwrap().lines().nth(1).unwrap().to_owned();
        let own = s.room.tmp("own");
        let copy = s.nix(Who::Root, "nix").args(["copy", "--no-check-sigs", "--to"]).arg(&own);
        copy.arg(&outer).ok().unwrap();
        let netrc = s.room.write("netrc", format!("machine 127.0.0.1 login anybody password {TOKEN}\n")).unwrap();
        let pushing = Self { daemon, url: format!("http://{address}"), own, netrc, outer, inner };
        pushing.delete(s);
        pushing
    }

    /// Has castored forget the paths.
    fn delete(&self, s: &Setup) {
        s.nix(Who::Root, "nix-store").args(["--delete", &self.outer, &self.inner]).ok().unwrap();
        assert!(!Path::new(&self.outer).exists() && !Path::new(&self.inner).exists());
    }

    fn push(&self, s: &Setup, release: &Release, parameters: &str, netrc: &Path) -> Call {
        let call = Call::nix(&s.room, Who::Root, release, "nix").args(["copy", "--from"]).arg(&self.own);
        let call = call.args(["--to", &format!("{}{parameters}", self.url), &self.outer, "--option", "netrc-file"]);
        // The paths come and go: what a client remembers of the cache is wrong soon.
        call.arg(netrc).args([
            "--option",
            "narinfo-cache-positive-ttl",
            "0",
            "--option",
            "narinfo-cache-negative-ttl",
            "0",
        ])
    }
}

#[test]
fn all_releases_push_however_they_compress() {
    let Some(s) = castored_setup("http-push") else { return };
    let pushing = Pushing::start(&s);
    for release in &s.machine.releases {
        // The oldest knows no zstd.
        let third = if release.is_2_3() { "?compression=bzip2" } else { "?compression=zstd" };
        for parameters in ["", "?compression=none", "?compression=xz&write-nar-listing=true", third] {
            pushing.push(&s, release, parameters, &pushing.netrc).ok().unwrap();
            let contents = fs::read_to_string(&pushing.outer).unwrap();
            assert!(
                contents.starts_with(&format!("run\n{}\n111\n", pushing.inner)),
                "{} {parameters}",
                release.version
            );
            assert_eq!(fs::read_to_string(&pushing.inner).unwrap(), "inner\n");
            s.nix(Who::Root, "nix-store").args(["--verify-path", &pushing.outer, &pushing.inner]).ok().unwrap();
            let refs = s.nix(Who::Root, "nix-store").args(["-q", "--references", &pushing.outer]).ok().unwrap().text();
            assert!(refs.lines().any(|reference| reference == pushing.inner), "{refs}");
            // What is there is not pushed again.
            pushing.push(&s, release, parameters, Path::new("/dev/null")).ok().unwrap();
            pushing.delete(&s);
        }
    }
    pushing.daemon.stop().unwrap();
}

#[test]
fn nobody_pushes_without_the_token() {
    let Some(s) = castored_setup("http-push-denied") else { return };
    let pushing = Pushing::start(&s);
    let other = s.room.write("other-netrc", "machine 127.0.0.1 login root password guessed\n").unwrap();
    for release in &s.machine.releases {
        for netrc in [Path::new("/dev/null"), &other] {
            let said = pushing.push(&s, release, "", netrc).fails().unwrap().all();
            expect_contains(&said, "401").unwrap();
        }
    }
    assert!(!Path::new(&pushing.inner).exists() && !Path::new(&pushing.outer).exists());
    pushing.daemon.stop().unwrap();
}

#[test]
fn what_was_pushed_survives_a_kill() {
    let Some(s) = castored_setup("http-push-kill") else { return };
    let pushing = Pushing::start(&s);
    pushing.push(&s, s.machine.newest(), "", &pushing.netrc).ok().unwrap();
    pushing.daemon.kill_server().unwrap();
    let address = pushing.url.trim_start_matches("http://").to_owned();
    assert!(wait_until(Duration::from_secs(20), || TcpStream::connect(&address).is_ok()));
    s.nix(Who::Root, "nix-store").args(["--verify-path", &pushing.outer, &pushing.inner]).ok().unwrap();
    pushing.daemon.stop().unwrap();
}
