//! Other users and other namespaces.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use mount::{Mount, Options};
use nix::errno::Errno;

use crate::fixture::{MemoryView, mount_or_skip, mounted, noise};

/// Nobody's user and group, who own nothing.
const NOBODY: u32 = 65_534;
/// Set for the process that mounts a store inside a user namespace of its own.
const INSIDE: &str = "CASTORED_TEST_MOUNT_INSIDE";

/// A shell script's output, run by nobody.
fn as_nobody(script: &str, arguments: &[&Path]) -> Output {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script, "sh"]).args(arguments).current_dir("/").uid(NOBODY).gid(NOBODY);
    command.output().unwrap()
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn everybody_reads_and_executes_what_may_be_executed() {
    let Some(store) = mounted() else { return };
    let view = &store.view;
    let script = "#!/bin/sh\necho ran\n";
    let base = view.add("tree", view.directory([("plain", view.file(script)), ("tool", view.executable(script))]));
    let dir = store.path(&base);
    let checked = as_nobody(
        r#"cd "$1" && ls . && cat plain >/dev/null && ./tool && test -r plain && test -x tool && test ! -x plain &&
           test ! -w plain && test ! -w . && ls "$2" >/dev/null"#,
        &[&dir, store.root()],
    );
    assert!(checked.status.success(), "{}", text(&checked));
    assert_eq!(text(&checked), "plain\ntool\nran\n");
    let refused = as_nobody(r#"exec "$1/plain""#, &[&dir]);
    assert!(text(&refused).contains("Permission denied"), "{}", text(&refused));
    for script in [r#"echo x > "$1/new""#, r#"echo x > "$1/plain""#, r#"rm -f "$1/plain""#, r#"chmod 777 "$1/plain""#] {
        let refused = as_nobody(script, &[&dir]);
        assert!(!refused.status.success(), "{script}");
        let said = text(&refused);
        let denied = ["Read-only file system", "Operation not permitted", "Permission denied"];
        assert!(denied.iter().any(|words| said.contains(words)), "{script}: {said}");
    }
}

#[test]
fn a_store_directory_that_seems_to_belong_to_a_group_is_still_nobodys_to_write() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let view = Arc::new(MemoryView::default());
    let options = Options { group: Some(NOBODY), ..Options::default() };
    let mount = match Mount::new(Arc::clone(&view) as Arc<_>, dir.path(), options) {
        Ok(mount) => mount,
        Err(error) => return println!("SKIPPED: {error}"),
    };
    let refused = as_nobody(r#"mkdir "$1/new""#, &[mount.mountpoint()]);
    assert!(text(&refused).contains("Read-only file system"), "{}", text(&refused));
}

/// `unshare -Urm`, as an ordinary user would call it, around a command.
fn in_a_namespace(program: &Path) -> Command {
    let mut command = Command::new("unshare");
    command.args(["-Urm", "--"]).arg(program).current_dir("/");
    command
}

/// Whether this machine lets anybody have a user namespace.
fn namespaces_are_allowed() -> bool {
    let allowed = in_a_namespace(Path::new("true")).status().is_ok_and(|status| status.success());
    if !allowed {
        println!("SKIPPED: no user namespaces here");
    }
    allowed
}

#[test]
fn a_user_namespace_sees_the_mount() {
    let Some(store) = mounted() else { return };
    if !namespaces_are_allowed() {
        return;
    }
    let view = &store.view;
    let base =
        view.add("tree", view.directory([("tool", view.executable("#!/bin/sh\ncat \"$0\" >/dev/null\necho ran\n"))]));
    for user in [0, NOBODY] {
        let mut command = in_a_namespace(&store.path(&base).join("tool"));
        let output = command.uid(user).gid(user).output().unwrap();
        assert_eq!(text(&output), "ran\n", "user {user}");
    }
}

/// Mounts and reads, in the process that [`a_store_can_be_mounted_inside_a_user_namespace`] starts; nothing otherwise.
#[test]
fn inside() {
    let Some(at) = std::env::var_os(INSIDE) else { return };
    let view = Arc::new(MemoryView::default());
    let contents = noise(3 << 20, 6);
    let base =
        view.add("tree", view.directory([("file", view.file(&contents)), ("true", view.executable("#!/bin/sh\n"))]));
    let mount = mount_or_skip(Arc::clone(&view), Path::new(&at)).unwrap();
    let dir = mount.mountpoint().join(&base);
    assert!(std::fs::read(dir.join("file")).unwrap() == contents);
    assert!(Command::new(dir.join("true")).status().unwrap().success());
    let refused = std::fs::write(dir.join("new"), "").unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(Errno::EROFS as i32));
    view.remove(&base);
    assert!(std::fs::symlink_metadata(&dir).is_err());
    mount.unmount().unwrap();
    println!("mounted and read inside");
}

#[test]
fn a_store_can_be_mounted_inside_a_user_namespace() {
    let Some(store) = mounted() else { return };
    drop(store);
    if !namespaces_are_allowed() {
        return;
    }
    // The test's own executable may lie where nobody else can go.
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let program = dir.path().join("test");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    for user in [0, NOBODY] {
        let mut child = in_a_namespace(&program)
            .args(["--exact", "users::inside", "--nocapture"])
            .env(INSIDE, dir.path().join(format!("store-{user}")))
            .uid(user)
            .gid(user)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (mut out, mut err) = (String::new(), String::new());
        child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
        child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
        assert!(child.wait().unwrap().success(), "user {user}: {out}{err}");
        assert!(out.contains("mounted and read inside"), "user {user}: {out}{err}");
    }
}
