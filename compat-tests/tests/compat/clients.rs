//! Every command of every stock client, as root, as users whom the daemon trusts by name and by their group, and as one
//! whom it does not trust; and what a user sees whom it does not serve.

use compat_tests::subject::identities_conf;
use compat_tests::{Call, Who, checks};

use crate::setup;

/// How many commands [`checks::run`] promises to check.
const COMMANDS: usize = 22;

fn client(version: &str, who: Who) {
    let Some(s) = setup(&format!("client-{version}")) else { return };
    let daemon = s.subject.start_with(&s.room, &identities_conf()).unwrap();
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

#[test]
fn a_user_who_is_not_allowed_is_told_so_by_every_client() {
    let Some(s) = setup("strangers") else { return };
    let mut daemon = s.subject.start_with(&s.room, &identities_conf()).unwrap();
    let file = s.room.write("file", "a stranger's\n").unwrap();
    let added = s.nix(Who::Root, "nix-store").arg("--add").arg(&file).ok().unwrap().text();
    for release in &s.machine.releases {
        let store = |who: Who| Call::nix(&s.room, who, release, "nix-store");
        let refused = store(Who::Stranger).arg("--add").arg(&file).fails().unwrap();
        // Before the handshake nobody can be told more than that the connection is closed; later clients say how.
        let words = ["disconnected unexpectedly", "Connection reset by peer", "unexpected end-of-file", "Broken pipe"];
        assert!(words.iter().any(|w| refused.stderr.contains(w)), "{}", refused.all());
        store(Who::Stranger).args(["--query", "--hash", &added]).fails().unwrap();
        for who in [Who::User, Who::Trusted, Who::Member, Who::Root] {
            store(who).args(["--check-validity", &added]).ok().unwrap();
        }
    }
    assert!(daemon.is_running());
    checks::expect_contains(&daemon.log(), "castored-stranger").unwrap();
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
    nix_2_3_7_as_trusted_user: "2.3.7" as Trusted;
    nix_2_3_7_as_member_of_trusted_group: "2.3.7" as Member;
    nix_2_8_0_as_root: "2.8.0" as Root;
    nix_2_8_0_as_user: "2.8.0" as User;
    nix_2_8_0_as_trusted_user: "2.8.0" as Trusted;
    nix_2_8_0_as_member_of_trusted_group: "2.8.0" as Member;
    nix_2_26_3_as_root: "2.26.3" as Root;
    nix_2_26_3_as_user: "2.26.3" as User;
    nix_2_26_3_as_trusted_user: "2.26.3" as Trusted;
    nix_2_26_3_as_member_of_trusted_group: "2.26.3" as Member;
    nix_2_34_8_as_root: "2.34.8" as Root;
    nix_2_34_8_as_user: "2.34.8" as User;
    nix_2_34_8_as_trusted_user: "2.34.8" as Trusted;
    nix_2_34_8_as_member_of_trusted_group: "2.34.8" as Member;
}
