//! Who is killed when there is no memory left: builders before the daemon, and everything else before it as well, since
//! programs cannot run without the store.

use std::fs;

/// The daemon's badness, from -1000 (never killed) to 1000.
const PROTECTED: &str = "-900";
/// What a process has unless somebody decides.
const USUAL: &str = "0";
const OWN: &str = "/proc/self/oom_score_adj";

/// Protects this process and those it starts, unless somebody has decided about it already. Ordinary users may not.
pub fn protect() {
    if fs::read_to_string(OWN).is_ok_and(|score| score.trim() == USUAL)
        && let Err(error) = fs::write(OWN, PROTECTED)
    {
        tracing::debug!(%error, "the daemon is not protected when memory runs out");
    }
}

/// Takes the protection from this process, which is to become something else.
pub(crate) fn expose() {
    if fs::read_to_string(OWN).is_ok_and(|score| score.trim() == PROTECTED) {
        // Everybody may give it up.
        let _ = fs::write(OWN, USUAL);
    }
}

/// Takes the protection from a process that was just started.
pub(crate) fn expose_other(pid: u32) {
    let file = format!("/proc/{pid}/oom_score_adj");
    if fs::read_to_string(&file).is_ok_and(|score| score.trim() == PROTECTED) {
        // It may be gone.
        let _ = fs::write(file, USUAL);
    }
}
