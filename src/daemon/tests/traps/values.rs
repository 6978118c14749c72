//! Values: what single fields may hold and how they are read, computed and printed.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use daemon::Locations;
use nix_compat::conf::Settings;
use nix_compat::hash::{Algorithm, Hash, sha256};
use nix_compat::signature::SecretKey;
use nix_compat::store_path::{StoreDir, StorePath, content_address_path};

use crate::common::Rig;
use crate::framing::set_options;
use crate::objects::{
    Drv, add_text, add_to_store, base_name, claim, derivation, directory_node, file_nar, file_node, hex, nar, path,
    symlink_node,
};
use crate::raw::{Claim, Msg, NEWEST, Raw, Said, op};

/// A key pair of RFC 8032's tests.
const SECRET_KEY: &str =
    "test:nWGxne/9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2DXWpgBgrEKt9VL/tPJZAc6DuFy89qmIyWvAhpo9wdRGg==";
const PUBLIC_KEY: &str = "test:11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=";

/// Adds contents and gives their path.
fn add(client: &mut Raw, name: &str, method: &str, references: &[String], payload: &[u8]) -> String {
    client.send(&add_to_store(name, method, references, payload));
    client.done();
    let path = client.text();
    client.claim(path.clone());
    path
}

/// `bytes` with the byte at this distance from the end changed.
fn damaged(bytes: &[u8], from_end: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let at = bytes.len() - from_end;
    bytes[at] ^= 1;
    bytes
}

/// What pads a string is zero, or the same contents would have several forms: in requests, after a file's contents, and
/// in an archive's very last string.
#[test]
fn trap_18_padding_is_zero() {
    let rig = Rig::new(true);
    let padded = path("padded");
    for minor in [18, NEWEST] {
        let mut client = Raw::new(&rig, minor);
        assert!(!client.is_valid(&padded));
        client.send(&Msg(damaged(&op(1).text(&padded).0, 1)));
        assert_eq!(client.refused(), "non-zero padding");
        client.closed();
    }
    // Also with all of the request still in the socket, which is where the daemon leaves it until it has answered.
    let mut client = Raw::new(&rig, NEWEST);
    std::thread::sleep(Duration::from_millis(100));
    client.send(&Msg(damaged(&op(1).text(&padded).0, 1)));
    assert_eq!(client.refused(), "non-zero padding");
    client.closed_in_order();
    // The archive ends "abc", five zeros, ")" with its length, seven zeros.
    let archive = file_nar("abc");
    let mut client = Raw::new(&rig, NEWEST);
    let names = nar(directory_node(&[("abc", file_node("x"))]));
    let after_name = names.len() - names.windows(8).position(|at| at == b"abc\0\0\0\0\0").unwrap() - 7;
    for (what, bytes) in [
        ("contents", damaged(&archive, 17)),
        ("the first zero after contents", damaged(&archive, 21)),
        ("the end", damaged(&archive, 1)),
        ("the end, first zero", damaged(&archive, 7)),
        ("a name", damaged(&names, after_name)),
        ("a target", damaged(&nar(symlink_node("abc")), 17)),
    ] {
        // The claim is true of the bytes as they are.
        let claim = claim("padded", &bytes);
        assert!(client.add(&claim, &bytes).is_err(), "{what}");
        assert!(!client.is_valid(&claim.path));
        client.send(&add_to_store("padded", "fixed:r:sha256", &[], &bytes));
        client.refused();
        let many = claim.fields(Msg::default().word(1)).raw(&bytes);
        client.send(&op(44).word(0).word(1).framed(&many.0));
        client.refused();
        client.goes_on();
    }
    assert_eq!(client.all_paths(), [""; 0]);
    client.add(&claim("padded", &archive), &archive).unwrap();
    client.add(&claim("names", &names), &names).unwrap();
}

/// An empty string is its length and nothing else. Whoever waits for a body or padding waits for ever.
#[test]
fn trap_19_an_empty_string_is_its_length_alone() {
    let rig = Rig::new(true);
    for minor in [18, 21, 30, NEWEST] {
        let mut client = Raw::new(&rig, minor);
        // The last thing of a request.
        client.send(&op(29).text(""));
        client.refused();
        client.goes_on();
        client.send(&add_text("empty", ""));
        client.done();
        let empty = client.text();
        assert_eq!(base_name(&empty), "wflv0hgb0qb1ddc5nxmsg0y9zjjhfvmh-empty");
        assert_eq!(client.nar(&empty), file_nar(""));
        // In the archive: of a file, and several of them.
        let archive = nar(directory_node(&[("a", file_node("")), ("b", file_node("")), ("c", file_node("c"))]));
        let claim = claim(&format!("empties-{minor}"), &archive);
        client.add(&claim, &archive).unwrap();
        assert_eq!(client.nar(&claim.path), archive);
        let info = client.info(&claim.path).unwrap();
        assert_eq!((info.deriver.as_str(), info.ca.as_str()), ("", ""));
        // Settings, and what is not a signature but parses as a string.
        let mut options = set_options(0).0;
        options.truncate(options.len() - 8);
        client.send(&Msg(options).word(2).text("builders").text("").text("").text(""));
        client.done();
        client.goes_on();
        client.send(&op(31).texts([&empty]).raw(if minor >= 27 { &[0; 8][..] } else { &[] }));
        client.done();
        assert_eq!(client.texts(), [empty.as_str()]);
        // Where a path must be, an empty string is an error and not a wait.
        client.send(&op(1).text(""));
        client.refused();
        client.closed();
    }
}

/// Memory goes by what has arrived, never by a length or count that was announced.
#[test]
fn trap_20_nothing_is_allocated_for_what_is_only_announced() {
    /// Private writable memory of this process, in bytes. What is reserved counts even before it is touched.
    fn memory() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("VmData:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    }
    const CLIENTS: usize = 60;
    let rig = Rig::new(true);
    let huge = 1 << 62;
    let archive = file_nar("x");
    let claim = claim("announced", &archive);
    // More than any request has.
    for request in [
        op(1).word(huge),
        op(31).word(huge),
        op(9).word(huge),
        op(37).text(&claim.path).word(huge),
        set_options_with(huge),
        op(8).text("name").word(huge),
        op(7).text("name").text("fixed:sha256").word(huge),
    ] {
        let mut client = Raw::new(&rig, NEWEST);
        client.send(&request);
        client.refused();
        client.closed();
    }
    let mut stream = Raw::dial(&rig);
    stream.write_all(&Msg::default().word(0x6e69_7863).word(1 << 8 | NEWEST).word(huge).0).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert_eq!(answer.len(), 16, "the daemon's magic and version, and no more");
    // Inside a payload: a claim may say what it likes, and an archive too.
    let big_file = Msg(archive[..archive.len() - 32].to_vec()).word(huge).raw("x");
    let mut client = Raw::new(&rig, NEWEST);
    for request in [
        Claim { nar_size: huge, ..claim.clone() }.add().framed(&archive),
        claim.add().framed(&big_file.0),
        op(44).word(0).word(1).framed(Msg::default().word(huge).0),
        op(44).word(0).word(1).framed(Msg::default().word(1).text(&claim.path).word(huge).0),
        op(44)
            .word(0)
            .word(1)
            .framed(Claim { nar_size: huge, ..claim.clone() }.fields(Msg::default().word(1)).raw(&archive).0),
    ] {
        client.send(&request);
        client.refused();
        client.goes_on();
    }
    // As much as a request may have, or a frame: the daemon waits, and keeps nothing ready for it.
    let before = memory();
    let waiting: Vec<Raw> = (0..CLIENTS)
        .map(|n| {
            let mut client = Raw::new(&rig, NEWEST);
            client.send(&match n % 5 {
                0 => op(8).text("name").word(60 << 20),
                1 => op(31).word(7 << 20),
                2 => claim.add().word(u64::from(u32::MAX)).raw("nix"),
                3 => set_options_with(3 << 20),
                _ => claim.add().frames(&big_file.0, 1 << 20),
            });
            client
        })
        .collect();
    std::thread::sleep(Duration::from_secs(1));
    // Each of them announced 48 MiB or more. Other tests run beside this one.
    let grown = memory().saturating_sub(before);
    assert!(grown < 1 << 30, "{grown} bytes for {CLIENTS} clients");
    drop(waiting);
    client.goes_on();
}

/// SetOptions with this many overrides announced and none sent.
fn set_options_with(count: u64) -> Msg {
    let mut options = set_options(0).0;
    options.truncate(options.len() - 8);
    Msg(options).word(count)
}

/// Store paths as stock computes them. The fingerprint of a flat hash ends in a colon; references are sorted; that an
/// object refers to itself is said last.
#[test]
fn trap_21_store_paths_are_those_of_stock() {
    let rig = Rig::new(true);
    let mut client = Raw::new(&rig, NEWEST);
    let hello = b"hello world";
    // Made by `nix-store --add-fixed`.
    for (method, expected) in [
        ("fixed:md5", "5igxc7n5qc9cqc56jgbgwvadqm6ljrv8-hello.txt"),
        ("fixed:r:md5", "ia6k2p0x5yrws3zx8kvy02mzp39r2h80-hello.txt"),
        ("fixed:sha1", "s02wda17b0dwh026cy52cs6l24r67y3v-hello.txt"),
        ("fixed:r:sha1", "x0dqapvjc32182vwjmb9qx337immxsc6-hello.txt"),
        ("fixed:sha256", "9956wx21q0rb63w8s43n6z1bims9sjs0-hello.txt"),
        ("fixed:r:sha256", "9833pw3cj8paw1plnya839qnikx9jjcd-hello.txt"),
        ("fixed:sha512", "hjavwvc4xvdpsf061gd3fbwcyfyybpci-hello.txt"),
        ("fixed:r:sha512", "k9am9m0iphjhwyfxcc2gw0svrl5r50q8-hello.txt"),
        ("text:sha256", "m6wswa7yn6x5gi6gdq7x1fqlwmlhfja9-hello.txt"),
    ] {
        let payload = if method.starts_with("fixed:r:") { file_nar(hello) } else { hello.to_vec() };
        assert_eq!(base_name(&add(&mut client, "hello.txt", method, &[], &payload)), expected, "{method}");
        if let Some(method) = method.strip_prefix("fixed:") {
            let (recursive, algorithm) = method.strip_prefix("r:").map_or((0, method), |algorithm| (1, algorithm));
            let mut old = Raw::new(&rig, 21);
            old.send(&op(7).text("hello.txt").word(1).word(recursive).text(algorithm).raw(file_nar(hello)));
            old.done();
            assert_eq!(base_name(&old.text()), expected, "{method}");
        }
    }
    // Made by `builtins.toFile`; in whatever order the references come.
    let first = add(&mut client, "hello.txt", "text:sha256", &[], hello);
    let second = add(&mut client, "another", "text:sha256", &[], b"");
    let text = format!("hi {first} {second}");
    for references in [[&first, &second], [&second, &first]] {
        let references = references.map(String::clone);
        let added = add(&mut client, "refs.txt", "text:sha256", &references, text.as_bytes());
        assert_eq!(base_name(&added), "mpb5v88xkncmyvjzp9zfy26rk2zbpqrc-refs.txt");
        client.send(&op(8).text("refs.txt").text(&text).texts(&references));
        client.done();
        assert_eq!(client.text(), added);
    }
    // Made by `nix store make-content-addressed`, in another store directory.
    let dir = StoreDir::new("/tmp/ha/store").unwrap();
    let address = "fixed:r:sha256:07l59mapqy02cm2n6vrl1h1fk1mqb0whhchkr8alqisxx8r9n5hm".parse().unwrap();
    let other: StorePath = "6xbm4202mi19slk1csgz6n8m2z3mg3wa-hello.txt".parse().unwrap();
    let itself = content_address_path(&dir, "self", &address, &[other].into(), true).unwrap();
    assert_eq!(itself.base_name(), "axb7y00afwjf6nfbabc5jilin803xfcv-self");
}

/// A daemon that wants signatures, and the key it trusts.
fn signing_rig() -> (Rig, SecretKey) {
    let settings =
        Settings { trusted_users: Vec::new(), trusted_public_keys: vec![PUBLIC_KEY.to_owned()], ..Settings::default() };
    (Rig::with(StoreDir::default(), settings), SecretKey::parse(SECRET_KEY).unwrap())
}

/// One hash has three forms: bare base 16 on the wire, prefixed base 32 in what is signed, and whatever a client likes
/// in what it sends. What is signed also has its references sorted.
#[test]
fn trap_22_a_nar_hash_has_the_form_of_its_place() {
    let (rig, key) = signing_rig();
    let mut client = Raw::new(&rig, NEWEST);
    let mut references: Vec<String> = (0..4)
        .map(|n| {
            client.send(&add_text(format!("reference-{n}"), "r"));
            client.done();
            client.text()
        })
        .collect();
    references.sort();
    let archive = file_nar("hashed");
    let hash = Hash::of(Algorithm::Sha256, &archive);
    let forms = [
        hash.to_base16(),
        hash.to_base16().to_uppercase(),
        hash.to_nix32(),
        hash.to_base64(),
        hash.to_prefixed_base16(),
        hash.to_prefixed_nix32(),
        hash.to_sri(),
    ];
    for (n, form) in forms.into_iter().enumerate() {
        let mut claim = claim(&format!("form-{n}"), &archive);
        let signed = |hash: &str, references: &[String]| {
            let text = format!("1;{};{hash};{};{}", claim.path, archive.len(), references.join(","));
            key.sign(text.as_bytes()).to_string()
        };
        let backwards: Vec<String> = references.iter().rev().cloned().collect();
        // Signatures of other forms are none.
        let wrong = [
            signed(&hash.to_base16(), &references),
            signed(&hash.to_nix32(), &references),
            signed(&hash.to_prefixed_base16(), &references),
            signed(&hash.to_sri(), &references),
            signed(&hash.to_prefixed_nix32(), &backwards),
        ];
        let right = signed(&hash.to_prefixed_nix32(), &references);
        claim.nar_hash = form;
        claim.references = backwards;
        claim.signatures = wrong.to_vec();
        let refused = client.add(&claim, &archive).unwrap_err();
        assert!(refused.contains("lacks a signature"), "{refused}");
        claim.signatures = vec![right.clone()];
        client.add(&claim, &archive).unwrap();
        let info = client.info(&claim.path).unwrap();
        assert_eq!(info.nar_hash, hex(&sha256(&archive)));
        assert_eq!(info.references, references);
        assert_eq!(info.signatures, [right]);
        client.send(&op(4).text(&claim.path));
        client.done();
        assert_eq!(client.text(), hex(&sha256(&archive)));
    }
}

/// Content addresses are written in base 32 and read in any base.
#[test]
fn trap_23_content_addresses_are_written_in_base_32_and_read_in_any() {
    // Nobody is trusted: what a path is added on is its address.
    let rig = Rig::new(false);
    let mut client = Raw::new(&rig, NEWEST);
    let contents = b"addressed";
    let archive = file_nar(contents);
    for (n, (method, hashed)) in
        [("text", &contents[..]), ("fixed", &contents[..]), ("fixed:r", &archive[..])].into_iter().enumerate()
    {
        for algorithm in [Algorithm::Sha256, Algorithm::Sha1, Algorithm::Md5, Algorithm::Sha512] {
            if method == "text" && algorithm != Algorithm::Sha256 {
                continue;
            }
            let hash = Hash::of(algorithm, hashed);
            let expected = format!("{method}:{algorithm}:{}", hash.to_nix32());
            for digits in [hash.to_base16(), hash.to_nix32(), hash.to_base64()] {
                let ca = format!("{method}:{algorithm}:{digits}");
                let name = format!("ca-{n}-{algorithm}-{}", digits.len());
                let address = expected.parse().unwrap();
                let path = content_address_path(&StoreDir::default(), &name, &address, &Default::default(), false);
                let claim = Claim { path: StoreDir::default().display(&path.unwrap()), ca, ..claim("any", &archive) };
                client.add(&claim, &archive).unwrap();
                assert_eq!(client.info(&claim.path).unwrap().ca, expected);
            }
        }
    }
    // A substitute is asked for by path and address, in any form as well.
    let asked =
        op(30).word(2).text(path("a")).text("").text(path("b")).text(format!("fixed:r:sha256:{}", hex(&[1; 32])));
    client.send(&asked);
    client.done();
    assert_eq!(client.word(), 0);
    client.goes_on();
}

/// Stock reads base 64 laxly: padding may be missing, be too long, and have anything behind it.
#[test]
fn trap_24_base_64_is_read_laxly() {
    let rig = Rig::new(true);
    let mut client = Raw::new(&rig, NEWEST);
    let archive = file_nar("lax");
    let digits = Hash::of(Algorithm::Sha256, &archive).to_base64();
    let bare = digits.trim_end_matches('=');
    for (n, text) in ["", "=", "==", "===", "=junk", "=\n"].into_iter().enumerate() {
        let claim = Claim { nar_hash: format!("sha256-{bare}{text}"), ..claim(&format!("lax-{n}"), &archive) };
        client.add(&claim, &archive).unwrap();
        assert_eq!(client.info(&claim.path).unwrap().nar_hash, hex(&sha256(&archive)));
    }
    // Laxness ends where digits are wrong or missing.
    for wrong in [format!("sha256-{}", &bare[1..]), format!("sha256-!{}", &bare[1..]), format!("sha256-{bare}A")] {
        let mut client = Raw::new(&rig, NEWEST);
        client.send(&Claim { nar_hash: wrong, ..claim("wrong", &archive) }.add());
        client.refused();
        client.closed();
    }
    // Signatures are base 64 too.
    client.send(
        &op(37).text(&claim("lax-0", &archive).path).texts([format!("key:{bare}"), format!("{PUBLIC_KEY}=junk")]),
    );
    client.done();
    assert_eq!(client.word(), 1);
}

/// QueryPathFromHashPart takes the 32 digits as text and answers a path, or an empty string.
#[test]
fn trap_25_a_hash_part_is_asked_for_as_text_and_answered_by_a_path() {
    let rig = Rig::new(true);
    for minor in [18, 34, NEWEST] {
        let mut client = Raw::new(&rig, minor);
        let archive = file_nar("found");
        let claim = claim("found", &archive);
        client.add(&claim, &archive).unwrap();
        client.send(&op(29).text(&base_name(&claim.path)[..32]));
        client.done();
        assert_eq!(client.text(), claim.path);
        client.send(&op(29).text(&base_name(&path("lost"))[..32]));
        client.done();
        assert_eq!(client.text(), "");
        // Other digits are the hash part of nothing, as with stock.
        client.send(&op(29).text([b'e'; 32]));
        client.done();
        assert_eq!(client.text(), "");
        // Twenty bytes, other lengths: refused, and the connection goes on.
        for wrong in [&[7; 20][..], &[b'0'; 31], &[b'0'; 33]] {
            client.send(&op(29).text(wrong));
            client.refused();
            client.goes_on();
        }
    }
}

/// QueryValidPaths answers the paths, and nothing about them.
#[test]
fn trap_26_valid_paths_are_answered_as_paths() {
    let rig = Rig::new(true);
    for minor in [18, 26, 27, NEWEST] {
        let mut client = Raw::new(&rig, minor);
        let archive = file_nar("valid");
        let mut valid: Vec<String> = ["one", "two", "three"].map(|name| claim(name, &archive).path).into();
        for name in ["one", "two", "three"] {
            client.add(&claim(name, &archive), &archive).unwrap();
        }
        let mut asked = valid.clone();
        asked.extend([path("four"), valid[0].clone(), path("five")]);
        for substitute in [0, 1] {
            let ask = op(31).texts(&asked);
            client.send(&if minor >= 27 { ask.word(substitute) } else { ask });
            client.done();
            valid.sort();
            assert_eq!(client.texts(), valid);
            client.goes_on();
        }
    }
}

/// Nothing but the configured store directory is a store: it is in what is read, printed and hashed.
#[test]
fn trap_27_the_store_directory_is_the_configured_one() {
    let settings = Settings { trusted_users: vec!["*".into()], ..Settings::default() };
    let rig = Rig::with(StoreDir::new("/tmp/ha/store").unwrap(), settings);
    let mut client = Raw::new(&rig, NEWEST);
    client.send(&add_text("hello.txt", "hello world"));
    client.done();
    let added = client.text();
    // The hash in it is another one than below /nix/store.
    let fingerprint = format!("text:sha256:{}:/tmp/ha/store:hello.txt", hex(&sha256(b"hello world")));
    let mut digest = [0; 20];
    for (i, byte) in sha256(fingerprint.as_bytes()).into_iter().enumerate() {
        digest[i % 20] ^= byte;
    }
    assert_eq!(added, format!("/tmp/ha/store/{}", StorePath::from_parts(digest, "hello.txt").unwrap()));
    assert!(client.is_valid(&added));
    assert_eq!(client.all_paths(), [added.as_str()]);
    client.send(&op(29).text(&base_name(&added)[..32]));
    client.done();
    assert_eq!(client.text(), added);
    let archive = file_nar("elsewhere");
    let path = format!("/tmp/ha/store/{}", base_name(&path("elsewhere")));
    let claim = Claim { path, references: vec![added.clone()], deriver: added.clone(), ..claim("elsewhere", &archive) };
    client.add(&claim, &archive).unwrap();
    let info = client.info(&claim.path).unwrap();
    assert_eq!((info.references, info.deriver), (vec![added.clone()], added.clone()));
    client.send(&op(1).text(format!("/nix/store/{}", base_name(&added))));
    assert!(client.refused().contains("/tmp/ha/store"));
    client.closed();
}

/// BuildDerivation up to the environment, which has to follow.
fn described(drv: &str, output: &str, path: &str, algorithm: &str, hash: &str) -> Msg {
    op(36).text(drv).word(1).text(output).text(path).text(algorithm).text(hash).word(0).text("x86_64-linux")
}

/// A derivation with structured attributes travels with them as the variable `__json`, whose text has to arrive and
/// stay as it is, since the derivation's hash is over it.
#[test]
fn trap_28_structured_attributes_travel_as_a_variable() {
    // The derivation of a client that is not trusted is stored as it came.
    let rig = Rig::new(false);
    let mut client = Raw::new(&rig, NEWEST);
    let json = r#"{ "b": [1, "x\n"], "a": {"ü": null},"name":"fixed" }"#;
    let out = add(&mut client, "fixed", "fixed:sha256", &[], b"out");
    let named = path("fixed.drv");
    let request = described(&named, "out", &out, "sha256", &hex(&sha256(b"out")));
    let request = request.text("/bin/sh").word(0).word(2).text("__json").text(json).text("out").text(&out).word(0);
    client.send(&request);
    client.done();
    // The output is there already, so nothing has to be built.
    assert_eq!((client.word(), client.text()), (2, String::new()));
    for _ in 0..6 {
        client.word();
    }
    assert_eq!(client.word(), 1);
    client.texts_n(2);
    client.goes_on();
    let stored: Vec<String> = client.all_paths().into_iter().filter(|path| path.ends_with("fixed.drv")).collect();
    assert_eq!(stored.len(), 1);
    let text = String::from_utf8(client.nar(&stored[0])).unwrap();
    let escaped = json.replace('\\', r"\\").replace('"', r#"\""#);
    assert!(text.contains(&format!(r#"("__json","{escaped}")"#)), "{text}");
}

/// Where stock's worker dies or loses step, castored says what is wrong and goes on.
#[test]
fn trap_29_what_kills_stock_is_refused_and_the_connection_goes_on() {
    let rig = Rig::new(true);
    let mut client = Raw::new(&rig, NEWEST);
    let known = add(&mut client, "known", "text:sha256", &[], b"known");
    let archive = file_nar("x");
    let refer = [known.clone()];
    for request in [
        add_to_store("name", "text:sha1", &[], b"x"),
        add_to_store("name", "text:md5", &refer, b"x"),
        add_to_store("name", "text:sha512", &[], b"x"),
        add_to_store("name", "fixed:sha256", &refer, b"x"),
        add_to_store("name", "fixed:sha1", &refer, b"x"),
        add_to_store("name", "fixed:r:sha1", &refer, &archive),
        add_to_store("name", "fixed:r:md4", &[], &archive),
        add_to_store("name", "", &[], &archive),
        op(37).text(path("nowhere")).texts([PUBLIC_KEY]),
        Claim { ca: format!("text:sha1:{}", hex(&[1; 20])), ..claim("x", &archive) }.add().framed(&archive),
        Claim {
            ca: format!("fixed:sha256:{}", hex(&sha256(b"x"))),
            references: refer.to_vec(),
            ..claim("x", &archive)
        }
        .add()
        .framed(&archive),
        op(45).text(base_name(&known)).framed("a log"),
        op(20).word(2).texts(&refer).word(0).word(u64::MAX).word(0).word(0).word(0),
    ] {
        client.send(&request);
        client.refused();
        client.goes_on();
    }
    // An untrusted client's log.
    let wary = Rig::new(false);
    let mut other = Raw::new(&wary, NEWEST);
    other.send(&op(45).text(base_name(&path("logged.drv"))).framed("a log"));
    other.refused();
    other.goes_on();
    assert_eq!(client.all_paths(), [known]);
    // Below 1.25 text cannot be asked for, but an algorithm can that does not exist.
    let mut old = Raw::new(&rig, 21);
    old.send(&op(7).text("name").word(1).word(0).text("sha3").raw(&archive));
    old.refused();
    old.goes_on();
}

/// An archive is unpacked into a tree, so its names must be single names, in order and once each; names, targets and
/// depth have bounds. Whatever breaks the rules is refused however it comes.
#[test]
fn trap_30_archives_keep_the_rules_of_names_order_and_bounds() {
    let deep = |levels: usize| {
        let innermost = file_node("deep");
        nar((1..levels).fold(innermost, |node, _| directory_node(&[("d", node)])))
    };
    let with_names =
        |names: &[&[u8]]| nar(directory_node(&names.iter().map(|name| (*name, file_node("x"))).collect::<Vec<_>>()));
    let long = vec![b'n'; 256];
    let good = [
        with_names(&[b"...", b".x", b"a", b"a b", b"b"]),
        with_names(&[&long[1..]]),
        nar(symlink_node(vec![b't'; 4095])),
        deep(64),
        nar(directory_node::<&str>(&[])),
    ];
    let inner = directory_node(&[("..", file_node("escape"))]);
    let bad = [
        with_names(&[b".."]),
        with_names(&[b"."]),
        with_names(&[b""]),
        with_names(&[b"a/b"]),
        with_names(&[b"/etc"]),
        with_names(&[b"a\0b"]),
        with_names(&[b"b", b"a"]),
        with_names(&[b"a", b"a"]),
        with_names(&[b"a", b"b", b"a"]),
        with_names(&[&long]),
        nar(directory_node(&[("a", inner)])),
        nar(symlink_node("")),
        nar(symlink_node("a\0b")),
        nar(symlink_node(vec![b't'; 4096])),
        deep(65),
    ];
    let rig = Rig::new(true);
    for minor in [18, 21, NEWEST] {
        for (n, archive) in good.iter().enumerate() {
            let claim = claim(&format!("good-{minor}-{n}"), archive);
            let mut client = Raw::new(&rig, minor);
            client.add(&claim, archive).unwrap();
            assert!(client.nar(&claim.path) == *archive);
        }
        let before = Raw::new(&rig, minor).all_paths();
        let mut client = Raw::new(&rig, minor);
        for (n, archive) in bad.iter().enumerate() {
            let claim = claim(&format!("bad-{minor}-{n}"), archive);
            assert!(client.add(&claim, archive).is_err(), "bad archive {n} at 1.{minor}");
            if minor < 21 {
                // The end of an archive that makes no sense cannot be found.
                client.closed();
                client = Raw::new(&rig, minor);
                continue;
            }
            client.goes_on();
            if minor == NEWEST {
                client.send(&add_to_store("bad", "fixed:r:sha256", &[], archive));
                client.refused();
                let many = claim.fields(Msg::default().word(1)).raw(archive);
                client.send(&op(44).word(0).word(1).framed(&many.0));
                client.refused();
                client.goes_on();
            }
        }
        assert_eq!(client.all_paths(), before);
    }
}

/// When contents turn out to be damaged while their archive is being sent, nothing can be said any more: the stream breaks
/// off, so that no client takes half an archive, or wrong bytes, for the whole.
#[test]
fn trap_30_a_damaged_archive_breaks_off() {
    let rig = Rig::new(true);
    // Many blocks, none of which can be compressed.
    let mut state = 1u64;
    let mut noise = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as u8
    };
    let contents: Vec<u8> = (0..3 << 20).map(|_| noise()).collect();
    let archive = file_nar(&contents);
    let claim = claim("damaged", &archive);
    let mut client = Raw::new(&rig, NEWEST);
    client.add(&claim, &archive).unwrap();
    rig.store.sync().unwrap();
    let mut damaged = 0;
    for pack in std::fs::read_dir(Locations::below(rig.dir()).unwrap().state_dir.join("castored/packs")).unwrap() {
        let pack = std::fs::File::options().read(true).write(true).open(pack.unwrap().path()).unwrap();
        // In the middle: what comes before is sent, and right.
        let (middle, mut byte) = (pack.metadata().unwrap().len() / 2, [0]);
        pack.read_exact_at(&mut byte, middle).unwrap();
        pack.write_all_at(&[byte[0] ^ 1], middle).unwrap();
        damaged += 1;
    }
    assert_eq!(damaged, 1);
    client.send(&op(38).text(&claim.path));
    client.done();
    let received = client.read_to_end();
    assert!(received.len() < archive.len(), "{} of {} bytes", received.len(), archive.len());
    assert!(archive.starts_with(&received), "what was sent before is not the beginning of the archive");
    // The daemon goes on.
    assert!(Raw::new(&rig, NEWEST).is_valid(&claim.path));
}

/// Names that begin with a dot are store paths, as long as the dots do not stand alone.
#[test]
fn trap_31_names_may_begin_with_a_dot() {
    let rig = Rig::new(true);
    for minor in [21, NEWEST] {
        let mut client = Raw::new(&rig, minor);
        for name in [".gitignore", ".x", "..x", "...", ".x-y", "a..", "-"] {
            client.send(&add_text(name, "dotted"));
            client.done();
            let added = client.text();
            assert!(added.ends_with(&format!("-{name}")));
            assert!(client.is_valid(&added));
        }
        for name in [".", "..", ".-x", "..-x"] {
            client.send(&add_text(name, "dots"));
            client.refused();
            client.goes_on();
            let mut other = Raw::new(&rig, minor);
            other.send(&op(1).text(format!("/nix/store/{}-{name}", "0".repeat(32))));
            other.refused();
            other.closed();
        }
    }
}

/// News of an activity that was not begun on this connection crashes clients, and so does an activity that shares its
/// number with another, or an error with a position.
#[test]
fn trap_32_activities_are_begun_before_anything_is_said_of_them() {
    let rig = Rig::new(true);
    let mut all = BTreeMap::new();
    for connection in 0..2 {
        for minor in [20, 21, 32, NEWEST] {
            let mut client = Raw::new(&rig, minor);
            let drv = derivation(&mut client, "built", &["out"], true);
            let unbuilt = derivation(&mut client, "unbuilt", &["out"], false);
            for request in [
                op(9).texts([&drv.outputs["out"]]).word(0),
                op(9).texts([format!("{}!out", drv.path)]).word(0),
                // These fail.
                op(9).texts([format!("{}!out", unbuilt.path)]).word(0),
                op(10).text(path("absent")),
            ] {
                client.send(&request);
                let mut open = Vec::new();
                let mut begun = 0;
                let failed = loop {
                    match client.said() {
                        Said::Start { id, level, kind, parent } => {
                            assert_ne!(id, 0);
                            assert!(level <= 7 && (kind == 0 || (100..=113).contains(&kind)));
                            assert!(parent == 0 || open.contains(&parent));
                            let before = all.insert(id, (connection, minor));
                            assert_eq!(before, None, "activity {id} began twice");
                            open.push(id);
                            begun += 1;
                        }
                        Said::Stop(id) => {
                            assert!(open.contains(&id), "stop of an unknown activity");
                            open.retain(|&other| other != id);
                        }
                        Said::Result { id, kind } => {
                            assert!(open.contains(&id), "result of an unknown activity");
                            assert!((100..=109).contains(&kind));
                        }
                        // That no error has a position is checked wherever one is read.
                        Said::Error { .. } => break true,
                        Said::Last => break false,
                        Said::Next(_) => {}
                        other => panic!("{other:?}"),
                    }
                };
                assert!(begun > 0);
                assert!(open.is_empty(), "left open: {open:?}");
                if !failed {
                    assert_eq!(client.word(), 1);
                }
                client.goes_on();
            }
        }
    }
}

/// Strings are bytes. Contents, names of files, arguments and links come back as they were, UTF-8 or not; and a message
/// that quotes some does not end the connection.
#[test]
fn trap_33_text_need_not_be_utf_8() {
    let odd = b"\xff\xfe\x80 \x1b[31m\xc3";
    let rig = Rig::new(true);
    for minor in [18, 21, NEWEST] {
        let mut client = Raw::new(&rig, minor);
        let archive = nar(directory_node(&[
            (&odd[..2], file_node(odd)),
            (&odd[..], symlink_node(odd)),
            (b"\xff\xff", file_node("")),
        ]));
        let claim = claim(&format!("odd-{minor}"), &archive);
        client.add(&claim, &archive).unwrap();
        assert_eq!(client.nar(&claim.path), archive);
        client.send(&add_text("odd", odd));
        client.done();
        let odd_text = client.text();
        assert_eq!(client.nar(&odd_text), file_nar(odd));
        // Settings, names and hash parts that are quoted or shown.
        let mut options = set_options(7).0;
        options.truncate(options.len() - 8);
        client.send(&Msg(options).word(2).text(odd).text(odd).text("max-jobs").text(odd));
        client.done();
        for request in [add_text(odd, "x"), op(29).text(odd)] {
            client.send(&request);
            client.refused();
            client.goes_on();
        }
        if minor >= 21 {
            let unsorted = nar(directory_node(&[(&odd[..], file_node("")), (&odd[..], file_node(""))]));
            assert!(client.add(&self::claim("unsorted", &unsorted), &unsorted).is_err());
            client.goes_on();
        }
        if minor >= 32 {
            client.send(&op(45).text(base_name(&path("odd.drv"))).framed(odd));
            client.done();
            assert_eq!(client.word(), 1);
        }
        // A link whose name is not UTF-8 keeps what it points to, and is shown as it is.
        let link = [rig.dir().to_str().unwrap().as_bytes(), b"/link-\xff"].concat();
        let file = <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(&link);
        let _ = std::fs::remove_file(file);
        std::os::unix::fs::symlink(&odd_text, file).unwrap();
        client.send(&op(12).text(&link));
        client.done();
        assert_eq!(client.word(), 1);
        client.send(&op(14));
        client.done();
        let roots: Vec<(Vec<u8>, String)> = (0..client.word()).map(|_| (client.raw_text(), client.text())).collect();
        assert!(roots.contains(&(link, odd_text)), "{roots:?}");
    }
    // What a build is made of.
    let wary = Rig::new(false);
    let mut client = Raw::new(&wary, NEWEST);
    let out = add(&mut client, "fixed", "fixed:sha256", &[], b"out");
    let request = described(&path("fixed.drv"), "out", &out, "sha256", &hex(&sha256(b"out")));
    client.send(&request.text(odd).texts([odd]).word(2).text(odd).text(odd).text("out").text(&out).word(0));
    client.done();
    assert_eq!((client.word(), client.text()), (2, String::new()));
    for _ in 0..7 {
        client.word();
    }
    client.texts_n(2);
    let stored: Vec<String> = client.all_paths().into_iter().filter(|path| path.ends_with("fixed.drv")).collect();
    let text = client.nar(&stored[0]);
    assert_eq!(text.windows(odd.len()).filter(|at| at == odd).count(), 4);
}

/// `nix build` prints and links what the results name, so a success names the outputs that were wanted; and it looks
/// its results up by the path it asked for.
#[test]
fn trap_34_results_name_the_outputs_and_the_path_that_was_asked_for() {
    let rig = Rig::new(true);
    let mut client = Raw::with_features(&rig, &["realisation-with-path-not-hash"]);
    let Drv { path: drv, outputs, .. } = derivation(&mut client, "many", &["bin", "dev", "out"], true);
    for (asked, names) in [
        (format!("{drv}!*"), vec!["bin", "dev", "out"]),
        (format!("{drv}!out"), vec!["out"]),
        (format!("{drv}!bin,dev"), vec!["bin", "dev"]),
        (drv.clone(), vec![]),
        (outputs["dev"].clone(), vec![]),
    ] {
        // The same twice has two results.
        client.send(&op(46).texts([&asked, &asked]).word(0));
        client.done();
        assert_eq!(client.word(), 2);
        for _ in 0..2 {
            assert_eq!(client.text(), asked);
            assert_eq!((client.word(), client.text()), (2, String::new()));
            for _ in 0..6 {
                client.word();
            }
            let count = client.word();
            let mut found = Vec::new();
            for _ in 0..count {
                found.push((client.text(), client.text()));
                client.texts();
            }
            let expected: Vec<_> = names.iter().map(|&name| (name.to_owned(), outputs[name].clone())).collect();
            assert_eq!(found, expected, "{asked}");
        }
        client.goes_on();
    }
    // A failure names none. (Names are a set: they come back sorted, as stock sends and compares them.)
    let asked = format!("{drv}!none,out");
    client.send(&op(46).texts([&asked]).word(0));
    client.done();
    assert_eq!((client.word(), client.text()), (1, asked));
    assert!(client.word() > 2);
    assert_ne!(client.text(), "");
    for _ in 0..6 {
        client.word();
    }
    assert_eq!(client.word(), 0);
    client.goes_on();
}

/// Up to 2.34 stock takes a request to delete the dead among some paths for one to delete all that is dead. Here it is
/// refused in the form that those clients send, and nothing is deleted.
#[test]
fn trap_35_deleting_the_dead_among_paths_deletes_nothing_else() {
    let rig = Rig::new(true);
    let archive = file_nar("dead");
    for minor in [18, 34, NEWEST] {
        // Nothing holds these but the connection that adds them.
        let mut adding = Raw::new(&rig, minor);
        for name in ["dead-one", "dead-two"] {
            adding.add(&claim(name, &archive), &archive).unwrap();
        }
        drop(adding);
        let mut client = Raw::new(&rig, minor);
        let one = path("dead-one");
        let collect = |action: u64, paths: &[&String]| {
            op(20).word(action).texts(paths).word(0).word(u64::MAX).word(0).word(0).word(0)
        };
        while {
            // The other connection has gone when both are dead.
            client.send(&collect(1, &[]));
            client.done();
            let dead = client.texts().len();
            assert_eq!((client.word(), client.word()), (0, 0));
            dead < 2
        } {}
        client.send(&collect(2, &[&one]));
        assert!(!client.refused().is_empty());
        client.goes_on();
        for name in ["dead-one", "dead-two"] {
            assert!(client.is_valid(&path(name)));
        }
        // What can be meant by it is there: these paths, or everything.
        client.send(&collect(3, &[&one]));
        client.done();
        assert_eq!(client.texts(), [one.as_str()]);
        client.word();
        assert_eq!(client.word(), 0);
        assert_eq!(client.all_paths(), [path("dead-two")]);
        client.send(&collect(2, &[]));
        client.done();
        assert!(client.texts().contains(&path("dead-two")));
        client.word();
        assert_eq!(client.word(), 0);
        assert_eq!(client.all_paths(), [""; 0]);
    }
}
