//! `memory-budget`: what is held in memory stays within it, whatever clients do.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use compat_tests::checks::expect_contains;
use compat_tests::subject::default_conf;
use compat_tests::{Call, Who, memory, tree};
use serde_json::Value;

use crate::builds::wait_until;
use crate::castored_setup;

/// The least that castored takes, in bytes.
const BUDGET: u64 = 64 << 20;
/// What the daemon takes beside its budget at most, in bytes: itself, its threads, the database's tables.
const BESIDE: u64 = 96 << 20;
/// The length of the tree, in bytes: many times what there is memory for.
const TREE: u64 = 300_000_000;
/// Clients that add at once.
const CLIENTS: u64 = 4;
/// Between two looks at the daemon.
const EVERY: Duration = Duration::from_millis(100);

#[test]
fn a_small_budget_holds_while_a_large_tree_is_added_and_read() {
    let Some(s) = castored_setup("budget") else { return };
    let tree = tree::from_usr(&s.room.tmp("usr"), TREE).unwrap();
    let parts = s.room.tmp("parts");
    tree::divide(tree.as_ref(), &parts, CLIENTS).unwrap();
    let conf = format!("{}memory-budget = 64M\n", default_conf());
    let daemon = s.subject.start_with(&s.room, &conf).unwrap();
    let program = s.subject.copy_into(&s.room).unwrap();
    let status = || {
        let call = Call::new(&s.room, Who::Root, &program).args(["status", "--json"]).quiet();
        serde_json::from_str::<Value>(&call.ok().unwrap().text()).unwrap()["memory"].clone()
    };
    let holders = |memory: &Value| -> Vec<(String, u64, u64)> {
        let number = |holder: &Value, name: &str| holder[name].as_u64().unwrap_or(0);
        let read = |holder: &Value| {
            (holder["name"].as_str().unwrap().to_owned(), number(holder, "has"), number(holder, "uses"))
        };
        memory["holders"].as_array().unwrap().iter().map(read).collect()
    };
    let first = status();
    assert_eq!(first["budget"], BUDGET);
    assert!(holders(&first).iter().map(|(_, has, _)| has).sum::<u64>() <= BUDGET, "{first}");

    memory::reset_peak(daemon.pid()).unwrap();
    let over = AtomicBool::new(false);
    let mut most = 0;
    let mut payloads = 0;
    thread::scope(|scope| {
        let watching = scope.spawn(|| {
            let (mut blocks, mut payloads) = (0, 0);
            while !over.load(Ordering::Relaxed) {
                for (name, has, uses) in holders(&status()) {
                    assert!(uses <= has, "{name} uses {uses} of {has}");
                    match name.as_str() {
                        "decoded blocks" => blocks = blocks.max(uses),
                        "payloads" => payloads = payloads.max(uses),
                        _ => {}
                    }
                }
                thread::sleep(EVERY);
            }
            (blocks, payloads)
        });
        let adding: Vec<_> = (0..CLIENTS)
            .map(|part| s.nix(Who::User, "nix-store").arg("--add").arg(parts.join(part.to_string())).quiet())
            .map(|call| scope.spawn(|| call.ok().unwrap().text()))
            .collect();
        let paths: Vec<String> = adding.into_iter().map(|client| client.join().unwrap()).collect();
        for (part, path) in paths.iter().enumerate() {
            let read = Call::new(&s.room, Who::User, "diff").args(["-r", "--no-dereference"]).quiet();
            read.arg(parts.join(part.to_string())).arg(path).ok().unwrap();
        }
        over.store(true, Ordering::Relaxed);
        (most, payloads) = watching.join().unwrap();
    });
    let peak = memory::peak(daemon.pid()).unwrap();
    println!("peak {} MiB, decoded blocks {} KiB, payloads {} KiB", peak >> 20, most >> 10, payloads >> 10);
    // It has been used: the tree did not go by unseen.
    assert!(most > 4 << 20 && payloads > 0, "decoded blocks {most}, payloads {payloads}");
    assert!(peak <= BUDGET + BESIDE, "{} MiB were in use", peak >> 20);

    // Who goes on after it died has the same budget.
    daemon.kill_server().unwrap();
    let successor = || {
        let told = Call::new(&s.room, Who::Root, &program).args(["status", "--json"]).quiet().run().unwrap();
        serde_json::from_slice::<Value>(&told.stdout).is_ok_and(|status| status["memory"]["budget"] == BUDGET)
    };
    assert!(wait_until(Duration::from_secs(20), successor), "the successor has another budget");
    daemon.stop().unwrap();
}

#[test]
fn what_is_too_little_is_refused_with_the_least_that_works() {
    let Some(s) = castored_setup("budget-refused") else { return };
    let refused = s.subject.start_with(&s.room, &format!("{}memory-budget = 63M\n", default_conf())).unwrap_err();
    expect_contains(&refused.to_string(), "at least 67108864 (64.00 MiB)").unwrap();
    let daemon = s.start();
    let program = s.subject.copy_into(&s.room).unwrap();
    let status = Call::new(&s.room, Who::Root, &program).arg("status").ok().unwrap().text();
    expect_contains(&status, "memory budget 1.74 GiB").unwrap();
    daemon.stop().unwrap();
}
