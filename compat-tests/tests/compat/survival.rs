//! The mount and the sockets outlive the process that serves them: `kill -9` of the server, its replacement, systemd's store
//! of descriptors, and servers that cannot be started any more.

mod load;
mod systemd;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use compat_tests::checks::expect_contains;
use compat_tests::nar::Tree;
use compat_tests::subject::SOCKET;
use compat_tests::wire::Client;
use compat_tests::{Call, Daemon, Who, memory};

use crate::{Setup, castored_setup, derivation};
use load::Load;

/// How often the server is killed, unless [`KILLS_VARIABLE`] says otherwise.
const KILLS: usize = 20;
/// For longer runs.
const KILLS_VARIABLE: &str = "CASTORED_KILLS";
/// The time between two kills.
const EVERY: Duration = Duration::from_millis(200);
/// How long a successor may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// What was acknowledged so long ago is on disk: three times what is promised.
const UNTIL_DURABLE: Duration = Duration::from_millis(300);
/// What a server says that has taken over.
const TAKEN_OVER: &str = "took the mount over";

fn kills() -> usize {
    std::env::var(KILLS_VARIABLE).map_or(KILLS, |kills| kills.parse().unwrap())
}

/// How many servers have taken the mount over.
fn successors(daemon: &Daemon) -> usize {
    daemon.log().matches(TAKEN_OVER).count()
}

/// Waits until so many servers have taken the mount over.
fn wait_for_successors(daemon: &Daemon, count: usize) {
    let start = Instant::now();
    while successors(daemon) < count {
        assert!(start.elapsed() < PATIENCE, "no successor: {}", daemon.log());
        thread::sleep(Duration::from_millis(2));
    }
}

/// Kills the server and waits for its successor.
fn kill_server(daemon: &Daemon) {
    let before = successors(daemon);
    daemon.kill_server().unwrap();
    wait_for_successors(daemon, before + 1);
}

/// Kills the server so and so often, each time after [`EVERY`], whatever it is doing then.
fn kill_again_and_again(daemon: &Daemon) {
    let before = successors(daemon);
    let kills = kills();
    let mut last = None;
    for _ in 0..kills {
        thread::sleep(EVERY);
        // In the moment between two servers there is none to be killed.
        let start = Instant::now();
        loop {
            match daemon.kill_server() {
                Ok(pid) if Some(pid) != last => break last = Some(pid),
                _ => assert!(start.elapsed() < PATIENCE, "no server: {}", daemon.log()),
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
    wait_for_successors(daemon, before + 1);
    // One that is killed while it starts never says so.
    println!("{kills} kills, {} successors in service", successors(daemon) - before);
}

#[test]
fn programs_do_not_notice_that_the_server_is_killed() {
    let Some(s) = castored_setup("killed") else { return };
    let daemon = s.start();
    Load::new(&s, &daemon, kills()).during(|| kill_again_and_again(&daemon));
    assert!(daemon.stop().unwrap().success());
    assert_unmounted();
}

/// The daemon's own program lies in the store: it was adopted there from stock, and is started from there.
#[test]
fn a_daemon_that_lies_in_its_own_store_survives_as_well() {
    let Some(s) = castored_setup("itself") else { return };
    let program = adopted_program(&s);
    let mut command = s.subject.command(&s.room, &compat_tests::subject::default_conf()).unwrap();
    command = with_program(&command, &program);
    let daemon = Daemon::spawn(command, &s.room, Path::new(SOCKET)).unwrap();
    for pid in [daemon.started_pid(), daemon.pid()] {
        let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap();
        assert!(exe.starts_with("/memfd:castored (deleted)"), "{}", exe.display());
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        assert!(!maps.contains("/nix/store"), "{maps}");
    }
    Load::new(&s, &daemon, kills()).during(|| kill_again_and_again(&daemon));
    // Its helpers are from memory as well.
    s.build(&derivation("built", "echo built > $out", "")).ok().unwrap();
    // And the program in the store, below the mount and through it, can take the daemon's place.
    let replaced =
        Call::new(&s.room, Who::Root, &program).args(["daemon", "--replace"]).env("NIX_CONF_DIR", "/nowhere");
    expect_contains(&replaced.ok().unwrap().text(), "replaced").unwrap();
    s.build(&derivation("built-again", "echo built > $out", "")).ok().unwrap();
    assert!(daemon.stop().unwrap().success());
}

/// castored as a path of a stock store that castored has adopted.
fn adopted_program(s: &Setup) -> String {
    let dir = s.room.tmp("program");
    fs::create_dir_all(&dir).unwrap();
    // What it weighs are the names for a debugger.
    let strip = Command::new("strip").args(["-o"]).arg(dir.join("castored")).arg(s.subject.binary()).status().unwrap();
    assert!(strip.success());
    let release = s.machine.newest();
    let add = Call::nix(&s.room, Who::Root, release, "nix-store").env("NIX_REMOTE", "local").arg("--add").arg(&dir);
    let path = add.args(["--option", "build-users-group", ""]).ok().unwrap().text();
    let castored = s.subject.copy_into(&s.room).unwrap();
    Call::new(&s.room, Who::Root, castored).args(["adopt", "--finish"]).ok().unwrap();
    format!("{path}/castored")
}

/// The same command with another program, which runs as `castored daemon`.
fn with_program(command: &Command, program: &str) -> Command {
    let mut other = Command::new(program);
    other.args(["daemon", "--grpc-listen", "none"]).env_clear();
    other.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    other
}

#[test]
fn programs_do_not_notice_a_replacement() {
    let Some(s) = castored_setup("replaced") else { return };
    let daemon = s.start();
    let castored = s.subject.copy_into(&s.room).unwrap();
    let replace = || {
        Call::new(&s.room, Who::Root, &castored).args(["daemon", "--replace"]).env("NIX_CONF_DIR", "/nowhere").quiet()
    };
    Load::new(&s, &daemon, KILLS).during(|| {
        for round in 1..=5 {
            let before = daemon.pid();
            expect_contains(&replace().ok().unwrap().text(), "replaced").unwrap();
            assert_ne!(daemon.pid(), before);
            assert_eq!(successors(&daemon), round);
            let exe = fs::read_link(format!("/proc/{}/exe", daemon.pid())).unwrap();
            assert_eq!(exe, castored, "the new program serves");
            thread::sleep(EVERY);
        }
    });
    let refused = Call::new(&s.room, Who::User, &castored).args(["daemon", "--replace"]).quiet().fails().unwrap();
    expect_contains(&refused.all(), "keeper").unwrap();
    assert!(daemon.stop().unwrap().success());
    assert_unmounted();
    replace().fails().expect("nothing runs");
}

/// What was registered a moment before the kill may be lost; then the kernel must not go on showing it.
#[test]
fn the_store_directory_shows_what_is_valid_after_a_kill() {
    let Some(s) = castored_setup("lost") else { return };
    let daemon = s.start();
    let mut lost = 0;
    for round in 0..12 {
        let mut client = Client::new(daemon.connect().unwrap()).unwrap();
        let path = client.add(&format!("fresh-{round}"), &Tree::File(format!("{round}").into_bytes())).unwrap();
        // Now the kernel knows the name, and the directory's listing.
        assert!(Path::new(&path).exists() && listing().contains(&path));
        kill_server(&daemon);
        let mut client = Client::new(daemon.connect().unwrap()).unwrap();
        let valid = client.is_valid(&path).unwrap();
        assert_eq!((Path::new(&path).exists(), listing().contains(&path)), (valid, valid), "{path}");
        lost += usize::from(!valid);
        // The same path again, with another number.
        let again = client.add(&format!("fresh-{round}"), &Tree::File(format!("{round}").into_bytes())).unwrap();
        assert_eq!((again, fs::read_to_string(&path).unwrap()), (path, round.to_string()));
    }
    println!("{lost} registrations were lost");
    assert!(lost > 0, "no kill was early enough to show anything");
    daemon.stop().unwrap();
}

fn listing() -> Vec<String> {
    fs::read_dir("/nix/store").unwrap().map(|entry| entry.unwrap().path().to_str().unwrap().to_owned()).collect()
}

/// A path that is deleted is gone whenever the server is killed, or still there as a whole.
#[test]
fn a_deletion_that_a_kill_interrupts_leaves_no_names() {
    let Some(s) = castored_setup("deleting") else { return };
    let daemon = s.start();
    for round in 0..6_u64 {
        let mut client = Client::new(daemon.connect().unwrap()).unwrap();
        let add = |client: &mut Client, n: u64| {
            client.add(&format!("garbage-{round}-{n}"), &Tree::File(n.to_le_bytes().to_vec())).unwrap()
        };
        let paths: Vec<String> = (0..300).map(|n| add(&mut client, n)).collect();
        drop(client);
        assert!(paths.iter().all(|path| Path::new(path).exists()));
        let collecting = s.nix(Who::Root, "nix-store").arg("--gc").quiet().spawn().unwrap();
        // At another moment of the collection each time.
        thread::sleep(Duration::from_millis(60 + round * 25));
        kill_server(&daemon);
        collecting.wait_with_output().unwrap();
        let mut client = Client::new(daemon.connect().unwrap()).unwrap();
        let valid = client.all_valid_paths().unwrap();
        for path in &paths {
            assert_eq!(Path::new(path).exists(), valid.contains(path), "{path}");
        }
        let mut listed = listing();
        listed.sort();
        let mut valid = valid;
        valid.sort();
        assert_eq!(listed, valid);
    }
    daemon.stop().unwrap();
}

#[test]
fn a_build_under_way_dies_with_the_server_and_its_client_is_told() {
    let Some(s) = castored_setup("build-killed") else { return };
    let daemon = s.start();
    thread::scope(|scope| {
        let building =
            scope.spawn(|| s.build(&derivation("endless", "echo begun; sleep 98765", "")).quiet().run().unwrap());
        let start = Instant::now();
        while sleeping().is_empty() {
            assert!(start.elapsed() < PATIENCE, "the build did not begin");
            thread::sleep(Duration::from_millis(10));
        }
        kill_server(&daemon);
        let told = building.join().unwrap();
        assert_ne!(told.code, 0);
        expect_contains(&told.stderr, "error:").unwrap();
    });
    let start = Instant::now();
    while !sleeping().is_empty() {
        assert!(start.elapsed() < PATIENCE, "the build goes on: {:?}", sleeping());
        thread::sleep(Duration::from_millis(10));
    }
    s.build(&derivation("next", "echo works > $out", "")).ok().unwrap();
    daemon.stop().unwrap();
}

/// Processes of the endless build.
fn sleeping() -> Vec<String> {
    let processes = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let commands = processes.filter_map(|process| fs::read(process.join("cmdline")).ok());
    let commands = commands.map(|command| String::from_utf8_lossy(&command).replace('\0', " "));
    commands.filter(|command| command.starts_with("sleep 98765")).collect()
}

/// A server that cannot be started any more: after so many attempts the mount goes, so that nobody waits for ever.
#[test]
fn servers_that_all_fail_are_given_up_and_the_mount_is_taken_away() {
    let Some(s) = castored_setup("given-up") else { return };
    let mut daemon = s.start();
    let file = s.room.write("file", "in the store\n").unwrap();
    let path = s.nix(Who::User, "nix-store").arg("--add").arg(&file).ok().unwrap().text();
    thread::sleep(UNTIL_DURABLE);
    let (index, aside) = (Path::new("/nix/var/nix/castored/index"), Path::new("/nix/var/nix/castored/aside"));
    fs::rename(index, aside).unwrap();
    daemon.kill_server().unwrap();
    // Whoever asks meanwhile waits, and gets an error in the end.
    let asked = fs::read_dir("/nix/store").map(|entries| entries.count());
    let status = daemon.wait(PATIENCE).unwrap();
    assert!(!status.success());
    assert!(asked.is_err() || !Path::new(&path).exists(), "{asked:?}");
    let log = daemon.log();
    expect_contains(&log, "giving up").unwrap();
    expect_contains(&log, "nobody serves the mount any more").unwrap();
    assert_unmounted();
    assert!(!Path::new(SOCKET).exists());
    // When what was wrong is put right, all is well.
    fs::rename(aside, index).unwrap();
    let daemon = s.start();
    assert_eq!(fs::read_to_string(&path).unwrap(), "in the store\n");
    daemon.stop().unwrap();
}

#[test]
fn inode_numbers_and_roots_of_processes_survive() {
    let Some(s) = castored_setup("numbers") else { return };
    let daemon = s.start();
    let tree = Tree::Directory(vec![(b"file".to_vec(), Tree::File(vec![7; 100_000]))]);
    let mut client = Client::new(daemon.connect().unwrap()).unwrap();
    let path = client.add("numbered", &tree).unwrap();
    drop(client);
    thread::sleep(UNTIL_DURABLE);
    let file = format!("{path}/file");
    let open = fs::File::open(&file).unwrap();
    let before = open.metadata().unwrap().ino();
    kill_server(&daemon);
    assert_eq!((open.metadata().unwrap().ino(), fs::metadata(&file).unwrap().ino()), (before, before));
    // A process has it open, through the mount of a server long dead: that is a root.
    let mut running = Command::new("sleep").arg("1000").stdin(open).spawn().unwrap();
    s.nix(Who::Root, "nix-store").arg("--gc").quiet().ok().unwrap();
    assert!(Path::new(&file).exists(), "collected although it is open");
    running.kill().unwrap();
    running.wait().unwrap();
    s.nix(Who::Root, "nix-store").arg("--gc").quiet().ok().unwrap();
    assert!(!Path::new(&path).exists());
    daemon.stop().unwrap();
}

#[test]
fn the_keeper_is_small_and_the_daemon_is_protected_and_builders_are_not() {
    let Some(s) = castored_setup("keeper") else { return };
    let daemon = s.start();
    let anonymous = {
        let status = fs::read_to_string(format!("/proc/{}/status", daemon.started_pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.split_whitespace().next().unwrap().parse::<u64>().unwrap()
    };
    let resident = memory::rss(daemon.started_pid()).unwrap() / 1024;
    println!("the keeper: {anonymous} KiB of its own, {resident} KiB with its program");
    assert!(anonymous < 2048, "{anonymous} KiB");
    assert_eq!(memory::threads(daemon.started_pid()).unwrap(), 1);
    let score = |pid| fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim().to_owned();
    let ours = fs::read_to_string("/proc/self/oom_score_adj").unwrap().trim().to_owned();
    // In a container root may not.
    let may =
        Command::new("sh").args(["-c", "echo -900 > /proc/self/oom_score_adj"]).output().unwrap().status.success();
    let expected = if may && ours == "0" { "-900" } else { &ours };
    assert_eq!((score(daemon.pid()).as_str(), score(daemon.started_pid()).as_str()), (expected, expected));
    let built = s.build(&derivation("scored", "read score < /proc/self/oom_score_adj; echo $score > $out", "")).ok();
    assert_eq!(fs::read_to_string(built.unwrap().text()).unwrap().trim(), ours);
    daemon.stop().unwrap();
}

fn assert_unmounted() {
    let mounts = fs::read_to_string("/proc/thread-self/mounts").unwrap();
    assert!(!mounts.contains(" /nix/store "), "{mounts}");
}
