//! Streams of any size go through a small memory: 4 GiB by each transport and back, and lengths that are only claimed.

use std::io::{self, Read, Write};
use std::time::Instant;

use compat_tests::flood::{Source, archive_size};
use compat_tests::load::{self, Connection, Frames, Message};
use compat_tests::nar::{hex, put};
use compat_tests::wire::{Op, Request};
use compat_tests::{Daemon, Error, memory};
use sha2::{Digest, Sha256};

use crate::castored_setup;

/// Bytes of the file that goes through.
const SIZE: u64 = 4 << 30;
/// The daemon may use this much at most.
const MEMORY: u64 = 256 << 20;
/// What stock's client puts into a frame.
const FRAME: usize = 32 * 1024;
/// Bytes copied at a time.
const PIECE: usize = 256 * 1024;

/// Copies everything and answers its SHA-256.
fn copy(from: &mut dyn Read, to: &mut dyn Write) -> [u8; 32] {
    let mut hasher = Sha256::new();
    let mut piece = vec![0; PIECE];
    loop {
        match from.read(&mut piece).unwrap() {
            0 => return hasher.finalize().into(),
            n => {
                hasher.update(&piece[..n]);
                to.write_all(&piece[..n]).unwrap();
            }
        }
    }
}

/// An upload by one transport: how it is sent, and the path it ends up under.
struct Upload<'a> {
    connection: Connection,
    source: &'a Source,
    salt: u64,
}

impl Upload<'_> {
    fn archive(&self) -> impl Read + '_ {
        self.source.archive(self.salt, SIZE)
    }

    /// The path to claim, and the archive's hash, which has to be known before it is sent.
    fn claim(&self) -> (String, [u8; 32]) {
        (load::made_up_path(&format!("flood {}", self.salt), "flood"), copy(&mut self.archive(), &mut io::sink()))
    }

    /// The fields of a path info, the path in front.
    fn info(path: &str, hash: [u8; 32]) -> Vec<u8> {
        let mut info = Vec::new();
        [path, "", &hex(&hash)].iter().for_each(|string| put(&mut info, string.as_bytes()));
        let words = [0, 0, archive_size(SIZE), 0, 0];
        info.extend(words.iter().flat_map(|word: &u64| word.to_le_bytes()));
        put(&mut info, b"");
        info
    }

    /// AddToStoreNar up to its payload.
    fn begin_add_nar(&mut self) -> (String, [u8; 32]) {
        let (path, hash) = self.claim();
        let request = [Op::AddToStoreNar as u64 as u8, 0, 0, 0, 0, 0, 0, 0];
        let flags: Vec<u8> = [0_u64, 1].iter().flat_map(|word| word.to_le_bytes()).collect();
        self.connection.send(&[&request[..], &Self::info(&path, hash), &flags].concat()).unwrap();
        (path, hash)
    }

    /// Sends the rest of a request in frames; its hash.
    fn frames(&mut self, head: &[u8], archive: bool) -> [u8; 32] {
        let output = self.connection.output();
        let mut frames = Frames::new(output, FRAME);
        frames.write_all(head).unwrap();
        let hash = if archive {
            copy(&mut self.source.archive(self.salt, SIZE), &mut frames)
        } else {
            copy(&mut self.source.data(self.salt, SIZE), &mut frames)
        };
        frames.end().unwrap();
        hash
    }

    /// A string that is the answer.
    fn answered_path(&mut self) -> String {
        self.connection.finish().unwrap();
        String::from_utf8(self.connection.string().unwrap()).unwrap()
    }
}

/// Uploads 4 GiB in one way, reads them back, and looks at the daemon's memory.
fn through(name: &str, minor: u64, upload: impl FnOnce(&mut Upload<'_>) -> (String, [u8; 32])) {
    let Some(s) = castored_setup(name) else { return };
    let daemon = s.start();
    let source = Source::default();
    let connection = Connection::over(daemon.connect().unwrap(), minor).unwrap();
    let salt = u64::from_le_bytes(compat_tests::nar::sha256(name.as_bytes())[..8].try_into().unwrap());
    let mut up = Upload { connection, source: &source, salt };
    let started = Instant::now();
    let (path, hash) = upload(&mut up);
    let sent = started.elapsed();
    drop(up);

    let mut connection = Connection::over(daemon.connect().unwrap(), 38).unwrap();
    let info = connection.path_info(&load::path_info(&path)).unwrap();
    assert_eq!((info.nar_hash, info.nar_size), (hex(&hash), archive_size(SIZE)));
    let started = Instant::now();
    connection.call(&Request::new(Op::NarFromPath).string(&path).0).unwrap();
    let read = copy(&mut connection.input().take(archive_size(SIZE)), &mut io::sink());
    assert_eq!(hex(&read), hex(&hash), "what comes back is not what was sent");
    assert!(connection.is_valid(&path).unwrap(), "the connection goes on after the archive");

    let peak = memory::peak(daemon.pid()).unwrap();
    println!("{name}: sent in {sent:.1?}, read in {:.1?}, at most {} MiB", started.elapsed(), peak >> 20);
    assert!(peak < MEMORY, "the daemon used {} MiB", peak >> 20);
    daemon.stop().unwrap();
}

#[test]
fn add_to_store_nar_inline() {
    through("inline", 18, |up| {
        let claim = up.begin_add_nar();
        let mut archive = up.source.archive(up.salt, SIZE);
        io::copy(&mut archive, up.connection.output()).unwrap();
        up.connection.finish().unwrap();
        claim
    });
}

#[test]
fn add_to_store_as_it_was() {
    through("old-add", 20, |up| {
        // Not `fixed`: the whole tree by SHA-256.
        let request = Request::new(Op::AddToStore).string("flood").word(0).word(1).string("sha256");
        up.connection.send(&request.0).unwrap();
        let hash = copy(&mut up.source.archive(up.salt, SIZE), up.connection.output());
        (up.answered_path(), hash)
    });
}

#[test]
fn add_to_store_nar_piece_by_piece() {
    through("asked", 21, |up| {
        let claim = up.begin_add_nar();
        let mut archive = up.source.archive(up.salt, SIZE);
        let mut piece = Vec::new();
        while let Message::Read(wanted) = up.connection.message().unwrap() {
            let mut bytes = Vec::new();
            (&mut archive).take(wanted).read_to_end(&mut bytes).unwrap();
            piece.clear();
            put(&mut piece, &bytes);
            up.connection.send(&piece).unwrap();
        }
        claim
    });
}

#[test]
fn add_to_store_nar_framed() {
    through("framed", 38, |up| {
        let claim = up.begin_add_nar();
        up.frames(&[], true);
        up.connection.finish().unwrap();
        claim
    });
}

#[test]
fn add_to_store_framed() {
    through("add", 38, |up| {
        let request = Request::new(Op::AddToStore).string("flood").string("fixed:r:sha256").word(0).word(0);
        up.connection.send(&request.0).unwrap();
        let hash = up.frames(&[], true);
        (up.answered_path(), hash)
    });
}

#[test]
fn add_to_store_flat() {
    through("flat", 38, |up| {
        let request = Request::new(Op::AddToStore).string("flood").string("fixed:sha256").word(0).word(0);
        up.connection.send(&request.0).unwrap();
        up.frames(&[], false);
        let hash = copy(&mut up.archive(), &mut io::sink());
        (up.answered_path(), hash)
    });
}

#[test]
fn add_multiple_to_store() {
    through("multiple", 38, |up| {
        let (path, hash) = up.claim();
        let mut request = Request::new(Op::IsValidPath).word(0).word(1).0;
        request[0] = 44;
        up.connection.send(&request).unwrap();
        let head = [&1_u64.to_le_bytes()[..], &Upload::info(&path, hash)].concat();
        up.frames(&head, true);
        up.connection.finish().unwrap();
        (path, hash)
    });
}

/// Connections that make each claim.
const CLAIMANTS: usize = 20;
/// What all of the claims together may cost.
const CLAIMED_MEMORY: u64 = 24 << 20;

/// A request with another number.
fn numbered(op: u64) -> Request {
    let mut request = Request::new(Op::IsValidPath);
    request.0[..8].copy_from_slice(&op.to_le_bytes());
    request
}

/// An AddToStore of an archive that begins with these strings and goes on with this length.
fn archive_claims(strings: &[&[u8]], length: u64) -> Request {
    let mut archive = Vec::new();
    strings.iter().for_each(|string| put(&mut archive, string));
    archive.extend_from_slice(&length.to_le_bytes());
    Request::new(Op::AddToStore).string("claim").string("fixed:r:sha256").word(0).word(0).framed(&archive)
}

#[test]
fn lengths_that_are_only_claimed_cost_nothing() {
    let Some(s) = castored_setup("claims") else { return };
    let daemon = s.start();
    let before = settled(&daemon);
    // What is refused at once, and what is waited for although it will never come.
    let refused: [(&str, Request); 7] = [
        ("a string of 2^62 bytes", numbered(1).word(1 << 62)),
        ("2^40 paths", numbered(31).word(1 << 40)),
        ("2^60 overrides", [0; 12].iter().fold(numbered(19), |request, word| request.word(*word)).word(1 << 60)),
        ("2^63 signatures", numbered(37).string(load::made_up_path("x", "x")).word(1 << 63)),
        ("a frame of 2^40 bytes", add_frame(1 << 40)),
        (
            "a name of 2^50 bytes",
            archive_claims(&[b"nix-archive-1", b"(", b"type", b"directory", b"entry", b"(", b"name"], 1 << 50),
        ),
        ("2^48 paths in AddMultipleToStore", numbered(44).word(0).word(1).framed(&(1_u64 << 48).to_le_bytes())),
    ];
    let awaited: [(&str, Request); 5] = [
        ("a string of 2^26 bytes", numbered(12).word(1 << 26)),
        ("2^22 paths", numbered(31).word(1 << 22)),
        ("a frame of 2^31 bytes", add_frame(1 << 31)),
        ("2^22 output names", numbered(36).string(load::made_up_path("x", "x.drv")).word(1 << 22)),
        ("a text of 2^25 bytes", numbered(8).string("text").word(1 << 25)),
    ];
    let mut connections = Vec::new();
    for (what, request) in &refused {
        for n in 0..CLAIMANTS {
            let mut connection = Connection::small(daemon.connect().unwrap(), 38).unwrap();
            connection.send(&request.0).unwrap();
            match connection.finish() {
                Err(Error::Refused(message)) if n == 0 => println!("{what}: {message}"),
                Err(Error::Refused(_)) => {}
                other => panic!("{what}: {other:?}"),
            }
            connections.push(connection);
        }
    }
    for (_, request) in &awaited {
        for _ in 0..CLAIMANTS {
            let mut connection = Connection::small(daemon.connect().unwrap(), 38).unwrap();
            connection.send(&request.0).unwrap();
            connections.push(connection);
        }
    }
    let grown = settled(&daemon).saturating_sub(before);
    println!("{} claims: {} KiB", connections.len(), grown >> 10);
    assert!(grown < CLAIMED_MEMORY, "{} MiB for claims", grown >> 20);
    drop(connections);
    daemon.stop().unwrap();
}

/// An AddToStore whose first frame says that it is so long.
fn add_frame(length: u64) -> Request {
    Request::new(Op::AddToStore).string("claim").string("fixed:r:sha256").word(0).word(0).word(length)
}

/// The daemon's memory when it has read what was sent to it: it answers everybody in turn.
fn settled(daemon: &Daemon) -> u64 {
    let path = load::made_up_path("nobody", "has-this");
    for _ in 0..20 {
        Connection::small(daemon.connect().unwrap(), 38).unwrap().is_valid(&path).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    memory::rss(daemon.pid()).unwrap()
}
