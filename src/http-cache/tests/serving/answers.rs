//! What is answered to clients of a binary cache.

use std::collections::BTreeSet;
use std::io::Write as _;

use nix_compat::narinfo::{Compression, NarInfo};
use nix_compat::realisation::{DrvOutput, Realisation};
use nix_compat::signature::Signature;
use nix_compat::store_path::{StoreDir, StorePath};
use store::SignaturePolicy;

use crate::rig::Rig;

#[test]
fn what_the_cache_says_of_itself() {
    let rig = Rig::new();
    let answer = rig.get("/nix-cache-info");
    assert_eq!((answer.status, answer.header("content-type")), (200, "text/x-nix-cache-info"));
    assert_eq!(answer.text(), "StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 30\n");
}

#[test]
fn a_narinfo_has_every_field_and_is_signed() {
    let rig = Rig::new();
    let inner = rig.add("inner", &[], 10);
    let outer = rig.add("outer", &[&inner.path], 1000);
    let theirs = Signature::from_parts("other-1", &[7; 64]).unwrap();
    rig.store.add_signatures(&outer.path, BTreeSet::from([theirs.clone()])).unwrap();
    let url = format!("/{}.narinfo", outer.path.hash_part());
    let answer = rig.get(&url);
    assert_eq!((answer.status, answer.header("content-type")), (200, "text/x-nix-narinfo"));
    let dir = StoreDir::default();
    let narinfo = NarInfo::parse(&dir, &answer.text()).unwrap();
    let valid = rig.store.path_info(&outer.path).unwrap().unwrap();
    assert_eq!((&narinfo.info.path, narinfo.info.nar_size), (&outer.path, outer.nar.len() as u64));
    assert_eq!((narinfo.info.nar_hash, &narinfo.info.references), (outer.nar_hash, &valid.references));
    assert_eq!((narinfo.compression, narinfo.file_size), (Compression::None, Some(outer.nar.len() as u64)));
    assert_eq!(narinfo.file_hash, Some(outer.nar_hash.into()));
    assert!(narinfo.info.signatures.contains(&theirs));
    assert!(narinfo.info.is_signed_by(&dir, &rig.signer.public_keys()));
    // Only told, not kept.
    assert_eq!(valid.signatures, BTreeSet::from([theirs]));

    let etag = answer.header("etag").to_owned();
    let again = rig.get_with(&url, &[&format!("If-None-Match: {etag}")]);
    assert_eq!((again.status, again.body.len(), again.header("etag")), (304, 0, etag.as_str()));
}

#[test]
fn nars_whole_and_in_part() {
    let rig = Rig::new();
    let added = rig.add("large", &[], 3 << 20);
    let url = rig.nar_url(&added);
    let size = added.nar.len();
    let whole = rig.get(&url);
    assert_eq!((whole.status, whole.header("content-length")), (200, size.to_string().as_str()));
    assert_eq!(whole.header("accept-ranges"), "bytes");
    assert!(whole.body == added.nar);
    let etag = whole.header("etag").to_owned();

    for (range, from, to) in [
        ("bytes=0-0".to_owned(), 0, 1),
        ("bytes=1000000-".to_owned(), 1_000_000, size),
        ("bytes=-500".to_owned(), size - 500, size),
        (format!("bytes=700000-{}", size * 2), 700_000, size),
    ] {
        let part = rig.get_with(&url, &[&format!("Range: {range}"), &format!("If-Range: {etag}")]);
        assert_eq!(part.status, 206, "{range}");
        assert_eq!(part.header("content-range"), format!("bytes {from}-{}/{size}", to - 1));
        assert!(part.body == added.nar[from..to], "{range}");
    }
    let beyond = rig.get_with(&url, &[&format!("Range: bytes={size}-")]);
    assert_eq!((beyond.status, beyond.header("content-range")), (416, format!("bytes */{size}").as_str()));
    // Of what was there before, a part is of no use.
    let other = rig.get_with(&url, &["Range: bytes=5-", "If-Range: \"other\""]);
    assert!(other.status == 200 && other.body == added.nar);
    assert_eq!(rig.get_with(&url, &[&format!("If-None-Match: {etag}")]).status, 304);
}

#[test]
fn nars_compressed() {
    let rig = Rig::new();
    let added = rig.add("large", &[], 3 << 20);
    let url = rig.nar_url(&added);
    for (url, headers, coding) in
        [(format!("{url}.zst"), &[][..], ""), (url.clone(), &["Accept-Encoding: gzip, zstd"][..], "zstd")]
    {
        let answer = rig.get_with(&url, headers);
        assert_eq!((answer.status, answer.header("content-encoding"), answer.whole), (200, coding, true));
        assert!(answer.body.len() < added.nar.len());
        assert!(zstd::stream::decode_all(&answer.body[..]).unwrap() == added.nar);
    }
    // A part is one of the NAR itself.
    let part = rig.get_with(&url, &["Accept-Encoding: zstd", "Range: bytes=100-199"]);
    assert_eq!((part.status, part.header("content-encoding")), (206, ""));
    assert!(part.body == added.nar[100..200]);
}

#[test]
fn a_listing_says_where_contents_lie_in_the_nar() {
    let rig = Rig::new();
    let added = rig.add("listed", &[], 700_000);
    let answer = rig.get(&format!("/{}.ls", added.path.hash_part()));
    assert_eq!((answer.status, answer.header("content-type")), (200, "application/json"));
    let listing: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
    let run = &listing["root"]["entries"]["bin"]["entries"]["run"];
    let data = &listing["root"]["entries"]["data"];
    let at = |file: &serde_json::Value| file["narOffset"].as_u64().unwrap() as usize;
    let expected = serde_json::json!({
        "root": { "type": "directory", "entries": {
            "bin": { "type": "directory", "entries": {
                "run": { "type": "regular", "size": 6, "executable": true, "narOffset": at(run) } } },
            "data": { "type": "regular", "size": 700_000, "narOffset": at(data) },
            "link": { "type": "symlink", "target": "bin/run" },
        } },
        "version": 1,
    });
    assert_eq!(listing, expected);
    assert_eq!(&added.nar[at(run)..][..6], b"listed");
    let contents: Vec<u8> = (0..700_000usize).map(|i| (i * i / 7) as u8).collect();
    assert!(added.nar[at(data)..][..700_000] == contents);
}

#[test]
fn logs_however_they_are_kept() {
    let rig = Rig::new();
    // A log outlives its derivation.
    let [packed, plain, none] = ["packed", "plain", "none"]
        .map(|name| StorePath::from_base_name(&format!("h6haz8fcxqy67i7c7n03iwh4jx13hhxx-{name}.drv")).unwrap());
    let log_dir = rig.dir.path().join("log");
    let file = |path, compressed| {
        let file = build::log::LogFile::path(&log_dir, path, compressed);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::File::create(file).unwrap()
    };
    let mut encoder = bzip2::write::BzEncoder::new(file(&packed, true), bzip2::Compression::fast());
    encoder.write_all(b"packed\n<b>").unwrap();
    encoder.finish().unwrap();
    file(&plain, false).write_all(b"plain\n").unwrap();
    for (path, text) in [(&packed, "packed\n<b>"), (&plain, "plain\n")] {
        let answer = rig.get(&format!("/log/{path}"));
        assert_eq!((answer.status, answer.header("content-type")), (200, "text/plain; charset=utf-8"));
        assert_eq!((answer.text().as_str(), answer.header("x-content-type-options")), (text, "nosniff"));
    }
    assert_eq!(rig.get(&format!("/log/{}", none)).status, 404);
}

#[test]
fn realisations_are_signed() {
    let rig = Rig::new();
    let out = rig.add("out", &[], 1);
    let id = DrvOutput::Modulo { hash: [0xab; 32], output: "out".parse().unwrap() };
    let known = Realisation::new(id.clone(), out.path.clone());
    rig.store.register_realisation(&known, SignaturePolicy::DontCheck).unwrap();
    let answer = rig.get(&format!("/realisations/{id}.doi"));
    assert_eq!((answer.status, answer.header("content-type")), (200, "application/json"));
    let told = Realisation::from_json(&answer.text()).unwrap();
    assert_eq!((&told.id, &told.out_path), (&id, &out.path));
    assert!(told.is_signed_by(&rig.signer.public_keys()));
    let other = DrvOutput::Modulo { hash: [1; 32], output: "out".parse().unwrap() };
    assert_eq!(rig.get(&format!("/realisations/{other}.doi")).status, 404);
}

#[test]
fn what_is_not_here_and_what_is_not_read() {
    let rig = Rig::new();
    let added = rig.add("here", &[], 1);
    let url = rig.nar_url(&added);
    let hash = added.path.hash_part();
    let other = "0".repeat(32);
    for path in [
        format!("/{other}.narinfo"),
        format!("/{other}.ls"),
        format!("/{hash}-other"),
        // A NAR that is not what a narinfo was about.
        format!("/nar/{hash}-{}.nar", "0".repeat(52)),
        url.replace(hash, &other),
        "/../etc/passwd".to_owned(),
        "/x".to_owned(),
    ] {
        let answer = rig.get(&path);
        assert_eq!((answer.status, answer.header("content-type")), (404, "text/plain; charset=utf-8"), "{path}");
        assert_eq!(answer.text(), "there is no such thing here\n");
    }
    for method in ["PUT", "POST", "DELETE"] {
        let answer = rig.connect().ask(method, &url, &["Content-Length: 0"]);
        assert_eq!((answer.status, answer.header("allow")), (405, "GET, HEAD"));
    }
}

#[test]
fn head_is_get_without_a_body() {
    let rig = Rig::new();
    let added = rig.add("here", &[], 100);
    let hash = added.path.hash_part();
    let url = rig.nar_url(&added);
    let mut connection = rig.connect();
    for path in ["/nix-cache-info", &format!("/{hash}.narinfo"), &url, &format!("/{hash}.ls"), "/", "/x"] {
        let head = connection.ask("HEAD", path, &[]);
        let get = connection.ask("GET", path, &[]);
        assert!(head.body.is_empty() && !get.body.is_empty());
        let of = |name: &str| (head.header(name).to_owned(), get.header(name).to_owned());
        assert_eq!(head.status, get.status, "{path}");
        for name in ["etag", "content-type", "content-length"] {
            let (one, other) = of(name);
            assert_eq!(one, other, "{path} {name}");
        }
    }
}

#[test]
fn what_is_damaged_is_cut_off_and_told() {
    let rig = Rig::new();
    let added = rig.add("damaged", &[], 3 << 20);
    let url = rig.nar_url(&added);
    let told = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let listener = told.clone();
    rig.store.on_damage(std::sync::Arc::new(move |_| listener.store(true, std::sync::atomic::Ordering::SeqCst)));
    rig.store.sync().unwrap();
    let packs = rig.dir.path().join("castored/packs");
    let mut damaged = 0;
    for pack in std::fs::read_dir(packs).unwrap() {
        let path = pack.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle..].iter_mut().take(4096).for_each(|byte| *byte ^= 0x55);
        std::fs::write(path, bytes).unwrap();
        damaged += 1;
    }
    assert!(damaged > 0);
    let mut connection = rig.connect();
    connection.send("GET", &url, &[]);
    // An error where it fails at once; later, what is on its way may be lost, but never is it whole.
    let answer = connection.receive(false);
    assert!(answer.is_none_or(|answer| answer.status == 500 || !answer.whole));
    assert!(told.load(std::sync::atomic::Ordering::SeqCst));
}
