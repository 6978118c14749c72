//! Proof of durability: stores on a disk that writes everything down, and what every crash may leave of them.
//!
//! * [`disk`] is a filesystem in memory with a log of what was done to it, [`mounted`] shows it to the kernel, since the
//!   database under the index does its own I/O. [`crash`] makes disks of the log as crashes may leave them, and states
//!   the rules. [`examine`] opens such disks by the hundred.
//! * [`load`] is what the store is put under, [`ledger`] what was acknowledged when, [`check`] holds a store to it.
//! * [`model`]: random steps and crashes against a model. [`faults`]: disks that fail.
//!
//! What the daemon promises beyond this (a durable point when a build has finished, a root is made, a connection ends)
//! are calls of [`store::Store::sync`], which the load makes as well.
//!
//! `CASTORED_CRASH_IMAGES`, `CASTORED_MODEL_STEPS` and `CASTORED_SEED` make the runs longer, or others.

// Everything here is test code, helpers as well.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod check;
mod contents;
mod crash;
mod disk;
mod examine;
mod faults;
mod ledger;
mod load;
mod model;
mod mounted;
mod random;

use store::Durability;

use disk::{Call, Disk, Fault};
use examine::{Found, examine};
use load::Plan;
use mounted::Mounted;

/// Disks looked at by each run of a load, at most; more of them need more loads.
const IMAGES_OF_A_LOAD: usize = 250;
/// Disks looked at unless the environment says otherwise.
const IMAGES: usize = 250;
const PLAN: Plan = Plan { seed: 0, threads: 3, steps: 50, durability: Durability::Grouped, long_journal: false };

fn number(variable: &str, otherwise: usize) -> usize {
    std::env::var(variable).map_or(otherwise, |value| value.parse().unwrap())
}

/// Whether there is nothing to test here; says why.
fn skipped() -> bool {
    let obstacle = Mounted::obstacle();
    if let Some(obstacle) = obstacle {
        println!("SKIPPED: {obstacle}");
    }
    obstacle.is_some()
}

/// Runs loads and looks at `images` disks that crashes during them may leave.
fn loads(plan: Plan, images: usize) {
    let mut left = images;
    let mut round = number("CASTORED_SEED", 1) as u64;
    let mut found = Found::default();
    while left > 0 && found.failures.len() < 3 {
        let mounted = Mounted::new(Disk::new(None));
        let ledger = load::run(&mounted, Plan { seed: round, ..plan });
        let now = left.min(IMAGES_OF_A_LOAD);
        found.extend(examine(&mounted.disk, &ledger.entries.lock(), now, round));
        left -= now;
        round += 1;
    }
    println!("{plan:?}: {found}");
    assert!(found.failures.is_empty(), "{:#?}", found.failures);
    assert!(found.held > 0, "nothing was ever acknowledged as durable");
}

#[test]
fn a_crash_at_any_moment_leaves_a_state_that_existed() {
    if !skipped() {
        loads(PLAN, number("CASTORED_CRASH_IMAGES", IMAGES));
    }
}

#[test]
fn with_immediate_durability_nothing_that_was_answered_is_lost() {
    if !skipped() {
        let plan = Plan { durability: Durability::Immediate, steps: 30, ..PLAN };
        loads(plan, number("CASTORED_CRASH_IMAGES", IMAGES) / 4);
    }
}

/// The database's journal is sealed, another begun and the old one deleted when nothing needs it any more.
#[test]
fn a_crash_while_a_journal_gives_way_to_another_is_no_loss() {
    if !skipped() {
        loads(Plan { long_journal: true, ..PLAN }, number("CASTORED_CRASH_IMAGES", IMAGES) / 6);
    }
}

/// What must not be found with a sound disk is found with one that lies: this harness can fail.
#[test]
fn a_disk_that_lies_about_fsync_is_found_out() {
    if skipped() {
        return;
    }
    // Packs that are not synced before the index names them; a journal that is not before it is acknowledged; names.
    for suffix in [".pack", ".jnl", "packs"] {
        let disk = Disk::new(None);
        let mounted = Mounted::new(disk);
        mounted.disk.inject(Fault { call: Call::Sync, suffix, error: None, times: usize::MAX });
        let ledger = load::run(&mounted, Plan { steps: 20, ..PLAN });
        let found = examine(&mounted.disk, &ledger.entries.lock(), 40, 1);
        println!("syncs of {suffix} do nothing: {found}");
        assert!(!found.failures.is_empty(), "a lie about {suffix} was not found");
        println!("    such as: {:?}", found.failures[0]);
    }
}
