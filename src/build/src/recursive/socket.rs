//! The socket in a build's directory, from before its builder starts until after it has ended.

use std::collections::BTreeSet;
use std::fs::Permissions;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, lchown};
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use nix_compat::store_path::StorePath;

use super::gate::Opening;
use super::{Gate, RecursiveStore, Serving};
use crate::room::Room;
use crate::sandbox::Identity;

/// Its name in the build directory, as in stock.
const NAME: &str = ".nix-socket";

/// A socket that a builder can connect to, and on which nobody answers yet.
pub(crate) struct Socket(UnixListener);

impl Socket {
    /// Makes the socket of a build that runs as `identity`. The builder has not started yet.
    pub(crate) fn create(room: &Room, identity: Identity) -> io::Result<Self> {
        let dir = std::fs::File::open(room.build_dir())?;
        // By descriptor: an address has at most 107 bytes, and build directories may be deep.
        let path = format!("/proc/self/fd/{}/{NAME}", dir.as_raw_fd());
        let listener = UnixListener::bind(&path)?;
        if let Identity::BuildUser { uid, gid, .. } = identity {
            lchown(&path, Some(uid), Some(gid))?;
        }
        std::fs::set_permissions(&path, Permissions::from_mode(0o600))?;
        Ok(Self(listener))
    }

    /// What the builder connects to, as a value of `NIX_REMOTE`; `build_dir` is its build directory, as it sees that.
    pub(crate) fn uri(build_dir: &str) -> String {
        format!("unix://{build_dir}/{NAME}")
    }

    /// Begins to answer.
    pub(crate) fn serve(self, store: &dyn RecursiveStore, opening: Opening) -> io::Result<Served> {
        let gate = Arc::new(Gate::open(opening));
        let serving = store.serve(self.0, gate.clone())?;
        Ok(Served { gate, serving: Some(serving) })
    }
}

/// A socket on which somebody answers. Dropping it ends that.
pub(crate) struct Served {
    gate: Arc<Gate>,
    serving: Option<Box<dyn Serving>>,
}

impl Served {
    /// Ends all connections; gives every path that the builder could see.
    pub(crate) fn close(mut self) -> BTreeSet<StorePath> {
        self.end()
    }

    fn end(&mut self) -> BTreeSet<StorePath> {
        if let Some(serving) = self.serving.take() {
            serving.close();
        }
        self.gate.close()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.end();
    }
}
