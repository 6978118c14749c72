//! The daemon's life: start, configuration, socket activation, and only one to a store.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use compat_tests::checks::expect_contains;
use compat_tests::subject::{Daemon, SOCKET, default_conf};
use compat_tests::{Error, Who};

use crate::{castored_setup, setup};

#[test]
fn a_second_daemon_on_the_same_store_refuses_and_names_the_first() {
    let Some(s) = castored_setup("second") else { return };
    let first = s.start();
    let second = s.subject.command(&s.room, &default_conf()).unwrap().output().unwrap();
    assert!(!second.status.success(), "a second daemon must not start");
    let said = String::from_utf8_lossy(&second.stderr);
    expect_contains(&said, &first.pid().to_string()).unwrap();
    s.nix(Who::User, "nix").args(["store", "info"]).ok().expect("the first goes on");
    first.stop().unwrap();
    // Now it may, also after the first was killed without warning.
    s.start().kill_hard().unwrap();
    s.start().stop().unwrap();
}

#[test]
fn systemd_may_hand_over_the_socket() {
    let Some(s) = setup("activation") else { return };
    let socket = std::path::Path::new(SOCKET);
    std::fs::create_dir_all(socket.parent().unwrap()).unwrap();
    let listener = UnixListener::bind(socket).unwrap();
    std::fs::set_permissions(socket, PermissionsExt::from_mode(0o666)).unwrap();
    let daemon = s.subject.start_activated(&s.room, &default_conf(), listener, socket).unwrap();
    s.nix(Who::User, "nix").args(["store", "info"]).ok().unwrap();
    daemon.stop().unwrap();
    assert!(socket.exists(), "the socket belongs to systemd: a daemon that got it must not remove it");
}

#[test]
fn nix_conf_may_include_files() {
    let Some(s) = setup("include") else { return };
    let more = s.room.write("more.conf", "extra-trusted-users = castored-test\n").unwrap();
    let conf = format!("{}include {}\n!include /nowhere/at-all.conf\n", default_conf(), more.display());
    let daemon = s.subject.start_with(&s.room, &conf).unwrap();
    let info = s.nix(Who::User, "nix").args(["store", "info", "--json"]).ok().unwrap().text();
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["trusted"], true, "{info}");
    daemon.stop().unwrap();
    let plain = s.start();
    let info = s.nix(Who::User, "nix").args(["store", "info", "--json"]).ok().unwrap().text();
    assert!(!info.contains("\"trusted\":true") && !info.contains("\"trusted\":1"), "{info}");
    plain.stop().unwrap();
}

#[test]
fn a_missing_include_is_an_error_at_start() {
    let Some(s) = setup("missing-include") else { return };
    let conf = format!("{}include /nowhere/at-all.conf\n", default_conf());
    match s.subject.start_with(&s.room, &conf) {
        Err(Error::Daemon { log, .. }) => expect_contains(&log, "/nowhere/at-all.conf").unwrap(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn users_that_are_not_allowed_are_turned_away() {
    let Some(s) = setup("allowed") else { return };
    let conf = format!("{}allowed-users = root\n", default_conf());
    let daemon = s.subject.start_with(&s.room, &conf).unwrap();
    s.nix(Who::User, "nix").args(["store", "info"]).fails().unwrap();
    s.nix(Who::Root, "nix").args(["store", "info"]).ok().unwrap();
    daemon.stop().unwrap();
}

#[test]
fn the_environment_moves_store_state_and_socket() {
    let Some(s) = setup("moved") else { return };
    let base = s.room.dir().join("moved");
    let socket = base.join("the-socket");
    std::fs::create_dir_all(&base).unwrap();
    let variables = [("NIX_STORE_DIR", "store"), ("NIX_STATE_DIR", "state"), ("NIX_LOG_DIR", "log")];
    let mut command = s.subject.command(&s.room, &default_conf().replace("sandbox = true", "sandbox = false")).unwrap();
    command.env("NIX_DAEMON_SOCKET_PATH", &socket);
    command.envs(variables.map(|(name, dir)| (name, base.join(dir))));
    let daemon = Daemon::spawn(command, &s.room, &socket).unwrap();
    let file = s.room.write("moved", "elsewhere\n").unwrap();
    let mut add = s.nix(Who::User, "nix-store").arg("--add").arg(file);
    add = add.env("NIX_REMOTE", format!("unix://{}", socket.display()));
    for (name, dir) in variables {
        add = add.env(name, base.join(dir));
    }
    let path = add.ok().unwrap().text();
    assert!(path.starts_with(base.join("store").to_str().unwrap()), "{path}");
    assert_eq!(std::fs::read_to_string(path).unwrap(), "elsewhere\n");
    daemon.stop().unwrap();
    while nix::mount::umount2(&base.join("store"), nix::mount::MntFlags::MNT_DETACH).is_ok() {}
}

#[test]
fn sigterm_ends_it_with_clients_connected() {
    let Some(s) = castored_setup("sigterm") else { return };
    let mut daemon = s.start();
    let client = compat_tests::wire::Client::new(daemon.connect().unwrap()).unwrap();
    nix::sys::signal::kill(daemon.started_pid(), nix::sys::signal::Signal::SIGTERM).unwrap();
    daemon.wait(Duration::from_secs(10)).unwrap();
    drop(client);
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(" /nix/store "), "the mount outlived a clean stop");
}
