//! castored as a source of castored, over gRPC.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use compat_tests::checks::expect_contains;
use compat_tests::subject::{GRPC_VARIABLE, SOCKET, default_conf};
use compat_tests::{Call, Daemon, Who};

use crate::grpc::free_address;
use crate::repair::noise;
use crate::{Setup, castored_setup, derivation};

/// Where its gRPC socket is, below a room's directory.
const GRPC_SOCKET: &str = "nix/var/nix/daemon-socket/grpc";

type Work = Box<dyn FnOnce(&Setup) + Send>;

/// A castored in a room of its own, which a thread of its own has entered.
pub(crate) struct Other {
    work: Option<Sender<Work>>,
    thread: Option<JoinHandle<()>>,
    pub(crate) address: String,
    dir: PathBuf,
    /// Signs what is built there.
    pub(crate) key: String,
}

impl Other {
    fn start(name: &str) -> Self {
        Self::start_with(name, |conf| conf)
    }

    /// The same with settings that follow from the usual ones.
    pub(crate) fn start_with(name: &str, conf: impl FnOnce(String) -> String + Send + 'static) -> Self {
        let (work, works) = channel::<Work>();
        let (ready, started) = channel();
        let (name, address) = (name.to_owned(), free_address());
        let listen = address.clone();
        let thread = std::thread::spawn(move || {
            let s = castored_setup(&name).unwrap();
            let (secret, public) = (s.room.tmp("secret"), s.room.tmp("public"));
            let make_key = s.nix(Who::Root, "nix-store").args(["--generate-binary-cache-key", "other-1"]);
            make_key.arg(&secret).arg(&public).ok().unwrap();
            let conf = format!("{}secret-key-files = {}\n", conf(default_conf()), secret.display());
            let mut command = s.subject.command(&s.room, &conf).unwrap();
            command.env(GRPC_VARIABLE, &listen);
            let daemon = Daemon::spawn(command, &s.room, Path::new(SOCKET)).unwrap();
            let key = fs::read_to_string(public).unwrap().trim().to_owned();
            ready.send((s.room.dir().to_owned(), key)).unwrap();
            for work in works {
                work(&s);
            }
            daemon.stop().unwrap();
        });
        let (dir, key) = started.recv().unwrap();
        Self { work: Some(work), thread: Some(thread), address, dir, key }
    }

    /// Does something in its room.
    pub(crate) fn inside<T: Send + 'static>(&self, work: impl FnOnce(&Setup) -> T + Send + 'static) -> T {
        let (answer, answers) = channel();
        let work: Work = Box::new(move |s| answer.send(work(s)).unwrap());
        self.work.as_ref().unwrap().send(work).unwrap();
        answers.recv().unwrap()
    }

    fn urls(&self) -> [String; 2] {
        [format!("grpc+http://{}", self.address), format!("grpc+unix://{}", self.dir.join(GRPC_SOCKET).display())]
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        drop(self.work.take());
        let ended = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            ended.unwrap();
        }
    }
}

fn realise(s: &Setup, path: &str, url: &str, key: &str) -> Call {
    let call = s.nix(Who::Root, "nix-store").args(["-r", path, "--option", "substituters", url]);
    call.args(["--option", "trusted-public-keys", key])
}

#[test]
fn castored_substitutes_from_castored() {
    let Some(s) = castored_setup("grpc-sink") else { return };
    let other = Other::start("grpc-source");
    let (outer, inner) = other.inside(|s| {
        let inner = derivation("inner", "echo inner > $out", "");
        let script = "/bin/sh -c 'echo run > $out' && echo $inner >> $out";
        let outer = s.build(&derivation("outer", script, &format!("inner = {inner};"))).ok().unwrap().text();
        let inner = fs::read_to_string(&outer).unwrap().lines().nth(1).unwrap().to_owned();
        (outer, inner)
    });
    let daemon = s.start();
    for url in other.urls() {
        // Nobody vouches for it by a key that is not trusted.
        let said = realise(&s, &outer, &url, "").fails().unwrap().all();
        expect_contains(&said, "not signed by any of the keys").unwrap();
        assert!(!Path::new(&outer).exists() && !Path::new(&inner).exists());

        let missing = s.nix(Who::Root, "nix-store").args(["-r", "--dry-run", &outer]);
        let options = ["--option", "substituters", &url, "--option", "trusted-public-keys", &other.key];
        expect_contains(&missing.args(options).ok().unwrap().all(), "will be fetched").unwrap();
        let said = realise(&s, &outer, &url, &other.key).ok().unwrap().all();
        expect_contains(&said, &format!("copying path '{outer}' from '{url}'")).unwrap();
        assert_eq!(fs::read_to_string(&outer).unwrap(), format!("run\n{inner}\n"));
        assert_eq!(fs::read_to_string(&inner).unwrap(), "inner\n");
        s.nix(Who::Root, "nix-store").args(["--verify", "--check-contents"]).ok().unwrap();
        s.nix(Who::Root, "nix-store").args(["--delete", &outer, &inner]).ok().unwrap();
    }
    daemon.stop().unwrap();
}

#[test]
fn a_castore_that_dies_is_warned_of_and_left_alone() {
    let Some(s) = castored_setup("grpc-dead") else { return };
    let other = Other::start("grpc-dying");
    let (path, key) = (
        other.inside(|s| {
            let file = s.room.write("large", noise(3, 3_000_000)).unwrap();
            s.nix(Who::User, "nix-store").arg("--add").arg(file).ok().unwrap().text()
        }),
        other.key.clone(),
    );
    let [url, _] = other.urls();
    let daemon = s.start();
    // What is content-addressed needs no signature.
    realise(&s, &path, &url, "").ok().unwrap();
    assert!(fs::read(&path).unwrap() == noise(3, 3_000_000));
    s.nix(Who::Root, "nix-store").args(["--delete", &path]).ok().unwrap();
    drop(other);
    let said = realise(&s, &path, &url, &key).fails().unwrap().all();
    // What it said of the path is remembered; that it is gone shows when the path is copied.
    expect_contains(&said, &format!("cannot copy from the castore '{url}'")).unwrap();
    assert!(!Path::new(&path).exists());
    // A build that would have liked to ask it is done all the same.
    let build = s.nix(Who::Root, "nix-build").args(["--no-out-link", "--option", "substituters", &url, "-E"]);
    build.arg(derivation("alone", "echo alone > $out", "")).ok().unwrap();
    daemon.stop().unwrap();
}
