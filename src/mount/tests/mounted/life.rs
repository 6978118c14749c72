//! Mounting and unmounting, and what was there before.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mount::{Mount, MountError, Options};
use nix::errno::Errno;

use crate::fixture::{MemoryView, mount_or_skip, mounted, names, noise};

/// Set for the process that mounts and is then killed.
const DOOMED: &str = "CASTORED_TEST_DOOMED_MOUNT";

#[test]
fn a_missing_mountpoint_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let view = Arc::new(MemoryView::default());
    let base = view.add("path", view.file("here"));
    let Some(mount) = mount_or_skip(view, &dir.path().join("not/there/yet")) else { return };
    assert_eq!(fs::read(mount.mountpoint().join(base)).unwrap(), b"here");
}

#[test]
fn it_can_be_used_the_moment_it_is_there_and_leaves_no_trace() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("below"), "").unwrap();
    let view = Arc::new(MemoryView::default());
    let base = view.add("path", view.file("here"));
    for _ in 0..20 {
        let Some(mount) = mount_or_skip(Arc::clone(&view), dir.path()) else { return };
        assert_eq!(names(dir.path()), [base.as_str()]);
        mount.unmount().unwrap();
        assert_eq!(names(dir.path()), ["below"]);
    }
    // After the last mount has gone its subscription does nothing.
    view.add("later", view.file(""));
}

#[test]
fn unmounting_waits_for_nobody() {
    let Some(store) = mounted() else { return };
    let contents = noise(1 << 20, 1);
    let base = store.view.add("open", store.view.file(&contents));
    let mut file = File::open(store.path(&base)).unwrap();
    let begun = Instant::now();
    store.mount.unmount().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(2));
    // The open file is served to its end.
    let mut read = Vec::new();
    file.read_to_end(&mut read).unwrap();
    assert!(read == contents);
}

#[test]
fn a_live_mount_is_not_covered() {
    let Some(store) = mounted() else { return };
    let again = Mount::new(Arc::clone(&store.view) as Arc<_>, store.root(), Options::default());
    let Err(error @ MountError::Busy { .. }) = again else { panic!("{again:?}") };
    assert!(error.to_string().contains("umount -l"), "{error}");
    assert_eq!(names(store.root()), [""; 0]);
}

#[test]
fn a_file_is_no_mountpoint() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let result = Mount::new(Arc::new(MemoryView::default()), file.path(), Options::default());
    let Err(MountError::Mountpoint { source, .. }) = result else { panic!("{result:?}") };
    assert_eq!(source.raw_os_error(), Some(Errno::ENOTDIR as i32));
}

#[test]
fn only_what_is_ours_is_unmounted() {
    let Some(store) = mounted() else { return };
    let other = tempfile::tempdir().unwrap();
    fs::write(other.path().join("other"), "").unwrap();
    let bound = Command::new("mount").arg("--bind").arg(other.path()).arg(store.root()).status().unwrap();
    if !bound.success() {
        println!("SKIPPED: cannot bind-mount");
        return;
    }
    let root = store.root().to_owned();
    store.mount.unmount().unwrap();
    assert_eq!(names(&root), ["other"]);
    assert!(Command::new("umount").arg(&root).status().unwrap().success());
    assert!(Command::new("umount").arg("-l").arg(&root).status().unwrap().success());
}

/// Mounts and waits to be killed, in the process [`what_a_dead_server_left_is_replaced`] starts; nothing otherwise.
#[test]
fn doomed() {
    let Some(at) = std::env::var_os(DOOMED) else { return };
    let Some(mount) = mount_or_skip(Arc::new(MemoryView::default()), Path::new(&at)) else { return };
    println!("mounted");
    std::thread::sleep(Duration::from_secs(60));
    drop(mount);
}

#[test]
fn what_a_dead_server_left_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("store");
    for _ in 0..2 {
        // Each round the doomed one replaces what the one before left.
        let mut server = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "life::doomed", "--nocapture"])
            .env(DOOMED, &at)
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        let mut output = server.stdout.take().unwrap();
        while !said.contains("mounted") {
            let mut some = [0; 256];
            let read = output.read(&mut some).unwrap();
            if read == 0 || said.contains("SKIPPED") {
                println!("SKIPPED: the other process cannot mount: {said}");
                server.wait().unwrap();
                return;
            }
            said.push_str(&String::from_utf8_lossy(&some[..read]));
        }
        server.kill().unwrap();
        server.wait().unwrap();
        assert_eq!(fs::metadata(&at).unwrap_err().raw_os_error(), Some(Errno::ENOTCONN as i32));
    }
    let view = Arc::new(MemoryView::default());
    let base = view.add("path", view.file("alive"));
    let Some(mount) = mount_or_skip(view, &at) else { return };
    assert_eq!(fs::read(mount.mountpoint().join(base)).unwrap(), b"alive");
}
