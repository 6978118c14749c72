//! Another machine that is this one: in place of ssh stands a script that runs the command here.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use crate::error::{Context, Result};
use crate::{Release, Room, Subject};

/// A host that is not this machine's name, or clients would pass over ssh.
pub const HOST: &str = "builder.example";

/// What clients need of ssh: options are passed over, and a client that waits for the connection is told of it.
const SSH: &str = r#"#!/bin/sh
started=
while [ $# -gt 0 ]; do
  case "$1" in
    -O) exit 1 ;;
    -oLocalCommand=*) started=1; shift ;;
    -[bcDeFIiJLlmopQRSWw]) shift 2 ;;
    --) shift; break ;;
    -*) shift ;;
    *) if [ -n "$host" ]; then break; fi; host=$1; shift ;;
  esac
done
[ "$1" = -- ] && shift
[ -n "$started" ] && echo started
PATH=@remote@:$PATH
export PATH
# ssh brings no environment along; the far machine's configuration is the daemon's.
unset NIX_REMOTE
NIX_CONF_DIR=@conf@
export NIX_CONF_DIR
exec /bin/sh -c "$*"
"#;

/// Sets the script up in the room, with the daemon called as `nix-daemon` and the release's `nix-store` behind it. Answers
/// the PATH with which a client finds it.
pub fn stand_in(room: &Room, subject: &Subject, release: &Release) -> Result<String> {
    let dir = room.dir().join(format!("far-{}", release.version));
    let (near_bin, far_bin) = (dir.join("near"), dir.join("far"));
    for bin in [&near_bin, &far_bin] {
        fs::create_dir_all(bin).doing("creating", bin)?;
    }
    let conf = room.dir().join("daemon-conf");
    let ssh = SSH.replace("@remote@", &far_bin.display().to_string()).replace("@conf@", &conf.display().to_string());
    executable(&near_bin.join("ssh"), &ssh)?;
    let nix_store = release.command("nix-store");
    executable(
        &far_bin.join("nix-store"),
        &format!("#!/bin/sh\nNIX_REMOTE=daemon exec {} \"$@\"\n", nix_store.display()),
    )?;
    let daemon = if subject.is_stock() { subject.binary().to_owned() } else { subject.copy_into(room)? };
    let name = far_bin.join("nix-daemon");
    symlink(daemon, &name).doing("linking", &name)?;
    let bin = release.prefix.join("bin");
    Ok(format!("{}:{}:/usr/bin:/bin", near_bin.display(), bin.display()))
}

/// Writes a script that everybody may run.
pub fn executable(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).doing("writing", path)?;
    fs::set_permissions(path, Permissions::from_mode(0o755)).doing("making executable", path)
}
