//! The process that a build runs in.
//!
//! The daemon has many threads, and a process with many threads can neither join new namespaces nor run Rust code
//! between fork and exec. So for each build the daemon executes itself once more under another name; that *helper* has
//! one thread and one job. It talks to the daemon over one socket, its standard input:
//!
//! ```text
//!   daemon                helper (supervisor)                     builder (pid 1 of its own pid namespace)
//!     | spec, then EOF ───────>|
//!     |                        | unshare(pid), fork ──────────────────────> private mounts, net, ipc, uts
//!     |                        | <──────────── user namespace made ───────|
//!     |                        | uid and gid maps ───────────────────────>| becomes the build user, seccomp, exec
//!     | <── Failed{..} ────────|──────────────────────────────────────────| (only when a step of the set-up failed)
//!     | <── Ended{..} ─────────| waits; kills the builder when the socket hangs up
//! ```
//!
//! **The builder never outlives the helper, nor the helper the daemon's interest.** The builder is the first process
//! of its pid namespace, so its end is the end of every process of the build; it is killed when the helper dies
//! (parent death signal), and the helper kills it when the daemon closes the socket, which also happens when the
//! daemon itself is killed. When `Ended` has been read there is no process left that could touch the outputs.
//!
//! A build that may use the store while it runs gets to see what it adds: see `window`.
//!
//! All `unsafe` code of the crate is in [`sys`].

mod builder;
mod loopback;
mod restrict;
mod spec;
mod supervisor;
mod sys;
mod tree;
mod view;
mod window;

use std::fmt;
use std::io;

pub use spec::{Bind, Executable, HostView, Identity, Program, Raw, Report, SandboxView, Spec, View};
pub use supervisor::sandbox_main;
pub(crate) use window::MAX_SHOWN_AT_ONCE;

/// Name (`argv[0]`) under which the daemon's executable becomes the helper.
pub const HELPER_NAME: &str = "castored-sandbox";

/// A step of the set-up that failed: what was tried, and what the kernel said.
#[derive(Debug)]
pub(crate) struct SetupError {
    step: String,
    source: io::Error,
}

impl fmt::Display for SetupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.step, self.source)
    }
}

impl std::error::Error for SetupError {}

/// Names the step that a result belongs to.
trait Step<T> {
    fn step<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T, SetupError>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T, SetupError> {
        self.map_err(|e| SetupError { step: what().into(), source: e.into() })
    }
}
