//! Stock clients run as root without `NIX_REMOTE=daemon`, on castored's store: they stop, and say what to do.

use std::fs;
use std::path::Path;

use compat_tests::checks::expect_contains;
use compat_tests::{Call, Who};

use crate::{Setup, castored_setup};

#[test]
fn client_2_3_7() {
    stops("2.3.7");
}

#[test]
fn client_2_8_0() {
    stops("2.8.0");
}

#[test]
fn client_2_26_3() {
    stops("2.26.3");
}

#[test]
fn client_2_34_8() {
    stops("2.34.8");
}

fn stops(version: &str) {
    let Some(s) = castored_setup("tripwire") else { return };
    let file = s.room.write("a-file", "text\n").unwrap();
    let new = s.room.write("a-new-file", "more text\n").unwrap();
    let daemon = s.start();
    let path = s.nix(Who::User, "nix-store").arg("--add").arg(&file).ok().unwrap().text();
    for round in ["while the daemon runs", "while it does not"] {
        println!("{round}");
        refused(&s, version, &["-q", "--references", &path]);
        refused(&s, version, &["-q", "--referrers", &path]);
        refused(&s, version, &["--realise", &path]);
        refused(&s, version, &["--add", new.to_str().unwrap()]);
        refused(&s, version, &["--delete", &path]);
        refused(&s, version, &["--verify"]);
        refused(&s, version, &["--optimise"]);
        refused(&s, version, &["--dump-db"]);
        let registration = format!("{path}\n{}\n8\n\n0\n", "0".repeat(64));
        let call = bypassing(&s, version).arg("--load-db").input(registration);
        expect_message(&call.fails().unwrap().stderr);
        let collected = bypassing(&s, version).arg("--gc").run().unwrap();
        if round == "while the daemon runs" {
            expect_message(&collected.stderr);
            assert_eq!(fs::read_to_string(&path).unwrap(), "text\n");
            nix::sys::signal::kill(daemon.pid(), nix::sys::signal::Signal::SIGTERM).unwrap();
            while Path::new(&path).exists() {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
        }
    }
    daemon.kill_hard().unwrap();
    // Nothing is left where castored would not start, and nothing is lost.
    let daemon = s.start();
    assert_eq!(fs::read_to_string(&path).unwrap(), "text\n");
    s.nix(Who::Root, "nix-store").args(["--verify-path", &path]).ok().unwrap();
    daemon.stop().unwrap();
}

fn bypassing(s: &Setup, version: &str) -> Call {
    // The group that the daemon knows as well: stock gives it the store directory first.
    let call = Call::nix(&s.room, Who::Root, s.machine.release(version).unwrap(), "nix-store");
    call.env("NIX_REMOTE", "").args(["--option", "build-users-group", compat_tests::room::BUILD_GROUP]).lines(3)
}

fn refused(s: &Setup, version: &str, arguments: &[&str]) {
    expect_message(&bypassing(s, version).args(arguments).fails().unwrap().stderr);
}

fn expect_message(stderr: &str) {
    expect_contains(stderr, "castored").unwrap();
    expect_contains(stderr, "NIX_REMOTE=daemon").unwrap();
}
