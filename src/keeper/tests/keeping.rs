//! A keeper and its servers, as processes of their own.
//!
//! This executable plays all parts: each test runs it again as a keeper, whose server is this executable once more. A keeper
//! forks and must have one thread, so there is no harness but [`main`].
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test, a panic is the report")]

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use keeper::{Config, Keeper, Limits, Manager, image, replace};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpid};

/// What the server does, and the directory where it writes down what happens.
const SCRIPT: &str = "KEEPER_TEST_SCRIPT";
const DIRECTORY: &str = "KEEPER_TEST_DIRECTORY";

/// The longest rest after a death in service: short, that the tests are.
const LONGEST_IN_SERVICE: Duration = Duration::from_millis(80);

const TESTS: [(&str, fn()); 10] = [
    ("a_dead_servers_successor_goes_on_with_what_was_kept", a_dead_servers_successor_goes_on_with_what_was_kept),
    ("what_never_gets_ready_is_given_up", what_never_gets_ready_is_given_up),
    (
        "what_dies_in_service_again_and_again_is_started_ever_slower",
        what_dies_in_service_again_and_again_is_started_ever_slower,
    ),
    ("what_fails_before_anything_is_kept_has_failed", what_fails_before_anything_is_kept_has_failed),
    ("what_a_dead_server_had_started_dies", what_a_dead_server_had_started_dies),
    ("a_signal_ends_both_and_the_servers_code_is_passed_on", a_signal_ends_both_and_the_servers_code_is_passed_on),
    ("a_server_that_does_not_end_is_killed", a_server_that_does_not_end_is_killed),
    ("another_program_takes_over_or_the_old_one_goes_on", another_program_takes_over_or_the_old_one_goes_on),
    ("a_killed_keeper_leaves_its_server_serving", a_killed_keeper_leaves_its_server_serving),
    ("a_keeper_is_small", a_keeper_is_small),
];

/// Understands as much of a harness's arguments as `cargo test` and nextest use: a list, names of tests, switches.
fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments[0].as_str() {
        "keeper" => return keeper_part(),
        "server" => return server_part(),
        _ => {}
    }
    let has = |argument: &str| arguments.iter().any(|other| other == argument);
    let names: Vec<&String> = arguments[1..].iter().filter(|argument| !argument.starts_with('-')).collect();
    let wanted = |name: &str| match has("--exact") {
        true => names.iter().any(|other| *other == name),
        false => names.is_empty() || names.iter().any(|other| name.contains(other.as_str())),
    };
    for (name, test) in TESTS.iter().filter(|(name, _)| !has("--ignored") && (has("--list") || wanted(name))) {
        if has("--list") {
            println!("{name}: test");
        } else {
            test();
            println!("test {name} ... ok");
        }
    }
}

/// Runs a keeper whose servers follow that script.
fn start(script: &str, dir: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.arg0("keeper").env(SCRIPT, script).env(DIRECTORY, dir).stdout(Stdio::null()).process_group(0);
    command.spawn().unwrap()
}

fn run(script: &str) -> (ExitStatus, Vec<String>) {
    let dir = tempfile::tempdir().unwrap();
    let status = start(script, dir.path()).wait().unwrap();
    (status, events(dir.path()))
}

/// What has happened, a line each.
fn events(dir: &Path) -> Vec<String> {
    let text = fs::read_to_string(dir.join("events")).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

fn wait_for(dir: &Path, event: &str, count: usize) {
    let start = Instant::now();
    while events(dir).iter().filter(|other| *other == event).count() < count {
        assert!(start.elapsed() < Duration::from_secs(20), "no {event}: {:?}", events(dir));
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn happens(event: &str) {
    let path = PathBuf::from(std::env::var_os(DIRECTORY).unwrap()).join("events");
    writeln!(OpenOptions::new().append(true).create(true).open(path).unwrap(), "{event}").unwrap();
}

fn keeper_part() {
    let dir = PathBuf::from(std::env::var_os(DIRECTORY).unwrap());
    let config = Config {
        program: image::own().unwrap(),
        arguments: image::arguments(["server".into()].into_iter()),
        given: vec![("given".to_owned(), File::open("/dev/null").unwrap().into())],
        control: dir.join("control"),
        limits: Limits {
            failures: 4,
            farewell: Duration::from_secs(2),
            free_deaths: 3,
            longest_in_service: LONGEST_IN_SERVICE,
            ..Limits::default()
        },
        release: |_, _| {},
    };
    let end = Keeper::new(config).unwrap().run().unwrap();
    let names: Vec<_> = end.kept.iter().map(|(name, _)| name.as_str()).collect();
    happens(&format!("keeper ends with {}, keeping {names:?}", end.code));
    std::process::exit(i32::from(end.code));
}

#[allow(clippy::zombie_processes, reason = "it is the keeper that takes leave of a dead server's children")]
fn server_part() {
    let script = std::env::var(SCRIPT).unwrap();
    let manager = Manager::from_environment().unwrap();
    assert!(manager.keeps() && keeper::by_keeper());
    let given = manager.take_other(&["file"]).is_some();
    let file = manager.take("file");
    happens(&format!("server, given {given}, file {}", file.is_some()));
    let die = || kill(getpid(), Signal::SIGKILL).unwrap();
    match script.as_str() {
        "dies and goes on" => {
            let Some(file) = file else {
                let file = File::from(OwnedFd::from(tempfile::tempfile().unwrap()));
                manager.store("file", file.as_fd()).unwrap();
                manager.ready().unwrap();
                (&file).write_all(b"1").unwrap();
                die();
                return;
            };
            // The offset is common to all copies of a descriptor.
            let mut file = File::from(file);
            file.write_all(b"2").unwrap();
            happens(&format!("{} bytes", file.metadata().unwrap().len()));
            manager.ready().unwrap();
            if file.metadata().unwrap().len() < 20 {
                die();
            }
            manager.remove_all().unwrap();
            std::process::exit(7);
        }
        "never ready" => {
            if file.is_none() {
                manager.store("file", tempfile::tempfile().unwrap().as_fd()).unwrap();
            }
            std::process::exit(3);
        }
        "fails at once" => std::process::exit(5),
        "leaves children" => {
            if file.is_some() {
                manager.remove_all().unwrap();
                std::process::exit(0);
            }
            let script = "setsid sh -c 'sleep 1; echo late >> \"$1\"' sh \"$0\" & sleep 1; echo late >> \"$0\"";
            let events = PathBuf::from(std::env::var_os(DIRECTORY).unwrap()).join("events");
            Command::new("sh").args(["-c", script]).arg(events).spawn().unwrap();
            std::thread::sleep(Duration::from_millis(200));
            manager.store("file", tempfile::tempfile().unwrap().as_fd()).unwrap();
            die();
        }
        "serves" | "does not end" => {
            if file.is_none() {
                manager.store("file", tempfile::tempfile().unwrap().as_fd()).unwrap();
            }
            let mut mask = nix::sys::signal::SigSet::empty();
            mask.add(Signal::SIGTERM);
            mask.add(Signal::SIGUSR2);
            mask.thread_block().unwrap();
            manager.ready().unwrap();
            happens("ready");
            loop {
                match mask.wait().unwrap() {
                    Signal::SIGUSR2 => std::process::exit(0),
                    _ if script == "serves" => {
                        manager.remove_all().unwrap();
                        std::process::exit(6);
                    }
                    _ => happens("asked to end"),
                }
            }
        }
        other => panic!("no such script: {other}"),
    }
}

fn a_dead_servers_successor_goes_on_with_what_was_kept() {
    let (status, events) = run("dies and goes on");
    assert_eq!(status.code(), Some(7), "{events:?}");
    let mut expected = vec!["server, given true, file false".to_owned()];
    for bytes in 2..=20 {
        expected.extend(["server, given true, file true".to_owned(), format!("{bytes} bytes")]);
    }
    expected.push("keeper ends with 7, keeping []".to_owned());
    assert_eq!(events, expected);
}

fn what_never_gets_ready_is_given_up() {
    let (status, events) = run("never ready");
    assert_eq!(status.code(), Some(3));
    assert_eq!(events.len(), 5, "{events:?}");
    assert_eq!(events[4], "keeper ends with 3, keeping [\"file\"]");
}

/// Nineteen deaths right after it was ready: three of them free, then 10, 20, 40 ms, and the longest rest for the others.
fn what_dies_in_service_again_and_again_is_started_ever_slower() {
    let start = Instant::now();
    let (status, _) = run("dies and goes on");
    assert_eq!(status.code(), Some(7));
    let least = Duration::from_millis(10 + 20 + 40) + LONGEST_IN_SERVICE * (19 - 3 - 3);
    assert!(start.elapsed() >= least, "{:?} is less than the rests, {least:?}", start.elapsed());
}

fn what_fails_before_anything_is_kept_has_failed() {
    let (status, events) = run("fails at once");
    assert_eq!((status.code(), events.len()), (Some(5), 2), "{events:?}");
}

fn what_a_dead_server_had_started_dies() {
    let dir = tempfile::tempdir().unwrap();
    assert!(start("leaves children", dir.path()).wait().unwrap().success());
    // They would have spoken by now.
    std::thread::sleep(Duration::from_millis(1500));
    let events = events(dir.path());
    assert!(events.iter().all(|event| event != "late"), "{events:?}");
    assert_eq!(events.len(), 3, "{events:?}");
}

fn signal(keeper: &Child, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(keeper.id()).unwrap()), signal).unwrap();
}

fn a_signal_ends_both_and_the_servers_code_is_passed_on() {
    let dir = tempfile::tempdir().unwrap();
    let mut keeper = start("serves", dir.path());
    wait_for(dir.path(), "ready", 1);
    signal(&keeper, Signal::SIGTERM);
    assert_eq!(keeper.wait().unwrap().code(), Some(6));
    assert!(!dir.path().join("control").exists());
}

fn a_server_that_does_not_end_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let mut keeper = start("does not end", dir.path());
    wait_for(dir.path(), "ready", 1);
    signal(&keeper, Signal::SIGTERM);
    assert_eq!(keeper.wait().unwrap().code(), Some(128 + 9));
    let last = events(dir.path()).pop().unwrap();
    assert_eq!(last, "keeper ends with 137, keeping [\"file\"]");
}

fn another_program_takes_over_or_the_old_one_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let mut keeper = start("serves", dir.path());
    wait_for(dir.path(), "ready", 1);
    let control = dir.path().join("control");
    // The keeper listens as soon as it has heard that the server is ready.
    let start = Instant::now();
    while !control.exists() {
        assert!(start.elapsed() < Duration::from_secs(20), "the keeper does not listen");
        std::thread::sleep(Duration::from_millis(1));
    }
    replace::ask(&control, image::copy_own().unwrap().as_fd()).unwrap();
    wait_for(dir.path(), "ready", 2);
    let bad = File::open("/bin/false").unwrap();
    let refused = loop {
        let refused = replace::ask(&control, bad.as_fd()).unwrap_err().to_string();
        if !refused.contains("try again") {
            break refused;
        }
    };
    assert!(refused.contains("the old one runs again"), "{refused}");
    wait_for(dir.path(), "ready", 3);
    signal(&keeper, Signal::SIGTERM);
    assert_eq!(keeper.wait().unwrap().code(), Some(6));
    let servers = events(dir.path()).iter().filter(|event| event.starts_with("server")).count();
    assert_eq!(servers, 3, "{:?}", events(dir.path()));
}

fn a_killed_keeper_leaves_its_server_serving() {
    let dir = tempfile::tempdir().unwrap();
    let mut keeper = start("serves", dir.path());
    wait_for(dir.path(), "ready", 1);
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", keeper.id())).unwrap();
    let server = Pid::from_raw(children.trim().parse().unwrap());
    signal(&keeper, Signal::SIGKILL);
    keeper.wait().unwrap();
    std::thread::sleep(Duration::from_millis(100));
    // It serves until it is told to end.
    kill(server, Signal::SIGUSR2).unwrap();
}

fn a_keeper_is_small() {
    let dir = tempfile::tempdir().unwrap();
    let mut keeper = start("serves", dir.path());
    wait_for(dir.path(), "ready", 1);
    let status = fs::read_to_string(format!("/proc/{}/status", keeper.id())).unwrap();
    let kib = |name: &str| -> u64 {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    };
    println!("{} KiB of its own", kib("RssAnon:"));
    assert!(kib("RssAnon:") < 1024, "{status}");
    assert_eq!(kib("Threads:"), 1);
    signal(&keeper, Signal::SIGTERM);
    keeper.wait().unwrap();
}
