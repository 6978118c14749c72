//! The sandbox helper with real namespaces, without a store: a plain directory plays the store's mount.

#![allow(clippy::unwrap_used, clippy::expect_used)] // in helpers of tests too

use std::fs;
use std::io::Read;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use build::helper::Helper;
use build::sandbox::{Bind, Executable, HostView, Identity, Program, Raw, Report, SandboxView, Spec, View};

const HELPER: &str = env!("CARGO_BIN_EXE_castored-sandbox");
const BUILD_UID: u32 = 872_415_232;
const BUILD_GID: u32 = 872_415_232;
const INPUT: &str = "00000000000000000000000000000001-input";
const OTHER: &str = "00000000000000000000000000000002-other";
const LINK: &str = "00000000000000000000000000000003-link";
const FILE: &str = "00000000000000000000000000000004-file";
const LATER: &str = "00000000000000000000000000000005-later";
const LATER_FILE: &str = "00000000000000000000000000000006-later-file";
const LATER_LINK: &str = "00000000000000000000000000000007-later-link";

/// What a build needs on disk, removed at the end.
struct Lab {
    dir: tempfile::TempDir,
    store_dir: String,
}

impl Lab {
    fn new(store_dir: &str) -> Lab {
        let dir = tempfile::Builder::new().prefix("sandbox-test").tempdir_in("/var/tmp").unwrap();
        let lab = Lab { dir, store_dir: store_dir.to_owned() };
        let builds = lab.path("builds");
        for sub in ["store", "builds/1/root", "builds/1/build", "builds/1/tmp", "builds/1/scratch", "builds/1/work"] {
            fs::create_dir_all(lab.path(sub)).unwrap();
        }
        fs::set_permissions(lab.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(builds, fs::Permissions::from_mode(0o700)).unwrap();
        let store = lab.path("store");
        fs::create_dir(store.join(INPUT)).unwrap();
        fs::write(store.join(INPUT).join("hello"), "from the input\n").unwrap();
        fs::create_dir(store.join(OTHER)).unwrap();
        symlink("somewhere", store.join(LINK)).unwrap();
        fs::write(store.join(FILE), "a file\n").unwrap();
        lab
    }

    fn path(&self, sub: &str) -> PathBuf {
        self.dir.path().join(sub)
    }

    fn give_to(&self, uid: u32, gid: u32) {
        chown(self.path("builds/1/build"), Some(uid), Some(gid)).unwrap();
        fs::set_permissions(self.path("builds/1/build"), fs::Permissions::from_mode(0o700)).unwrap();
        fs::set_permissions(self.path("builds/1/tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
        chown(self.path("builds/1/scratch"), None, Some(gid)).unwrap();
        fs::set_permissions(self.path("builds/1/scratch"), fs::Permissions::from_mode(0o1775)).unwrap();
    }

    fn raw(&self, sub: &str) -> Raw {
        self.path(sub).into()
    }

    fn sandboxed(&self, script: &str) -> Spec {
        let bind = |source: &str, target: &str| Bind { source: source.into(), target: target.into(), optional: false };
        Spec {
            identity: Identity::BuildUser { uid: BUILD_UID, gid: BUILD_GID, count: 1 },
            view: View::Sandbox(SandboxView {
                root: self.raw("builds/1/root"),
                store_mount: self.raw("store"),
                store_dir: self.store_dir.as_str().into(),
                scratch: self.raw("builds/1/scratch"),
                inputs: vec![INPUT.into(), LINK.into(), FILE.into()],
                build_dir: self.raw("builds/1/build"),
                build_dir_inside: "/build".into(),
                tmp: self.raw("builds/1/tmp"),
                binds: vec![bind(busybox(), "/bin/sh"), bind(busybox(), "/bb/busybox")],
                shm_size: "50%".into(),
            }),
            host_network: false,
            personality_32: false,
            linux_26: false,
            filter_system_calls: true,
            new_privileges: false,
            grows: false,
            cgroup: None,
            program: shell(script, "/path-not-set", self.store_dir.as_str().into()),
            work_dir: "/build".into(),
        }
    }

    /// The same without a root of its own; the store is the lab's.
    fn unsandboxed(&self, script: &str) -> Spec {
        let build_dir = self.raw("builds/1/build");
        Spec {
            view: View::Host(HostView {
                store_mount: self.raw("store"),
                scratch: self.raw("builds/1/scratch"),
                overlay_work: self.raw("builds/1/work"),
                inputs: vec![INPUT.into(), LINK.into(), FILE.into()],
                build_dir: build_dir.clone(),
                builds_dir: self.raw("builds"),
            }),
            host_network: true,
            program: shell(script, "/usr/bin:/bin", self.raw("store")),
            work_dir: build_dir,
            ..self.sandboxed(script)
        }
    }

    /// For another build in the same lab.
    fn empty_scratch(&self) {
        for entry in fs::read_dir(self.path("builds/1/scratch")).unwrap() {
            let path = entry.unwrap().path();
            let is_dir = fs::symlink_metadata(&path).unwrap().is_dir();
            if is_dir { fs::remove_dir_all(path) } else { fs::remove_file(path) }.unwrap();
        }
    }

    fn output(&self, name: &str) -> String {
        fs::read_to_string(self.path("builds/1/scratch").join(name)).unwrap()
    }
}

fn shell(script: &str, path: &str, store: Raw) -> Program {
    Program::Executable(Executable {
        path: "/bin/sh".into(),
        args: vec!["sh".into(), "-c".into(), script.into()],
        env: vec![("PATH".into(), path.into()), ("STORE".into(), store)],
    })
}

fn busybox() -> &'static str {
    ["/usr/bin/busybox", "/bin/busybox"].into_iter().find(|p| Path::new(p).exists()).unwrap_or("/bin/sh")
}

/// Runs a build: its report and its log.
fn run(spec: &Spec) -> (Report, String) {
    let (helper, mut log) = Helper::spawn(Path::new(HELPER), spec).unwrap();
    let mut text = String::new();
    log.read_to_string(&mut text).unwrap();
    (helper.wait().unwrap().expect("a report"), text)
}

fn succeed(spec: &Spec) -> String {
    let (report, log) = run(spec);
    assert!(matches!(report, Report::Ended { code: Some(0), .. }), "{report:?}\n{log}");
    log
}

/// Whether the tests can run here; says so when not.
fn ready() -> bool {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED: needs root");
        return false;
    }
    if !busybox().ends_with("busybox") {
        println!("SKIPPED: needs a static busybox");
        return false;
    }
    true
}

fn lab(store_dir: &str) -> Option<Lab> {
    ready().then(|| {
        let lab = Lab::new(store_dir);
        lab.give_to(BUILD_UID, BUILD_GID);
        lab
    })
}

#[test]
fn runs_as_the_build_user_and_sees_only_its_inputs() {
    for store_dir in ["/nix/store", "/var/tmp/elsewhere/store"] {
        let Some(lab) = lab(store_dir) else { return };
        let log = succeed(&lab.sandboxed(
            "b=/bb/busybox; $b id; $b hostname; $b pwd; $b ls -a $STORE; $b cat $STORE/*-input/hello; \
             $b readlink $STORE/*-link; $b cat $STORE/*-file; echo made > $STORE/out; echo $$; $b ls -A / /dev /etc",
        ));
        assert!(log.contains("uid=1000(nixbld) gid=100(nixbld)\n"), "{log}");
        assert!(log.contains("\nlocalhost\n/build\n"), "{log}");
        assert!(log.contains("from the input\nsomewhere\na file\n1\n"), "{log}");
        assert!(!log.contains(OTHER), "an input that was not given is visible: {log}");
        assert!(!log.contains("root\n") && !log.contains("home\n"), "the host's root shows: {log}");
        assert_eq!(lab.output("out"), "made\n");
        let owner = std::os::unix::fs::MetadataExt::uid(&fs::metadata(lab.path("builds/1/scratch/out")).unwrap());
        assert_eq!(owner, BUILD_UID);
    }
}

#[test]
fn the_log_can_be_opened_by_name() {
    let Some(lab) = lab("/nix/store") else { return };
    let script =
        "echo one | /bb/busybox tee /dev/stderr > /dev/null; echo two > /dev/stdout; echo three > /proc/self/fd/2";
    assert_eq!(succeed(&lab.sandboxed(script)), "one\ntwo\nthree\n");
}

#[test]
fn nothing_of_the_daemons_own_limits_and_keys_is_inherited() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let Some(lab) = lab("/nix/store") else { return };
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(4096), hard).unwrap();
    let script = "ulimit -n; ulimit -Hn; /bb/busybox cat /proc/keys || :";
    let log = succeed(&lab.sandboxed(script));
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(lines[0], "1024", "{log}");
    assert!(lines[1].parse::<u64>().unwrap() <= 524_288, "{log}");
    // A session keyring of its own, and none that is the daemon's.
    assert!(log.contains(" _ses: ") && !log.contains("_uid_ses.0"), "{log}");
}

/// A 32-bit program that gives `/build/s` the mode 04755 and ends with the error number.
#[cfg(target_arch = "x86_64")]
fn program_32() -> Vec<u8> {
    const BASE: u32 = 0x0804_8000;
    const HEADERS: u32 = 52 + 32;
    let mut code = vec![0xb8, 15, 0, 0, 0, 0xbb]; // mov eax, chmod; mov ebx, path
    code.extend((BASE + HEADERS + 26).to_le_bytes());
    code.extend([0xb9, 0xed, 0x09, 0, 0, 0xcd, 0x80]); // mov ecx, 04755; int 0x80
    code.extend([0x89, 0xc3, 0xf7, 0xdb, 0x31, 0xc0, 0x40, 0xcd, 0x80]); // mov ebx, eax; neg ebx; exit
    assert_eq!(code.len(), 26);
    code.extend(b"/build/s\0");
    let words = |file: &mut Vec<u8>, words: &[u32]| words.iter().for_each(|word| file.extend(word.to_le_bytes()));
    let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x03\0".to_vec();
    words(&mut file, &[1, BASE + HEADERS, 52, 0, 0, 52 | 32 << 16, 1 | 40 << 16, 0]);
    let size = HEADERS + code.len() as u32;
    words(&mut file, &[1, 0, BASE, BASE, size, size, 5, 0x1000]);
    file.extend(code);
    file
}

#[cfg(target_arch = "x86_64")]
#[test]
fn programs_of_32_bits_run_under_the_same_rules() {
    let Some(lab) = lab("/nix/store") else { return };
    let program = lab.path("store").join(INPUT).join("program");
    fs::write(&program, program_32()).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let outside = std::process::Command::new(&program).status();
    if !outside.is_ok_and(|status| status.code() == Some(2)) {
        println!("SKIPPED: the kernel runs no 32-bit programs");
        return;
    }
    let mut spec = lab.sandboxed("echo > s; $STORE/*-input/program; echo $?; /bb/busybox uname -m");
    spec.personality_32 = true;
    assert_eq!(succeed(&spec), "1\ni686\n");
}

#[test]
fn inputs_root_and_devices_are_protected() {
    let Some(lab) = lab("/nix/store") else { return };
    let log = succeed(&lab.sandboxed(
        "b=/bb/busybox; for f in $STORE/*-input/new $STORE/*-input/hello /new /etc/passwd /etc/new /dev/new; do \
           if (echo x > $f) 2>/dev/null; then echo \"wrote $f\"; fi; done; \
         $b rmdir $STORE/*-input 2>/dev/null && echo removed; \
         $b mount -t tmpfs x /tmp 2>/dev/null && echo mounted; \
         $b touch s; $b chmod 4755 s 2>/dev/null && echo setuid; $b chmod 2755 s 2>/dev/null && echo setgid; \
         $b mknod d c 1 3 2>/dev/null && echo device; \
         for f in /dev/null /dev/shm/x /tmp/x /build/x; do echo x > $f || echo \"cannot write $f\"; done; \
         $b chmod 755 s || echo 'chmod is broken'; echo done",
    ));
    assert_eq!(log, "done\n");
}

#[test]
fn settings_take_restrictions_away() {
    let script = "b=/bb/busybox; $b grep NoNewPrivs /proc/self/status; $b touch s; $b chmod 4755 s 2>/dev/null || \
                  echo refused; $b uname -r; $b grep CapEff /proc/self/status";
    for (filter, gain, old) in [(true, false, false), (true, true, true), (false, false, true), (false, true, false)] {
        for sandboxed in [true, false] {
            let Some(lab) = lab("/nix/store") else { return };
            let outside = script.replace("b=/bb/busybox", &format!("b={}", busybox()));
            let mut spec = if sandboxed { lab.sandboxed(script) } else { lab.unsandboxed(&outside) };
            (spec.filter_system_calls, spec.new_privileges, spec.linux_26) = (filter, gain, old);
            let log = succeed(&spec);
            assert!(log.starts_with(&format!("NoNewPrivs:\t{}\n", u8::from(!gain))), "{log}");
            assert_eq!(log.contains("refused\n"), filter, "{log}");
            assert_eq!(log.contains("\n2.6."), old, "{log}");
            assert!(log.ends_with("CapEff:\t0000000000000000\n"), "{log}");
        }
    }
}

#[test]
fn a_range_of_users_has_a_root_that_is_not_the_hosts() {
    let Some(lab) = lab("/nix/store") else { return };
    let mut spec = lab.sandboxed(
        "b=/bb/busybox; $b id; $b cat /proc/self/uid_map /etc/passwd; $b touch mine theirs last; $b chown 5:6 theirs; \
         $b chown 65535 last; $b chown 65536 last 2>/dev/null && echo 'outside the range'; \
         $b mkdir /srv /mnt && $b mount -t tmpfs none /mnt && echo mounted; $b ip -o addr; \
         echo 'x:x:7:7::/:/x' >> /etc/passwd2 && echo etc; \
         for f in $STORE/*-input/new $STORE/*-input/hello /proc/sys/kernel/hostname2 /proc/sys/vm/swappiness \
           /proc/sys/kernel/core_pattern; do if (echo 60 > $f) 2>/dev/null; then echo \"wrote $f\"; fi; done; \
         $b mknod /d b 1 1 2>/dev/null && echo device; $b chroot / /bin/sh -c 'echo chroot'; \
         $b umount $STORE/*-input 2>/dev/null && echo uncovered; \
         $b mount -o remount,rw,bind $STORE/*-input 2>/dev/null && (echo > $STORE/*-input/new) 2>/dev/null && \
           echo 'the store is writable'; \
         $b mkdir $STORE/out; echo made > $STORE/out/file; $b chown 3:3 $STORE/out/file",
    );
    const COUNT: u32 = 65_536;
    spec.identity = Identity::BuildUser { uid: BUILD_UID, gid: BUILD_GID, count: COUNT };
    let log = succeed(&spec);
    assert!(log.starts_with("uid=0(root) gid=0(root)"), "{log}");
    let map: Vec<u32> = log.lines().nth(1).unwrap().split_whitespace().map(|n| n.parse().unwrap()).collect();
    assert_eq!(map, [0, BUILD_UID, COUNT]);
    assert!(log.contains("root:x:0:0:") && log.contains("nixbld:x:0:0:"), "{log}");
    assert!(log.contains("\nmounted\n") && log.contains("127.0.0.1/8") && log.contains("\netc\nchroot\n"), "{log}");
    for bad in ["outside", "wrote", "device", "uncovered", "writable"] {
        assert!(!log.contains(bad), "{bad}: {log}");
    }
    use std::os::unix::fs::MetadataExt;
    let owner = |name: &str| fs::symlink_metadata(lab.path("builds/1").join(name)).unwrap().uid();
    let found = ["build/mine", "build/theirs", "build/last", "scratch/out/file"].map(owner);
    assert_eq!(found, [BUILD_UID, BUILD_UID + 5, BUILD_UID + COUNT - 1, BUILD_UID + 3]);

    let mut spec = lab.unsandboxed("id");
    spec.identity = Identity::BuildUser { uid: BUILD_UID, gid: BUILD_GID, count: COUNT };
    let (report, _) = run(&spec);
    assert!(matches!(report, Report::Failed { .. }), "{report:?}");
}

#[test]
fn network_is_a_loopback_of_its_own() {
    let Some(lab) = lab("/nix/store") else { return };
    let log = succeed(&lab.sandboxed("/bb/busybox ip -o addr; /bb/busybox ls /sys 2>&1; cat=1"));
    assert!(log.contains("127.0.0.1/8"), "{log}");
    assert!(log.lines().all(|l| !l.contains("eth")), "{log}");
}

#[test]
fn nothing_outlives_the_builder() {
    let Some(lab) = lab("/nix/store") else { return };
    let start = Instant::now();
    let (report, log) = run(&lab.sandboxed(
        "(/bb/busybox setsid /bb/busybox sh -c 'while :; do echo late >> /nix/store/out; done' &) ; \
         /bb/busybox sleep 0.2; exit 7",
    ));
    assert!(matches!(report, Report::Ended { code: Some(7), .. }), "{report:?} {log}");
    let size = || fs::metadata(lab.path("builds/1/scratch/out")).map(|m| m.len()).unwrap_or(0);
    let before = size();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(size(), before, "a process still writes to the output");
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn closing_the_socket_kills_every_process() {
    let Some(lab) = lab("/nix/store") else { return };
    let spec = lab.sandboxed("/bb/busybox sleep 100 & echo started; /bb/busybox sleep 100");
    let (helper, mut log) = Helper::spawn(Path::new(HELPER), &spec).unwrap();
    let mut first = [0; 8];
    log.read_exact(&mut first).unwrap();
    let start = Instant::now();
    helper.killer().unwrap().kill();
    // The pipe ends only when no process has its other end any more.
    let mut rest = Vec::new();
    log.read_to_end(&mut rest).unwrap();
    assert_eq!(helper.wait().unwrap(), None);
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
}

#[test]
fn killing_the_helper_kills_the_builder() {
    let Some(lab) = lab("/nix/store") else { return };
    let spec = lab.sandboxed("echo started; /bb/busybox sleep 100");
    let (helper, mut log) = Helper::spawn(Path::new(HELPER), &spec).unwrap();
    log.read_exact(&mut [0; 8]).unwrap();
    let start = Instant::now();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(helper.pid() as i32), nix::sys::signal::Signal::SIGKILL).unwrap();
    log.read_to_end(&mut Vec::new()).unwrap();
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
}

#[test]
fn a_step_that_fails_is_named() {
    let Some(lab) = lab("/nix/store") else { return };
    let mut spec = lab.sandboxed("true");
    let Program::Executable(executable) = &mut spec.program else { panic!("{:?}", spec.program) };
    executable.path = "/no/such/builder".into();
    let (report, _) = run(&spec);
    let Report::Failed { error } = report else { panic!("{report:?}") };
    assert!(error.starts_with("executing '/no/such/builder': No such file"), "{error}");

    let mut spec = lab.sandboxed("true");
    spec.identity = Identity::BuildUser { uid: 0, gid: 0, count: 1 };
    let (report, _) = run(&spec);
    let Report::Failed { error } = report else { panic!("a builder ran as root: {report:?}") };
    assert!(error.contains("build user is root"), "{error}");
}

#[test]
fn sandbox_paths_below_a_link_stay_inside() {
    let Some(lab) = lab("/nix/store") else { return };
    symlink(lab.path("outside"), lab.path("evil")).unwrap();
    let mut spec = lab.sandboxed("echo ran");
    let View::Sandbox(view) = &mut spec.view else { unreachable!() };
    view.binds.push(Bind { source: lab.raw("evil"), target: "/link".into(), optional: false });
    view.binds.push(Bind { source: busybox().into(), target: "/link/made".into(), optional: false });
    let (_, log) = run(&spec);
    assert!(!lab.path("outside").exists(), "a mount point was made outside the root: {log}");
}

#[test]
fn optional_sandbox_paths_may_be_missing() {
    let Some(lab) = lab("/nix/store") else { return };
    let mut spec = lab.sandboxed("echo ran");
    let View::Sandbox(view) = &mut spec.view else { unreachable!() };
    view.binds.push(Bind { source: "/no/such/thing".into(), target: "/thing".into(), optional: true });
    assert_eq!(succeed(&spec), "ran\n");
}

#[test]
fn without_a_sandbox_the_store_is_writable_in_private() {
    let Some(lab) = lab("/unused") else { return };
    let log = succeed(&lab.unsandboxed(
        "cat $STORE/*-input/hello; echo made > $STORE/out; ls $STORE; pwd; touch here; ls -d /proc/[0-9]* | wc -l; id -u",
    ));
    assert!(log.starts_with("from the input\n"), "{log}");
    assert!(log.contains("out\n"), "{log}");
    assert!(log.contains(&format!("{}\n", lab.path("builds/1/build").display())), "{log}");
    assert!(log.ends_with(&format!("{BUILD_UID}\n")), "{log}");
    assert_eq!(lab.output("out"), "made\n");
    assert!(!lab.path("store/out").exists(), "the store itself was written to");
    assert!(lab.path("builds/1/build/here").exists());
}

/// A builder that waits for a path to appear, and what it sees then; the path is shown to it while it runs.
fn run_growing(exe: &Path, spec: &Spec, named: &[&str]) -> (Result<(), String>, Report, String) {
    let spec = Spec { grows: true, ..spec.clone() };
    let (mut helper, mut log) = Helper::spawn(exe, &spec).unwrap();
    let mut window = helper.take_window().unwrap();
    let mut text = Vec::new();
    while !text.ends_with(b"ready\n") {
        let mut byte = [0];
        assert_eq!(log.read(&mut byte).unwrap(), 1, "{}", String::from_utf8_lossy(&text));
        text.push(byte[0]);
    }
    let shown = window.show(named).map_err(|e| e.to_string());
    let mut text = String::new();
    log.read_to_string(&mut text).unwrap();
    let report = helper.wait().unwrap().expect("a report");
    assert!(window.show(named).is_err(), "shown to a builder that is gone");
    (shown, report, text)
}

/// Looks for the file `$1`, which is not there, and waits until it is; gives up after ten seconds.
const AWAIT: &str =
    "await() { i=0; while [ ! -e $1 -a ! -L $1 ]; do i=$((i+1)); [ $i -lt 100 ] || exit 9; $b sleep 0.1; done; }; ";

fn add_later(lab: &Lab) {
    // Never seen by the builder before: what an overlay shows of it is not what it remembers.
    fs::create_dir(lab.path("store").join(LATER)).unwrap();
    fs::write(lab.path("store").join(LATER).join("hello"), "from later\n").unwrap();
    fs::write(lab.path("store").join(LATER_FILE), "a later file\n").unwrap();
    symlink("elsewhere", lab.path("store").join(LATER_LINK)).unwrap();
}

const SEE_LATER: &str = "[ ! -e $STORE/*-later ] || echo early; echo ready; await $STORE/00000000000000000000000000000007-later-link; \
     $b cat $STORE/*-later/hello $STORE/*-later-file; $b readlink $STORE/*-later-link; \
     (echo x > $STORE/00000000000000000000000000000005-later/new) 2>/dev/null && echo wrote; \
     $b umount $STORE/*-later 2>/dev/null && echo uncovered; \
     (echo x > $STORE/00000000000000000000000000000006-later-file) 2>/dev/null && echo wrote; \
     [ ! -e $STORE/*-other ] || echo other; echo done";
const SEEN_LATER: &str = "from later\na later file\nelsewhere\ndone\n";

#[test]
fn a_running_sandbox_is_shown_more_of_the_store() {
    for (store_dir, count) in [("/nix/store", 1), ("/var/tmp/elsewhere/store", 1), ("/nix/store", 65_536)] {
        let Some(lab) = lab(store_dir) else { return };
        add_later(&lab);
        let script = format!("b=/bb/busybox; {AWAIT} {SEE_LATER}");
        let mut spec = lab.sandboxed(&script);
        spec.identity = Identity::BuildUser { uid: BUILD_UID, gid: BUILD_GID, count };
        let (shown, report, log) = run_growing(Path::new(HELPER), &spec, &[LATER, LATER_FILE, LATER_LINK]);
        shown.unwrap();
        assert!(matches!(report, Report::Ended { code: Some(0), .. }), "{report:?}\n{log}");
        // A build's root may uncover its own directory; what lies below is empty.
        let log = if count > 1 { log.replace("uncovered\n", "") } else { log };
        assert_eq!(log, SEEN_LATER, "{count} users");
        assert!(fs::read_dir(lab.path("builds/1/scratch").join(LATER)).unwrap().next().is_none());
    }
}

#[test]
fn what_a_builder_made_itself_is_not_covered() {
    let Some(lab) = lab("/nix/store") else { return };
    add_later(&lab);
    let script = format!(
        "echo own > $STORE/{LATER}; $b echo ready; read line < $STORE/{LATER}; /bb/busybox sleep 1; echo $line"
    );
    let (shown, report, log) = run_growing(Path::new(HELPER), &lab.sandboxed(&script.replace("$b ", "")), &[LATER]);
    assert!(shown.unwrap_err().contains("exists"));
    assert!(matches!(report, Report::Ended { code: Some(0), .. }), "{report:?}\n{log}");
    assert_eq!(log, "own\n");
    lab.empty_scratch();
    let (shown, ..) = run_growing(Path::new(HELPER), &lab.sandboxed("echo ready; /bb/busybox sleep 1"), &["missing"]);
    assert!(shown.unwrap_err().contains("taking 'missing' from the store"));
}

#[test]
fn a_build_without_a_sandbox_sees_what_it_looked_for_too_early() {
    let Some(lab) = lab("/unused") else { return };
    let script = format!(
        "b={}; {AWAIT} p=$STORE/{LATER}; [ ! -e $p ] || echo early; echo ready; await $p; cat $p/hello; \
         (echo x > $p/hello) 2>/dev/null && echo wrote; cat $STORE/{LATER_FILE}",
        busybox()
    );
    let spec = Spec { grows: true, ..lab.unsandboxed(&script) };
    let (mut helper, mut log) = Helper::spawn(Path::new(HELPER), &spec).unwrap();
    let mut window = helper.take_window().unwrap();
    let mut ready = [0; 6];
    log.read_exact(&mut ready).unwrap();
    assert_eq!(&ready, b"ready\n");
    add_later(&lab);
    window.show(&[LATER, LATER_FILE]).unwrap();
    let mut text = String::new();
    log.read_to_string(&mut text).unwrap();
    let report = helper.wait().unwrap().expect("a report");
    assert!(matches!(report, Report::Ended { code: Some(0), .. }), "{report:?}\n{text}");
    assert_eq!(text, "from later\na later file\n");
}

/// An ordinary user's daemon: the helper is started as that user.
#[test]
fn an_ordinary_user_builds_in_a_user_namespace() {
    if !ready() {
        return;
    }
    const USER: u32 = 54_321;
    let lab = Lab::new("/nix/store");
    let give = |path: PathBuf| chown(path, Some(USER), Some(USER)).unwrap();
    for sub in ["builds", "builds/1", "builds/1/root", "builds/1/tmp", "builds/1/scratch", "builds/1/work"] {
        give(lab.path(sub));
    }
    lab.give_to(USER, USER);
    let run_as_user = |spec: &Spec| {
        // setpriv stands for a daemon that was never root: it starts the helper with that user's ids.
        let wrapper = lab.path("as-user");
        let text = format!(
            "#!/bin/sh\nexec setpriv --reuid {USER} --regid {USER} --clear-groups {} \"$@\"\n",
            lab.path("helper").display()
        );
        fs::copy(HELPER, lab.path("helper")).unwrap();
        fs::write(&wrapper, text).unwrap();
        fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).unwrap();
        // Scripts need a PATH; the helper's own environment is empty, and sh has a default.
        let (helper, mut log) = Helper::spawn(&wrapper, spec).unwrap();
        let mut text = String::new();
        log.read_to_string(&mut text).unwrap();
        (helper.wait().unwrap().expect("a report"), text)
    };
    let mut spec = lab.sandboxed("/bb/busybox id -u; echo made > $STORE/out; /bb/busybox cat $STORE/*-input/hello");
    spec.identity = Identity::Caller;
    let (report, log) = run_as_user(&spec);
    assert!(matches!(report, Report::Ended { code: Some(0), .. }), "{report:?}\n{log}");
    assert_eq!(log, "1000\nfrom the input\n");
    assert_eq!(lab.output("out"), "made\n");

    let mut spec = lab.unsandboxed("id -u; cat $STORE/*-input/hello; echo made > $STORE/out2");
    spec.identity = Identity::Caller;
    let (report, log) = run_as_user(&spec);
    assert!(matches!(report, Report::Ended { code: Some(0), .. }), "{report:?}\n{log}");
    assert_eq!(log, format!("{USER}\nfrom the input\n"));
    assert_eq!(lab.output("out2"), "made\n");

    lab.empty_scratch();
    add_later(&lab);
    let mut spec = lab.sandboxed(&format!("b=/bb/busybox; {AWAIT} {SEE_LATER}"));
    spec.identity = Identity::Caller;
    let (shown, report, log) = run_growing(&lab.path("as-user"), &spec, &[LATER, LATER_FILE, LATER_LINK]);
    shown.unwrap();
    assert!(matches!(report, Report::Ended { code: Some(0), .. }), "{report:?}\n{log}");
    assert_eq!(log, SEEN_LATER);
}
