//! Stock clients against the daemon under test. One binary, a module for each concern.
//!
//! `CASTORED_COMPAT_DAEMON=/path/to/stock/nix-daemon` runs the same tests against stock Nix, which is how a test is
//! proved right before castored is measured by it.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test, a panic is the report")]

mod bad_input;
mod budget;
mod builders;
mod builds;
mod builtins;
mod clients;
mod collect;
mod command_line;
mod crash;
mod differential;
mod grpc;
mod grpc_source;
mod http_cache;
mod http_push;
mod lazy;
mod life;
mod many;
mod mount;
mod mount_elsewhere;
mod moving;
mod nixos;
mod pages;
mod recursive;
mod remote;
mod repair;
mod roots;
mod serve_vectors;
mod servers;
mod space;
mod stdio;
mod streams;
mod substitute;
mod survival;
mod tripwire;
mod upload;
mod upstream_formats;
mod upstream_vectors;

use std::collections::BTreeMap;

use compat_tests::machine::{self, Machine};
use compat_tests::{Call, Daemon, Room, Subject, Who};

/// What nearly every test begins with: a prepared machine, a room of its own, and a daemon to start in it.
struct Setup {
    machine: &'static Machine,
    subject: Subject,
    room: Room,
}

/// A prepared machine; `None`, after saying why, where that is impossible.
fn prepared() -> Option<&'static Machine> {
    if let Some(reason) = machine::obstacle() {
        println!("SKIPPED: {reason}");
        return None;
    }
    Some(machine::prepare().unwrap())
}

/// Enters a room; `None`, after saying why, where that is impossible.
fn setup(name: &str) -> Option<Setup> {
    let machine = prepared()?;
    let subject = Subject::from_environment().unwrap();
    let room = Room::enter(name).unwrap();
    Some(Setup { machine, subject, room })
}

/// As [`setup`], for what only castored promises.
fn castored_setup(name: &str) -> Option<Setup> {
    let setup = setup(name)?;
    if setup.subject.is_stock() {
        println!("not a promise of stock nix: nothing to test");
        return None;
    }
    Some(setup)
}

/// The files of a directory of stock's unit test data, with their contents; `None`, after saying why, where it cannot be
/// had.
fn unit_data(directory: &str) -> Option<BTreeMap<String, Vec<u8>>> {
    let directory = prepared()?.unit_data.join(directory);
    let files = std::fs::read_dir(directory).unwrap().map(|entry| {
        let path = entry.unwrap().path();
        (path.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(&path).unwrap())
    });
    Some(files.collect())
}

impl Setup {
    fn start(&self) -> Daemon {
        self.subject.start(&self.room).unwrap()
    }

    /// A command of the newest stock release.
    fn nix(&self, who: Who, name: &str) -> Call {
        Call::nix(&self.room, who, self.machine.newest(), name)
    }

    /// `nix-build` of an expression, as the unprivileged user.
    fn build(&self, expression: &str) -> Call {
        self.build_with(&self.machine.newest().version, expression)
    }

    /// The same with the client of that version.
    fn build_with(&self, version: &str, expression: &str) -> Call {
        let release = self.machine.release(version).unwrap();
        Call::nix(&self.room, Who::User, release, "nix-build").args(["--no-out-link", "-E", expression])
    }
}

/// A derivation whose builder is the sandbox's shell; `more` are further attributes, each with its semicolon.
fn derivation(name: &str, script: &str, more: &str) -> String {
    format!(
        "derivation {{ name = \"{name}\"; system = \"x86_64-linux\"; builder = \"/bin/sh\"; \
         args = [ \"-c\" ''{script}'' ]; {more} }}"
    )
}
