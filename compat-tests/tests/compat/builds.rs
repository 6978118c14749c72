//! Sandboxed builds, as a stock client sees them.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use compat_tests::Who;
use compat_tests::checks::{expect_code, expect_contains};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{derivation, setup};

#[test]
fn outputs_may_be_several_and_refer_to_their_inputs() {
    let Some(s) = setup("outputs") else { return };
    let daemon = s.start();
    let source = s.room.write("source", "the source\n").unwrap();
    let expression = derivation(
        "several",
        "mkdir $out $dev; cp $src $out/copy; echo $src > $dev/reference; ln -s $out/copy $dev/link",
        &format!("src = {}; outputs = [ \"out\" \"dev\" ];", source.display()),
    );
    let file = s.room.write("several.nix", format!("let d = {expression}; in [ d.out d.dev ]")).unwrap();
    let paths = s.nix(Who::User, "nix-build").arg("--no-out-link").arg(file).ok().unwrap().lines();
    assert_eq!(paths.len(), 2, "{paths:?}");
    let (out, dev) = (&paths[0], &paths[1]);
    assert!(dev.ends_with("-several-dev"), "{dev}");
    assert_eq!(fs::read_to_string(format!("{dev}/link")).unwrap(), "the source\n");
    let references =
        |path: &str| s.nix(Who::User, "nix-store").args(["-q", "--references", path]).ok().unwrap().lines();
    assert_eq!(references(out), Vec::<String>::new(), "a copied file is no reference");
    let source = fs::read_to_string(format!("{dev}/reference")).unwrap().trim().to_owned();
    let mut expected = [source, out.clone()];
    expected.sort();
    assert_eq!(references(dev), expected);
    let referrers = s.nix(Who::User, "nix-store").args(["-q", "--referrers", out]).ok().unwrap().lines();
    assert_eq!(referrers, std::slice::from_ref(dev));
    daemon.stop().unwrap();
}

#[test]
fn a_chain_of_derivations_builds_in_order() {
    let Some(s) = setup("chain") else { return };
    let daemon = s.start();
    let first = derivation("first", "echo one > $out", "");
    let second = derivation("second", "read l < ${first}; echo $l two > $out", "");
    let third = derivation("third", "read l < ${second}; echo $l three ${first} > $out", "");
    let all = format!("let first = {first}; second = {second}; in {third}");
    let out = s.build(&all).ok().unwrap().text();
    assert!(fs::read_to_string(&out).unwrap().starts_with("one two three /nix/store/"));
    let requisites = s.nix(Who::User, "nix-store").args(["-qR", &out]).ok().unwrap().lines();
    assert_eq!(requisites.len(), 2, "itself and the first, not the second: {requisites:?}");
    daemon.stop().unwrap();
}

#[test]
fn a_fixed_output_must_have_its_hash() {
    let Some(s) = setup("fixed") else { return };
    let daemon = s.start();
    let fixed = |hash: &str| {
        let more = format!("outputHashMode = \"flat\"; outputHashAlgo = \"sha256\"; outputHash = \"{hash}\";");
        derivation("fixed", "echo right > $out", &more)
    };
    let right = compat_tests::nar::hex(&compat_tests::nar::sha256(b"right\n"));
    let wrong = compat_tests::nar::hex(&compat_tests::nar::sha256(b"wrong\n"));
    // Only old clients are told the exit code; newer ones always end with 1.
    for (version, code) in [("2.3.7", 102), ("2.34.8", 1)] {
        let refused = s.build_with(version, &fixed(&wrong)).fails().unwrap();
        expect_code(&refused, code).unwrap();
        expect_contains(&refused.stderr, "hash mismatch in fixed-output derivation").unwrap();
    }
    let out = s.build(&fixed(&right)).ok().unwrap().text();
    assert_eq!(fs::read_to_string(&out).unwrap(), "right\n");
    daemon.stop().unwrap();
}

#[test]
fn a_failure_has_stocks_exit_codes_and_the_end_of_the_log() {
    let Some(s) = setup("failure") else { return };
    let daemon = s.start();
    let script = "i=1; while [ $i -le 40 ]; do echo line $i; i=$((i+1)); done; exit 3";
    let failing = derivation("failing", script, "");
    for (version, code) in [("2.3.7", 100), ("2.34.8", 1)] {
        let failed = s.build_with(version, &failing).fails().unwrap();
        expect_code(&failed, code).unwrap();
        expect_contains(&failed.stderr, "failing.drv").unwrap();
        expect_contains(&failed.stderr, "exit code 3").unwrap();
    }
    let new = s.nix(Who::User, "nix").args(["build", "--impure", "--no-link", "--expr", &failing]).fails().unwrap();
    expect_code(&new, 1).unwrap();
    expect_contains(&new.stderr, "exit code 3").unwrap();
    expect_contains(&new.stderr, "line 40").unwrap();
    assert!(!new.stderr.contains("line 3\n"), "the end of the log, not all of it:\n{}", new.stderr);
    // What needs the failed one fails as well; what does not is built with --keep-going.
    let good = derivation("good", "echo good > $out", "");
    let needs = derivation("needs", "read l < ${bad}", "");
    let file = s.room.write("mixed.nix", format!("let bad = {failing}; in [ ({needs}) ({good}) ]")).unwrap();
    let mixed = s.nix(Who::User, "nix-build").args(["--no-out-link", "--keep-going"]).arg(file).fails().unwrap();
    expect_contains(&mixed.stderr, "needs.drv").unwrap();
    s.build(&good).args(["--max-jobs", "0"]).ok().expect("already built: needs no job");
    daemon.stop().unwrap();
}

#[test]
fn the_environment_is_stocks() {
    let Some(s) = setup("environment") else { return };
    let daemon = s.start();
    let script = "
        set -e
        [ $NIX_BUILD_TOP = /build ]; [ $TMPDIR = /build ]; [ $PWD = /build ]
        [ $HOME = /homeless-shelter ]; [ ! -e $HOME ]
        [ $PATH = /path-not-set ]; [ $NIX_STORE = /nix/store ]; [ $NIX_BUILD_CORES = 1 ]
        [ -z \"$long\" ]; content=$(cat $longPath); [ $content = passed ]
        [ $(id -u) != 0 ]; [ $name = environment ]
        echo ok > $out";
    let expression = derivation("environment", script, "long = \"passed\"; passAsFile = [ \"long\" ];");
    let out = s.build(&expression).args(["--cores", "1"]).ok().unwrap().text();
    assert_eq!(fs::read_to_string(&out).unwrap(), "ok\n");
    daemon.stop().unwrap();
}

#[test]
fn the_sandbox_shows_neither_the_network_nor_the_machine() {
    let Some(s) = setup("sandbox") else { return };
    let daemon = s.start();
    let hidden = s.room.write("secret", "not for builders\n").unwrap();
    let other = s.nix(Who::Root, "nix-store").arg("--add").arg(&hidden).ok().unwrap().text();
    let script = format!(
        "
        set -e
        for path in {} {other} /usr /var /root /home /nix/var /run; do
            if [ -e $path ]; then echo $path is visible; exit 1; fi
        done
        if grep -vE \"Inter-|face|lo:\" /proc/net/dev; then echo a network device; exit 1; fi
        if grep -q castored-test /etc/passwd; then echo the passwd of the machine; exit 1; fi
        echo x > /nix/store/stray || true
        [ $(ls -d /proc/[0-9]* | wc -l) -lt 10 ]
        echo ok > $out",
        hidden.display()
    );
    let out = s.build(&derivation("sandbox", &script, "")).ok().unwrap().text();
    assert_eq!(fs::read_to_string(&out).unwrap(), "ok\n");
    assert!(!Path::new("/nix/store/stray").exists(), "what a builder writes beside its outputs is nobody's");
    daemon.stop().unwrap();
}

#[test]
fn the_log_can_be_read_afterwards() {
    let Some(s) = setup("log") else { return };
    let daemon = s.start();
    let script = "echo first line; echo to the other >&2; echo > $out";
    let out = s.build(&derivation("log", script, "")).ok().unwrap().text();
    let log = s.nix(Who::User, "nix-store").args(["--read-log", &out]).ok().unwrap().text();
    assert_eq!(log, "first line\nto the other");
    assert_eq!(s.nix(Who::User, "nix").args(["log", "--option", "substituters", "", &out]).ok().unwrap().text(), log);
    let drv = s.nix(Who::User, "nix-store").args(["-q", "--deriver", &out]).ok().unwrap().text();
    let base = Path::new(&drv).file_name().unwrap().to_str().unwrap();
    assert!(Path::new(&format!("/nix/var/log/nix/drvs/{}/{}.bz2", &base[..2], &base[2..])).exists());
    daemon.stop().unwrap();
}

#[test]
fn a_client_that_goes_away_takes_its_build_along() {
    let Some(s) = setup("cancel") else { return };
    let daemon = s.start();
    // The argument is found in the process table; no other process has it.
    let marker = format!("7{:09}", std::process::id());
    let client = s.build(&derivation("endless", &format!("sleep {marker}; echo > $out"), ""));
    let mut client = client.spawn().unwrap();
    assert!(wait_until(Duration::from_secs(30), || is_sleeping(&marker)), "the build did not start");
    kill(Pid::from_raw(i32::try_from(client.id()).unwrap()), Signal::SIGKILL).unwrap();
    client.wait().unwrap();
    assert!(wait_until(Duration::from_secs(10), || !is_sleeping(&marker)), "the builder outlived its only client");
    let valid = s.nix(Who::User, "nix").args(["path-info", "--all"]).ok().unwrap().lines();
    assert!(valid.iter().all(|p| !p.ends_with("-endless")), "{valid:?}");
    daemon.stop().unwrap();
}

/// Whether any process has `sleep` with this argument as its command line.
fn is_sleeping(marker: &str) -> bool {
    fs::read_dir("/proc").unwrap().flatten().any(|p| {
        let line = fs::read(p.path().join("cmdline")).unwrap_or_default();
        line.split(|b| *b == 0).collect::<Vec<_>>().ends_with(&[b"sleep".as_slice(), marker.as_bytes(), b""])
    })
}

/// Polls until it is so or the time is over.
pub(crate) fn wait_until(limit: Duration, condition: impl Fn() -> bool) -> bool {
    poll(limit, Duration::from_millis(20), condition)
}

/// As [`wait_until`], with so long a pause between two looks.
pub(crate) fn poll(limit: Duration, pause: Duration, condition: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    while start.elapsed() < limit {
        if condition() {
            return true;
        }
        thread::sleep(pause);
    }
    condition()
}
