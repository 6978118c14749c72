//! What no well-behaved client sends: a clear error to the sender, nothing registered, nobody else affected.

use compat_tests::checks::expect_contains;
use compat_tests::nar::{Tree, put, sha256};
use compat_tests::wire::{Client, Op, Request};
use compat_tests::{Daemon, Error, Who};

use crate::setup;

/// A well-formed store path that no daemon here has.
const PATH: &str = "/nix/store/0123456789abcdfghijklmnpqrsvwxyz-claimed";

fn connect(daemon: &Daemon) -> Client {
    Client::new(daemon.connect().unwrap()).unwrap()
}

/// A client that was there before the bad one and must not notice anything.
struct Bystander {
    client: Client,
    path: String,
}

impl Bystander {
    fn new(daemon: &Daemon) -> Self {
        let mut client = connect(daemon);
        let path = client.add("bystander", &Tree::File(b"unharmed".to_vec())).unwrap();
        Self { client, path }
    }

    /// Its own path and nothing else is valid, and its connection works.
    fn is_unharmed(&mut self) {
        assert!(self.client.is_valid(&self.path).unwrap());
        assert_eq!(self.client.all_valid_paths().unwrap(), std::slice::from_ref(&self.path));
    }
}

/// The daemon's refusal, which must be one: not success, not a broken connection.
fn refusal<T: std::fmt::Debug>(answer: compat_tests::Result<T>) -> String {
    match answer {
        Err(Error::Refused(message)) => {
            assert!(!message.is_empty(), "an error must say what is wrong");
            message
        }
        other => panic!("expected a refusal, got {other:?}"),
    }
}

#[test]
fn malformed_requests_end_their_own_connection() {
    let Some(s) = setup("malformed") else { return };
    let daemon = s.start();
    let mut bystander = Bystander::new(&daemon);
    let mut unknown = Request::new(Op::IsValidPath).0;
    unknown[0] = 0xee;
    for (what, bytes, told) in [
        ("an unknown operation", unknown, true),
        ("a string of 2^62 bytes", Request::new(Op::IsValidPath).word(1 << 62).0, false),
        ("padding that is not zero", [Request::new(Op::IsValidPath).word(1).0, b"xyyyyyyy".to_vec()].concat(), true),
        ("a path outside the store", Request::new(Op::IsValidPath).string("/etc/passwd").0, true),
        ("a path with a bad hash", Request::new(Op::IsValidPath).string("/nix/store/eeee-x").0, true),
    ] {
        let mut client = connect(&daemon);
        client.send(&bytes).unwrap();
        let answer = client.finish();
        println!("{what}: {answer:?}");
        match answer {
            Err(Error::Refused(message)) => assert!(!message.is_empty()),
            // Stock cannot always say it; it must not go on as if nothing had happened.
            Err(Error::Io { .. }) if !told && s.subject.is_stock() => {}
            other => panic!("{what}: {other:?}"),
        }
        client.closed().expect("the stream is out of step: the connection must not live on");
        bystander.is_unharmed();
    }
    // A greeting that is none.
    let mut client = daemon.connect().unwrap();
    std::io::Write::write_all(&mut client, b"GET / HTTP/1.1\r\n\r\n").unwrap();
    drop(client);
    bystander.is_unharmed();
    daemon.stop().unwrap();
}

#[test]
fn a_wrong_hash_is_refused_and_the_connection_lives_on() {
    let Some(s) = setup("wrong-hash") else { return };
    let daemon = s.start();
    let mut bystander = Bystander::new(&daemon);
    let mut client = connect(&daemon);
    let archive = Tree::File(vec![7; 100_000]).archive();
    client.send(&Request::add_nar(PATH, sha256(b"something else"), &archive, true).0).unwrap();
    expect_contains(&refusal(client.finish()), "hash mismatch").unwrap();
    assert!(!client.is_valid(PATH).unwrap());
    assert!(s.subject.is_stock() || !std::path::Path::new(PATH).exists());
    bystander.is_unharmed();
    // The same upload with the right hash, over the same connection.
    client.send(&Request::add_nar(PATH, sha256(&archive), &archive, true).0).unwrap();
    client.finish().unwrap();
    assert!(client.is_valid(PATH).unwrap());
    daemon.stop().unwrap();
}

#[test]
fn archives_that_no_writer_produces_are_refused() {
    let Some(s) = setup("bad-archives") else { return };
    let daemon = s.start();
    let mut bystander = Bystander::new(&daemon);
    let file = || Tree::File(b"x".to_vec());
    let named = |names: &[&[u8]]| Tree::Directory(names.iter().map(|n| (n.to_vec(), file())).collect()).archive();
    let mut deep = file();
    for _ in 0..3_000 {
        deep = Tree::Directory(vec![(b"d".to_vec(), deep)]);
    }
    let mut unknown_kind = Vec::new();
    for s in [b"nix-archive-1".as_slice(), b"(", b"type", b"socket", b")"] {
        put(&mut unknown_kind, s);
    }
    let mut huge = Vec::new();
    for s in [b"nix-archive-1".as_slice(), b"(", b"type", b"regular", b"contents"] {
        put(&mut huge, s);
    }
    huge.extend_from_slice(&u64::MAX.wrapping_sub(7).to_le_bytes());
    for (what, archive) in [
        ("an empty name", named(&[b""])),
        ("the name .", named(&[b"."])),
        ("the name ..", named(&[b".."])),
        ("a name with a slash", named(&[b"a/b"])),
        ("a name with a zero byte", named(&[b"a\0b"])),
        ("names out of order", named(&[b"b", b"a"])),
        ("a name twice", named(&[b"a", b"a"])),
        ("no archive at all", b"this is not an archive, whatever its length may be".to_vec()),
        ("an unknown kind of node", unknown_kind),
        ("3,000 directories in each other", deep.archive()),
        ("a file of nearly 2^64 bytes", huge),
    ] {
        let mut client = connect(&daemon);
        client.send(&Request::add_nar(PATH, sha256(&archive), &archive, true).0).unwrap();
        println!("{what}: {}", refusal(client.finish()));
        assert!(!client.is_valid(PATH).unwrap(), "{what}: registered, or the connection is unusable");
        let by_contents = Request::new(Op::AddToStore).string("bad").string("fixed:r:sha256").word(0).word(0);
        client.send(&by_contents.framed(&archive).0).unwrap();
        refusal(client.finish());
        // Stock leaves what it has unpacked until the next collection.
        assert!(s.subject.is_stock() || !std::path::Path::new(PATH).exists(), "{what}: left in the store");
        bystander.is_unharmed();
    }
    daemon.stop().unwrap();
}

#[test]
fn a_truncated_upload_registers_nothing() {
    let Some(s) = setup("truncated") else { return };
    let daemon = s.start();
    let mut bystander = Bystander::new(&daemon);
    let archive = Tree::File(vec![9; 500_000]).archive();
    let request = Request::add_nar(PATH, sha256(&archive), &archive, true).0;
    // The last cut takes a byte of the archive; what follows it is only the end mark of the frames.
    for kept in [12, 100, 200, request.len() / 2, request.len() - 9] {
        let mut client = connect(&daemon);
        client.send(&request[..kept]).unwrap();
        client.shut_down_sending().unwrap();
        client.closed().unwrap();
        bystander.is_unharmed();
        assert!(s.subject.is_stock() || !std::path::Path::new(PATH).exists(), "after {kept} bytes");
    }
    daemon.stop().unwrap();
}

#[test]
fn an_untrusted_client_cannot_import_what_nobody_signed() {
    let Some(s) = setup("unsigned") else { return };
    let daemon = s.start();
    let mut bystander = Bystander::new(&daemon);
    // An export stream made by hand: one path that is not content-addressed.
    let mut export = 1u64.to_le_bytes().to_vec();
    export.extend(Tree::File(b"trojan".to_vec()).archive());
    export.extend(0x4558_494e_u64.to_le_bytes());
    put(&mut export, PATH.as_bytes());
    export.extend(0u64.to_le_bytes());
    put(&mut export, b"");
    export.extend([0; 16]);
    for release in &s.machine.releases {
        let import = compat_tests::Call::nix(&s.room, Who::User, release, "nix-store").arg("--import");
        let refused = import.input(export.clone()).fails().unwrap();
        expect_contains(&refused.stderr, "lacks a").unwrap();
        expect_contains(&refused.stderr, "signature").unwrap();
        bystander.is_unharmed();
        assert!(!std::path::Path::new(PATH).exists());
    }
    // Root is trusted and may say so.
    s.nix(Who::Root, "nix-store").arg("--import").input(export).ok().unwrap();
    assert_eq!(std::fs::read_to_string(PATH).unwrap(), "trojan");
    daemon.stop().unwrap();
}
