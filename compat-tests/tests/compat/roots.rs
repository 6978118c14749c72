//! What keeps paths alive beside links: what clients and processes are using. The links, and the graph below all roots,
//! are compared with stock's in `differential/graphs.rs`.
//!
//! Tests side by side see each other's processes, so none has a path that another has.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use compat_tests::Who;
use compat_tests::wire::{Client, Request};
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::builds::wait_until;
use crate::{Setup, castored_setup, derivation, setup};

const PATIENCE: Duration = Duration::from_secs(20);

/// A program in the store that does what busybox does.
fn program(s: &Setup, name: &str) -> String {
    let busybox = ["/usr/bin/busybox", "/bin/busybox"].iter().find(|file| Path::new(file).exists()).unwrap();
    let copy = s.room.tmp(name);
    fs::copy(busybox, &copy).unwrap();
    // One that differs from all others, so that each has a path of its own.
    File::options().append(true).open(&copy).unwrap().write_all(name.as_bytes()).unwrap();
    s.nix(Who::Root, "nix-store").arg("--add").arg(&copy).quiet().ok().unwrap().text()
}

/// A directory in the store.
fn directory(s: &Setup, name: &str) -> String {
    let tree = s.room.tmp(name);
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("file"), name).unwrap();
    s.nix(Who::Root, "nix-store").arg("--add").arg(&tree).quiet().ok().unwrap().text()
}

/// A process that ends with this.
struct Process(Child);

impl Process {
    fn start(command: &mut Command) -> Self {
        command
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Self(command.spawn().unwrap())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Where the roots are of a path, with the number of the process left out.
fn roots_of(s: &Setup, who: Who, path: &str) -> Vec<String> {
    let roots = s.nix(who, "nix-store").args(["--gc", "--print-roots"]).quiet().ok().unwrap().lines();
    let of_path = roots.iter().filter_map(|line| line.strip_suffix(&format!(" -> {path}")));
    of_path.map(|link| link.trim_matches('"').replace(|c: char| c.is_ascii_digit(), "")).collect()
}

#[test]
fn what_processes_use_is_kept_as_long_as_they_do() {
    let Some(s) = setup("processes") else { return };
    let daemon = s.start();
    let [run, stood_in, open, known] =
        [program(&s, "run"), directory(&s, "stood-in"), directory(&s, "open"), directory(&s, "known")];
    let mut command = Command::new(&run);
    command.arg0("busybox").args(["sh", "-c", "exec 7<\"$0\"; echo; read line", &format!("{open}/file")]);
    command.env_clear().env("PATH", format!("{known}/bin:/usr/bin")).current_dir(&stood_in);
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let process = Process(child);
    let expected = [
        (&run, vec!["/proc//exe", "/proc//maps"]),
        (&stood_in, vec!["/proc//cwd"]),
        (&open, vec!["/proc//fd/"]),
        (&known, vec!["/proc//environ"]),
    ];
    assert!(
        wait_until(PATIENCE, || expected.iter().all(|(path, links)| {
            let found = roots_of(&s, Who::Root, path);
            links.iter().all(|link| found.iter().any(|f| f == link))
        })),
        "{:?}",
        expected.map(|(path, _)| roots_of(&s, Who::Root, path))
    );
    // Others' processes are nobody's business.
    for (path, _) in &expected {
        assert_eq!(roots_of(&s, Who::User, path), ["{censored}"]);
    }
    s.nix(Who::User, "nix-store").arg("--gc").ok().unwrap();
    assert!(expected.iter().all(|(path, _)| Path::new(path).exists()), "deleted what a process uses");
    drop(process);
    s.nix(Who::User, "nix-store").arg("--gc").ok().unwrap();
    assert!(expected.iter().all(|(path, _)| !Path::new(path).exists()));
    daemon.stop().unwrap();
}

#[test]
fn what_processes_see_under_another_name_is_kept_too() {
    let Some(s) = castored_setup("elsewhere") else { return };
    let daemon = s.start();
    let [run, stood_in, root] =
        [program(&s, "elsewhere-program"), directory(&s, "elsewhere-to-stand-in"), directory(&s, "elsewhere-open")];
    let [place, hall, top] = ["place", "hall", "top"].map(|name| s.room.tmp(name));
    fs::write(&place, "").unwrap();
    fs::create_dir(&hall).unwrap();
    fs::create_dir(&top).unwrap();
    // In a mount namespace of its own, where nothing is called as it is here and the store is not to be seen.
    let script = "mount --bind $1 $4 && mount --bind $2 $5 && mount --bind $3 $6 && umount -l /nix/store && cd $5 && \
                  exec 8<$6 && exec env -i $4 sleep 600";
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", script, "sh", &run, &stood_in, &root]);
    // Busybox goes by the name it is called by.
    let busybox = place.with_file_name("busybox");
    fs::rename(&place, &busybox).unwrap();
    command.args([&busybox, &hall, &top]);
    command.env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin");
    let process = Process(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap());
    let expected = [(&run, "/proc//exe"), (&run, "/proc//maps"), (&stood_in, "/proc//cwd"), (&root, "/proc//fd/")];
    assert!(
        wait_until(PATIENCE, || {
            expected.iter().all(|(path, link)| roots_of(&s, Who::Root, path).iter().any(|found| found == link))
        }),
        "{:?}",
        expected.map(|(path, _)| roots_of(&s, Who::Root, path))
    );
    let name = fs::read_link(format!("/proc/{}/exe", process.0.id())).unwrap();
    assert!(!name.starts_with("/nix/store"), "{} shows nothing", name.display());
    s.nix(Who::Root, "nix-store").arg("--gc").ok().unwrap();
    assert!(expected.iter().all(|(path, _)| Path::new(path).exists()), "deleted what a process uses");
    drop(process);
    s.nix(Who::Root, "nix-store").arg("--gc").ok().unwrap();
    assert!(expected.iter().all(|(path, _)| !Path::new(path).exists()));
    daemon.stop().unwrap();
}

#[test]
fn a_process_below_the_store_is_its_root() {
    let Some(s) = setup("chroot") else { return };
    let daemon = s.start();
    let tree = s.room.tmp("tree");
    fs::create_dir(&tree).unwrap();
    let busybox = ["/usr/bin/busybox", "/bin/busybox"].iter().find(|file| Path::new(file).exists()).unwrap();
    fs::copy(busybox, tree.join("busybox")).unwrap();
    let path = s.nix(Who::Root, "nix-store").arg("--add").arg(&tree).quiet().ok().unwrap().text();
    let mut command = Command::new("chroot");
    command.args([&path, "/busybox", "sleep", "600"]);
    let process = Process::start(&mut command);
    assert!(wait_until(PATIENCE, || !roots_of(&s, Who::Root, &path).is_empty()));
    s.nix(Who::Root, "nix-store").arg("--gc").ok().unwrap();
    assert!(Path::new(&path).exists());
    drop(process);
    s.nix(Who::Root, "nix-store").arg("--gc").ok().unwrap();
    assert!(!Path::new(&path).exists());
    daemon.stop().unwrap();
}

#[test]
fn temporary_roots_last_as_long_as_who_has_them() {
    let Some(s) = setup("temporary") else { return };
    let daemon = s.start();
    let [held, written] = [directory(&s, "held"), directory(&s, "written")];
    let mut client = Client::new(daemon.connect().unwrap()).unwrap();
    client.send(&Request::numbered(11).string(&held).0).unwrap();
    client.finish().unwrap();
    client.word().unwrap();
    // As a stock tool does that works on the store by itself: a file that is locked while its process lives.
    let file = Path::new("/nix/var/nix/temproots/4000001");
    fs::write(file, format!("{written}\0")).unwrap();
    let tool = Flock::lock(File::options().read(true).write(true).open(file).unwrap(), FlockArg::LockShared).unwrap();
    assert_eq!(roots_of(&s, Who::Root, &written), ["{temp:}"]);
    assert_eq!(roots_of(&s, Who::User, &written), ["{censored}"]);
    s.nix(Who::Root, "nix-store").arg("--gc").ok().unwrap();
    assert!(Path::new(&held).exists() && Path::new(&written).exists());
    drop(tool);
    let told = s.nix(Who::Root, "nix-store").arg("--gc").ok().unwrap();
    assert!(told.stderr.contains("removing stale temporary roots file"), "{}", told.stderr);
    assert!(!file.exists() && Path::new(&held).exists() && !Path::new(&written).exists());
    drop(client);
    assert!(wait_until(PATIENCE, || {
        s.nix(Who::Root, "nix-store").arg("--gc").quiet().ok().unwrap();
        !Path::new(&held).exists()
    }));
    daemon.stop().unwrap();
}

#[test]
fn what_the_kernel_executes_is_kept() {
    let Some(s) = setup("kernel") else { return };
    let setting = Path::new("/proc/sys/kernel/poweroff_cmd");
    if !setting.exists() {
        println!("SKIPPED: no {} on this machine", setting.display());
        return;
    }
    let daemon = s.start();
    let path = directory(&s, "poweroff");
    // Only here: a file over the kernel's own.
    let file = s.room.write("poweroff_cmd", format!("{path}/bin/poweroff\n")).unwrap();
    mount(Some(&file), setting, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    assert_eq!(roots_of(&s, Who::Root, &path), ["/proc/sys/kernel/poweroff_cmd"]);
    s.nix(Who::Root, "nix-store").arg("--gc").ok().unwrap();
    assert!(Path::new(&path).exists());
    umount2(setting, MntFlags::MNT_DETACH).unwrap();
    s.nix(Who::Root, "nix-store").arg("--gc").ok().unwrap();
    assert!(!Path::new(&path).exists());
    daemon.stop().unwrap();
}

/// The setting is the client's: it lets a user environment refer to the derivations of what is in it.
#[test]
fn a_user_environment_keeps_its_derivations_where_that_is_set() {
    let Some(s) = setup("env-derivations") else { return };
    let daemon = s.start();
    let install = |name: &str, kept: &str| {
        let expression = derivation(name, "echo tool > $out", "");
        let file = s.room.write(&format!("{name}.nix"), format!("{{ tool = {expression}; }}")).unwrap();
        let drv = s.nix(Who::Root, "nix-instantiate").arg(&file).args(["-A", "tool"]).ok().unwrap().text();
        let profile = format!("/nix/var/nix/profiles/{name}");
        let install = s.nix(Who::Root, "nix-env").args(["-p", &profile, "-f"]).arg(&file).args(["-iA", "tool"]);
        install.args(["--option", "keep-env-derivations", kept]).ok().unwrap();
        (drv, profile)
    };
    let (kept, profile) = install("kept-derivation", "true");
    let (gone, other) = install("other-derivation", "false");
    let collect =
        || s.nix(Who::Root, "nix-store").args(["--gc", "--option", "keep-derivations", "false"]).ok().unwrap();
    collect();
    let is_valid = |path: &str| {
        Client::new(daemon.connect().unwrap()).unwrap().all_valid_paths().unwrap().contains(&path.to_owned())
    };
    assert!(is_valid(&kept) && !is_valid(&gone));
    for profile in [&profile, &other] {
        assert!(fs::read_link(profile).is_ok(), "{profile}");
        s.nix(Who::Root, "nix-env").args(["-p", profile, "-e", "*"]).ok().unwrap();
        s.nix(Who::Root, "nix-env").args(["-p", profile, "--delete-generations", "old"]).ok().unwrap();
    }
    collect();
    assert!(!is_valid(&kept), "nothing refers to it any more");
    daemon.stop().unwrap();
}
