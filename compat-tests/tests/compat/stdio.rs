//! `nix-daemon --stdio`: who is trusted through it, and which daemon it reaches.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Stdio;

use compat_tests::subject::default_conf;
use compat_tests::wire::Client;
use compat_tests::{Call, Who};

use crate::{Setup, castored_setup};

const TRUST_OVERRIDE: [&str; 2] = ["--extra-experimental-features", "daemon-trust-override"];

/// Whether a client is trusted that root starts `nix-daemon --stdio` with these arguments for; an error if it cannot
/// even shake hands.
fn trusted(s: &Setup, arguments: &[&str]) -> compat_tests::Result<bool> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut command = s.subject.command(&s.room, &default_conf()).unwrap();
    let input = OwnedFd::from(theirs.try_clone().unwrap());
    command.arg("--stdio").args(arguments).stdin(input).stdout(OwnedFd::from(theirs)).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    // The other end's copies are in the command.
    drop(command);
    let client = Client::new(ours);
    let trusted = client.as_ref().map(|client| client.trusted).map_err(|e| compat_tests::Error::Wrong(e.to_string()));
    drop(client);
    child.wait().unwrap();
    trusted
}

#[test]
fn stdio_is_trusted_as_its_caller_is_unless_that_is_taken_back() {
    let Some(s) = castored_setup("stdio") else { return };
    let daemon = s.start();
    assert!(trusted(&s, &[]).unwrap());
    assert!(trusted(&s, &["--process-ops", "--store", "daemon"]).unwrap());
    assert!(!trusted(&s, &[TRUST_OVERRIDE[0], TRUST_OVERRIDE[1], "--force-untrusted"]).unwrap());
    assert!(trusted(&s, &[TRUST_OVERRIDE[0], TRUST_OVERRIDE[1], "--force-trusted"]).unwrap());
    // As with stock, only where the feature is enabled.
    trusted(&s, &["--force-untrusted"]).unwrap_err();
    trusted(&s, &["--store", "/nowhere"]).unwrap_err();
    daemon.stop().unwrap();
}

#[test]
fn a_user_cannot_become_trusted_through_stdio() {
    let Some(s) = castored_setup("stdio-user") else { return };
    let daemon = s.start();
    let hello: Vec<u8> = [0x6e69_7863_u64, 0x123, 0, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
    let arguments = ["--stdio", "--force-trusted", TRUST_OVERRIDE[0], TRUST_OVERRIDE[1]];
    let answer = Call::new(&s.room, Who::User, "/bin/bash")
        .args(["-c", "exec -a nix-daemon \"$0\" \"$@\""])
        .arg(s.subject.copy_into(&s.room).unwrap())
        .args(arguments)
        .input(hello)
        .run()
        .unwrap();
    // At 1.35 the greeting ends with the version as a string, the word of trust (2: not trusted), and the end mark.
    let words: Vec<u64> =
        answer.stdout.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect();
    assert_eq!(words[words.len() - 2..], [2, 0x616c_7473], "{answer:?}");
    daemon.stop().unwrap();
}

#[test]
fn a_stock_clients_session_can_be_recorded() {
    let Some(s) = castored_setup("record") else { return };
    let program = s.subject.copy_into(&s.room).unwrap();
    let recordings = s.room.dir().join("recordings");
    let mut daemon = Call::new(&s.room, Who::Root, &program)
        .args(["daemon", "--grpc-listen", "none", "--option", "build-users-group", "", "--record"])
        .arg(&recordings)
        .spawn()
        .unwrap();
    let socket = compat_tests::subject::SOCKET;
    let up = crate::builds::wait_until(std::time::Duration::from_secs(20), || UnixStream::connect(socket).is_ok());
    assert!(up, "it does not answer");
    let contents = "something that is nowhere else in the session";
    let file = s.room.write("recorded", contents).unwrap();
    s.nix(Who::Root, "nix-store").arg("--add").arg(&file).ok().unwrap();
    let holds = |ending: &str, text: &str| {
        std::fs::read_dir(&recordings).unwrap().map(|entry| entry.unwrap().path()).any(|path| {
            path.extension().is_some_and(|e| e == ending)
                && std::fs::read(&path).unwrap().windows(text.len()).any(|window| window == text.as_bytes())
        })
    };
    assert!(holds("client", contents), "what the client sent is not there");
    assert!(holds("server", "-recorded"), "what the daemon answered is not there");
    let pid = nix::unistd::Pid::from_raw(i32::try_from(daemon.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(daemon.wait().unwrap().success());
}
