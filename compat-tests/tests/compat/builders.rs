//! Builds on other machines: a castored that builds nothing itself, and a castored or a stock Nix, of every release, that
//! builds for it. The clients are stock.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use compat_tests::checks::expect_contains;
use compat_tests::ssh::executable;
use compat_tests::subject::{SOCKET, default_conf};
use compat_tests::{Call, Daemon, Room, Subject, Who};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::builds::wait_until;
use crate::{Setup, castored_setup, derivation};

/// Far away, according to its name.
const HOST: &str = "builder.example";

/// Stands for ssh: passes over the options and runs the command here. What it is called with is written down.
const SSH: &str = r#"#!/bin/sh
echo "$*" >> @log@
[ "$1" = nowhere.example ] && { echo "ssh: connect to host nowhere.example port 22: No route to host" >&2; exit 255; }
while [ "$1" != -- ]; do shift; done
shift
PATH=@bin@:$PATH
exec /bin/sh -c "$*"
"#;

fn conf_without_builders() -> String {
    default_conf().replace("build-users-group = castored-build", "build-users-group =")
}

/// Another machine: a room of its own, with a castored in it.
struct Far {
    dir: PathBuf,
    /// Its daemon: the process that keeps the mount, and the one that serves.
    daemon: [Pid; 2],
    stop: mpsc::Sender<()>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Far {
    fn start(name: &str) -> Self {
        Self::start_with(name, Subject::from_environment().unwrap())
    }

    fn start_with(name: &str, subject: Subject) -> Self {
        let (stop, stopped) = mpsc::channel();
        let (tell, told) = mpsc::channel();
        let name = name.to_owned();
        // A room is a thread's.
        let thread = thread::spawn(move || {
            let room = Room::enter(&format!("{name}-far")).unwrap();
            // Stock kills whatever runs as a builder, in every room.
            let conf = if subject.is_stock() { conf_without_builders() } else { default_conf() };
            let conf = format!("{conf}system-features = big gpu\n");
            let daemon = subject.start_with(&room, &conf).unwrap();
            tell.send((room.dir().to_owned(), [daemon.started_pid(), daemon.pid()])).unwrap();
            let _ = stopped.recv();
            daemon.stop().unwrap();
        });
        let (dir, daemon) = told.recv().unwrap();
        Self { dir, daemon, stop, thread: Some(thread) }
    }

    fn socket(&self) -> PathBuf {
        self.dir.join(SOCKET.trim_start_matches('/'))
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        let _ = self.stop.send(());
        let ended = self.thread.take().map(thread::JoinHandle::join);
        if !thread::panicking() {
            ended.unwrap().unwrap();
        }
    }
}

/// A castored that builds nothing itself.
struct Near {
    setup: Setup,
    daemon: Daemon,
    bin: PathBuf,
    ssh_log: PathBuf,
}

impl Near {
    fn start(name: &str) -> Option<Self> {
        let setup = castored_setup(name)?;
        let room = &setup.room;
        let (bin, ssh_log) = (room.dir().join("near-bin"), room.dir().join("ssh-log"));
        fs::create_dir(&bin).unwrap();
        let ssh = SSH.replace("@log@", ssh_log.to_str().unwrap()).replace("@bin@", bin.to_str().unwrap());
        executable(&bin.join("ssh"), &ssh).unwrap();
        let mut command = setup.subject.command(room, &default_conf()).unwrap();
        command.env("PATH", format!("{}:/usr/bin:/bin", bin.display()));
        let daemon = Daemon::spawn(command, room, Path::new(SOCKET)).unwrap();
        Some(Self { setup, daemon, bin, ssh_log })
    }

    /// `nix-daemon` for ssh to find, which passes on to the far castored.
    fn reaches(&self, far: &Far) {
        let room = &self.setup.room;
        let castored = self.bin.join("castored").join("nix-daemon");
        fs::create_dir(castored.parent().unwrap()).unwrap();
        symlink(self.setup.subject.copy_into(room).unwrap(), &castored).unwrap();
        let script = format!(
            "#!/bin/sh\nNIX_DAEMON_SOCKET_PATH={} exec {} \"$@\"\n",
            far.socket().display(),
            castored.display()
        );
        executable(&self.bin.join("nix-daemon"), &script).unwrap();
    }

    /// A stock release's command, with a store of its own.
    fn stock(&self, version: &str, command: &str) -> PathBuf {
        let release = self.setup.machine.release(version).unwrap();
        let dir = self.setup.room.dir().join(format!("stock-{version}"));
        let conf = dir.join("etc");
        fs::create_dir_all(&conf).unwrap();
        fs::write(conf.join("nix.conf"), format!("{}system-features = big\n", conf_without_builders())).unwrap();
        let script = format!(
            "#!/bin/sh\nexec env -i PATH=/usr/bin:/bin HOME={0} NIX_CONF_DIR={0}/etc NIX_REMOTE='local?root={0}/root' \
             {1} \"$@\"\n",
            dir.display(),
            release.command(command).display()
        );
        let path = self.bin.join(format!("{command}-{version}"));
        executable(&path, &script).unwrap();
        path
    }

    fn build(&self, builders: &str, expression: &str) -> Call {
        self.setup.nix(Who::Root, "nix-build").args([
            "--no-out-link",
            "--max-jobs",
            "0",
            "--builders",
            builders,
            "-E",
            expression,
        ])
    }

    /// A chain of derivations and a source, all of it there and right in the end.
    fn everything(&self, name: &str, builders: &str) {
        let source = self.setup.room.write("source", format!("source of {name}\n")).unwrap();
        let first = derivation(
            &format!("first-{name}"),
            "echo hello from the first; read l < $src; echo one $l > $out",
            &format!("src = {};", source.display()),
        );
        let second = derivation(
            &format!("second-{name}"),
            "echo hello from the second; mkdir $out $dev; read l < ${first}; echo $l two > $out/x; echo $out > $dev",
            "",
        )
        .replace("echo $out > $dev", "echo $out/x ${first} > $dev/y; printf '#!x' > $dev/z; ln -s y $dev/l")
        .replace("args =", "outputs = [ \"out\" \"dev\" ]; args =");
        let expression = format!("let first = {first}; second = {second}; in second.dev");
        let built = self.build(builders, &expression).ok().unwrap();
        for line in ["hello from the first", "hello from the second"] {
            expect_contains(&built.stderr, line).unwrap();
        }
        let dev = built.text();
        assert!(dev.ends_with(&format!("second-{name}-dev")), "{dev}");
        let text = fs::read_to_string(format!("{dev}/l")).unwrap();
        let (x, first) = text.trim().split_once(' ').unwrap();
        assert_eq!(fs::read_to_string(x).unwrap(), format!("one source of {name} two\n"));
        assert_eq!(fs::read_to_string(first).unwrap(), format!("one source of {name}\n"));
        let query = |what: &[&str]| self.setup.nix(Who::User, "nix-store").args(what).ok().unwrap().lines();
        let out = x.strip_suffix("/x").unwrap();
        let mut references = [out, first].map(str::to_owned);
        references.sort();
        assert_eq!(query(&["-q", "--references", &dev]), references);
        assert!(query(&["-q", "--deriver", &dev])[0].ends_with(&format!("second-{name}.drv")));
        assert!(query(&["--read-log", &dev]).contains(&"hello from the second".to_owned()));
        query(&["--verify-path", &dev, out, first]);
        // All of it is there.
        let again = self.build(builders, &expression).ok().unwrap();
        assert!(!again.stderr.contains("hello"), "{}", again.stderr);
    }

    fn stop(self) {
        self.daemon.stop().unwrap();
    }
}

#[test]
fn castored_builds_on_castored() {
    let Some(near) = Near::start("builders") else { return };
    let far = Far::start("builders");
    near.reaches(&far);
    near.everything("socket", &format!("unix://{}", far.socket().display()));
    near.everything("localhost", &format!("ssh-ng://localhost?remote-program={}/nix-daemon", near.bin.display()));
    near.everything(
        "ssh",
        &format!("ssh-ng://someone@{HOST}?compress=true x86_64-linux /key 4 2.5 big - aG9zdGtleQ=="),
    );
    let called = fs::read_to_string(&near.ssh_log).unwrap();
    for word in [&format!("someone@{HOST} -x"), "-i /key", "-C", "-oUserKnownHostsFile=/", "-- nix-daemon --stdio"] {
        expect_contains(&called, word).unwrap();
    }
    // What a client says of a machine, the daemon's own list says as well, in a file too.
    fs::write(near.setup.room.dir().join("daemon-conf/machines"), format!("ssh-ng://{HOST}\n")).unwrap();
    let own = derivation("by-the-list", "echo x > $out", "");
    near.setup.build(&own).args(["--max-jobs", "0"]).ok().unwrap();
    near.stop();
}

/// Every stock release builds for castored, by either protocol.
fn on_stock(version: &str) {
    let Some(near) = Near::start(&format!("builders-{version}")) else { return };
    let release = near.setup.machine.release(version).unwrap();
    let far = Far::start_with(&format!("builders-{version}"), Subject::stock(release));
    for (scheme, command) in [("ssh", "nix-store"), ("ssh-ng", "nix-daemon"), ("unix", "")] {
        let builder = if scheme == "unix" {
            format!("unix://{}", far.socket().display())
        } else if scheme == "ssh-ng" && release.is_2_3() {
            // It looks for NARs below the root it does not have.
            continue;
        } else {
            format!("{scheme}://{HOST}?remote-program={}", near.stock(version, command).display())
        };
        near.everything(&format!("{scheme}-{version}"), &builder);
        let failing = derivation(&format!("failing-{scheme}"), "echo before the end; exit 3", "");
        let failed = near.build(&builder, &failing).fails().unwrap();
        assert_eq!(failed.stderr.matches("\nbefore the end").count(), 1, "{}", failed.stderr);
        expect_contains(&failed.stderr, "exit code 3").unwrap();
    }
    near.stop();
}

#[test]
fn castored_builds_on_nix_2_3_7() {
    on_stock("2.3.7");
}

#[test]
fn castored_builds_on_nix_2_8_0() {
    on_stock("2.8.0");
}

#[test]
fn castored_builds_on_nix_2_26_3() {
    on_stock("2.26.3");
}

#[test]
fn castored_builds_on_nix_2_34_8() {
    on_stock("2.34.8");
}

#[test]
fn a_failing_build_is_told_with_its_log() {
    let Some(near) = Near::start("builders-failing") else { return };
    let far = Far::start("builders-failing");
    let builder = format!("unix://{}", far.socket().display());
    let failing = derivation("failing", "echo before the end; exit 3", "");
    let failed = near.build(&builder, &failing).fails().unwrap();
    for text in ["before the end", "exit code 3", "failing.drv' on 'unix:///", "' failed: "] {
        expect_contains(&failed.stderr, text).unwrap();
    }
    let old = near.setup.machine.release("2.3.7").unwrap();
    let old = Call::nix(&near.setup.room, Who::Root, old, "nix-build")
        .args(["--no-out-link", "--max-jobs", "0", "--builders", &builder, "-E", &failing])
        .fails()
        .unwrap();
    assert_eq!(old.code, 100);

    let silent = derivation("silent", "sleep 100", "");
    let start = Instant::now();
    let failed = near.build(&builder, &silent).args(["--max-silent-time", "1"]).fails().unwrap();
    expect_contains(&failed.stderr, "timed out").unwrap();
    assert!(start.elapsed() < Duration::from_secs(30));
    let talks = derivation("talks", "while echo 0123456789012345678901234567890123456789; do :; done", "");
    let failed = near.build(&builder, &talks).args(["--option", "max-build-log-size", "100000"]).fails().unwrap();
    expect_contains(&failed.stderr, "log output").unwrap();

    let hash = format!("sha256-{}=", "A".repeat(43));
    let more = format!("outputHashMode = \"flat\"; outputHash = \"{hash}\";");
    let failed = near.build(&builder, &derivation("fixed", "echo x > $out", &more)).fails().unwrap();
    expect_contains(&failed.stderr, "hash mismatch in fixed-output derivation").unwrap();
    near.stop();
}

#[test]
fn features_and_systems_choose_the_machine() {
    let Some(near) = Near::start("builders-features") else { return };
    let far = Far::start("builders-features");
    let far = format!("unix://{}", far.socket().display());
    let needs = |name: &str, features: &str| {
        derivation(name, "echo x > $out", &format!("requiredSystemFeatures = [ {features} ];"))
    };
    // The first cannot be reached, so whoever tries it says so.
    let both = format!("ssh://nowhere.example - - 1 1 other; {far} - - 1 1 big,gpu big");
    let built = near.build(&both, &needs("big", "\"big\"")).ok().unwrap();
    assert!(!built.stderr.contains("nowhere.example"), "{}", built.stderr);
    let built = near.build(&both, &needs("big-gpu", "\"gpu\" \"big\"")).ok().unwrap();
    assert!(!built.stderr.contains("nowhere.example"), "{}", built.stderr);
    // The feature that must be asked for is not asked for.
    let failed = near.build(&both, &needs("gpu", "\"gpu\"")).fails().unwrap();
    for text in [
        "Failed to find a machine for remote build!",
        "(x86_64-linux, [gpu])",
        "2 available machines:",
        "missing system features",
    ] {
        expect_contains(&failed.stderr, text).unwrap();
    }
    let other = derivation("other-system", "echo x > $out", "").replace("x86_64-linux", "riscv64-linux");
    expect_contains(&near.build(&far, &other).fails().unwrap().stderr, "(riscv64-linux, [])").unwrap();
    // What this machine prefers for itself is built here, if it builds at all.
    let prefers = derivation("prefers", "echo x > $out", "preferLocalBuild = true;");
    let with_jobs = |builders: &str, expression: &str| near.build(builders, expression).args(["--max-jobs", "2"]);
    let built = with_jobs("ssh://nowhere.example", &prefers).ok().unwrap();
    assert!(!built.stderr.contains("nowhere.example"), "{}", built.stderr);
    // What no machine can do is done here.
    with_jobs(&both, &derivation("local", "echo x > $out", "")).ok().unwrap();
    // The list is not one.
    let failed = near.build("far - - eight", &derivation("bad-list", "echo x > $out", "")).fails().unwrap();
    expect_contains(&failed.stderr, "failed to convert column #3 in a row: 'far - - eight' to 'unsigned int'").unwrap();
    near.stop();
}

#[test]
fn a_machine_that_cannot_be_reached_is_passed_over() {
    let Some(near) = Near::start("builders-unreachable") else { return };
    let far = Far::start("builders-unreachable");
    let builders = format!("ssh://nowhere.example - - 4 9; unix://{}", far.socket().display());
    let simple = |name: &str| derivation(name, "echo x > $out", "");
    let built = near.build(&builders, &simple("first")).ok().unwrap();
    expect_contains(&built.stderr, "cannot build on 'ssh://nowhere.example':").unwrap();
    expect_contains(&built.stderr, "No route to host").unwrap();
    let built = near.build(&builders, &simple("second")).ok().unwrap();
    assert!(!built.stderr.contains("nowhere"), "it is tried again at once:\n{}", built.stderr);
    assert_eq!(fs::read_to_string(&near.ssh_log).unwrap().lines().count(), 1);
    let failed = near.build("ssh://nowhere.example", &simple("third")).fails().unwrap();
    expect_contains(&failed.stderr, "No route to host").unwrap();
    near.build("ssh://nowhere.example", &simple("fourth")).args(["--max-jobs", "1"]).ok().unwrap();
    let silent = format!("ssh-ng://localhost?remote-program={}", near.bin.join("mute").display());
    executable(&near.bin.join("mute"), "#!/bin/sh\necho I am not a daemon >&2; echo nor do I speak like one\n")
        .unwrap();
    let built = near.build(&silent, &simple("fifth")).args(["--max-jobs", "1"]).ok().unwrap();
    for text in ["cannot build on 'ssh-ng://localhost?", "I am not a daemon"] {
        expect_contains(&built.stderr, text).unwrap();
    }
    near.stop();
}

#[test]
fn a_machine_that_does_not_trust_us_builds_what_it_can_check() {
    let Some(near) = Near::start("builders-untrusted") else { return };
    let far = Far::start("builders-untrusted");
    let builder = format!("unix://{}", far.socket().with_file_name("untrusted").display());
    // The inputs of the second lie there from the first.
    near.everything("untrusted", &builder);
    // An input that was built elsewhere has no signature it trusts.
    let local = derivation("local", "echo x > $out", "");
    near.build("", &local).args(["--max-jobs", "1"]).ok().unwrap();
    let needs = derivation("needs", "read l < ${local}; echo $l > $out", "");
    let failed = near.build(&builder, &format!("let local = {local}; in {needs}")).fails().unwrap();
    expect_contains(&failed.stderr, "lacks a signature by a trusted key").unwrap();
    near.stop();
}

#[test]
fn builds_wait_for_a_place_and_the_status_names_the_machine() {
    let Some(near) = Near::start("builders-slots") else { return };
    let far = Far::start("builders-slots");
    let builder = format!("unix://{}", far.socket().display());
    let one = |n: u32| derivation(&format!("slot-{n}"), "sleep 1; echo x > $out", "");
    let list: String = (0..3).map(|n| format!("({})", one(n))).collect();
    let file = near.setup.room.write("slots.nix", format!("[ {list} ]")).unwrap();
    let build = |jobs: u32| {
        let builders = format!("{builder} - - {jobs}");
        let call = near.setup.nix(Who::Root, "nix-build").args(["--no-out-link", "--max-jobs", "0", "--builders"]);
        call.arg(builders).arg(&file)
    };
    let start = Instant::now();
    let mut client = build(1).spawn().unwrap();
    let castored = near.setup.subject.copy_into(&near.setup.room).unwrap();
    let status = || Call::new(&near.setup.room, Who::Root, &castored).arg("status").quiet().ok().unwrap().text();
    assert!(wait_until(Duration::from_secs(20), || status().contains(" on unix:///")), "{}", status());
    assert!(status().matches(" on unix:///").count() == 1, "{}", status());
    assert!(client.wait().unwrap().success());
    assert!(start.elapsed() >= Duration::from_secs(3), "they did not wait for each other");
    near.stop();
}

#[test]
fn a_client_that_goes_away_ends_ssh_and_the_build() {
    let Some(near) = Near::start("builders-cancel") else { return };
    let far = Far::start("builders-cancel");
    near.reaches(&far);
    let marker = format!("8{:09}", std::process::id());
    let builder = format!("ssh-ng://{HOST}");
    let mut client = near.build(&builder, &derivation("endless", &format!("sleep {marker}"), "")).spawn().unwrap();
    assert!(wait_until(Duration::from_secs(30), || !running(&["sleep", &marker]).is_empty()), "it did not begin");
    let ssh = || children(near.daemon.pid());
    assert!(!ssh().is_empty());
    kill(Pid::from_raw(i32::try_from(client.id()).unwrap()), Signal::SIGKILL).unwrap();
    client.wait().unwrap();
    assert!(wait_until(Duration::from_secs(1), || ssh().is_empty()), "ssh is still there: {:?}", ssh());
    assert!(wait_until(Duration::from_secs(5), || running(&["sleep", &marker]).is_empty()), "the build goes on");
    near.stop();
}

#[test]
fn a_machine_that_dies_during_a_build_is_replaced() {
    let Some(near) = Near::start("builders-dying") else { return };
    for (n, scheme) in ["unix", "ssh-ng"].into_iter().enumerate() {
        let far = Far::start(&format!("builders-dying-{scheme}"));
        let builder = if scheme == "unix" {
            format!("unix://{}", far.socket().display())
        } else {
            near.reaches(&far);
            format!("ssh-ng://{HOST}")
        };
        let marker = format!("2.{n}{}", std::process::id());
        let slow = derivation(&format!("slow-{scheme}"), &format!("echo begun; sleep {marker}; echo x > $out"), "");
        // Here there is a place as well, but the machine is asked first.
        let building = near.build(&builder, &slow).args(["--max-jobs", "1"]).spawn().unwrap();
        assert!(wait_until(Duration::from_secs(30), || !running(&["sleep", &marker]).is_empty()), "it did not begin");
        far.daemon.iter().for_each(|pid| kill(*pid, Signal::SIGKILL).unwrap());
        let output = building.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        expect_contains(&said, "the connection to the daemon broke off").unwrap();
        expect_contains(&said, "; trying elsewhere").unwrap();
        assert_eq!(said.matches("\nbegun").count(), 2, "{said}");
        // With nowhere else to go it fails, and says why.
        let failed = near.build(&builder, &derivation(&format!("more-{scheme}"), "echo x > $out", "")).fails().unwrap();
        expect_contains(&failed.stderr, "could not be reached").unwrap();
    }
    near.stop();
}

/// Processes with this command line.
fn running(words: &[&str]) -> Vec<PathBuf> {
    let wanted: Vec<u8> = words.iter().flat_map(|word| [word.as_bytes(), b"\0"].concat()).collect();
    let is_it = |process: &PathBuf| fs::read(process.join("cmdline")).is_ok_and(|line| line.ends_with(&wanted));
    fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path()).filter(is_it).collect()
}

/// The command lines of a process's children.
fn children(of: Pid) -> Vec<String> {
    let mut found = Vec::new();
    for task in fs::read_dir(format!("/proc/{of}/task")).unwrap().flatten() {
        let pids = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        for pid in pids.split_whitespace() {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            found.push(String::from_utf8_lossy(&line).replace('\0', " "));
        }
    }
    found
}
