//! What needs the `builtin:` builders: profiles, channels, downloads.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::Command;

use compat_tests::checks::expect_contains;
use compat_tests::{Call, Who};

use crate::{derivation, setup};

/// Packages that all have `bin/tool`, and one program of their own.
fn packages() -> String {
    let package = |name: &str, more: &str| {
        let script = format!("mkdir -p $out/bin; echo {name} > $out/bin/tool; echo > $out/bin/{name}");
        format!("{name} = {} // {{ {more} }};", derivation(&format!("{name}-1.0"), &script, ""))
    };
    let low = "meta = { priority = 9; };";
    format!("{{ {} {} {} }}", package("one", ""), package("two", ""), package("three", low))
}

#[test]
fn packages_are_installed_into_a_profile() {
    let Some(s) = setup("profile") else { return };
    let daemon = s.start();
    let file = s.room.write("packages.nix", packages()).unwrap();
    for release in &s.machine.releases {
        let profile = s.room.tmp(&format!("profile-{}", release.version));
        let nix_env = || Call::nix(&s.room, Who::User, release, "nix-env").arg("-p").arg(&profile).arg("-f").arg(&file);
        let read = |name: &str| fs::read_to_string(profile.join(name)).unwrap();
        nix_env().args(["-iA", "one"]).ok().unwrap();
        assert_eq!(read("bin/tool"), "one\n", "{}", release.version);
        nix_env().args(["-iA", "three"]).ok().unwrap();
        assert_eq!(read("bin/tool"), "one\n", "{}", release.version);
        assert!(profile.join("bin/three").exists() && profile.join("manifest.nix").exists());

        let refused = nix_env().args(["-iA", "two"]).fails().unwrap();
        expect_contains(&refused.stderr, "/bin/tool").unwrap();
        expect_contains(&refused.stderr, "conflict").unwrap();
        nix_env().args(["--set-flag", "priority", "4", "one"]).ok().unwrap();
        nix_env().args(["-iA", "two"]).ok().unwrap();
        assert_eq!(read("bin/tool"), "one\n", "{}", release.version);
        nix_env().args(["-e", "one"]).ok().unwrap();
        assert_eq!(read("bin/tool"), "two\n", "{}", release.version);
        assert!(!profile.join("bin/one").exists());
        nix_env().arg("--rollback").ok().unwrap();
        assert!(profile.join("bin/one").exists());
    }
    daemon.stop().unwrap();
}

#[test]
fn channels_are_updated() {
    let Some(s) = setup("channels") else { return };
    let daemon = s.start();
    s.room.write("site/exprs/default.nix", packages()).unwrap();
    let site = s.room.tmp("site");
    let mut tar = Command::new("tar");
    tar.args(["-cJf", "nixexprs.tar.xz", "exprs"]).current_dir(&site);
    assert!(tar.status().unwrap().success());
    let url = format!("file://{}", site.display());
    // Newer ones follow this way only when they find their own nix-env.
    for version in ["2.26.3", "2.34.8"] {
        let release = s.machine.release(version).unwrap();
        let call = |name: &str| {
            let bin = release.command("nix-env").parent().unwrap().to_owned();
            Call::nix(&s.room, Who::User, release, name).env("NIX_BIN_DIR", bin)
        };
        call("nix-channel").args(["--add", &url, "mine"]).ok().unwrap();
        call("nix-channel").arg("--update").ok().unwrap();
        let expression = "toString <mine>";
        let text = call("nix-instantiate").args(["--eval", "-E", expression]).ok().unwrap().text();
        let path = text.trim_matches('"').to_owned();
        assert_eq!(fs::read_to_string(format!("{path}/default.nix")).unwrap(), packages(), "{version}");
        call("nix-channel").args(["--remove", "mine"]).ok().unwrap();
    }
    daemon.stop().unwrap();
}

#[test]
fn a_file_is_fetched() {
    let Some(s) = setup("fetchurl") else { return };
    let daemon = s.start();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
            let found = lines.next().is_some_and(|line| line.starts_with("GET /file "));
            lines.by_ref().take_while(|line| !line.is_empty()).for_each(drop);
            let (status, body) = if found { ("200 OK", "fetched") } else { ("404 Not Found", "gone") };
            let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
            let _ = (&stream).write_all(format!("{head}{body}").as_bytes());
        }
    });
    let digest = |text: &[u8]| compat_tests::nar::hex(&compat_tests::nar::sha256(text));
    let fetch = |name: &str, path: &str, hash: &str| {
        format!(
            "import <nix/fetchurl.nix> {{ name = \"{name}\"; url = \"http://{address}{path}\"; sha256 = \"{hash}\"; }}"
        )
    };
    for version in ["2.26.3", "2.34.8"] {
        let name = format!("file-{version}");
        let out = s.build_with(version, &fetch(&name, "/file", &digest(b"fetched"))).ok().unwrap().text();
        assert_eq!(fs::read_to_string(out).unwrap(), "fetched", "{version}");
        // A bar lives on this: the download, how far it is, its end.
        let watched = format!("watched-{version}");
        let release = s.machine.release(version).unwrap();
        let watch = Call::nix(&s.room, Who::User, release, "nix").args(["build", "--no-link", "--impure", "--expr"]);
        let watch = watch.arg(fetch(&watched, "/file", &digest(b"fetched"))).args(["--log-format", "internal-json"]);
        let log = watch.ok().unwrap().stderr;
        let lines: Vec<&str> = log.lines().filter(|line| line.starts_with("@nix ")).collect();
        let start = format!("downloading 'http://{address}/file'");
        let started = lines.iter().find(|line| line.contains(&start) && line.contains(r#""type":101"#));
        let id = started.and_then(|line| line.split(r#""id":"#).nth(1)?.split(',').next()).expect(&log);
        let of_it = |action: &str| {
            let (action, id) = (format!(r#""action":"{action}""#), format!(r#""id":{id}"#));
            lines.iter().filter(move |line| line.contains(&action) && line.contains(&id)).collect::<Vec<_>>()
        };
        assert!(of_it("result").iter().any(|line| line.contains(r#""fields":[7,7,0,0]"#)), "{version}: {log}");
        assert_eq!(of_it("stop").len(), 1, "{version}: {log}");
        let missing = s.build_with(version, &fetch("missing", "/none", &digest(b"gone"))).fails().unwrap();
        expect_contains(&missing.stderr, &format!("unable to download 'http://{address}/none': HTTP error 404"))
            .unwrap();
        let wrong = s.build_with(version, &fetch("wrong", "/file", &digest(b"other"))).fails().unwrap();
        expect_contains(&wrong.stderr, "hash mismatch in fixed-output derivation").unwrap();
    }
    daemon.stop().unwrap();
}
