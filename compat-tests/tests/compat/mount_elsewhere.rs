//! `castored mount --grpc` and `castored umount`: a store that another process has.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use compat_tests::checks::expect_contains;
use compat_tests::{Call, Who};

use crate::grpc::{free_address, start_on};
use crate::repair::noise;
use crate::{Setup, castored_setup};

/// How long anything here may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// A running `castored mount`. Dropping it ends it.
struct Mounted {
    child: Child,
    dir: PathBuf,
    log: PathBuf,
}

fn castored(s: &Setup, arguments: &[&str]) -> Command {
    let mut command = Command::new(s.subject.binary());
    command.args(arguments).stdin(Stdio::null());
    command
}

fn failure(mut command: Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let said = String::from_utf8_lossy(&[stdout, stderr].concat()).into_owned();
    assert!(!status.success(), "{said}");
    said
}

fn is_mountpoint(dir: &Path) -> bool {
    let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    table.lines().any(|line| line.split(' ').nth(4) == dir.to_str())
}

fn wait_until(what: &str, log: &Path, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < PATIENCE, "{what}: {}", fs::read_to_string(log).unwrap_or_default());
        std::thread::sleep(Duration::from_millis(10));
    }
}

impl Mounted {
    fn new(s: &Setup, url: &str, name: &str) -> Self {
        let (dir, log) = (s.room.tmp(name), s.room.tmp(&format!("{name}.log")));
        let mut command = castored(s, &["mount", "--grpc", url, dir.to_str().unwrap()]);
        let child = command.stderr(File::create(&log).unwrap()).spawn().unwrap();
        let mut mounted = Self { child, dir, log };
        wait_until("mounting", &mounted.log, || {
            assert!(mounted.child.try_wait().unwrap().is_none(), "{}", fs::read_to_string(&mounted.log).unwrap());
            is_mountpoint(&mounted.dir)
        });
        mounted
    }

    /// Where a path of the store is here.
    fn path(&self, path: &str) -> PathBuf {
        self.dir.join(path.trim_start_matches("/nix/store/"))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = Command::new("umount").arg("-l").arg(&self.dir).stderr(Stdio::null()).status();
    }
}

/// Small and large files, an executable, a link, an empty directory.
fn make_tree(s: &Setup) -> PathBuf {
    let tree = s.room.tmp("tree");
    for dir in ["a/deep/er", "b", "empty"] {
        fs::create_dir_all(tree.join(dir)).unwrap();
    }
    for n in 0..200 {
        fs::write(tree.join(format!("b/{n}")), format!("file {n}\n").repeat(n)).unwrap();
    }
    for (name, size) in [("a/middle", 700_000), ("a/deep/large", 9_000_000), ("a/deep/er/none", 0)] {
        fs::write(tree.join(name), noise(size as u64, size)).unwrap();
    }
    fs::write(tree.join("tool"), "#!/bin/sh\necho it runs\n").unwrap();
    fs::set_permissions(tree.join("tool"), PermissionsExt::from_mode(0o755)).unwrap();
    symlink("b/100", tree.join("link")).unwrap();
    tree
}

#[test]
fn it_shows_what_the_other_store_shows() {
    let Some(s) = castored_setup("elsewhere") else { return };
    let address = free_address();
    let daemon = start_on(&s, &address);
    let tree = make_tree(&s);
    let path = s.nix(Who::User, "nix-store").arg("--add").arg(&tree).ok().unwrap().text();
    let link = s.nix(Who::User, "nix-store").arg("--add").arg(tree.join("link")).ok().unwrap().text();
    let urls = [format!("grpc+http://{address}"), "grpc+unix:///nix/var/nix/daemon-socket/grpc".to_owned()];
    for (url, name) in urls.iter().zip(["by-tcp", "by-socket"]) {
        let mounted = Mounted::new(&s, url, name);
        // By name, before anything was listed.
        assert_eq!(fs::read_to_string(mounted.path(&path).join("b/7")).unwrap(), "file 7\n".repeat(7));
        let names = |dir: &Path| {
            let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        assert_eq!(names(&mounted.dir), names(Path::new("/nix/store")));
        let compared = Call::new(&s.room, Who::User, "diff").args(["-r", "--no-dereference", &path]);
        compared.arg(mounted.path(&path)).ok().unwrap();
        assert_eq!(fs::read_link(mounted.path(&path).join("link")).unwrap(), Path::new("b/100"));
        assert_eq!(
            fs::symlink_metadata(mounted.path(&link)).unwrap().mode(),
            fs::symlink_metadata(&link).unwrap().mode()
        );
        let ran = Call::new(&s.room, Who::User, mounted.path(&path).join("tool")).ok().unwrap().text();
        assert_eq!(ran, "it runs");
        for file in ["", "b", "b/7", "tool", "a/deep/large"] {
            let attributes = |path: &Path| {
                let call = Call::new(&s.room, Who::User, "getfattr").args(["-d", "-m", "-", "--absolute-names"]);
                call.arg(path.join(file)).ok().unwrap().lines()[1..].to_vec()
            };
            assert_eq!(attributes(&mounted.path(&path)), attributes(Path::new(&path)), "{file}");
            let stat = |path: &Path| {
                let meta = fs::symlink_metadata(path.join(file)).unwrap();
                (meta.mode(), meta.size(), meta.mtime(), meta.uid(), meta.nlink())
            };
            assert_eq!(stat(&mounted.path(&path)), stat(Path::new(&path)), "{file}");
        }
        assert_eq!(fs::write(mounted.dir.join("new"), "").unwrap_err().kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        // What is added there afterwards is here when it is asked for.
        let later = s.room.write(&format!("later-{name}"), name).unwrap();
        let later = s.nix(Who::User, "nix-store").arg("--add").arg(&later).ok().unwrap().text();
        assert_eq!(fs::read_to_string(mounted.path(&later)).unwrap(), name);
    }
    daemon.stop().unwrap();
}

#[test]
fn a_store_that_is_gone_gives_errors_and_comes_back() {
    let Some(s) = castored_setup("gone") else { return };
    let address = free_address();
    let daemon = start_on(&s, &address);
    let tree = make_tree(&s);
    let path = s.nix(Who::User, "nix-store").arg("--add").arg(&tree).ok().unwrap().text();
    let mounted = Mounted::new(&s, &format!("grpc+http://{address}"), "mounted");
    assert_eq!(fs::read_to_string(mounted.path(&path).join("b/7")).unwrap(), "file 7\n".repeat(7));
    daemon.kill_hard().unwrap();
    let begun = Instant::now();
    let error = fs::read(mounted.path(&path).join("a/middle")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(5), "{error}");
    let listed = fs::read_dir(&mounted.dir).unwrap().next().unwrap();
    assert_eq!(listed.unwrap_err().raw_os_error(), Some(5));
    assert!(begun.elapsed() < PATIENCE);
    // What was read stays.
    assert_eq!(fs::read_to_string(mounted.path(&path).join("b/7")).unwrap(), "file 7\n".repeat(7));
    let log = fs::read_to_string(&mounted.log).unwrap();
    // The directory that the file is in was not read before.
    expect_contains(&log, "-tree/a\" digest=\"b3:").unwrap();

    while nix::mount::umount2("/nix/store", nix::mount::MntFlags::MNT_DETACH).is_ok() {}
    let daemon = start_on(&s, &address);
    wait_until("coming back", &mounted.log, || fs::read(mounted.path(&path).join("a/middle")).is_ok());
    assert!(fs::read(mounted.path(&path).join("a/middle")).unwrap() == noise(700_000, 700_000));
    assert!(fs::read(mounted.path(&path).join("a/deep/large")).unwrap() == noise(9_000_000, 9_000_000));
    drop(mounted);
    daemon.stop().unwrap();
}

#[test]
fn unmounting_ends_it_and_errors_help() {
    let Some(s) = castored_setup("umount") else { return };
    let address = free_address();
    let daemon = start_on(&s, &address);
    let url = format!("grpc+http://{address}");
    let mut mounted = Mounted::new(&s, &url, "mounted");
    let dir = mounted.dir.to_str().unwrap().to_owned();

    // A directory in use, and one that holds something.
    expect_contains(&failure(castored(&s, &["mount", "--grpc", &url, &dir])), "is mounted there and in use").unwrap();
    let full = s.room.write("full/file", "").unwrap();
    let full = full.parent().unwrap().to_str().unwrap().to_owned();
    expect_contains(&failure(castored(&s, &["mount", "--grpc", &url, &full])), "not empty").unwrap();
    // No such store.
    let nobody = format!("grpc+http://{}", free_address());
    let said = failure(castored(&s, &["mount", "--grpc", &nobody, s.room.tmp("other").to_str().unwrap()]));
    expect_contains(&said, &format!("cannot reach the store at {nobody}")).unwrap();
    let said = failure(castored(&s, &["mount", "--grpc", "http://127.0.0.1:1", &full]));
    expect_contains(&said, "not empty").unwrap();
    let said = failure(castored(&s, &["mount", "--grpc", "http://127.0.0.1:1", s.room.tmp("other").to_str().unwrap()]));
    expect_contains(&said, "grpc+unix://").unwrap();
    // No FUSE, and no right to mount.
    let mut without = Command::new("unshare");
    without.args(["-m", "--", "/bin/sh", "-euc", r#"mount -t tmpfs none /dev; exec "$@""#, "sh"]);
    without.arg(s.subject.binary()).args(["mount", "--grpc", &url]).arg(s.room.tmp("other"));
    expect_contains(&failure(without), "modprobe fuse").unwrap();
    let copy = s.subject.copy_into(&s.room).unwrap();
    fs::create_dir(s.room.tmp("theirs")).unwrap();
    let theirs = Call::new(&s.room, Who::User, &copy).args(["mount", "--grpc", &url]).arg(s.room.tmp("theirs"));
    let said = theirs.env("PATH", "/nowhere").fails().unwrap().all();
    expect_contains(&said, "install the fuse3 package").unwrap();
    // Nothing to unmount, somebody else's, and the daemon's.
    expect_contains(&failure(castored(&s, &["umount", &full])), "nothing is mounted there").unwrap();
    expect_contains(&failure(castored(&s, &["umount", "/proc"])), "not castored's but proc").unwrap();
    expect_contains(&failure(castored(&s, &["umount"])), "stop the daemon").unwrap();

    assert!(castored(&s, &["umount", &dir]).status().unwrap().success());
    assert!(!is_mountpoint(&mounted.dir));
    wait_until("ending", &mounted.log.clone(), || {
        mounted.child.try_wait().unwrap().is_some_and(|status| status.success())
    });
    drop(mounted);

    // What a dead one left is replaced, or taken away.
    let mut dead = Mounted::new(&s, &url, "mounted");
    dead.child.kill().unwrap();
    dead.child.wait().unwrap();
    assert_eq!(fs::read_dir(&dir).unwrap_err().raw_os_error(), Some(nix::errno::Errno::ENOTCONN as i32));
    let mut again = {
        let log = dead.log.clone();
        let child = castored(&s, &["mount", "--grpc", &url, &dir]).stderr(File::create(&log).unwrap()).spawn().unwrap();
        Mounted { child, dir: PathBuf::from(&dir), log }
    };
    wait_until("replacing", &again.log, || fs::read_dir(&dir).is_ok());
    again.child.kill().unwrap();
    again.child.wait().unwrap();
    assert!(castored(&s, &["umount", &dir]).status().unwrap().success());
    assert!(!is_mountpoint(Path::new(&dir)));
    drop((dead, again));
    daemon.stop().unwrap();
}
