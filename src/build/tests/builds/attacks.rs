//! Attacks out of a build: one for each class that has happened to Nix or its like, and some that could.
//!
//! The attacker is this very program, run as a builder (see `attacks_inside`). All of it is tried as root and, by the
//! last test, as an ordinary user.

use std::fs::File;
use std::io::{IoSliceMut, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::{OFlag, RenameFlags, openat, renameat2};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::sys::stat::Mode;
use nix_compat::hash::{Algorithm, Hash};
use nix_compat::store_path::StorePath;
use nix_compat::worker::{BuildMode, BuildStatus};

use crate::attacks_inside::{ATTACK, LARGE, PAIRS, SAID, TARGET};
use crate::rig::{Draft, Log, Rig, all_outputs, soon};

/// Where the attacker finds itself, and what it is linked to.
fn sandbox_paths() -> String {
    let exe = std::env::current_exe().unwrap();
    format!("/busybox=/usr/bin/busybox /attacker={} /usr /lib /lib64?", exe.display())
}

/// A build of which an attack is the builder. What it says begins with [`SAID`].
fn attack(rig: &Rig, name: &str, target: &str) -> Draft {
    let exe = std::env::current_exe().unwrap();
    let script = format!(
        "exe=/attacker; [ -e $exe ] || exe={}; exec $exe --exact attacks_inside::attacker --nocapture",
        exe.display()
    );
    rig.derivation(name, &script).env(ATTACK, name).env(TARGET, target)
}

/// The draft, told where busybox is with or without a sandbox.
fn placed(draft: Draft, sandbox: &str) -> Draft {
    let draft = draft.env("sandbox", sandbox);
    if sandbox == "true" { draft } else { draft.env("b", "/usr/bin/busybox") }
}

fn said(log: &Log) -> Vec<String> {
    log.lines().iter().filter_map(|line| line.strip_prefix(SAID).map(str::to_owned)).collect()
}

fn repelled(log: &Log) {
    let worked: Vec<String> = said(log).into_iter().filter(|line| line.ends_with(" WORKED")).collect();
    assert!(worked.is_empty(), "{worked:?}\n{:?}", log.lines());
}

/// What the mount shows has the hash that was registered.
fn assert_honest(rig: &Rig, path: &StorePath) {
    let parent = File::open(rig.store.store_dir().as_str()).unwrap();
    let mut nar = Vec::new();
    build::dump_tree(parent.as_fd(), Path::new(path.base_name()), &mut nar).unwrap();
    let info = rig.store.path_info(path).unwrap().unwrap();
    assert_eq!(Hash::of(Algorithm::Sha256, &nar), Hash::Sha256(*info.nar_hash.as_bytes()));
}

/// A descriptor that an accomplice was handed.
fn receive(stream: &UnixStream) -> OwnedFd {
    let mut byte = [0];
    let mut space = nix::cmsg_space!([i32; 1]);
    let mut parts = [IoSliceMut::new(&mut byte)];
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty()).unwrap();
    for control in message.cmsgs().unwrap() {
        if let ControlMessageOwned::ScmRights(fds) = control {
            return own(fds[0]);
        }
    }
    panic!("no descriptor came");
}

/// Waits for the builder to come; it may have failed before.
fn meet(listener: &UnixListener) -> Option<UnixStream> {
    listener.set_nonblocking(true).unwrap();
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(30) {
        if let Ok((stream, _)) = listener.accept() {
            stream.set_nonblocking(false).unwrap();
            return Some(stream);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    None
}

/// The received descriptor stays open as well, and is all that keeps the file.
fn own(fd: i32) -> OwnedFd {
    let path = format!("/proc/self/fd/{fd}");
    let writable = std::fs::OpenOptions::new().read(true).write(true).open(&path);
    writable.or_else(|_| File::open(&path)).unwrap().into()
}

/// CVE-2024-27297, CVE-2025-46416: the meeting place is an abstract socket.
#[tokio::test(flavor = "multi_thread")]
async fn no_abstract_socket_outside_is_reached() {
    let Some(rig) = Rig::new() else { return };
    let name = format!("castored-attack-{}", std::process::id());
    let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let paths = sandbox_paths();
    let own_network = ("sandbox", "true");
    let mut cases = vec![(own_network, attack(&rig, "abstract", &name))];
    if version >= (6, 12) {
        // With the host's network only Landlock is in the way.
        cases.push((own_network, attack(&rig, "abstract", &name).fixed(&rig, "done\n")));
        cases.push((("sandbox", "false"), attack(&rig, "abstract", &name).env("again", "1")));
    } else {
        println!("SKIPPED: the kernel is too old to keep builds that have the host's network from abstract sockets");
    }
    for (sandbox, draft) in cases {
        let (_, log) = rig.succeed(&draft, &[sandbox, ("sandbox-paths", &paths)]).await;
        repelled(&log);
    }
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err(), "somebody came");
}

/// The same attack once the descriptor is out: here through a socket with a path, which builds without a sandbox reach.
#[tokio::test(flavor = "multi_thread")]
async fn who_kept_a_descriptor_changes_nothing() {
    let Some(rig) = Rig::new() else { return };
    let socket = rig.path("meet");
    let listener = UnixListener::bind(&socket).unwrap();
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o777)).unwrap();
    let accomplice = std::thread::spawn(move || {
        let stream = meet(&listener).expect("the builder");
        File::from(receive(&stream))
    });
    let draft = attack(&rig, "pass", socket.to_str().unwrap());
    let draft = draft.fixed(&rig, "good\n");
    let (drv, _) = rig.succeed(&draft, &[("sandbox", "false")]).await;
    let mut file = accomplice.join().unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    file.write_all(b"evil\n").unwrap();
    file.sync_all().unwrap();
    let out = rig.output(&drv, "out");
    assert_eq!(rig.read(&out), "good\n");
    assert_honest(&rig, &out);
}

/// The same while the output is taken: what is registered has the contents that were hashed, whichever these were.
#[tokio::test(flavor = "multi_thread")]
async fn who_changes_an_output_meanwhile_changes_its_hash() {
    let Some(rig) = Rig::new() else { return };
    let socket = rig.path("meet");
    for round in 0..3 {
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o777)).unwrap();
        let drv = rig.add(&attack(&rig, "pass-large", socket.to_str().unwrap()).env("round", &round.to_string()));
        let (_, client) = rig.client();
        let settings = rig.settings(&[("sandbox", "false")]);
        let done = AtomicBool::new(false);
        let (result, changes) = std::thread::scope(|scope| {
            let accomplice = scope.spawn(|| {
                let stream = meet(&listener).expect("the builder");
                let file = File::from(receive(&stream));
                drop(stream);
                let mut changes = 0;
                while !done.load(Ordering::Relaxed) {
                    // From the end, towards whoever reads.
                    for block in (0..LARGE).step_by(4096).rev() {
                        file.write_at(&[b'a' + (changes % 26) as u8], block as u64).unwrap();
                    }
                    changes += 1;
                }
                changes
            });
            let handle = tokio::runtime::Handle::current();
            let build = rig.scheduler.realise(vec![all_outputs(&drv)], BuildMode::Normal, settings, client);
            let result = tokio::task::block_in_place(|| handle.block_on(build)).remove(0).1;
            done.store(true, Ordering::Relaxed);
            (result, accomplice.join().unwrap())
        });
        assert_eq!(result.status, BuildStatus::Built, "{}", result.error);
        assert!(changes > 1, "nothing was changed meanwhile");
        assert_honest(&rig, &rig.output(&drv, "out"));
    }
}

/// CVE-2025-52991 and -52993: what is looked at is not what is opened then.
#[tokio::test(flavor = "multi_thread")]
async fn the_scan_of_an_output_is_not_led_astray() {
    let Some(rig) = Rig::new() else { return };
    let (socket, outside) = (rig.path("meet"), rig.path("outside"));
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("file"), "SECRET").unwrap();
    let done = AtomicBool::new(false);
    let swap = |out: OwnedFd| {
        let open = |pair: usize| openat(&out, format!("{pair:03}").as_str(), OFlag::O_PATH, Mode::empty()).unwrap();
        let pairs: Vec<OwnedFd> = (0..PAIRS).map(open).collect();
        // Another build user's directories may be changed by the test only as root.
        while !done.load(Ordering::Relaxed) {
            for pair in &pairs {
                let _ = renameat2(pair, "dir", pair, "link", RenameFlags::RENAME_EXCHANGE);
            }
        }
    };
    for round in 0..2 {
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o777)).unwrap();
        done.store(false, Ordering::Relaxed);
        let target = format!("{} {}", socket.display(), outside.display());
        let drv = rig.add(&attack(&rig, "pass-directory", &target).env("round", &round.to_string()));
        let (log, client) = rig.client();
        let settings = rig.settings(&[("sandbox", "false")]);
        let result = std::thread::scope(|scope| {
            let accomplice = scope.spawn(|| {
                let stream = meet(&listener).expect("the builder");
                let out = receive(&stream);
                // The builder may end now.
                drop(stream);
                swap(out);
            });
            let handle = tokio::runtime::Handle::current();
            let paths = vec![all_outputs(&drv)];
            let build = rig.scheduler.realise(paths, BuildMode::Normal, settings, client);
            let result = tokio::task::block_in_place(|| handle.block_on(build)).remove(0).1;
            done.store(true, Ordering::Relaxed);
            accomplice.join().unwrap();
            result
        });
        // Either an entry was caught changing, or every one is inside.
        if !result.status.is_success() {
            assert_eq!(result.status, BuildStatus::OutputRejected, "{} {:?}", result.error, log.lines());
            continue;
        }
        let out = rig.output(&drv, "out");
        let root = PathBuf::from(rig.store.store_dir().display(&out));
        for pair in 0..PAIRS {
            for name in ["dir", "link"] {
                let path = root.join(format!("{pair:03}/{name}"));
                if std::fs::symlink_metadata(&path).is_ok_and(|found| found.is_dir()) {
                    assert_eq!(std::fs::read_to_string(path.join("file")).unwrap(), "inside", "round {round}");
                }
            }
        }
        assert_honest(&rig, &out);
    }
}

/// The same without a build around it, many times: not even what was read before the change was noticed is from outside.
#[test]
fn not_a_byte_is_read_from_outside() {
    const DUMPS: usize = 20_000;
    let dir = tempfile::tempdir().unwrap();
    let (tree, outside) = (dir.path().join("tree"), dir.path().join("outside"));
    for (directory, text) in [(tree.join("dir"), "inside"), (outside.clone(), "SECRET")] {
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join("file"), text).unwrap();
    }
    std::os::unix::fs::symlink(&outside, tree.join("link")).unwrap();
    let (parent, inside) = (File::open(dir.path()).unwrap(), File::open(&tree).unwrap());
    let done = AtomicBool::new(false);
    let mut whole = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                renameat2(&inside, "dir", &inside, "link", RenameFlags::RENAME_EXCHANGE).unwrap();
            }
        });
        let found = (0..DUMPS).any(|_| {
            let mut nar = Vec::new();
            whole += usize::from(build::dump_tree(parent.as_fd(), Path::new("tree"), &mut nar).is_ok());
            nar.windows(6).any(|window| window == b"SECRET")
        });
        done.store(true, Ordering::Relaxed);
        assert!(!found, "a link was followed");
    });
    println!("{whole} of {DUMPS} were not disturbed");
}

/// Links in outputs and build directories lead nowhere the daemon would follow.
#[tokio::test(flavor = "multi_thread")]
async fn links_are_links() {
    let Some(rig) = Rig::new() else { return };
    let victim = rig.path("victim");
    std::fs::create_dir(&victim).unwrap();
    std::fs::write(victim.join("file"), "precious").unwrap();
    std::fs::set_permissions(&victim, std::fs::Permissions::from_mode(0o711)).unwrap();
    let before = std::fs::metadata(&victim).unwrap();
    let input = rig.add(&rig.derivation("input", "$b mkdir $out; echo input > $out/file"));
    let links = format!(
        "$b ln -s {victim} link; $b mkdir deep; $b ln -s {victim}/file deep/file; $b ln -s .. deep/up; \
         if $b ln $dep/file linked 2>/dev/null; then echo linked an input; fi; ",
        victim = victim.display()
    );
    for (name, end) in [
        ("made", "$b ln -s /etc/shadow $out"),
        ("failed", "exit 1"),
        ("dangling", "$b mkdir $out; $b ln -s ../.. $out/up; $b ln $dep/file $out/file 2>/dev/null && echo linked; :"),
    ] {
        for sandbox in ["true", "false"] {
            let draft = rig.derivation(name, &format!("{links}{end}")).needs(&rig, "dep", &input);
            let draft = placed(draft, sandbox);
            let drv = rig.add(&draft);
            let (log, mut client) = rig.client();
            client.uid = Some(54_321);
            let settings = rig.settings(&[("sandbox", sandbox), ("keep-failed", "true")]);
            let result = rig.scheduler.realise(vec![all_outputs(&drv)], BuildMode::Normal, settings, client).await;
            assert_eq!(result[0].1.status.is_success(), name != "failed", "{:?}", result[0].1);
            if !log.lines().is_empty() {
                // A link within an overlay is to a copy.
                assert_eq!(sandbox, "false", "{:?}", log.lines());
            }
            if name == "made" {
                let out = rig.store.store_dir().display(&rig.output(&drv, "out"));
                assert_eq!(std::fs::read_link(out).unwrap(), Path::new("/etc/shadow"));
            }
        }
    }
    let after = std::fs::metadata(&victim).unwrap();
    assert_eq!((after.mode(), after.uid()), (before.mode(), before.uid()));
    assert_eq!(std::fs::read_to_string(victim.join("file")).unwrap(), "precious");
    assert_eq!(rig.read_below(&rig.output(&input, "out"), "file"), "input\n");
    assert_honest(&rig, &rig.output(&input, "out"));
}

/// Processes of this machine whose environment has this text.
fn processes_with(text: &str) -> Vec<i32> {
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        let environ = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environ.windows(text.len()).any(|window| window == text.as_bytes())
    })
    .collect()
}

/// CVE-2025-46415 and others: what is left behind.
#[tokio::test(flavor = "multi_thread")]
async fn no_process_is_left_when_a_build_is_answered() {
    let Some(rig) = Rig::new() else { return };
    let mark = format!("castored_left_behind={}", std::process::id());
    let (name, value) = mark.split_once('=').unwrap();
    for (i, sandbox) in ["true", "false"].into_iter().enumerate() {
        for (j, end) in ["echo > $out", "exit 1"].into_iter().enumerate() {
            let script = format!(
                "($b setsid $b sh -c '($b nohup $b sh -c \"trap : 1 2 15; while :; do $b sleep 1; done\" &) &' \
                 </dev/null >/dev/null 2>&1 &); ($b sleep 99 &) ; $b sleep 0.3; echo started; {end}"
            );
            let draft = rig.derivation(&format!("left{i}{j}"), &script).env(name, value);
            let drv = rig.add(&placed(draft, sandbox));
            let (results, log) = rig.build(&[&drv], &[("sandbox", sandbox)]).await;
            assert_eq!(log.lines(), ["started"], "{results:?}");
            assert_eq!(processes_with(&mark), [0; 0], "sandbox = {sandbox}");
        }
    }
}

/// One build against another one, the daemon, and the machine.
#[tokio::test(flavor = "multi_thread")]
async fn other_processes_and_directories_are_out_of_reach() {
    let Some(rig) = Rig::new() else { return };
    let paths = sandbox_paths();
    let shared = rig.path("shared");
    std::fs::create_dir(&shared).unwrap();
    // As castored has it.
    std::fs::set_permissions(rig.path("state/castored"), std::fs::Permissions::from_mode(0o700)).unwrap();
    for (i, sandbox) in ["true", "false"].into_iter().enumerate() {
        let shown = if sandbox == "true" { "/shared".to_owned() } else { shared.display().to_string() };
        let paths = format!("{paths} /shared={}", shared.display());
        let settings = [("sandbox", sandbox), ("sandbox-paths", paths.as_str())];
        let mark = format!("castored_victim={}{i}", std::process::id());
        let (name, value) = mark.split_once('=').unwrap();
        let victim = rig.add(&attack(&rig, "wait", &format!("{shown} end{i}")).env(name, value));
        let (victim_log, client) = rig.client();
        let waiting =
            rig.scheduler.realise(vec![all_outputs(&victim)], BuildMode::Normal, rig.settings(&settings), client);
        let attacking = async {
            soon("the other build", || said(&victim_log).contains(&"waiting".to_owned())).await;
            let mut targets = processes_with(&mark);
            assert!(!targets.is_empty(), "no process of the other build found");
            targets.push(std::process::id() as i32);
            let list = targets.iter().map(i32::to_string).collect::<Vec<_>>().join(" ");
            let (_, log) = rig.succeed(&attack(&rig, "processes", &list).env("i", &i.to_string()), &settings).await;
            repelled(&log);
            assert!(said(&log)[0].starts_with("pid ") && said(&log)[0].ends_with(" parent 0"), "{:?}", said(&log));
            assert!(said(&log).contains(&"0 secrets".to_owned()), "{:?}", said(&log));

            // By name: the directories of other builds, the daemon's own, and its socket.
            let state = rig.path("state");
            let script = format!(
                "for f in {state}/castored/builds/*/build/precious {state}/castored/index {state}/castored/packs \
                 /proc/*/cwd/precious /proc/*/root/build/precious; do [ -e $f ] && echo \"found $f\"; done; \
                 $b ls {state}/castored/builds 2>/dev/null | $b wc -l; echo > $out",
                state = state.display()
            );
            let draft = placed(rig.derivation(&format!("look{i}"), &script), sandbox);
            let (_, log) = rig.succeed(&draft, &settings).await;
            // Without a sandbox a build sees its own directory there.
            assert_eq!(log.lines(), [if sandbox == "true" { "0" } else { "1" }]);
            File::create(shared.join(format!("end{i}"))).unwrap();
        };
        let (results, ()) = tokio::join!(waiting, attacking);
        assert_eq!(results[0].1.status, BuildStatus::Built, "{}", results[0].1.error);
        assert_eq!(said(&victim_log), ["waiting", "survived"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_file_gets_a_setuid_bit_and_no_device_is_made() {
    let Some(rig) = Rig::new() else { return };
    let paths = sandbox_paths();
    for sandbox in ["true", "false"] {
        let draft = attack(&rig, "setuid", "").env("sandbox", sandbox);
        let (drv, log) = rig.succeed(&draft, &[("sandbox", sandbox), ("sandbox-paths", &paths)]).await;
        repelled(&log);
        let out = rig.store.store_dir().display(&rig.output(&drv, "out"));
        assert_eq!(std::fs::metadata(out).unwrap().mode() & 0o7777, 0o555);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn namespaces_of_its_own_give_a_build_nothing() {
    let Some(rig) = Rig::new() else { return };
    let input = rig.add(&rig.derivation("input", "$b mkdir $out; echo input > $out/file"));
    let path = rig.store.store_dir().display(&rig.output(&input, "out"));
    let draft = attack(&rig, "namespaces", &path).needs(&rig, "dep", &input);
    let (_, log) = rig.succeed(&draft, &[("sandbox-paths", &sandbox_paths())]).await;
    repelled(&log);
    if !said(&log).contains(&"root".to_owned()) {
        println!("SKIPPED: builds cannot make user namespaces here: {:?}", log.lines());
    }
    assert_honest(&rig, &rig.output(&input, "out"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_is_given_three_descriptors() {
    let Some(rig) = Rig::new() else { return };
    let paths = sandbox_paths();
    for sandbox in ["true", "false"] {
        let draft = attack(&rig, "descriptors", "").env("sandbox", sandbox);
        let (_, log) = rig.succeed(&draft, &[("sandbox", sandbox), ("sandbox-paths", &paths)]).await;
        repelled(&log);
        assert_eq!(said(&log), ["0=/dev/null 1=pipe 2=pipe", "variables []"]);
    }
}

/// The daemon's own socket, and a terminal it was started at.
#[tokio::test(flavor = "multi_thread")]
async fn neither_sockets_nor_terminals_of_the_daemon_are_there() {
    let Some(rig) = Rig::new() else { return };
    let socket = rig.path("state/socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    let script =
        format!("for f in {} /nix/var /run /var; do [ -e $f ] && echo $f; done; echo > $out", socket.display());
    for draft in [rig.derivation("socket", &script), rig.derivation("socket", &script).fixed(&rig, "\n")] {
        let (_, log) = rig.succeed(&draft, &[]).await;
        let found = log.lines();
        // The store of this test is below /var.
        assert!(found.is_empty() || found == ["/var"], "{found:?}");
    }
}

/// Set for this program when it runs once more, at a terminal or as another user.
const AGAIN: &str = "CASTORED_ATTACKS_AGAIN";

fn again(program: &str, arguments: &[&str]) {
    let output = std::process::Command::new(program).args(arguments).env(AGAIN, "1").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().filter(|line| line.contains("SKIPPED")).for_each(|line| println!("{line}"));
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(!text.contains("running 0 tests"), "{text}");
}

/// TIOCSTI: what a build types into the terminal of whoever started the daemon, that one's shell would execute.
#[test]
fn at_a_terminal_too() {
    if std::env::var_os(AGAIN).is_some() || Rig::new().is_none() {
        return;
    }
    if !Path::new("/usr/bin/script").exists() {
        println!("SKIPPED: needs script");
        return;
    }
    let exe = std::env::current_exe().unwrap();
    let command = format!("{} --exact attacks::a_build_is_given_three_descriptors", exe.display());
    again("/usr/bin/script", &["-qec", &command, "/dev/null"]);
}

/// All of the above as an ordinary user's daemon.
#[test]
fn as_an_ordinary_user_too() {
    if std::env::var_os(AGAIN).is_some() || !nix::unistd::geteuid().is_root() || Rig::new().is_none() {
        return;
    }
    let exe = std::env::current_exe().unwrap();
    let readable = exe.ancestors().all(|path| std::fs::metadata(path).is_ok_and(|found| found.mode() & 0o005 == 0o005));
    if !readable || !Path::new("/usr/bin/setpriv").exists() {
        println!("SKIPPED: needs setpriv, and a test program that everybody can execute");
        return;
    }
    let user = ["--reuid", "nobody", "--regid", "nogroup", "--clear-groups", exe.to_str().unwrap()];
    let tests = ["attacks::", "--test-threads=1", "--nocapture"];
    again("/usr/bin/setpriv", &[&user[..], &tests[..]].concat());
}
