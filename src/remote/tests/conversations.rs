//! Conversations with other ends that do as they should, or do not.

#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix_compat::hash::NarHash;
use nix_compat::path_info::PathInfo;
use nix_compat::serve;
use nix_compat::store_path::{StoreDir, StorePath};
use nix_compat::store_uri::StoreUri;
use nix_compat::wire::{ReadError, Reader, Writer};
use nix_compat::worker::handshake::{Progress, ServerHandshake, Trust};
use nix_compat::worker::stderr::{ErrorMessage, Message};
use nix_compat::worker::{AddToStoreNar, Features, Protocol, Request, Response};
use parking_lot::Mutex;
use remote::{BuildLog, ClientError, Connection, Download, Limits, RemoteStore, SharedLog, Stopper};

const PATIENCE: Duration = Duration::from_millis(300);

fn path(n: u8) -> StorePath {
    StorePath::from_parts([n; 20], "x").unwrap()
}

fn info(n: u8, references: &[u8]) -> PathInfo {
    PathInfo {
        path: path(n),
        deriver: None,
        nar_hash: NarHash::from([n; 32]),
        references: references.iter().copied().map(path).collect(),
        registration_time: 1,
        nar_size: 120,
        ultimate: false,
        signatures: BTreeSet::new(),
        ca: None,
    }
}

/// The server's end of a connection.
struct Server {
    stream: UnixStream,
    received: Vec<u8>,
}

impl Server {
    fn decode<T>(&mut self, mut decode: impl FnMut(&mut Reader<'_>) -> Result<T, ReadError>) -> T {
        loop {
            let mut reader = Reader::new(&self.received);
            match decode(&mut reader) {
                Ok(value) => {
                    let used = reader.position();
                    self.received.drain(..used);
                    return value;
                }
                Err(ReadError::Incomplete { .. }) => self.receive(),
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn receive(&mut self) {
        let mut buffer = [0; 4096];
        let length = self.stream.read(&mut buffer).unwrap();
        assert!(length > 0, "the client has left");
        self.received.extend_from_slice(&buffer[..length]);
    }

    fn send(&mut self, write: impl FnOnce(&mut Writer)) {
        let mut writer = Writer::new();
        write(&mut writer);
        self.stream.write_all(writer.as_bytes()).unwrap();
    }

    /// Shakes hands as a daemon.
    fn welcome(stream: UnixStream, minor: u16) -> (Self, Protocol) {
        let mut server = Self { stream, received: Vec::new() };
        let mut handshake = ServerHandshake::new(StoreDir::default(), "test", Trust::Trusted, Features::ALL);
        let protocol = loop {
            let mut writer = Writer::new();
            let (used, progress) = handshake.advance(&server.received, &mut writer).unwrap();
            server.received.drain(..used);
            server.stream.write_all(writer.as_bytes()).unwrap();
            match progress {
                Progress::Done(connected) => break connected.protocol,
                Progress::NeedMore => server.receive(),
            }
        };
        assert_eq!(protocol.minor, minor);
        server.send(|w| Message::Last.encode(&protocol, w));
        (server, protocol)
    }
}

/// A client and a server that talks to it.
fn pair<T: Send + 'static>(
    minor: u16,
    serve: impl FnOnce(&mut Server, &Protocol) -> T + Send + 'static,
) -> (Connection, thread::JoinHandle<T>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = thread::spawn(move || {
        let (mut server, protocol) = Server::welcome(theirs, minor);
        serve(&mut server, &protocol)
    });
    let limits = Limits { silence: Some(Duration::from_secs(10)), deadline: None };
    (Connection::over(ours, &StoreDir::default(), minor, limits).unwrap(), server)
}

#[test]
fn a_payload_that_is_asked_for_goes_out_piece_by_piece() {
    const PIECE: u64 = 1000;
    let (mut client, server) = pair(21, |server, protocol| {
        let request = server.decode(|r| Request::decode(r, protocol));
        let mut payload = Vec::new();
        while payload.len() < 10_000 {
            server.send(|w| Message::Next(b"still reading".to_vec()).encode(protocol, w));
            server.send(|w| Message::Read(PIECE).encode(protocol, w));
            let piece = server.decode(|r| Ok(r.bytes(PIECE as usize)?.to_vec()));
            assert!(!piece.is_empty());
            payload.extend(piece);
        }
        server.send(|w| Message::Last.encode(protocol, w));
        (request, payload)
    });
    let bytes: Vec<u8> = (0..10_000u32).map(|n| n as u8).collect();
    let request = Request::AddToStoreNar(AddToStoreNar { info: info(1, &[]), repair: false, dont_check_sigs: true });
    client.call(&request, |out| out.write_all(&bytes)).unwrap();
    assert_eq!(server.join().unwrap(), (request, bytes));
}

#[test]
fn a_server_that_needs_no_payload_or_refuses_it_is_understood() {
    for refuses in [false, true] {
        let (mut client, server) = pair(21, move |server, protocol| {
            server.decode(|r| Request::decode(r, protocol));
            let end = if refuses { Message::Error(ErrorMessage::new("no")) } else { Message::Last };
            server.send(|w| end.encode(protocol, w));
        });
        let request =
            Request::AddToStoreNar(AddToStoreNar { info: info(1, &[]), repair: false, dont_check_sigs: true });
        let answer = client.call(&request, |out| out.write_all(&[7; 100_000]));
        match answer {
            Ok(Response::Nothing) => assert!(!refuses),
            Err(ClientError::Refused(text)) => assert!(refuses && text == "no"),
            other => panic!("{other:?}"),
        }
        server.join().unwrap();
    }
}

#[test]
fn a_server_that_talks_while_it_is_sent_to_does_not_block_either_end() {
    let (mut client, server) = pair(38, |server, protocol| {
        server.decode(|r| Request::decode(r, protocol));
        // Much more than the socket holds, before any of the payload is read.
        for _ in 0..3000 {
            server.send(|w| Message::Next(vec![b'x'; 1000]).encode(protocol, w));
        }
        let mut length = 0;
        loop {
            let frame = server.decode(|r| r.u64());
            if frame == 0 {
                break;
            }
            while (server.received.len() as u64) < frame {
                server.receive();
            }
            server.received.drain(..frame as usize);
            length += frame;
        }
        server.send(|w| Message::Last.encode(protocol, w));
        length
    });
    let request = Request::AddToStoreNar(AddToStoreNar { info: info(1, &[]), repair: false, dont_check_sigs: true });
    client.call(&request, |out| (0..20).try_for_each(|_| out.write_all(&[7; 1_000_000]))).unwrap();
    assert_eq!(server.join().unwrap(), 20_000_000);
}

#[test]
fn a_failure_of_the_payload_is_not_one_of_the_connection() {
    let (mut client, server) = pair(38, |server, protocol| {
        server.decode(|r| Request::decode(r, protocol));
    });
    let request = Request::AddToStoreNar(AddToStoreNar { info: info(1, &[]), repair: false, dont_check_sigs: true });
    let failed = client.call(&request, |_| Err(std::io::Error::other("the disk is on fire")));
    assert!(matches!(&failed, Err(ClientError::Payload(e)) if e.to_string().contains("fire")), "{failed:?}");
    server.join().unwrap();
}

fn open(uri: &str, stopper: &Stopper) -> Result<RemoteStore, ClientError> {
    RemoteStore::open(&StoreUri::parse(uri).unwrap(), &StoreDir::default(), PATIENCE, stopper)
}

/// A store that is a script, without ssh.
fn script(dir: &Path, scheme: &str, text: &str) -> String {
    let program = dir.join("program");
    std::fs::write(&program, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    format!("{scheme}://localhost?remote-program={}", program.display())
}

#[test]
fn one_that_never_answers_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    for scheme in ["ssh", "ssh-ng"] {
        let start = Instant::now();
        let error = open(&script(dir.path(), scheme, "exec sleep 1000"), &Stopper::default()).unwrap_err();
        assert!(error.is_too_late(), "{error}");
        assert!(start.elapsed() < Duration::from_secs(5));
    }
    let socket = dir.path().join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    let error = open(&format!("unix://{}", socket.display()), &Stopper::default()).unwrap_err();
    assert!(error.is_too_late(), "{error}");
}

#[test]
fn one_that_ends_says_why() {
    let dir = tempfile::tempdir().unwrap();
    for scheme in ["ssh", "ssh-ng"] {
        let error = open(&script(dir.path(), scheme, "echo no such machine >&2; exit 255"), &Stopper::default());
        let text = error.unwrap_err().to_string();
        assert!(text.contains("broke off") && text.ends_with("no such machine"), "{text}");
        let text =
            open(&script(dir.path(), scheme, "echo Welcome to my machine; exec cat >/dev/null"), &Stopper::default());
        let text = text.unwrap_err().to_string();
        assert!(text.contains("does not speak the protocol"), "{text}");
    }
}

#[test]
fn an_endless_message_is_not_collected() {
    let dir = tempfile::tempdir().unwrap();
    // The serve protocol's greeting, and a list of paths that never ends: 0xfffff of them, each empty.
    let endless =
        r"printf '\313\356RT\0\0\0\0\7\2\0\0\0\0\0\0'; printf '\377\377\377\377\377\377\0\0'; exec cat /dev/zero";
    let mut store = open(&script(dir.path(), "ssh", endless), &Stopper::default()).unwrap();
    let refused = store.valid_paths([path(1)].into(), false).unwrap_err();
    assert!(matches!(refused, ClientError::Protocol(_) | ClientError::Process { .. }), "{refused}");
}

#[test]
fn stopping_ends_a_wait_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let stopper = Stopper::default();
    let uri = StoreUri::parse(&script(dir.path(), "ssh-ng", "exec sleep 1000")).unwrap();
    let other = stopper.clone();
    let opening =
        thread::spawn(move || RemoteStore::open(&uri, &StoreDir::default(), Duration::from_secs(60), &other).is_err());
    thread::sleep(Duration::from_millis(200));
    let start = Instant::now();
    stopper.stop();
    assert!(opening.join().unwrap());
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
}

/// Collects a log.
#[derive(Default)]
struct Collected(Vec<u8>);

impl BuildLog for Collected {
    fn output(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    fn phase(&mut self, _: &str) {}

    fn note(&mut self, _: &str) {}

    fn download(&mut self, _: Download) {}
}

#[test]
fn a_build_over_the_serve_protocol_has_its_log_from_standard_error() {
    let dir = tempfile::tempdir().unwrap();
    let (greeting, answer) = {
        let protocol = serve::Protocol { minor: 7, store_dir: StoreDir::default() };
        let (mut greeting, mut answer) = (Writer::new(), Writer::new());
        serve::write_answer(7, &mut greeting);
        let result =
            nix_compat::worker::BuildResult::new(nix_compat::worker::BuildStatus::PermanentFailure, "it failed");
        serve::write_build_result(&result, &protocol, &mut answer);
        (greeting, answer)
    };
    std::fs::write(dir.path().join("greeting"), greeting.as_bytes()).unwrap();
    std::fs::write(dir.path().join("answer"), answer.as_bytes()).unwrap();
    let at = dir.path().display();
    let text = format!(
        "echo before >&2; cat {at}/greeting; head -c 24 >/dev/null; seq 1 50000 >&2; cat {at}/answer; exec cat >/dev/null"
    );
    let mut store = open(&script(dir.path(), "ssh", &text), &Stopper::default()).unwrap();
    thread::sleep(Duration::from_millis(100));
    let derivation = nix_compat::derivation::BasicDerivation {
        name: "x".into(),
        outputs: [("out".parse().unwrap(), nix_compat::derivation::Output::Deferred)].into(),
        input_srcs: BTreeSet::new(),
        platform: Vec::new(),
        builder: Vec::new(),
        args: Vec::new(),
        env: Default::default(),
    };
    let log = Arc::new(Mutex::new(Collected::default()));
    let shared: SharedLog = log.clone();
    let drv = StorePath::from_parts([9; 20], "x.drv").unwrap();
    let result = store.build(&drv, &derivation, &Default::default(), Limits::default(), &shared).unwrap();
    assert_eq!(result.error, "it failed");
    let expected: String = (1..=50_000).map(|n| format!("{n}\n")).collect();
    assert_eq!(String::from_utf8_lossy(&log.lock().0), expected, "the whole log, and nothing of before");
}

#[test]
fn what_is_no_store_that_can_be_reached() {
    for uri in ["auto", "/tmp/x", "local?root=/x", "https://cache", "unix://", "ssh://-x"] {
        let refused = open(uri, &Stopper::default()).unwrap_err();
        assert!(matches!(refused, ClientError::Uri { .. }), "{uri}: {refused}");
    }
    assert!(matches!(open("unix:///nowhere/socket", &Stopper::default()), Err(ClientError::NoDaemon { .. })));
}
