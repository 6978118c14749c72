//! What the daemon tells the helper, and what the helper answers.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::builtin::Task;

/// Bytes that are usually text: environment values, arguments and paths need not be UTF-8, but JSON strings must.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Raw {
    /// Bytes that are UTF-8.
    Text(String),
    /// Bytes that are not.
    Bytes(Vec<u8>),
}

impl Raw {
    /// The bytes themselves.
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Raw::Text(s) => s.as_bytes(),
            Raw::Bytes(b) => b,
        }
    }

    /// The bytes as a path.
    pub fn as_path(&self) -> &Path {
        Path::new(OsStr::from_bytes(self.as_bytes()))
    }
}

impl From<Vec<u8>> for Raw {
    fn from(bytes: Vec<u8>) -> Self {
        String::from_utf8(bytes).map_or_else(|e| Raw::Bytes(e.into_bytes()), Raw::Text)
    }
}

impl From<&[u8]> for Raw {
    fn from(bytes: &[u8]) -> Self {
        bytes.to_vec().into()
    }
}

impl From<String> for Raw {
    fn from(text: String) -> Self {
        Raw::Text(text)
    }
}

impl From<&str> for Raw {
    fn from(text: &str) -> Self {
        Raw::Text(text.to_owned())
    }
}

impl From<PathBuf> for Raw {
    fn from(path: PathBuf) -> Self {
        OsString::from(path).into_vec().into()
    }
}

impl From<&Path> for Raw {
    fn from(path: &Path) -> Self {
        path.as_os_str().as_bytes().into()
    }
}

/// One build, as far as the helper needs to know it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Spec {
    /// Whose processes the build consists of.
    pub identity: Identity,
    /// What the builder sees of the filesystem.
    pub view: View,
    /// Whether the builder keeps the host's network (fixed-output builds and unsandboxed ones).
    pub host_network: bool,
    /// Whether the builder is told that the machine has 32 bits.
    pub personality_32: bool,
    /// Whether the builder is told that the kernel is a Linux 2.6.
    pub linux_26: bool,
    /// Whether system calls that make files special are refused.
    pub filter_system_calls: bool,
    /// Whether programs of the builder may gain privileges, as setuid programs do.
    pub new_privileges: bool,
    /// Whether the builder gets to see further store paths while it runs. Then the helper's standard output is a socket
    /// on which it is told of them.
    pub grows: bool,
    /// The directory of the control group that the builder belongs to, if it has one of its own.
    pub cgroup: Option<Raw>,
    /// What the builder is.
    pub program: Program,
    /// Its working directory, as the builder sees it.
    pub work_dir: Raw,
}

/// What runs as the builder.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Program {
    /// A program of its own.
    Executable(Executable),
    /// The helper itself goes on as the builder.
    Builtin(Box<Task>),
}

/// A program to execute.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Executable {
    /// Its path, as the builder itself sees it.
    pub path: Raw,
    /// Its arguments, `argv[0]` first.
    pub args: Vec<Raw>,
    /// Its whole environment.
    pub env: Vec<(Raw, Raw)>,
}

/// Who the builder is on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Identity {
    /// The helper is root and turns into this user, which must not be root.
    BuildUser {
        /// User id on the host.
        uid: u32,
        /// Group id on the host.
        gid: u32,
        /// How many ids it has, beginning with these. With more than one, the builder is root inside the sandbox, and
        /// its other users are the rest.
        count: u32,
    },
    /// The daemon runs as an ordinary user, and so does the builder: in a user namespace with only that user in it.
    Caller,
}

impl Identity {
    /// Whether the builder has many ids, and is root inside the sandbox.
    pub fn has_range(self) -> bool {
        matches!(self, Self::BuildUser { count: 2.., .. })
    }
}

/// What the builder sees of the filesystem.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum View {
    /// A root of its own with nothing but what the build was given.
    Sandbox(SandboxView),
    /// The host's files, with a store that can be written to on top of the store.
    Host(HostView),
}

/// A root assembled for one build. Host paths except where said otherwise.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SandboxView {
    /// An empty directory to mount the root on.
    pub root: Raw,
    /// Where the store is mounted.
    pub store_mount: Raw,
    /// The store directory, as the builder sees it.
    pub store_dir: Raw,
    /// The directory that becomes the store directory: outputs land in it, on disk.
    pub scratch: Raw,
    /// Base names of the store paths that the builder may read.
    pub inputs: Vec<String>,
    /// The build directory.
    pub build_dir: Raw,
    /// Where the builder sees the build directory.
    pub build_dir_inside: Raw,
    /// The directory that becomes `/tmp`.
    pub tmp: Raw,
    /// Further files and directories of the host.
    pub binds: Vec<Bind>,
    /// `size=` option of `/dev/shm`.
    pub shm_size: String,
}

/// The host's root with a writable layer over the store.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HostView {
    /// Where the store is mounted, which is also where the builder sees it.
    pub store_mount: Raw,
    /// Upper directory of the overlay: outputs land in it.
    pub scratch: Raw,
    /// Work directory of the overlay, on the same filesystem as `scratch`.
    pub overlay_work: Raw,
    /// Base names of the inputs, for when the kernel refuses the overlay.
    pub inputs: Vec<String>,
    /// The build directory.
    pub build_dir: Raw,
    /// The directory that hides all build directories from other users; this build sees only its own in it.
    pub builds_dir: Raw,
}

/// A file or directory of the host that a sandbox shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    /// Path on the host.
    pub source: Raw,
    /// Path in the sandbox.
    pub target: Raw,
    /// Whether a missing source is fine.
    pub optional: bool,
}

/// What the helper answers: at most one of these, as one line of JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Report {
    /// The builder was never started.
    Failed {
        /// What was tried and why it failed.
        error: String,
    },
    /// The builder and every process it started are gone.
    Ended {
        /// Exit code, when it ended by itself.
        code: Option<i32>,
        /// Signal that ended it otherwise.
        signal: Option<i32>,
        /// User CPU time in microseconds.
        cpu_user: u64,
        /// System CPU time in microseconds.
        cpu_system: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_keeps_bytes_that_are_not_text() {
        for bytes in [&b"PATH=/bin"[..], b"\xff\xfe", b"", "ä".as_bytes()] {
            let json = serde_json::to_string(&Raw::from(bytes)).unwrap();
            let back: Raw = serde_json::from_str(&json).unwrap();
            assert_eq!(back.as_bytes(), bytes, "{json}");
        }
    }
}
