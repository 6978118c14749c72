//! Many clients at once: each costs little, and none can hold up another.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use compat_tests::load::{self, Connection, Frames, Offer};
use compat_tests::nar::{Tree, put};
use compat_tests::subject::{SOCKET, default_conf};
use compat_tests::wire::{Op, Request};
use compat_tests::{Daemon, Who, memory};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::{Setup, castored_setup, derivation, setup};

/// Clients at once.
const CLIENTS: usize = 1_000;
/// What one that has asked and is silent may cost. (A process of stock's costs 574 KiB.)
const IDLE_CLIENT: u64 = 24 * 1024;
/// How soon a short question is answered, whatever the others do; the machine may be busy with other tests.
const PROMPT: Duration = Duration::from_secs(5);
/// The daemon has 256 threads for work that waits for the disk: more than that hang on slow clients.
const SLOW: usize = 300;
/// Descriptors of a daemon that has few.
const FEW_DESCRIPTORS: usize = 160;

/// Two descriptors for each connection of ours.
fn raise_limit() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
}

fn connect(daemon: &Daemon) -> Connection {
    Connection::small(daemon.connect().unwrap(), 38).unwrap()
}

/// Short operations of a client that comes now are answered soon: questions, and a small path added.
fn others_are_served(daemon: &Daemon, tag: &str) {
    let started = Instant::now();
    let mut client = connect(daemon);
    let path = load::made_up_path(tag, "small");
    assert!(!client.is_valid(&path).unwrap());
    let archive = Tree::File(tag.as_bytes().to_vec()).archive();
    client.call(&Offer { path: path.clone(), archive, ..Offer::default() }.add_nar()).unwrap();
    assert!(client.is_valid(&path).unwrap());
    let took = started.elapsed();
    println!("{tag}: a new client was served in {took:.1?}");
    assert!(took < PROMPT, "{tag}: a new client waited {took:?}");
}

#[test]
fn a_thousand_connections_cost_little() {
    let Some(s) = castored_setup("thousand") else { return };
    raise_limit();
    let daemon = s.start();
    let path = load::made_up_path("nobody", "has-this");
    others_are_served(&daemon, "before");
    let before = memory::pss(daemon.pid()).unwrap();
    let clients: Vec<Connection> = (0..CLIENTS)
        .map(|_| {
            let mut client = connect(&daemon);
            assert!(!client.is_valid(&path).unwrap());
            client
        })
        .collect();
    std::thread::sleep(Duration::from_millis(300));
    let each = memory::pss(daemon.pid()).unwrap().saturating_sub(before) / CLIENTS as u64;
    let threads = memory::threads(daemon.pid()).unwrap();
    println!("{CLIENTS} connections: {each} bytes each, {threads} threads");
    assert!(each < IDLE_CLIENT, "{each} bytes for each connection");
    others_are_served(&daemon, "with a thousand others");
    for mut client in clients {
        assert!(!client.is_valid(&path).unwrap());
    }
    daemon.stop().unwrap();
}

/// Adds that many small paths.
fn fill(daemon: &Daemon, paths: usize) {
    let mut stream = (paths as u64).to_le_bytes().to_vec();
    for n in 0..paths {
        let path = load::made_up_path(&format!("known {n}"), "known");
        Offer { path, archive: Tree::File(n.to_le_bytes().to_vec()).archive(), ..Offer::default() }
            .write_into_multiple(&mut stream);
    }
    let mut request: Vec<u8> = [44_u64, 0, 1].iter().flat_map(|w| w.to_le_bytes()).collect();
    let mut frames = Frames::new(&mut request, 32 * 1024);
    frames.write_all(&stream).and_then(|()| frames.end()).unwrap();
    connect(daemon).call(&request).unwrap();
}

/// A path with one large file.
fn add_large(daemon: &Daemon) -> String {
    let path = load::made_up_path("large", "large");
    let archive = Tree::File(vec![7; 16 << 20]).archive();
    connect(daemon).call(&Offer { path: path.clone(), archive, ..Offer::default() }.add_nar()).unwrap();
    path
}

#[test]
fn clients_that_do_not_read_block_nobody() {
    let Some(s) = castored_setup("not-reading") else { return };
    raise_limit();
    let daemon = s.start();
    fill(&daemon, 20_000);
    let large = add_large(&daemon);
    let mut stuck = Vec::new();
    for request in [Request::new(Op::QueryAllValidPaths).0, Request::new(Op::NarFromPath).string(&large).0] {
        for _ in 0..SLOW {
            let mut client = connect(&daemon);
            client.send(&request).unwrap();
            stuck.push(client);
        }
        others_are_served(&daemon, &format!("with {} that do not read", stuck.len()));
    }
    // Those who read after all get all of it.
    let mut last = stuck.pop().unwrap();
    last.finish().unwrap();
    last.skip(Tree::File(vec![7; 16 << 20]).archive().len() as u64).unwrap();
    assert!(last.is_valid(&large).unwrap());
    drop(stuck);
    others_are_served(&daemon, "when they are gone");
    daemon.stop().unwrap();
}

/// Uploads that begin and do not go on, so large that each has a thread.
fn begin_uploads(daemon: &Daemon, inline: bool) -> Vec<Connection> {
    let mut head = Vec::new();
    for string in [b"nix-archive-1".as_slice(), b"(", b"type", b"regular", b"contents"] {
        put(&mut head, string);
    }
    head.extend_from_slice(&(1_u64 << 30).to_le_bytes());
    head.resize(400 * 1024, 9);
    (0..SLOW)
        .map(|_| {
            let stream = daemon.connect().unwrap();
            let mut client = Connection::small(stream, if inline { 20 } else { 38 }).unwrap();
            if inline {
                let request = Request::new(Op::AddToStore).string("slow").word(0).word(1).string("sha256");
                client.send(&request.0).unwrap();
                client.send(&head).unwrap();
            } else {
                let request = Request::new(Op::AddToStore).string("slow").string("fixed:r:sha256").word(0).word(0);
                client.send(&request.0).unwrap();
                client.send(&(head.len() as u64).to_le_bytes()).unwrap();
                client.send(&head).unwrap();
            }
            client
        })
        .collect()
}

#[test]
fn slow_uploads_block_nobody() {
    let Some(s) = castored_setup("slow-uploads") else { return };
    raise_limit();
    let daemon = s.start();
    for inline in [false, true] {
        let slow = begin_uploads(&daemon, inline);
        others_are_served(&daemon, &format!("with {SLOW} slow uploads, inline: {inline}"));
        // A large upload of another user has a thread as well.
        let file = s.room.write("large", vec![u8::from(inline); 8 << 20]).unwrap();
        s.nix(Who::User, "nix-store").arg("--add").arg(file).limit(Duration::from_secs(60)).ok().unwrap();
        drop(slow);
    }
    others_are_served(&daemon, "when they are gone");
    daemon.stop().unwrap();
}

#[test]
fn a_log_that_nobody_reads_blocks_no_build() {
    let Some(s) = setup("unread-log") else { return };
    let daemon = s.start();
    let lines =
        "i=0; while [ $i -lt 40000 ]; do echo a line of the log that nobody reads $i; i=$((i+1)); done; echo > $out";
    let instantiate =
        |expression: String| s.nix(Who::User, "nix-instantiate").args(["-E", &expression]).ok().unwrap().text();
    let loud = instantiate(derivation("loud", lines, ""));
    let mut deaf = connect(&daemon);
    let build = |drv: &str| {
        let mut request = Request::new(Op::IsValidPath).word(1).string(format!("{drv}!*")).word(0).0;
        request[0] = 9;
        request
    };
    deaf.send(&build(&loud)).unwrap();
    let started = Instant::now();
    s.build(&derivation("quiet", "echo > $out", "")).ok().unwrap();
    println!("another build: {:.1?}", started.elapsed());
    if !s.subject.is_stock() {
        // Stock's builder waits for its client; ours ends, log or no log.
        let out = s.nix(Who::User, "nix-store").args(["-q", "--outputs", &loud]).ok().unwrap().text();
        let mut client = connect(&daemon);
        let deadline = Instant::now() + Duration::from_secs(60);
        while !client.is_valid(&out).unwrap() {
            assert!(Instant::now() < deadline, "the build waits for a client that does not read");
            std::thread::sleep(Duration::from_millis(50));
        }
        deaf.finish().unwrap();
    }
    daemon.stop().unwrap();
}

/// Starts the daemon with a hard limit on descriptors.
fn start_with_few_descriptors(s: &Setup) -> Daemon {
    let inner = s.subject.command(&s.room, &default_conf()).unwrap();
    let mut command = Command::new("/usr/bin/env");
    command.args(["sh", "-c", &format!("ulimit -n {FEW_DESCRIPTORS}; exec \"$@\""), "sh"]);
    command.arg(inner.get_program()).args(inner.get_args()).env_clear();
    command.envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
    Daemon::spawn(command, &s.room, Path::new(SOCKET)).unwrap()
}

/// Whether a new connection is greeted soon.
fn is_greeted(socket: &Path) -> bool {
    let Ok(mut stream) = UnixStream::connect(socket) else { return false };
    stream.set_read_timeout(Some(Duration::from_millis(700))).unwrap();
    let hello: Vec<u8> = [0x6e69_7863_u64, 0x126].iter().flat_map(|word| word.to_le_bytes()).collect();
    stream.write_all(&hello).is_ok() && stream.read_exact(&mut [0; 16]).is_ok()
}

#[test]
fn accepting_survives_a_lack_of_descriptors() {
    let Some(s) = castored_setup("descriptors") else { return };
    raise_limit();
    let mut daemon = start_with_few_descriptors(&s);
    let socket = PathBuf::from(SOCKET);
    let mut first = connect(&daemon);
    others_are_served(&daemon, "before");
    // Half of these are more than there are descriptors; those that are not accepted wait in the kernel.
    let crowd: Vec<UnixStream> = (0..2 * FEW_DESCRIPTORS)
        .map_while(|_| {
            let stream = UnixStream::connect(&socket);
            stream.ok()
        })
        .collect();
    std::thread::sleep(Duration::from_millis(500));
    assert!(crowd.len() > FEW_DESCRIPTORS, "only {} could connect", crowd.len());
    assert!(!is_greeted(&socket), "there are descriptors left");
    // Who is inside is served as before, and the store can be written to: not all descriptors are for clients.
    let path = load::made_up_path("in need", "small");
    for n in 0..50_u32 {
        let path = load::made_up_path(&format!("in need {n}"), "small");
        let archive = Tree::File(vec![n as u8; 200_000]).archive();
        first.call(&Offer { path, archive, ..Offer::default() }.add_nar()).unwrap();
    }
    assert!(!first.is_valid(&path).unwrap());
    assert!(daemon.is_running());
    drop(crowd);
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is_greeted(&socket) {
        assert!(Instant::now() < deadline, "nobody is let in although the others are gone");
    }
    others_are_served(&daemon, "when they are gone");
    daemon.stop().unwrap();
}
