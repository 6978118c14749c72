//! Framing, and the order of things.

use std::io::Write;
use std::time::Duration;

use daemon::Events;
use nix_compat::hash::sha256;
use nix_compat::worker::stderr::Message;

use crate::common::Rig;
use crate::objects::{
    add_text, add_to_store, base_name, claim, derivation, directory_node, file_nar, file_node, hex, nar, path,
};
use crate::raw::{Claim, Msg, NEWEST, Raw, Said, op};

/// Minors on both sides of every change of the transports and of the errors.
const MINORS: [u64; 9] = [18, 20, 21, 22, 23, 25, 26, 32, NEWEST];

/// A payload that does not fit into one piece of a stream, nor into the buffers of a socket.
fn large() -> Vec<u8> {
    file_nar(vec![b'x'; 3_000_000])
}

/// Clients from 2.25 on abort when LAST arrives before they have sent the end of the frames, even if the daemon could
/// know all it needs by then.
#[test]
fn trap_01_last_waits_for_the_end_of_the_frames() {
    let rig = Rig::new(true);
    let mut client = Raw::new(&rig, NEWEST);
    for nar in [file_nar("small"), file_nar(vec![b'x'; 600_000])] {
        let claim = claim("known", &nar);
        client.add(&claim, &nar).unwrap();
        client.send(&add_to_store("source", "fixed:r:sha256", &[], &nar));
        client.done();
        let source = client.text();
        client.claim(source);
        let many = claim.fields(Msg::default().word(1)).raw(&nar).0;
        // The first three find that they need nothing of what is sent.
        for (what, request, payload) in [
            ("AddToStoreNar", claim.add(), &nar),
            ("AddToStore", op(7).text("source").text("fixed:r:sha256").texts::<&str>([]).word(0), &nar),
            ("AddMultipleToStore", op(44).word(0).word(1), &many),
            ("AddBuildLog", op(45).text(base_name(&path("logged.drv"))), &nar),
        ] {
            client.send(&request.frames(payload, 32 * 1024));
            client.silent(what);
            client.send(&Msg::default().word(0));
            client.done();
            match what {
                "AddToStore" => {
                    let path = client.text();
                    client.claim(path);
                }
                "AddBuildLog" => assert_eq!(client.word(), 1),
                _ => {}
            }
            client.goes_on();
        }
    }
}

/// Whatever is wrong with a framed request, and however early it is known: the frames are on their way and have to be
/// read to their end, or they are taken for requests.
#[test]
fn trap_02_a_refusal_drains_the_frames() {
    let rig = Rig::new(true);
    let nar = file_nar(b"\x01\0\0\0\0\0\0\0".repeat(80_000));
    let good = claim("good", &nar);
    let bad_node = file_nar("x").iter().map(|&byte| if byte == b'r' { b'R' } else { byte }).collect::<Vec<u8>>();
    let long = "n".repeat(212);
    let mut requests: Vec<Msg> = vec![
        Claim { nar_hash: hex(&[7; 32]), ..good.clone() }.add().framed(&nar),
        Claim { nar_size: 8, ..good.clone() }.add().framed(&nar),
        Claim { ca: format!("fixed:r:sha256:{}", hex(&[7; 32])), ..good.clone() }.add().framed(&nar),
        Claim { references: vec![path("nowhere")], ..good.clone() }.add().framed(&nar),
        // The archive breaks off, is none, is empty.
        good.add().framed(&nar[..500_000]),
        good.add().framed(&bad_node),
        good.add().framed(""),
        op(44).word(0).word(1).framed(&nar),
        op(44).word(0).word(1).framed(""),
        op(45).text(base_name(&path("no-derivation"))).framed(&nar),
    ];
    for method in ["fixed:r:md4", "fixed:git:sha1", "text:sha1", "r:sha256", "nonsense", ""] {
        requests.push(add_to_store("name", method, &[], &nar));
    }
    for name in ["a/b", "a b", "..", "", &long] {
        requests.push(add_to_store(name, "fixed:r:sha256", &[], &nar));
    }
    requests.push(add_to_store("name", "fixed:sha256", &[path("nowhere")], &nar));
    requests.push(add_to_store("name", "text:sha256", &[path("nowhere")], &nar));
    let mut client = Raw::new(&rig, NEWEST);
    for request in requests {
        client.send(&request);
        client.refused();
        client.goes_on();
    }
    let wary = Rig::new(false);
    let mut client = Raw::new(&wary, NEWEST);
    let many = good.fields(Msg::default().word(1)).raw(&nar);
    for request in [
        good.add().framed(&nar),
        op(44).word(0).word(1).framed(&many.0),
        op(45).text(base_name(&path("logged.drv"))).framed(&nar),
    ] {
        client.send(&request);
        client.refused();
        client.goes_on();
    }
    assert_eq!(client.all_paths(), [""; 0]);
}

/// Stock hashes everything in the frames but unpacks the archive alone: a path then has contents that its hash does not
/// cover. What follows an archive is refused.
#[test]
fn trap_03_nothing_may_follow_the_archive_in_its_frames() {
    for archive in [file_nar("small"), large()] {
        let rig = Rig::new(true);
        let mut client = Raw::new(&rig, NEWEST);
        let surplus = [&archive[..], b"and more"].concat();
        // A claim of the archive, and one of all the bytes.
        for claim in [claim("more", &archive), claim("more", &surplus)] {
            client.send(&claim.add().framed(&surplus));
            client.refused();
            assert!(!client.is_valid(&claim.path));
        }
        for method in ["fixed:r:sha256", "fixed:r:sha1"] {
            client.send(&add_to_store("more", method, &[], &surplus));
            client.refused();
            client.goes_on();
        }
        let many = claim("more", &surplus).fields(Msg::default().word(1)).raw(&surplus);
        client.send(&op(44).word(0).word(1).framed(&many.0));
        client.refused();
        client.goes_on();
        assert_eq!(client.all_paths(), [""; 0]);
        let many = claim("one", &archive).fields(Msg::default().word(1)).raw(&surplus);
        client.send(&op(44).word(0).word(1).framed(&many.0));
        client.refused();
        client.goes_on();
    }
}

/// Frames carry no padding, whatever their length, and where they are cut means nothing; strings are padded. The length
/// of a frame is a whole word, of which stock takes no more than 32 bits.
#[test]
fn trap_04_frames_have_no_padding_and_strings_have() {
    let rig = Rig::new(true);
    let mut client = Raw::new(&rig, NEWEST);
    for size in [1, 3, 7, 8, 13] {
        let archive =
            nar(directory_node(&[("a", file_node(format!("in frames of {size}"))), ("bc", file_node("12345"))]));
        let claim = claim(&format!("cut-{size}"), &archive);
        client.send(&claim.add().frames(&archive, size).word(0));
        client.done();
        assert!(client.nar(&claim.path) == archive);
    }
    for length in 0..=17 {
        client.send(&add_text(format!("{:x<1$}", "t", length + 1), vec![b'x'; length]));
        client.done();
        let added = client.text();
        assert_eq!(client.nar(&added), file_nar(vec![b'x'; length]));
    }
    // Cut to 32 bits this would be a frame of five bytes.
    client.send(&claim("far", &large()).add().word((1 << 32) + 5).raw("12345").word(0));
    client.refused();
    client.closed();
}

/// Some operations answer a word that means nothing, and clients wait for it; others answer nothing, and a word there
/// is taken for the beginning of the next answer.
#[test]
fn trap_05_the_word_that_means_nothing_is_there_where_it_belongs() {
    let rig = Rig::new(true);
    for minor in MINORS {
        let mut client = Raw::new(&rig, minor);
        let archive = file_nar("exported");
        let known = claim("known", &archive);
        client.add(&known, &archive).unwrap();
        let link = rig.dir().join("link");
        let mut with_word = vec![
            (9, op(9).word(0).word(0)),
            (10, op(10).text(&known.path)),
            (11, op(11).text(&known.path)),
            (12, op(12).text(link.to_str().unwrap())),
            (13, op(13)),
            (16, op(16).text(&known.path).word(0)),
            (34, op(34)),
            (37, op(37).text(&known.path).texts(["key:AAAA"])),
        ];
        if minor >= 32 {
            with_word.push((45, op(45).text(base_name(&path("logged.drv"))).framed("a log")));
        }
        for (code, request) in with_word {
            client.send(&request);
            client.done();
            assert_eq!(client.word(), 1, "operation {code} at 1.{minor}");
            client.goes_on();
        }
        client.send(&set_options(3));
        client.done();
        client.goes_on();
        client.add(&claim("new", &archive), &archive).unwrap();
        client.goes_on();
        if minor >= 32 {
            client.send(&op(44).word(0).word(1).framed(Msg::default().word(0).0));
            client.done();
            client.goes_on();
        }
        let id = format!("sha256:{}!out", hex(&[1; 32]));
        client.send(&if minor < 31 {
            op(42).text(id).text(base_name(&known.path))
        } else {
            op(42).text(format!(r#"{{"id":"{id}","outPath":"{}","signatures":[]}}"#, base_name(&known.path)))
        });
        // Whether it is taken or refused, nothing follows.
        let _ = client.outcome();
        client.goes_on();
        // CollectGarbage: what is alive; then a number that is 0 here and one that always is.
        client.send(&op(20).word(0).word(0).word(0).word(u64::MAX).word(0).word(0).word(0));
        client.done();
        client.texts();
        assert_eq!((client.word(), client.word()), (0, 0));
        client.goes_on();
    }
}

/// SetOptions of a client that has no configuration but a verbosity.
pub(crate) fn set_options(verbosity: u64) -> Msg {
    let options = [0, 0, 0, verbosity, 1, 0, 1, 0, 0, 0, 0, 1];
    options.into_iter().fold(op(19), Msg::word).word(0)
}

/// A daemon that asks for its data gets strings, padded ones, and must not ask when it has it all: the client then
/// fails, since it has nothing left.
#[test]
fn trap_06_data_that_is_asked_for_comes_in_strings_and_ends_exactly() {
    /// Gives `data` in pieces of at most `most` bytes.
    fn serve(client: &mut Raw, mut data: &[u8], most: usize) {
        loop {
            match client.said() {
                Said::Read(wanted) => {
                    assert!(wanted > 0 && !data.is_empty(), "asked beyond the end");
                    let (piece, rest) = data.split_at(data.len().min(most).min(usize::try_from(wanted).unwrap()));
                    client.send(&Msg::default().text(piece));
                    data = rest;
                }
                Said::Last => break,
                other => panic!("{other:?}"),
            }
        }
        assert!(data.is_empty(), "{} bytes were not asked for", data.len());
    }
    let rig = Rig::new(true);
    for minor in [21, 22] {
        let mut client = Raw::new(&rig, minor);
        for (length, most) in [(10, 1), (1000, 7), (600_000, 32_768), (600_000, 1 << 30)] {
            let archive = file_nar(vec![b'y'; length]);
            let claim = claim(&format!("asked-{minor}-{length}-{most}"), &archive);
            client.send(&claim.add());
            serve(&mut client, &archive, most);
            assert!(client.nar(&claim.path) == archive);
            // A path that is there needs no data.
            client.send(&claim.add());
            assert_eq!(client.done(), []);
            client.goes_on();
        }
        // An empty answer is the client's end of data.
        let archive = file_nar("breaks off");
        let claim = claim("broken", &archive);
        client.send(&claim.add());
        for piece in [&archive[..50], b""] {
            assert!(matches!(client.said(), Said::Read(_)));
            client.send(&Msg::default().text(piece));
        }
        client.refused();
        assert!(!client.is_valid(&claim.path));
    }
    for minor in [18, 21, NEWEST] {
        let mut client = Raw::new(&rig, minor);
        let (archive, imported) = (file_nar("imported"), path(&format!("imported-{minor}")));
        let record = Msg::default().word(1).raw(&archive).word(0x4558_494e).text(&imported);
        let stream = record.texts::<&str>([]).text("").word(0).word(0);
        client.send(&op(27));
        serve(&mut client, &stream.0, 11);
        assert_eq!(client.texts(), [imported]);
        client.goes_on();
    }
}

/// A client that sends an archive with its request reads nothing until it has sent all of it. A daemon that waits for
/// it to read, or stops reading, waits for ever.
#[test]
fn trap_07_nobody_waits_for_a_client_that_only_writes() {
    let rig = Rig::new(true);
    let archive = file_nar(vec![b'z'; 16 << 20]);
    let broken = [&archive[..archive.len() - 16], &[0xff; 16]].concat();
    for minor in [18, 20, 23, NEWEST] {
        let mut client = Raw::new(&rig, minor);
        client.send(&set_options(7));
        client.done();
        let claim = claim(&format!("written-{minor}"), &archive);
        let refused = Claim { nar_hash: hex(&[3; 32]), path: path("refused"), ..claim.clone() };
        // Everything is written before anything is read: here `send` gives up after a while.
        for (claim, payload, good) in [(&refused, &archive, false), (&claim, &archive, true), (&claim, &archive, true)]
        {
            client.send(&claim.add());
            client.send(&if minor < 23 { Msg(payload.clone()) } else { Msg::default().framed(payload) });
            assert_eq!(client.outcome().is_ok(), good, "1.{minor}");
            client.goes_on();
        }
        let add = if minor < 25 {
            op(7).text("old").word(0).word(1).text("sha256").raw(&archive)
        } else {
            add_to_store("old", "fixed:r:sha256", &[], &archive)
        };
        client.send(&add);
        client.done();
        client.text();
        if minor < 23 {
            // Here the connection is lost, but the client is told when it has finished.
            client.send(&claim_at(&claim, "lost").add());
            client.send_if_open(&Msg(broken.clone()));
            client.refused();
        }
    }
    // And what is logged meanwhile is kept back.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        let events = Events::new();
        events.hold();
        events.push(Message::Next(b"later\n".to_vec()));
        let soon = Duration::from_millis(50);
        assert!(tokio::time::timeout(soon, events.wait()).await.is_err());
        events.release();
        assert!(tokio::time::timeout(soon, events.wait()).await.is_ok());
        assert_eq!(events.take().len(), 1);
    });
}

fn claim_at(claim: &Claim, name: &str) -> Claim {
    Claim { path: path(name), ..claim.clone() }
}

/// An answer that stays in a buffer until the next request stops a client that waits for it. And a request is answered
/// when its last byte is there, however the bytes come.
#[test]
fn trap_08_answers_are_sent_when_they_are_ready() {
    let rig = Rig::new(true);
    for minor in [18, 21, 32, NEWEST] {
        // Each step of this handshake waits for the one before.
        let mut client = Raw::new(&rig, minor);
        let archive = file_nar("sent at once");
        let claim = claim("known", &archive);
        client.add(&claim, &archive).unwrap();
        let request = op(26).text(&claim.path);
        for byte in &request.0 {
            client.send(&Msg(vec![*byte]));
        }
        client.done();
        assert_eq!(client.word(), 1);
        client.claim(String::new());
        assert!(client.nar(&claim.path) == archive);
        client.send(&op(18).text(path("nobody")));
        client.refused();
        // And several requests at once get several answers.
        client.send(&Msg(request.0.repeat(3)));
        for _ in 0..3 {
            client.done();
            assert_eq!(client.word(), 1);
            client.claim(String::new());
        }
        client.silent("an answer nobody asked for");
    }
}

/// Where a request that does not parse ends cannot be known, so all that is left is to say why and to close. Stock says
/// it twice.
#[test]
fn trap_09_a_request_that_cannot_be_read_gets_one_error_and_ends_the_connection() {
    let rig = Rig::new(true);
    let mut padded = op(1).text(path("padded"));
    *padded.0.last_mut().unwrap() = 1;
    for minor in [18, 26, NEWEST] {
        for (what, request) in [
            ("an unknown operation", op(999)),
            ("one that is gone", op(24)),
            ("a large number", op(1 << 32 | 1)),
            ("a path elsewhere", op(1).text("/etc/passwd")),
            ("a short path", op(26).text("/nix/store/abc-x")),
            ("a digit that is none", op(1).text(format!("/nix/store/{}-x", "e".repeat(32)))),
            ("a path among others", op(31).texts([path("good").as_str(), "bad"]).word(0)),
            ("padding", padded.clone()),
            ("a mode", op(9).word(0).word(3)),
            ("an action", op(20).word(9).word(0).word(0).word(0).word(0).word(0).word(0)),
        ] {
            let mut client = Raw::new(&rig, minor);
            client.goes_on();
            client.send(&request);
            assert!(client.outcome().is_err(), "{what}");
            // Neither a second error nor an answer to this.
            client.send_if_open(&op(23));
            client.closed();
        }
        // The same without the error in it is answered.
        let mut client = Raw::new(&rig, minor);
        client.send(&op(9).word(0).word(0));
        client.done();
    }
    // A client that has finished is no error.
    let mut client = Raw::new(&rig, NEWEST);
    client.half_close();
    client.closed();
    let mut halfway = Raw::dial(&rig);
    halfway.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert_eq!(std::io::Read::read(&mut halfway, &mut [0; 64]).unwrap(), 0);
}

/// Refusing a request before all of it was read leaves the rest of it to be taken for the next one.
#[test]
fn trap_10_a_request_is_read_before_it_is_refused() {
    let rig = Rig::new(false);
    let known = path("known");
    let id = format!("sha256:{}!out", hex(&sha256(b"id")));
    let collect = |action, ignore| op(20).word(action).texts([&known]).word(ignore).word(9).word(0).word(0).word(0);
    for minor in MINORS {
        let mut client = Raw::new(&rig, minor);
        let drv = derivation(&mut client, "anything", &["out"], false);
        let link = rig.dir().join("root");
        let mut requests = vec![
            collect(3, 1),
            collect(2, 0),
            op(35).word(1).word(1),
            op(47).text(&known).text(link.to_str().unwrap()),
            op(29).text("too-short"),
            op(16).text(&known).word(0),
            op(38).text(&known),
            op(37).text(&known).texts(["key:AAAA"]),
            op(22).text(path("no.drv")),
            op(36)
                .text(&drv.path)
                .word(1)
                .text("out")
                .text(&drv.outputs["out"])
                .text("")
                .text("")
                .word(0)
                .text("sys")
                .text("/bin/sh")
                .word(0)
                .word(0)
                .word(0),
        ];
        if minor >= 22 {
            requests.push(op(41).text(path("no.drv")));
        }
        for request in requests {
            client.send(&request);
            client.refused();
            client.goes_on();
        }
        // Refused or not: these were read.
        client.send(&op(43).text(&id));
        if client.outcome().is_ok() {
            client.texts();
        }
        client.goes_on();
        client.send(&if minor < 31 {
            op(42).text(&id).text(base_name(&known))
        } else {
            op(42).text(format!(r#"{{"id":"{id}","outPath":"{}"}}"#, base_name(&known)))
        });
        let _ = client.outcome();
        client.goes_on();
    }
    assert!(!rig.dir().join("root").exists());
}
