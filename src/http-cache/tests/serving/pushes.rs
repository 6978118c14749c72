//! What pushers put in, and what keeps others from it.

use std::io::Write as _;
use std::time::Duration;

use data_encoding::BASE64;
use http_cache::Limits;
use nix_compat::hash::{NarHash, sha256};
use nix_compat::signature::Signature;
use nix_compat::store_path::{StoreDir, StorePath};

use crate::rig::{Connection, Response, Rig, TOKEN, tree};

/// A path as a pusher has it.
struct Pushed {
    path: StorePath,
    nar: Vec<u8>,
    file: Vec<u8>,
    url: String,
    compression: &'static str,
}

impl Pushed {
    fn new(name: &str, nar: Vec<u8>, compression: &'static str) -> Self {
        let path = StorePath::from_parts(sha256(name.as_bytes())[..20].try_into().unwrap(), name).unwrap();
        let (file, ending) = match compression {
            "none" => (nar.clone(), ""),
            "zstd" => (zstd::encode_all(&nar[..], 1).unwrap(), ".zst"),
            other => panic!("{other}"),
        };
        let url = format!("nar/{}.nar{ending}", nix_compat::nixbase32::encode(&sha256(&file)));
        Self { path, nar, file, url, compression }
    }

    fn narinfo(&self, references: &[&StorePath]) -> String {
        let references: Vec<&str> = references.iter().map(|path| path.base_name()).collect();
        format!(
            "StorePath: /nix/store/{}\nURL: {}\nCompression: {}\nNarHash: {}\nNarSize: {}\nReferences: {}\n",
            self.path,
            self.url,
            self.compression,
            NarHash::from(sha256(&self.nar)),
            self.nar.len(),
            references.join(" ")
        )
    }

    fn narinfo_url(&self) -> String {
        format!("/{}.narinfo", self.path.hash_part())
    }
}

fn bearer() -> String {
    format!("Authorization: Bearer {TOKEN}")
}

fn put(rig: &Rig, path: &str, body: &[u8]) -> Response {
    rig.connect().put(path, &[&bearer()], body)
}

fn upload(rig: &Rig, pushed: &Pushed) -> Response {
    put(rig, &format!("/{}", pushed.url), &pushed.file)
}

#[test]
fn a_path_is_there_once_it_is_described() {
    let rig = Rig::pushing(Limits::default());
    for compression in ["none", "zstd"] {
        let pushed = Pushed::new(compression, tree(compression, 1_000_000), compression);
        let file = format!("/{}", pushed.url);
        assert_eq!(rig.connect().ask("HEAD", &file, &[]).status, 404);
        assert_eq!(upload(&rig, &pushed).status, 201);
        assert_eq!(rig.connect().ask("HEAD", &file, &[]).status, 200, "nobody has to upload it again");
        assert_eq!(rig.get(&pushed.narinfo_url()).status, 404);
        let theirs = Signature::from_parts("other-1", &[7; 64]).unwrap();
        let narinfo = format!("{}Sig: {theirs}\n", pushed.narinfo(&[&pushed.path]));
        assert_eq!(put(&rig, &pushed.narinfo_url(), narinfo.as_bytes()).status, 201);
        let info = rig.store.path_info(&pushed.path).unwrap().unwrap();
        assert!(info.signatures.into_iter().eq([theirs]), "as they were given");
        assert!(!info.ultimate && info.references.contains(&pushed.path));
        let mut nar = Vec::new();
        let entry = rig.store.shared_entry(&pushed.path).unwrap().unwrap();
        rig.store.write_nar_of(&entry.node, &mut nar).unwrap();
        assert!(nar == pushed.nar);
        // Others may have the same contents under another name; and to say it twice is no mistake.
        let again = Pushed { path: Pushed::new(&format!("{compression}-2"), Vec::new(), "none").path, ..pushed };
        for _ in 0..2 {
            assert_eq!(put(&rig, &again.narinfo_url(), again.narinfo(&[]).as_bytes()).status, 201);
        }
        assert!(rig.store.is_valid(&again.path).unwrap());
    }
}

#[test]
fn nobody_pushes_without_a_token() {
    let rig = Rig::pushing(Limits::default());
    let pushed = Pushed::new("secret", tree("secret", 100), "none");
    let basic = |password: &str| format!("Authorization: Basic {}", BASE64.encode(format!("me:{password}").as_bytes()));
    for headers in [&[][..], &["Authorization: Bearer another"], &[&basic("another")], &[&basic("")]] {
        for (path, body) in
            [(format!("/{}", pushed.url), pushed.file.clone()), (pushed.narinfo_url(), pushed.narinfo(&[]).into())]
        {
            let answer = rig.connect().put(&path, headers, &body);
            assert_eq!((answer.status, answer.header("www-authenticate")), (401, "Basic realm=\"castored\""));
        }
    }
    assert_eq!(rig.connect().ask("HEAD", &format!("/{}", pushed.url), &[]).status, 404);
    assert_eq!(rig.connect().put(&format!("/{}", pushed.url), &[&basic(TOKEN)], &pushed.file).status, 201);
    // Where nobody may push, a token is none.
    let rig = Rig::new();
    let answer = put(&rig, &format!("/{}", pushed.url), &pushed.file);
    assert_eq!((answer.status, answer.header("allow")), (405, "GET, HEAD"));
}

#[test]
fn what_is_not_as_described_is_refused() {
    let rig = Rig::pushing(Limits::default());
    let pushed = Pushed::new("right", tree("right", 1000), "none");
    let refused = |path: &str, body: &[u8], status: u16, why: &str| {
        let answer = put(&rig, path, body);
        assert_eq!(answer.status, status, "{path}: {}", answer.text());
        assert!(answer.text().contains(why), "{}", answer.text());
    };
    let (url, narinfo_url, narinfo) = (format!("/{}", pushed.url), pushed.narinfo_url(), pushed.narinfo(&[]));
    refused(&narinfo_url, narinfo.as_bytes(), 409, "upload it again");
    refused(&url, &pushed.nar[..pushed.nar.len() - 8], 400, "");
    refused(&url, &[&pushed.nar[..], b"more"].concat(), 400, "followed by other bytes");
    refused(&url, b"no archive", 400, "");
    refused(&format!("{url}.zst"), &pushed.nar, 400, "");
    refused(&format!("{url}.exe"), &pushed.nar, 405, "");
    refused("/nix-cache-info", b"StoreDir: /other\n", 405, "");
    refused(&narinfo_url, narinfo.as_bytes(), 409, "upload it again");
    assert_eq!(upload(&rig, &pushed).status, 201);
    let other = Pushed::new("other", tree("other", 1000), "none");
    let hash = |pushed: &Pushed| NarHash::from(sha256(&pushed.nar)).to_string();
    for (wrong, status, why) in [
        (narinfo.replace(&hash(&pushed), &hash(&other)), 400, "hash"),
        (narinfo.replace(&format!("NarSize: {}", pushed.nar.len()), "NarSize: 7"), 400, "size"),
        (narinfo.replace("NarSize", "NarSise"), 400, "NarSize"),
        (pushed.narinfo(&[&other.path]), 400, other.path.base_name()),
        (other.narinfo(&[]), 400, "another path"),
        (format!("{narinfo}CA: fixed:r:sha256:{}\n", &hash(&other)["sha256:".len()..]), 400, ""),
        ("x".repeat(http_cache::limits::MAX_DESCRIPTION_BYTES + 1), 413, "longer"),
    ] {
        refused(&narinfo_url, wrong.as_bytes(), status, why);
        assert!(!rig.store.is_valid(&pushed.path).unwrap(), "{wrong}");
    }
    let coded = rig.connect().put(&narinfo_url, &[&bearer(), "Content-Encoding: zstd"], narinfo.as_bytes());
    assert_eq!(coded.status, 400);
    refused(&narinfo_url, narinfo.as_bytes(), 201, "");
    assert!(rig.store.is_valid(&pushed.path).unwrap());
}

/// Begins an upload of all but the last bytes.
fn begin(rig: &Rig, pushed: &Pushed) -> Connection {
    let mut connection = rig.connect();
    let length = format!("Content-Length: {}", pushed.file.len());
    connection.send("PUT", &format!("/{}", pushed.url), &[&bearer(), &length]);
    connection.stream.write_all(&pushed.file[..pushed.file.len() - 8]).unwrap();
    connection
}

#[test]
fn an_upload_that_stops_or_breaks_off_leaves_nothing() {
    let limits = Limits { request_time: Duration::from_millis(300), ..Limits::default() };
    let rig = Rig::pushing(limits);
    let pushed = Pushed::new("slow", tree("slow", 300_000), "none");
    let mut stalled = begin(&rig, &pushed);
    drop(begin(&rig, &pushed));
    assert_eq!(stalled.receive(false).unwrap().status, 408);
    assert_eq!(put(&rig, &pushed.narinfo_url(), pushed.narinfo(&[]).as_bytes()).status, 409);
    // As many as there are places, so that one which is not given back is missed.
    for _ in 0..http_cache::limits::MAX_PUSHES {
        drop(begin(&rig, &pushed));
    }
    assert_eq!(upload(&rig, &pushed).status, 201);
    assert_eq!(put(&rig, &pushed.narinfo_url(), pushed.narinfo(&[]).as_bytes()).status, 201);
}

#[test]
fn references_come_first() {
    let rig = Rig::pushing(Limits::default());
    let inner = Pushed::new("inner", tree("inner", 10), "none");
    let outer = Pushed::new("outer", tree("outer", 10), "zstd");
    let dir = StoreDir::default();
    for pushed in [&inner, &outer] {
        assert_eq!(upload(&rig, pushed).status, 201);
    }
    let narinfo = outer.narinfo(&[&inner.path]);
    let answer = put(&rig, &outer.narinfo_url(), narinfo.as_bytes());
    assert_eq!(answer.status, 400);
    assert!(answer.text().contains(&dir.display(&inner.path)), "{}", answer.text());
    assert_eq!(put(&rig, &inner.narinfo_url(), inner.narinfo(&[]).as_bytes()).status, 201);
    assert_eq!(put(&rig, &outer.narinfo_url(), narinfo.as_bytes()).status, 201);
}
