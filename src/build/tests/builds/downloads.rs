//! `builtin:fetchurl` and `builtin:unpack-channel`.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix_compat::content_address::{ContentAddress, Method};
use nix_compat::derivation::{Output, OutputName};
use nix_compat::hash::{Algorithm, Hash};
use nix_compat::nar::NarWriter;
use nix_compat::worker::BuildStatus;
use nix_compat::worker::stderr::{ActivityKind, Field, Message, ResultKind, Verbosity};

use crate::rig::{Draft, Rig};
use crate::server::{Server, moved, ok, response};

/// A derivation that fetches what has this hash.
fn fetch(rig: &Rig, name: &str, url: &str, method: Method, hash: Hash) -> Draft {
    let mut draft = rig.builtin("fetchurl", name).env("url", url);
    let path = nix_compat::store_path::fixed_output_path(rig.store.store_dir(), name, method, &hash).unwrap();
    draft.outputs.insert(OutputName::default(), Output::Fixed { path, ca: ContentAddress { method, hash } });
    draft
}

fn file(rig: &Rig, name: &str, url: &str, contents: &[u8]) -> Draft {
    fetch(rig, name, url, Method::Flat, Hash::of(Algorithm::Sha256, contents))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_fetched() {
    let Some(rig) = Rig::new() else { return };
    let server = Server::new(|request, _| match request.split(' ').nth(1).unwrap() {
        "/first/x" => moved("../second?a=b#c"),
        "/second?a=b" => ok(b"the contents"),
        _ => response("404 Not Found", "", b"there is nothing"),
    });
    let (drv, log) = rig.succeed(&file(&rig, "file", &server.url("/first/x"), b"the contents"), &[]).await;
    assert_eq!(rig.read(&rig.output(&drv, "out")), "the contents");
    assert_eq!(log.lines(), [""; 0]);
    let requests = server.requests();
    assert_eq!(requests.len(), 2);
    assert!(requests[0].to_lowercase().contains("\r\nuser-agent: curl/8 castored/"), "{requests:?}");

    let (_, log) = rig.fail(&file(&rig, "none", &server.url("/none"), b"x"), &[]).await;
    let error = format!("error: unable to download '{}': HTTP error 404", server.url("/none"));
    assert_eq!(log.lines(), [&error, "       ", "       response body:", "       ", "       there is nothing"]);
    assert_eq!(server.requests().len(), 3, "what is not there was asked for again");

    let (result, _) = rig.fail(&file(&rig, "other", &server.url("/first/x"), b"other contents"), &[]).await;
    assert_eq!(result.status, BuildStatus::OutputRejected);
    assert!(result.error.starts_with("hash mismatch in fixed-output derivation '"), "{}", result.error);

    let unfixed = rig.builtin("fetchurl", "unfixed").env("url", &server.url("/first/x"));
    let (_, log) = rig.fail(&unfixed, &[]).await;
    assert_eq!(log.lines(), ["error: 'builtin:fetchurl' must be a fixed-output or impure derivation"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_for_a_moment_is_tried_again() {
    let Some(rig) = Rig::new() else { return };
    // Busy, then only half of it, then the rest.
    let server = Server::new(|request, before| match before {
        0 => response("503 Service Unavailable", "", b"busy"),
        1 => b"HTTP/1.1 200 OK\r\nAccept-Ranges: bytes\r\nETag: \"v1\"\r\nContent-Length: 8\r\n\r\nfour".to_vec(),
        _ if request.to_lowercase().contains("\r\nrange: bytes=4-\r\n") && request.contains("\"v1\"") => {
            response("206 Partial Content", "Content-Range: bytes 4-7/8\r\n", b"more")
        }
        _ => response("400 Bad Request", "", request.as_bytes()),
    });
    let (drv, log) = rig.succeed(&file(&rig, "flaky", &server.url("/x"), b"fourmore"), &[]).await;
    assert_eq!(rig.read(&rig.output(&drv, "out")), "fourmore");
    let lines = log.lines();
    assert_eq!(lines[0], format!("warning: unable to download '{}': HTTP error 503", server.url("/x")));
    assert!(lines[4].starts_with("busy; retrying in ") && lines[4].ends_with(" ms (attempt 1/5)"), "{lines:?}");
    assert!(lines[5].contains("; retrying from offset 4 in ") && lines[5].ends_with(" (attempt 2/5)"), "{lines:?}");

    // A server that does not go on from where it stopped begins anew.
    let server = Server::new(|_, before| match before {
        0 => b"HTTP/1.1 200 OK\r\nAccept-Ranges: bytes\r\nContent-Length: 8\r\n\r\nxxxxxx".to_vec(),
        _ => ok(b"all of it"),
    });
    let (drv, _) = rig.succeed(&file(&rig, "again", &server.url("/x"), b"all of it"), &[]).await;
    assert_eq!(rig.read(&rig.output(&drv, "out")), "all of it");

    let server = Server::new(|_, _| response("503 Service Unavailable", "", b""));
    rig.fail(&file(&rig, "busy", &server.url("/x"), b"x"), &[("download-attempts", "2")]).await;
    assert_eq!(server.requests().len(), 2);

    let server = Server::new(|_, _| Vec::new());
    let start = Instant::now();
    let settings = [("download-attempts", "1"), ("stalled-download-timeout", "1")];
    let (_, log) = rig.fail(&file(&rig, "silent", &server.url("/x"), b"x"), &settings).await;
    assert!(start.elapsed() < Duration::from_secs(10));
    assert!(log.lines()[0].contains("timeout"), "{:?}", log.lines());

    let server = Server::new(|_, before| moved(&format!("/{before}")));
    rig.fail(&file(&rig, "circle", &server.url("/x"), b"x"), &[]).await;
    assert_eq!(server.requests().len(), 11);

    let server = Server::new(|_, _| moved("file:///etc/passwd"));
    let (_, log) = rig.fail(&file(&rig, "local", &server.url("/x"), b"x"), &[]).await;
    let error = format!("error: unable to download '{}': Protocol \"file\" not supported", server.url("/x"));
    assert_eq!(log.lines(), [error]);
}

#[tokio::test(flavor = "multi_thread")]
async fn mirrors_are_asked_by_hash_first() {
    let Some(rig) = Rig::new() else { return };
    let digest = Hash::of(Algorithm::Sha256, b"mirrored").to_base16();
    let path = format!("GET /m/sha256/{digest} ");
    let mirror = Server::new(move |request, _| match request.starts_with(&path) {
        true => ok(b"mirrored"),
        false => response("404 Not Found", "", b""),
    });
    let server = Server::new(|_, _| ok(b"original"));
    let mirrors = [mirror.url("/none/"), mirror.url("/m")].join(" ");
    let settings = [("hashed-mirrors", mirrors.as_str())];
    rig.succeed(&file(&rig, "mirrored", &server.url("/x"), b"mirrored"), &settings).await;
    assert_eq!((mirror.requests().len(), server.requests().len()), (2, 0));
    rig.succeed(&file(&rig, "original", &server.url("/x"), b"original"), &settings).await;
    assert_eq!((mirror.requests().len(), server.requests().len()), (4, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn passwords_go_to_their_host_only() {
    let Some(rig) = Rig::new() else { return };
    let other = Server::new(|_, _| ok(b"secret"));
    let elsewhere = format!("http://localhost:{}/x", other.address.port());
    let server = Server::new(move |_, _| moved(&elsewhere));
    let netrc = rig.path("netrc");
    std::fs::write(&netrc, "machine 127.0.0.1 login me password secret\n").unwrap();
    std::fs::set_permissions(&netrc, std::fs::Permissions::from_mode(0o600)).unwrap();
    let settings = [("netrc-file", netrc.to_str().unwrap())];
    rig.succeed(&file(&rig, "secret", &server.url("/x"), b"secret"), &settings).await;
    // `me:secret`
    assert!(server.requests()[0].to_lowercase().contains("\r\nauthorization: basic bwu6c2vjcmv0\r\n"));
    assert!(!other.requests()[0].to_lowercase().contains("authorization"), "{:?}", other.requests());
    rig.succeed(&file(&rig, "again", &other.url("/x").replace("//", "//me:secret@"), b"secret"), &[]).await;
    assert!(other.requests()[1].to_lowercase().contains("\r\nauthorization: basic bwu6c2vjcmv0\r\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_verified() {
    let Some(rig) = Rig::new() else { return };
    let (server, certificate) = Server::with_tls(|_, _| ok(b"over TLS"));
    let port = server.address.port();
    let draft = |name: &str, host: &str| file(&rig, name, &format!("https://{host}:{port}/x"), b"over TLS");
    // The hash would be right, but whoever answers is not who was asked.
    for settings in [&[][..], &[("ssl-cert-file", "/no/such/file")]] {
        let (_, log) = rig.fail(&draft("unknown", "localhost"), settings).await;
        assert_eq!(log.lines().len(), 1, "it was tried again: {:?}", log.lines());
        assert!(log.lines()[0].contains("invalid peer certificate: UnknownIssuer"), "{:?}", log.lines());
    }
    assert!(server.requests().is_empty(), "a request was sent before the server was known");

    let file = rig.path("certificates.pem");
    std::fs::write(&file, certificate).unwrap();
    let settings = [("ssl-cert-file", file.to_str().unwrap())];
    let (drv, _) = rig.succeed(&draft("known", "localhost"), &settings).await;
    assert_eq!(rig.read(&rig.output(&drv, "out")), "over TLS");
    let (_, log) = rig.fail(&draft("other", "127.0.0.1"), &settings).await;
    assert!(log.lines()[0].contains("certificate not valid for name"), "{:?}", log.lines());
}

#[tokio::test(flavor = "multi_thread")]
async fn archives_and_programs() {
    let Some(rig) = Rig::new() else { return };
    let mut nar = NarWriter::new(Vec::new());
    nar.enter_directory().unwrap();
    nar.entry(b"dir").unwrap();
    nar.enter_directory().unwrap();
    nar.entry(b"prog").unwrap();
    nar.regular_header(true, 2).unwrap();
    nar.contents(b"#!").unwrap();
    nar.end_regular().unwrap();
    nar.leave_directory().unwrap();
    nar.entry(b"link").unwrap();
    nar.symlink(b"/etc/passwd").unwrap();
    nar.leave_directory().unwrap();
    let nar = nar.finish().unwrap();
    let hash = Hash::of(Algorithm::Sha256, &nar);
    let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 6);
    xz.write_all(&nar).unwrap();
    let (xz, plain) = (xz.finish().unwrap(), nar.clone());
    let server = Server::new(move |request, _| match request.split(' ').nth(1).unwrap() {
        "/a.nar.xz" => ok(&xz),
        "/a.nar" => ok(&plain),
        "/short" => ok(&plain[..plain.len() - 8]),
        _ => ok(b"#!"),
    });
    for (name, path) in [("packed", "/a.nar.xz"), ("plain", "/a.nar")] {
        let draft = fetch(&rig, name, &server.url(path), Method::Nar, hash).env("unpack", "1");
        let (drv, _) = rig.succeed(&draft, &[]).await;
        let out = rig.store.store_dir().display(&rig.output(&drv, "out"));
        assert_eq!(std::fs::read_to_string(format!("{out}/dir/prog")).unwrap(), "#!");
        assert_eq!(std::fs::read_link(format!("{out}/link")).unwrap(), Path::new("/etc/passwd"));
    }
    let draft = fetch(&rig, "short", &server.url("/short"), Method::Nar, hash).env("unpack", "1");
    let (_, log) = rig.fail(&draft, &[]).await;
    assert!(log.lines()[0].starts_with("error: cannot unpack the download: NAR ends early"), "{:?}", log.lines());

    let mut nar = NarWriter::new(Vec::new());
    nar.regular_header(true, 2).unwrap();
    nar.contents(b"#!").unwrap();
    nar.end_regular().unwrap();
    let hash = Hash::of(Algorithm::Sha256, &nar.finish().unwrap());
    let draft = fetch(&rig, "program", &server.url("/p"), Method::Nar, hash).env("executable", "1");
    rig.succeed(&draft, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_the_machine_only_without_a_sandbox() {
    let Some(rig) = Rig::new() else { return };
    let path = rig.path("a file");
    std::fs::write(&path, "local").unwrap();
    let url = format!("file://{}", path.to_str().unwrap().replace(' ', "%20"));
    let (_, log) = rig.fail(&file(&rig, "local", &url, b"local"), &[]).await;
    let error = format!("error: unable to download '{url}': Could not open file {}: ", path.display());
    assert!(log.lines()[0].starts_with(&error), "{:?}", log.lines());
    rig.succeed(&file(&rig, "local", &url, b"local"), &[("sandbox", "false")]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn channels_are_unpacked() {
    let Some(rig) = Rig::new() else { return };
    let tarball = |names: &[&str]| {
        let mut builder = tar::Builder::new(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast()));
        for name in names {
            let mut header = tar::Header::new_gnu();
            header.set_size(3);
            header.set_mode(0o644);
            builder.append_data(&mut header, name, &b"nix"[..]).unwrap();
        }
        builder.into_inner().unwrap().finish().unwrap()
    };
    let draft = |name: &str, names: &[&str], channel: &str| {
        let mut tarball = &tarball(names)[..];
        let options = store::AddOptions {
            name: format!("{name}.tar.gz"),
            method: Method::Flat,
            algorithm: Algorithm::Sha256,
            references: Default::default(),
        };
        let source = rig.store.add(&options, &mut tarball).unwrap().path;
        let mut draft = rig.builtin("unpack-channel", name).env("channelName", channel);
        draft = draft.env("src", &rig.store.store_dir().display(&source));
        draft.sources.insert(source);
        draft
    };
    let (drv, _) = rig.succeed(&draft("good", &["nixexprs-1/default.nix", "nixexprs-1/lib/x"], "mine"), &[]).await;
    let out = rig.store.store_dir().display(&rig.output(&drv, "out"));
    assert_eq!(std::fs::read_to_string(format!("{out}/mine/lib/x")).unwrap(), "nix");
    assert_eq!(std::fs::read_dir(&out).unwrap().count(), 1);

    for (name, names, channel, error) in [
        ("two", &["a/x", "b/x"][..], "mine", "contains more than one file"),
        ("empty", &[], "mine", "is empty"),
        ("up", &["a/x"], "../mine", "channelName is not allowed to contain filesystem separators, got ../mine"),
        ("dots", &["a/x"], "..", "channelName is not allowed to contain filesystem separators, got .."),
    ] {
        let (_, log) = rig.fail(&draft(name, names, channel), &[]).await;
        assert!(log.lines()[0].starts_with("error: ") && log.lines()[0].ends_with(error), "{:?}", log.lines());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn downloads_are_activities() {
    let Some(rig) = Rig::new() else { return };
    let server = Server::new(|_, _| ok(b"the contents"));
    let url = server.url("/x");
    let (_, log) = rig.succeed(&file(&rig, "shown", &url, b"the contents"), &[]).await;
    let (mut build, mut transfer, mut news) = (0, 0, Vec::new());
    for message in log.messages() {
        match message {
            Message::StartActivity { id, kind: ActivityKind::Build, .. } => build = id,
            Message::StartActivity { id, kind: ActivityKind::FileTransfer, level, text, fields, parent } => {
                let named = vec![Field::Text(url.clone().into_bytes())];
                assert_eq!((level, parent, fields), (Verbosity::Talkative, build, named));
                assert_eq!(text, format!("downloading '{url}'").into_bytes());
                transfer = id;
            }
            Message::Result { id, kind, fields } if id == transfer => news.push((kind, fields)),
            _ => {}
        }
    }
    assert!(build > 0 && transfer > 0, "{:?}", log.messages());
    assert_eq!(news.last(), Some(&(ResultKind::Progress, [12, 12, 0, 0].map(Field::Int).to_vec())));
    assert!(log.lines().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_any_builder_may_tell_clients() {
    let Some(rig) = Rig::new() else { return };
    let say = |message: &str| format!("echo '@nix {message}';");
    let script = [
        r#"{"action":"start","id":1,"level":3,"type":101,"text":"fetching a","fields":["a"]}"#,
        r#"{"action":"start","id":1,"level":3,"type":101,"text":"the same again","fields":["b"]}"#,
        r#"{"action":"start","id":2,"level":0,"type":105,"text":"building what it does not"}"#,
        r#"{"action":"result","id":1,"type":105,"fields":[1,2,0,0]}"#,
        r#"{"action":"result","id":2,"type":101,"fields":["a line of another build"]}"#,
        r#"{"action":"msg","level":1,"msg":"a warning"}"#,
        r#"{"action":"msg","level":5,"msg":"what few want to know"}"#,
        r#"{"action":"result","id":1,"type":105}"#,
        r#"{"action":"start","id":3,"level":3,"type":101,"text":"fetching c","fields":["c"]}"#,
        r#"{"action":"stop","id":3}"#,
        r#"{"action":"stop","id":9}"#,
        "nonsense",
    ];
    let script = script.iter().map(|message| say(message)).collect::<String>();
    let (_, log) = rig.succeed(&rig.derivation("talker", &format!("{script} echo > $out")), &[]).await;
    let texts: Vec<String> = log
        .messages()
        .iter()
        .filter_map(|message| match message {
            Message::StartActivity { kind: ActivityKind::FileTransfer, text, .. } => {
                Some(String::from_utf8_lossy(text).into_owned())
            }
            _ => None,
        })
        .collect();
    assert_eq!(texts, ["fetching a", "fetching c"]);
    assert_eq!(log.builds().len(), 1);
    assert_eq!(log.lines(), ["@nix nonsense"]);
    let notes = log.notes();
    assert_eq!((notes.len(), notes[0].as_str()), (2, "a warning"));
    assert!(notes[1].starts_with("bad JSON log message from the derivation builder: "), "{notes:?}");
}
