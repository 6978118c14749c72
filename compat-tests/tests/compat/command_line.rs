//! The `castored` command itself.

use std::fs;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use compat_tests::{Call, Who};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::builds::wait_until;
use crate::castored_setup;

#[test]
fn import_goes_through_the_daemon_and_status_and_stats_tell_of_it() {
    let Some(s) = castored_setup("command-line") else { return };
    let daemon = s.start();
    let program = s.subject.copy_into(&s.room).unwrap();
    let castored = |who: Who, args: &[&str]| Call::new(&s.room, who, &program).args(args);
    let file = s.room.write("imported", "imported\n").unwrap();
    let path = castored(Who::User, &["import", file.to_str().unwrap()]).ok().unwrap().text();
    assert_eq!(fs::read_to_string(&path).unwrap(), "imported\n");
    let same = s.nix(Who::User, "nix-store").arg("--add").arg(&file).ok().unwrap().text();
    assert_eq!(path, same, "the path that nix-store gives");
    let status = castored(Who::Root, &["status"]).ok().unwrap().text();
    assert!(status.contains(&daemon.pid().to_string()), "{status}");
    for command in ["status", "stats"] {
        let json = castored(Who::Root, &[command, "--json"]).ok().unwrap().text();
        serde_json::from_str::<serde_json::Value>(&json).unwrap();
    }
    daemon.stop().unwrap();
    castored(Who::Root, &["status"]).fails().expect("there is no daemon any more");
}

#[test]
fn an_ordinary_user_has_everything_below_one_directory() {
    let Some(s) = castored_setup("root") else { return };
    let root = s.room.dir().join("home-user/store");
    let at = root.to_str().unwrap();
    let program = s.subject.copy_into(&s.room).unwrap();
    let castored = |args: &[&str]| Call::new(&s.room, Who::User, &program).args(["--root", at]).args(args);
    let mut daemon = castored(&["daemon", "--grpc-listen", "none"]).spawn().unwrap();
    let socket = root.join("var/nix/daemon-socket/socket");
    assert!(wait_until(Duration::from_secs(20), || UnixStream::connect(&socket).is_ok()), "it does not answer");
    let file = s.room.write("own", "an ordinary user's\n").unwrap();
    let path = castored(&["import", file.to_str().unwrap()]).ok().unwrap().text();
    assert!(path.starts_with(root.join("store").to_str().unwrap()), "{path}");
    // Through cat: root may not look into a user's mount.
    assert_eq!(Call::new(&s.room, Who::User, "cat").arg(&path).ok().unwrap().text(), "an ordinary user's");
    kill(Pid::from_raw(i32::try_from(daemon.id()).unwrap()), Signal::SIGTERM).unwrap();
    assert!(daemon.wait().unwrap().success());
}
