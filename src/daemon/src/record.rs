//! Recording sessions: every byte in both directions, so that a bug somebody meets can become a test.
//!
//! A session gets two files in the directory, `NUMBER-USER-PID.client` and `.server`, as the tests of `nix-compat` read
//! them; `store-dir` names the store directory. They hold everything that was added and read, so only the daemon's own
//! user may look at them.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix_compat::store_path::StoreDir;

use crate::peer::Peer;

/// Bytes recorded of one direction of one session; what comes after is left out.
const MAX_RECORDING: u64 = 1 << 30;

/// The recordings of a daemon.
#[derive(Debug)]
pub struct Recorder {
    dir: PathBuf,
    next: AtomicU64,
}

impl Recorder {
    /// Records into `dir`, which is made if it is not there.
    ///
    /// # Errors
    /// When the directory cannot be made or written to.
    pub fn new(dir: &Path, store_dir: &StoreDir) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        fs::write(dir.join("store-dir"), store_dir.as_str())?;
        Ok(Self { dir: dir.to_owned(), next: AtomicU64::new(1) })
    }

    /// The two tapes of a new session: what the client sends, what the daemon sends. A session that cannot be recorded
    /// is served all the same.
    pub(crate) fn session(&self, peer: &Peer) -> (Tape, Tape) {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        // A name comes from the system's user database, but goes into a path here.
        let user: String = peer.user.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        let tape = |direction: &str| {
            let path = self.dir.join(format!("{number:06}-{user}-{}.{direction}", peer.pid));
            match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
                Ok(file) => Tape(Some(Running { file, path, left: MAX_RECORDING })),
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "cannot record a session");
                    Tape::default()
                }
            }
        };
        (tape("client"), tape("server"))
    }
}

/// One direction of a session being recorded, or nothing.
#[derive(Debug, Default)]
pub(crate) struct Tape(Option<Running>);

#[derive(Debug)]
struct Running {
    file: File,
    path: PathBuf,
    left: u64,
}

impl Tape {
    /// Records bytes as they go over the socket. Errors end the recording, not the session.
    pub(crate) fn put(&mut self, bytes: &[u8]) {
        let Some(running) = &mut self.0 else { return };
        let fits = bytes.len().min(usize::try_from(running.left).unwrap_or(usize::MAX));
        let written = running.file.write_all(&bytes[..fits]);
        running.left -= fits as u64;
        let path = running.path.display();
        match written {
            Ok(()) if fits == bytes.len() => return,
            Ok(()) => tracing::warn!(%path, MAX_RECORDING, "a recording is full; leaving out the rest of the session"),
            Err(error) => tracing::warn!(%path, %error, "cannot go on recording a session"),
        }
        self.0 = None;
    }
}
