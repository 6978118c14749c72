//! Stock clients against the daemon under test. One binary, a module for each concern.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test, a panic is the report")]

mod clients;

use compat_tests::machine::{self, Machine};
use compat_tests::{Room, Subject};

/// What nearly every test begins with: a prepared machine, a room of its own, and a daemon to start in it.
struct Setup {
    machine: &'static Machine,
    room: Room,
    subject: Subject,
}

/// Enters a room; `None`, after saying why, where that is impossible.
fn setup(name: &str) -> Option<Setup> {
    if let Some(reason) = machine::obstacle() {
        println!("SKIPPED: {reason}");
        return None;
    }
    let machine = machine::prepare().unwrap();
    let subject = Subject::from_environment().unwrap();
    let room = Room::enter(name).unwrap();
    Some(Setup { machine, room, subject })
}
