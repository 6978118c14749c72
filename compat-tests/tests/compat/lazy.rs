//! Paths of a lazy castore: programs run from them before they are here.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use compat_tests::checks::expect_contains;
use compat_tests::subject::default_conf;
use compat_tests::{Call, Daemon, Who};
use serde_json::Value;

use crate::grpc_source::Other;
use crate::{Setup, castored_setup, derivation};

/// Bytes of the large file of each path.
const LARGE: u64 = 3_000_000;
/// How long something in the background may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Lets connections through.
const OPEN: u8 = 0;
/// Breaks those that there are, and takes no new ones.
const SHUT: u8 = 1;
/// Takes bytes and passes none of them on.
const HELD: u8 = 2;

/// Stands before a server, and can be shut.
struct Gate {
    address: String,
    state: Arc<AtomicU8>,
}

impl Gate {
    fn before(server: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (state, server) = (Arc::new(AtomicU8::new(OPEN)), server.to_owned());
        let kept = state.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if state.load(Ordering::SeqCst) == SHUT {
                    continue;
                }
                let server = TcpStream::connect(&server).unwrap();
                for (from, to) in [(&client, &server), (&server, &client)] {
                    let (from, to, state) = (from.try_clone().unwrap(), to.try_clone().unwrap(), state.clone());
                    std::thread::spawn(move || pass(from, to, &state));
                }
            }
        });
        Self { address, state: kept }
    }

    fn set(&self, state: u8) {
        self.state.store(state, Ordering::SeqCst);
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, state: &AtomicU8) {
    from.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let mut buffer = [0; 16 * 1024];
    while state.load(Ordering::SeqCst) != SHUT {
        if state.load(Ordering::SeqCst) == HELD {
            std::thread::sleep(Duration::from_millis(5));
            continue;
        }
        match from.read(&mut buffer) {
            Ok(length @ 1..) if to.write_all(&buffer[..length]).is_ok() => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            _ => break,
        }
    }
    for stream in [from, to] {
        let _ = stream.shutdown(Shutdown::Both);
    }
}

/// A program that needs a library, each with something large beside it; their paths.
fn build(other: &Other, name: &str) -> (String, String) {
    let name = name.to_owned();
    other.inside(move |s| {
        let random = format!("/bin/busybox head -c {LARGE} /dev/urandom");
        let library = derivation(
            &format!("{name}-library"),
            &format!("/bin/busybox mkdir -p $out/lib && {random} > $out/lib/data && echo words > $out/lib/words"),
            "",
        );
        let script = format!(
            "/bin/busybox mkdir -p $out/bin $out/share && /bin/busybox cp /bin/busybox $out/bin/hello && \
             /bin/busybox chmod 555 $out/bin/hello && {random} > $out/share/data && echo $library > $out/share/library"
        );
        let path = s.build(&derivation(&name, &script, &format!("library = {library};"))).ok().unwrap().text();
        let library = fs::read_to_string(format!("{path}/share/library")).unwrap().trim().to_owned();
        (path, library)
    })
}

/// Contents of a file as they are at the source.
fn contents(other: &Other, file: &str) -> Vec<u8> {
    let file = file.to_owned();
    other.inside(move |_| fs::read(file).unwrap())
}

fn source(name: &str) -> Other {
    Other::start_with(name, |conf| {
        let shell = conf.split("sandbox-paths = /bin/sh=").nth(1).unwrap().lines().next().unwrap().to_owned();
        conf.replace("sandbox-paths = ", &format!("sandbox-paths = /bin/busybox={shell} "))
    })
}

/// A daemon with this source.
fn start(s: &Setup, url: &str, key: &str) -> Daemon {
    let conf = default_conf().replace("substituters =\n", &format!("substituters = {url}\n"));
    s.subject.start_with(&s.room, &format!("{conf}trusted-public-keys = {key}\nconnect-timeout = 2\n")).unwrap()
}

fn castored(s: &Setup, arguments: &[&str]) -> Call {
    let program: PathBuf = s.subject.copy_into(&s.room).unwrap();
    Call::new(&s.room, Who::Root, program).args(arguments)
}

fn lazy_status(s: &Setup) -> Value {
    let text = castored(s, &["status", "--json"]).quiet().ok().unwrap().text();
    let status: Value = serde_json::from_str(&text).unwrap();
    status["lazy"].clone()
}

fn until(s: &Setup, what: &str, is_so: impl Fn(&Value) -> bool) {
    let begun = Instant::now();
    loop {
        let status = lazy_status(s);
        if is_so(&status) {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "{what}: {status}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn hello(path: &str) -> std::io::Result<String> {
    let output = Command::new(format!("{path}/bin/hello")).arg0("busybox").args(["echo", "hello"]).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn programs_run_from_a_lazy_closure_also_over_kills() {
    let Some(s) = castored_setup("lazy-sink") else { return };
    let other = source("lazy-source");
    let (path, library) = build(&other, "hello");
    let gate = Gate::before(&other.address);
    let url = format!("grpc+http://{}", gate.address);
    let daemon = start(&s, &format!("{url}?lazy=true"), &other.key);
    s.nix(Who::User, "nix-store").args(["-r", &path]).ok().unwrap();
    let status = lazy_status(&s);
    assert!(status["bytes"].as_u64().unwrap() > 2 * LARGE, "{status}");
    assert_eq!(status["sources"][0]["paths"], 2, "{status}");
    assert_eq!(fs::metadata(format!("{library}/lib/data")).unwrap().len(), LARGE);

    // A program that is read while the server dies runs all the same.
    gate.set(HELD);
    let running = std::thread::spawn({
        let path = path.clone();
        // A thread of its own has the room's mounts as well.
        move || hello(&path)
    });
    std::thread::sleep(Duration::from_millis(500));
    assert!(!running.is_finished());
    daemon.kill_server().unwrap();
    std::thread::sleep(Duration::from_millis(200));
    gate.set(OPEN);
    assert_eq!(running.join().unwrap().unwrap(), "hello\n");
    // What follows in the background, and what is not touched.
    until(&s, "the path's rest comes", |status| status["sources"][0]["paths"] == 1);
    assert!(lazy_status(&s)["bytes"].as_u64().unwrap() >= LARGE);

    // Nothing of it is damage, and it is readable by the protocol.
    s.nix(Who::Root, "nix-store").args(["--verify", "--check-contents"]).ok().unwrap();
    castored(&s, &["fsck"]).ok().unwrap();
    daemon.kill_server().unwrap();
    s.nix(Who::Root, "nix-store").args(["--gc", "--print-dead"]).ok().unwrap();
    let said = castored(&s, &["prefetch", &path]).ok().unwrap().all();
    expect_contains(&said, "fetched 2 files").unwrap();
    assert!(fs::read(format!("{library}/lib/data")).unwrap() == contents(&other, &format!("{library}/lib/data")));
    until(&s, "all is here", |status| status["blobs"] == 0 && status["sources"].as_array().unwrap().is_empty());
    s.nix(Who::Root, "nix-store").args(["--verify", "--check-contents"]).ok().unwrap();
    daemon.stop().unwrap();
}

#[test]
fn a_lazy_source_that_is_gone_is_an_error_for_what_it_has_alone() {
    let Some(s) = castored_setup("lazy-gone") else { return };
    let other = source("lazy-going");
    let (path, library) = build(&other, "gone");
    let gate = Gate::before(&other.address);
    let url = format!("grpc+http://{}", gate.address);
    let daemon = start(&s, &format!("{url}?lazy=true"), &other.key);
    s.nix(Who::User, "nix-store").args(["-r", &path]).ok().unwrap();
    assert_eq!(fs::read_to_string(format!("{library}/lib/words")).unwrap(), "words\n");
    until(&s, "the library comes", |status| status["sources"][0]["paths"] == 1);
    gate.set(SHUT);
    let begun = Instant::now();
    let error = fs::read(format!("{path}/share/data")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(5), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    assert_eq!(fs::read(format!("{library}/lib/data")).unwrap().len() as u64, LARGE);
    let failure = lazy_status(&s)["sources"][0]["failure"].clone();
    assert!(failure.as_str().is_some_and(|failure| failure.contains(&url)), "{failure}");
    let said = castored(&s, &["prefetch", &path]).run().unwrap();
    assert_eq!(said.code, 3, "{}", said.all());
    s.nix(Who::Root, "nix-store").args(["--dump", &path]).fails().unwrap();

    gate.set(OPEN);
    assert_eq!(hello(&path).unwrap(), "hello\n");
    assert!(fs::read(format!("{path}/share/data")).unwrap() == contents(&other, &format!("{path}/share/data")));
    until(&s, "all is here", |status| status["blobs"] == 0);
    // Collected like any other.
    s.nix(Who::Root, "nix-store").args(["--delete", &path, &library]).ok().unwrap();
    assert!(!Path::new(&path).exists());
    daemon.stop().unwrap();
}

#[test]
fn builds_read_lazy_inputs() {
    let Some(s) = castored_setup("lazy-inputs") else { return };
    let other = source("lazy-inputs-of");
    let (path, library) = build(&other, "input");
    let daemon = start(&s, &format!("grpc+http://{}?lazy=true", other.address), &other.key);
    s.nix(Who::User, "nix-store").args(["-r", &path]).ok().unwrap();
    assert_eq!(lazy_status(&s)["sources"][0]["paths"], 2);
    let more = format!("input = builtins.storePath \"{library}\"; hello = builtins.storePath \"{path}\";");
    let script = "read word < $input/lib/words && read -n 4 head < $hello/bin/hello; echo $word > $out";
    let built = s.build(&derivation("reader", script, &more)).ok().unwrap().text();
    assert_eq!(fs::read_to_string(built).unwrap(), "words\n");
    daemon.stop().unwrap();
}

#[test]
fn nobody_but_the_trusted_makes_a_source_lazy() {
    let Some(s) = castored_setup("lazy-untrusted") else { return };
    let other = source("lazy-untrusted-of");
    let (path, library) = build(&other, "wary");
    let url = format!("grpc+http://{}", other.address);
    let daemon = start(&s, &url, &other.key);
    let lazy = format!("{url}?lazy=true");
    let realise = |who, path: &str| s.nix(who, "nix-store").args(["-r", path, "--option", "substituters", &lazy]);
    let said = realise(Who::User, &library).run().unwrap().all();
    expect_contains(&said, &format!("ignoring untrusted substituter '{lazy}'")).unwrap();
    assert_eq!(lazy_status(&s)["blobs"], 0);
    realise(Who::Root, &path).ok().unwrap();
    assert!(lazy_status(&s)["bytes"].as_u64().unwrap() > LARGE);
    daemon.stop().unwrap();
}
