//! Every command of every stock client, as root and as an unprivileged user.

use compat_tests::{Who, checks};

use crate::setup;

/// How many commands [`checks::run`] promises to check.
const COMMANDS: usize = 22;

fn client(version: &str, who: Who) {
    let Some(s) = setup(&format!("client-{version}")) else { return };
    let daemon = s.subject.start(&s.room).unwrap();
    let checks = checks::run(&s.room, s.machine.release(version).unwrap(), who);
    assert_eq!(checks.len(), COMMANDS);
    let mut failed = 0;
    println!("== nix {version} as {who:?}");
    for check in &checks {
        match &check.outcome {
            Ok(()) => println!("  ok    {}", check.name),
            Err(e) => {
                failed += 1;
                println!("  WRONG {}: {e}", check.name);
            }
        }
    }
    assert_eq!(failed, 0, "of {COMMANDS} commands; the daemon's log:\n{}", daemon.log());
    daemon.stop().unwrap();
}

macro_rules! clients {
    ($($name:ident: $version:literal as $who:ident;)*) => {
        $(#[test]
        fn $name() {
            client($version, Who::$who);
        })*
    };
}

clients! {
    nix_2_3_7_as_root: "2.3.7" as Root;
    nix_2_3_7_as_user: "2.3.7" as User;
    nix_2_8_0_as_root: "2.8.0" as Root;
    nix_2_8_0_as_user: "2.8.0" as User;
    nix_2_26_3_as_root: "2.26.3" as Root;
    nix_2_26_3_as_user: "2.26.3" as User;
    nix_2_34_8_as_root: "2.34.8" as Root;
    nix_2_34_8_as_user: "2.34.8" as User;
}
