//! Stock clients that run in a build and use the store from there.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use compat_tests::call::without_escapes;
use compat_tests::checks::expect_contains;
use compat_tests::subject::default_conf;
use compat_tests::wire::{Client, Request};
use compat_tests::{Call, Error, Who};

use crate::{castored_setup, derivation, setup};

/// With one place for builds, which the outer one has.
fn conf(prefix: &str) -> String {
    default_conf()
        .replace("sandbox-paths = ", &format!("sandbox-paths = {prefix} "))
        .replace("max-jobs = 2", "max-jobs = 1")
        .replace("experimental-features = ", "experimental-features = recursive-nix ")
}

fn builds_with_a_client_inside(version: &str) {
    let Some(s) = setup(&format!("recursive-{version}")) else { return };
    let release = s.machine.release(version).unwrap();
    let prefix = release.prefix.display().to_string();
    let daemon = s.subject.start_with(&s.room, &conf(&prefix)).unwrap();
    let source = s.room.write("source", "the source\n").unwrap();
    let secret = s.room.write("secret", "a secret\n").unwrap();
    let secret = s.nix(Who::User, "nix-store").arg("--add").arg(&secret).ok().unwrap().text();
    let inner = "derivation { name = \"inner\"; system = \"x86_64-linux\"; builder = \"/bin/sh\"; \
                 args = [ \"-c\" \"read l < $src; echo inner $l > $out\" ]; src = builtins.toFile \"text\" \"text\\n\"; }";
    let script = format!(
        "
        set -e
        nix=\"{prefix}/bin/nix --extra-experimental-features nix-command\"
        export HOME=$PWD NIX_CONF_DIR=$PWD
        [ $NIX_REMOTE = unix:///build/.nix-socket ]
        $nix path-info $src
        if $nix path-info {secret}; then echo knows the secret; exit 1; fi
        if $nix store dump-path {secret} > dumped; then echo has the secret; exit 1; fi
        if $nix build --no-link {secret}; then echo builds the secret; exit 1; fi
        if [ -e {secret} ]; then echo sees the secret; exit 1; fi
        echo added > file
        added=$($nix store add-path ./file)
        read line < $added
        [ $line = added ]
        built=$($nix build --impure --no-link --print-out-paths --expr '{inner}')
        read line < $built
        [ \"$line\" = \"inner text\" ]
        mkdir $out
        $nix path-info --all | cut -c 45- | sort > $out/all
        ln -s $added $out/added
        ln -s $built $out/built
        ln -s {secret} $out/secret
        if $nix store gc; then :; fi
        [ -e $added ]"
    );
    let more = format!("requiredSystemFeatures = [ \"recursive-nix\" ]; src = {};", source.display());
    let out = s.build(&derivation("outer", &script, &more)).ok().unwrap().text();
    assert_eq!(fs::read_to_string(format!("{out}/added")).unwrap(), "added\n");
    assert_eq!(fs::read_to_string(format!("{out}/built")).unwrap(), "inner text\n");
    let mut references = s.nix(Who::User, "nix-store").args(["-q", "--references", &out]).ok().unwrap().lines();
    references.sort();
    let target = |name: &str| fs::read_link(format!("{out}/{name}")).unwrap().display().to_string();
    let mut expected = [target("added"), target("built")];
    expected.sort();
    assert_eq!(references, expected, "what it has added and built, and not what it only knew the name of");
    let all = fs::read_to_string(format!("{out}/all")).unwrap();
    assert_eq!(all.lines().collect::<Vec<_>>(), ["file", "inner", "inner.drv", "source", "text"]);
    // Without the feature it is as in stock: nothing here can build it.
    daemon.stop().unwrap();
    let daemon = s.subject.start_with(&s.room, &conf(&prefix).replace("recursive-nix ", "")).unwrap();
    let more = "requiredSystemFeatures = [ \"recursive-nix\" ];";
    let refused = s.build(&derivation("refused", "echo > $out", more)).fails().unwrap();
    expect_contains(&refused.stderr, "recursive-nix").unwrap();
    Call::nix(&s.room, Who::User, release, "nix-store").args(["--check-validity", &out]).ok().unwrap();
    daemon.stop().unwrap();
}

#[test]
fn a_build_uses_the_store_with_nix_2_26() {
    builds_with_a_client_inside("2.26.3");
}

#[test]
fn a_build_uses_the_store_with_nix_2_34() {
    builds_with_a_client_inside("2.34.8");
}

/// The sockets of running builds.
fn sockets() -> Vec<PathBuf> {
    let mut todo = vec![PathBuf::from("/nix/var/nix/builds"), PathBuf::from("/nix/var/nix/castored/builds")];
    let mut found = Vec::new();
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.file_name() == ".nix-socket" {
                found.push(entry.path());
            }
            // Not into what the build itself has made.
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                todo.push(entry.path());
            }
        }
    }
    found
}

/// Connects to a socket whose file has been seen: it is there a moment before anybody listens.
fn connect(socket: &Path) -> UnixStream {
    let given_up = Instant::now() + Duration::from_secs(5);
    loop {
        match UnixStream::connect(socket) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused && Instant::now() < given_up => {
                thread::sleep(Duration::from_millis(10));
            }
            connected => return connected.unwrap(),
        }
    }
}

/// What a request is answered: its error, or that there is none.
fn answer(socket: &Path, request: Request) -> String {
    let mut client = Client::new(connect(socket)).unwrap();
    assert!(!client.trusted);
    client.send(&request.0).unwrap();
    match client.finish() {
        Ok(()) => "answered".into(),
        Err(Error::Refused(text)) => without_escapes(&text),
        Err(other) => other.to_string(),
    }
}

#[test]
fn what_a_build_may_not_ask_for_is_refused_in_stocks_words() {
    let Some(s) = setup("recursive-refusals") else { return };
    let daemon = s.subject.start_with(&s.room, &conf("")).unwrap();
    let secret = s.room.write("secret", "a secret\n").unwrap();
    let secret = s.nix(Who::User, "nix-store").arg("--add").arg(&secret).ok().unwrap().text();
    let expression = derivation(
        "outer",
        "while [ ! -e go ]; do sleep 0.05; done; echo > $out",
        "requiredSystemFeatures = [ \"recursive-nix\" ];",
    );
    let building = s.build(&expression).spawn().unwrap();
    let start = Instant::now();
    let socket = loop {
        // The socket is there before anybody answers; who connects then waits.
        if let Some(socket) = sockets().pop() {
            break socket;
        }
        assert!(start.elapsed() < Duration::from_secs(30), "no socket");
        std::thread::sleep(Duration::from_millis(20));
    };
    let path = |op: u64| Request::numbered(op).string(&secret);
    let unknown = |what: &str| format!("cannot {what} unknown path '{secret}' in recursive Nix");
    let invalid = format!("path '{secret}' is not valid");
    let unbuildable = format!("cannot build '{secret}' in recursive Nix because path is unknown");
    // Stock notices when it has begun to answer, and closes the connection.
    let undumpable = if s.subject.is_stock() { "answered".to_owned() } else { unknown("dump") };
    let answered = "answered";
    let collect = |ignore: u64| {
        Request::numbered(20).word(2).strings::<&str>(&[]).word(ignore).word(u64::MAX).word(0).word(0).word(0)
    };
    let mut wrong = Vec::new();
    for (name, request, expected) in [
        ("IsValidPath", path(1), answered),
        ("QueryReferrers", path(6), answered),
        ("BuildPaths", Request::numbered(9).strings(&[&secret]).word(0), &unbuildable),
        ("BuildPaths, check", Request::numbered(9).strings::<&str>(&[]).word(2), "unsupported build mode"),
        ("EnsurePath", path(10), &unknown("substitute")),
        ("AddTempRoot", path(11), answered),
        ("AddIndirectRoot", Request::numbered(12).string("/tmp/link"), answered),
        ("SyncWithGC", Request::numbered(13), answered),
        ("FindRoots", Request::numbered(14), answered),
        ("QueryDeriver", path(18), &invalid),
        ("CollectGarbage", collect(0), answered),
        ("CollectGarbage, alive", collect(1), "you are not allowed to ignore liveness"),
        ("QueryAllValidPaths", Request::numbered(23), answered),
        ("QueryPathInfo", path(26), answered),
        ("QueryValidPaths", Request::numbered(31).strings(&[&secret]).word(0), answered),
        ("QueryValidDerivers", path(33), answered),
        ("OptimiseStore", Request::numbered(34), answered),
        ("VerifyStore", Request::numbered(35).word(1).word(0), answered),
        ("VerifyStore, repair", Request::numbered(35).word(1).word(1), "you are not privileged to repair paths"),
        ("AddSignatures", path(37).strings::<&str>(&[]), "operation 'addSignatures' is not supported by store 'local'"),
        ("NarFromPath", path(38), &undumpable),
        ("QueryMissing", Request::numbered(40).strings(&[&secret]), answered),
        ("QueryDerivationOutputMap", path(41), &unknown("query output map for")),
        ("BuildPathsWithResults", Request::numbered(46).strings(&[&secret]).word(0), &unbuildable),
    ] {
        let answer = answer(&socket, request);
        if answer != expected {
            wrong.push(format!("{name}: {answer}\n  instead of: {expected}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    fs::write(socket.with_file_name("go"), "").unwrap();
    let output = building.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    daemon.stop().unwrap();
}

/// Two builds that run, and want each other: whoever closes the circle is told at once, and the other one goes on.
#[test]
fn builds_that_wait_for_each_other_are_told() {
    let Some(s) = castored_setup("recursive-circle") else { return };
    let daemon = s.subject.start_with(&s.room, &conf("").replace("max-jobs = 1", "max-jobs = 2")).unwrap();
    let script = "echo $name > which; while [ ! -e go ]; do sleep 0.05; done; echo > $out";
    let more = "requiredSystemFeatures = [ \"recursive-nix\" ];";
    let outer = ["one", "two"].map(|name| derivation(name, script, more));
    // Of what another one needs, not only of what it is.
    let above = derivation("above", "echo > $out", "needs = two;");
    let expression = format!("let one = {}; two = {}; above = {above}; in [ one two above ]", outer[0], outer[1]);
    let file = s.room.write("outer.nix", &expression).unwrap();
    let drvs = s.nix(Who::User, "nix-instantiate").arg(&file).ok().unwrap().lines();
    let building = s.build(&format!("let a = {expression}; in [ (builtins.elemAt a 0) (builtins.elemAt a 1) ]"));
    let building = building.args(["--max-jobs", "2"]).spawn().unwrap();
    let named = || {
        let name = |socket: &PathBuf| fs::read_to_string(socket.with_file_name("which")).unwrap_or_default();
        let find = |wanted: &str| sockets().into_iter().find(|socket| name(socket).trim() == wanted);
        Some([find("one")?, find("two")?])
    };
    let start = Instant::now();
    let [one, two] = loop {
        if let Some(found) = named() {
            break found;
        }
        assert!(start.elapsed() < Duration::from_secs(30), "they do not run");
        std::thread::sleep(Duration::from_millis(20));
    };
    let texts: Vec<String> = drvs.iter().map(|drv| fs::read_to_string(drv).unwrap()).collect();
    // A build knows of a derivation when it has its text.
    let wants = |socket: &Path, wanted: &[usize]| {
        let socket = socket.to_owned();
        let adds = wanted.iter().map(|&n| {
            let name = drvs[n].split_once('-').unwrap().1.to_owned();
            let references: Vec<&str> = if n == 2 { vec![drvs[1].as_str()] } else { Vec::new() };
            Request::numbered(8).string(name).string(&texts[n]).strings(&references)
        });
        let adds: Vec<Request> = adds.collect();
        let last = format!("{}!out", drvs[wanted[wanted.len() - 1]]);
        std::thread::spawn(move || {
            for add in adds {
                assert_eq!(answer(&socket, add), "answered");
            }
            answer(&socket, Request::numbered(9).strings(&[last]).word(0))
        })
    };
    let first = wants(&one, &[1, 2]);
    // It waits.
    std::thread::sleep(Duration::from_secs(1));
    assert!(!first.is_finished());
    let start = Instant::now();
    let second = wants(&two, &[0]).join().unwrap();
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert_eq!(second, format!("cannot build '{}' within a build that it needs itself", drvs[0]));
    assert!(!first.is_finished(), "both were refused");
    fs::write(two.with_file_name("go"), "").unwrap();
    assert_eq!(first.join().unwrap(), "answered");
    fs::write(one.with_file_name("go"), "").unwrap();
    let output = building.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    daemon.stop().unwrap();
}
