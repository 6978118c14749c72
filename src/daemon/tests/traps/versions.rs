//! Protocol versions and features.

use std::time::{Duration, Instant};

use nix_compat::store_path::StoreDir;
use nix_compat::worker::stderr::Verbosity;
use nix_compat::worker::{Features, Protocol};

use crate::common::Rig;
use crate::framing::set_options;
use crate::objects::{add_to_store, base_name, claim, derivation, file_nar, path};
use crate::raw::{Msg, NEWEST, Raw, Said, op};

const WITH_PATH: &str = "realisation-with-path-not-hash";
const REFERRERS: &str = "delete-dead-specific-referrers";

/// A result of a build as it stands on the wire.
struct Result {
    status: u64,
    error: String,
    /// Key and value of each output; with the feature, name and path.
    outputs: Vec<(String, String)>,
}

fn build_result(client: &mut Raw, feature: bool) -> Result {
    let (status, error) = (client.word(), client.text());
    if client.minor >= 29 {
        client.word();
        assert!(client.word() <= 1, "isNonDeterministic");
        client.word();
        client.word();
    }
    if client.minor >= 37 {
        for _ in ["user", "system"] {
            match client.word() {
                0 => {}
                1 => drop(client.word()),
                other => panic!("out of step: {other:#x} is no tag"),
            }
        }
    }
    let mut outputs = Vec::new();
    if client.minor >= 28 {
        for _ in 0..client.word() {
            outputs.push((client.text(), client.text()));
            if feature {
                client.texts();
            }
        }
    }
    Result { status, error, outputs }
}

/// Whether OptimiseStore, which logs a line for information, shows it.
fn shows_information(client: &mut Raw) -> bool {
    client.send(&op(34));
    let said = client.done();
    assert_eq!(client.word(), 1);
    said.iter().any(|said| matches!(said, Said::Next(_)))
}

/// Both ends go by the lower of both versions, whichever of them has it, and in both directions.
#[test]
fn trap_11_the_lower_version_counts_in_both_directions() {
    let rig = Rig::new(true);
    for announced in [18, 20, 21, 24, 25, 26, 27, 29, 33, 35, 37, 38, 39, 99, 250] {
        let mut client = Raw::new(&rig, announced);
        // What the daemon announces does not depend on the client.
        assert_eq!(client.server_version, 1 << 8 | NEWEST);
        assert_eq!(client.minor, announced.min(NEWEST));
        // Requests: of an older client without what came later, of a newer one not with what comes later.
        let known = path("known");
        let ask = op(31).texts([&known]);
        client.send(&if announced >= 27 { ask.word(0) } else { ask });
        client.done();
        assert_eq!(client.texts(), [""; 0]);
        client.goes_on();
        let add = if announced >= 25 {
            add_to_store("added", "fixed:r:sha256", &[], &file_nar("added"))
        } else {
            op(7).text("added").word(0).word(1).text("sha256").raw(file_nar("added"))
        };
        client.send(&add);
        client.done();
        let added = client.text();
        if announced >= 25 {
            client.claim(added.clone());
        }
        // Answers: errors, and activities as lines below 1.20, would be out of step at another minor than the client's.
        client.send(&op(18).text(&known));
        client.refused();
        client.send(&op(9).texts([added]).word(0));
        let said = client.done();
        assert_eq!(client.word(), 1);
        assert_eq!(said.iter().any(|said| matches!(said, Said::Start { .. })), announced >= 20);
        client.goes_on();
    }
}

/// Clients over ssh never send SetOptions, others send it several times; no place in the conversation is its own.
#[test]
fn trap_12_options_may_never_come_or_come_again() {
    let rig = Rig::new(true);
    for minor in [18, 21, 35, NEWEST] {
        let information = if minor <= 21 { 2 } else { 3 };
        let mut client = Raw::new(&rig, minor);
        assert!(client.info(&path("nothing")).is_none());
        assert!(shows_information(&mut client));
        for verbosity in [0, information, 1, 7, 0] {
            client.send(&set_options(verbosity));
            client.done();
            assert_eq!(shows_information(&mut client), verbosity >= information, "1.{minor}, verbosity {verbosity}");
        }
        client.goes_on();
    }
}

/// Nix 2.3 wants an exit status behind an error's text, and not 0; counts verbosity without "notice"; and may name a
/// processor in the handshake.
#[test]
fn trap_13_what_is_special_about_clients_of_2_3() {
    let rig = Rig::new(true);
    let mut client = Raw::shake_hands(&rig, 21, &[], Some(3));
    for request in [op(18).text(path("nothing")), op(9).texts([path("nothing")]).word(0), op(29).text("short")] {
        client.send(&request);
        let status = loop {
            match client.said() {
                Said::Error { status, .. } => break status,
                Said::Last => panic!("not refused"),
                _ => {}
            }
        };
        assert!(status.is_some_and(|status| status != 0));
        client.goes_on();
    }
    // Its 2 is "info", which is 3 today; today's 2 is less.
    client.send(&set_options(2));
    client.done();
    assert!(shows_information(&mut client));
    client.send(&set_options(1));
    client.done();
    assert!(!shows_information(&mut client));
    let mut newer = Raw::shake_hands(&rig, NEWEST, &[], Some(u64::MAX));
    newer.send(&set_options(2));
    newer.done();
    assert!(!shows_information(&mut newer));
    // The same for levels that go out; no operation here has one that differs.
    let protocol = |minor| Protocol { minor, features: Features::NONE, store_dir: StoreDir::default() };
    let levels = [Verbosity::Error, Verbosity::Warn, Verbosity::Notice, Verbosity::Info, Verbosity::Vomit];
    assert_eq!(levels.map(|level| level.to_wire(&protocol(21))), [0, 1, 2, 2, 6]);
    assert_eq!(levels.map(|level| level.to_wire(&protocol(32))), [0, 1, 2, 3, 7]);
}

/// A feature changes encodings although the version stays 1.38; who does not name it gets the old ones, the results of
/// builds as JSON with all that is in it.
#[test]
fn trap_14_features_change_encodings_and_their_absence_keeps_the_old_ones() {
    let rig = Rig::new(true);
    let mut plain = Raw::new(&rig, NEWEST);
    let drv = derivation(&mut plain, "two", &["dev", "out"], true);
    let offered = plain.server_features.clone();
    assert!(offered.iter().any(|feature| feature == WITH_PATH), "{offered:?}");
    // These are for the sockets inside builds.
    for other in ["disable-set-options", "add-to-store-scanning", "submit-output"] {
        assert!(!offered.iter().any(|feature| feature == other), "{offered:?}");
    }
    let build = op(46).texts([format!("{}!*", drv.path)]).word(0);
    let described = |msg: Msg| {
        let outputs = drv
            .outputs
            .iter()
            .fold(msg.text(&drv.path).word(2), |msg, (name, path)| msg.text(name).text(path).text("").text(""));
        let env = drv
            .outputs
            .iter()
            .fold(outputs.word(0).text("x86_64-linux").text("/bin/sh").word(0).word(2), |msg, (name, path)| {
                msg.text(name).text(path)
            });
        env.word(0)
    };
    let legacy = |outputs: &[(String, String)]| {
        assert_eq!(outputs.len(), 2);
        for ((key, json), (name, path)) in outputs.iter().zip(&drv.outputs) {
            assert_eq!(*key, format!("sha256:{}!{name}", drv.hash_modulo));
            for part in [format!(r#""id":"{key}""#), format!(r#""outPath":"{}""#, base_name(path))] {
                assert!(json.contains(&part), "{json} lacks {part}");
            }
        }
    };
    let modern = |outputs: &[(String, String)]| assert!(drv.outputs.iter().eq(outputs.iter().map(|(k, v)| (k, v))));
    let id = format!("sha256:{}!out", drv.hash_modulo);
    let out = &drv.outputs["out"];

    // Old clients, and new ones that name features nobody knows.
    let unknown = ["no-such-feature", "disable-set-options", ""];
    for mut client in [Raw::new(&rig, 34), Raw::new(&rig, 35), plain, Raw::with_features(&rig, &unknown)] {
        client.send(&build);
        client.done();
        assert_eq!((client.word(), client.text()), (1, format!("{}!*", drv.path)));
        let result = build_result(&mut client, false);
        assert_eq!((result.status, result.error.as_str()), (2, ""));
        legacy(&result.outputs);
        client.send(&described(op(36)));
        client.done();
        legacy(&build_result(&mut client, false).outputs);
        client.send(&op(43).text(&id));
        client.done();
        for json in client.texts() {
            assert!(json.contains(&format!(r#""outPath":"{}""#, base_name(out))), "{json}");
        }
        client.send(&op(42).text(format!(r#"{{"id":"{id}","outPath":"{}","signatures":[]}}"#, base_name(out))));
        let _ = client.outcome();
        client.goes_on();
        client.send(&op(20).word(1).word(0).word(0).word(0).word(0).word(0).word(0));
        client.done();
        client.texts();
        assert_eq!((client.word(), client.word()), (0, 0));
        client.goes_on();
    }

    for features in [vec![WITH_PATH], vec!["no-such-feature", WITH_PATH, REFERRERS]] {
        let mut client = Raw::with_features(&rig, &features);
        client.send(&build);
        client.done();
        assert_eq!((client.word(), client.text()), (1, format!("{}!*", drv.path)));
        let result = build_result(&mut client, true);
        assert_eq!((result.status, result.error.as_str()), (2, ""));
        modern(&result.outputs);
        client.send(&described(op(36)));
        client.done();
        modern(&build_result(&mut client, true).outputs);
        client.send(&op(43).text(&drv.path).text("out"));
        client.done();
        match client.word() {
            0 => {}
            1 => {
                assert_eq!(client.text(), *out);
                client.texts();
            }
            other => panic!("out of step: {other:#x} is no tag"),
        }
        client.send(&op(42).text(&drv.path).text("out").text(out).texts(["key:AAAA"]));
        let _ = client.outcome();
        client.goes_on();
        // CollectGarbage has a form of its own only where both ends name that feature.
        let scoped = features.contains(&REFERRERS) && offered.iter().any(|feature| feature == REFERRERS);
        for whole in [true, false] {
            let scope = match (scoped, whole) {
                (true, true) => Msg::default().word(1),
                (true, false) => Msg::default().word(0).texts([path("absent")]).word(0),
                (false, true) => Msg::default().word(0),
                (false, false) => Msg::default().texts([path("absent")]),
            };
            client.send(
                &op(20).word(if whole { 1 } else { 3 }).raw(scope.0).word(0).word(u64::MAX).word(0).word(0).word(0),
            );
            client.done();
            client.texts();
            client.word();
            assert_eq!(client.word(), 0);
            client.goes_on();
        }
    }
}

/// With the feature, a collection of the dead may be bound to paths: the others stay, dead or not. Without it there is no
/// way to say so, and the request is refused instead of taking the whole store.
#[test]
fn trap_14_the_dead_among_given_paths() {
    let rig = Rig::new(true);
    let add = |client: &mut Raw, name: &str| {
        let archive = file_nar(name);
        let claim = claim(name, &archive);
        client.add(&claim, &archive).unwrap();
        claim.path
    };
    let delete = |paths: &[&String], scoped: bool| {
        let paths = Msg::default().texts(paths);
        let scope = if scoped { Msg::default().word(0).raw(paths.0).word(0) } else { paths };
        op(20).word(2).raw(scope.0).word(0).word(u64::MAX).word(0).word(0).word(0)
    };
    let [dead, other, live] = {
        let mut client = Raw::new(&rig, NEWEST);
        ["dead", "other", "live"].map(|name| add(&mut client, name))
    };
    let mut holder = Raw::new(&rig, NEWEST);
    holder.send(&op(11).text(&live));
    holder.done();
    holder.word();

    let mut without = Raw::new(&rig, NEWEST);
    without.send(&delete(&[&dead], false));
    without.refused();
    without.goes_on();
    for path in [&dead, &other, &live] {
        assert!(without.is_valid(path), "{path}");
    }
    drop(without);

    let mut client = Raw::with_features(&rig, &[REFERRERS]);
    // What was added is kept until the daemon has noticed that who added it is gone.
    let start = Instant::now();
    let (deleted, freed) = loop {
        client.send(&delete(&[&dead, &live], true));
        client.done();
        let (deleted, freed) = (client.texts(), client.word());
        client.word();
        if !deleted.is_empty() || start.elapsed() > Duration::from_secs(10) {
            break (deleted, freed);
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(deleted, std::slice::from_ref(&dead));
    assert!(freed > 0);
    assert_eq!([&dead, &other, &live].map(|path| client.is_valid(path)), [false, true, true]);
}

/// Up to 1.29 a derivation without "!" stands for all its outputs, from 1.30 on for its file alone.
#[test]
fn trap_15_a_derivation_without_outputs_means_two_things() {
    let rig = Rig::new(true);
    let drv = derivation(&mut Raw::new(&rig, NEWEST), "unbuilt", &["out"], false);
    let built = derivation(&mut Raw::new(&rig, NEWEST), "built", &["out"], true);
    for minor in [19, 21, 29, 30, 34, NEWEST] {
        let mut client = Raw::new(&rig, minor);
        client.send(&op(40).texts([&drv.path]));
        client.done();
        let will_build = client.texts();
        assert_eq!(will_build, if minor < 30 { vec![drv.path.clone()] } else { Vec::new() }, "1.{minor}");
        assert_eq!((client.texts(), client.texts()), (Vec::new(), Vec::new()));
        assert_eq!((client.word(), client.word()), (0, 0));
        // Both are there already, whatever is meant; only the derivation's outputs come as results.
        client.send(&op(46).texts([&built.path]).word(0));
        client.done();
        assert_eq!((client.word(), client.text()), (1, built.path.clone()));
        let result = build_result(&mut client, false);
        assert_eq!((result.status, result.outputs.len()), (2, usize::from(minor == 29)), "1.{minor}");
        // To build it is tried only where it is meant; here nothing can be built.
        client.send(&op(9).texts([&drv.path]).word(0));
        assert_eq!(client.outcome().is_err(), minor < 30, "1.{minor}");
        if minor >= 30 {
            assert_eq!(client.word(), 1);
        }
        client.goes_on();
    }
}

/// The daemon serves BuildPathsWithResults to clients older than it, and what a result consists of goes by the version,
/// not by the operation.
#[test]
fn trap_16_results_of_builds_have_the_fields_of_the_version() {
    let rig = Rig::new(true);
    let drv = derivation(&mut Raw::new(&rig, NEWEST), "built", &["out"], true);
    let wanted = [format!("{}!out", drv.path), path("absent"), drv.outputs["out"].clone()];
    for minor in [18, 21, 27, 28, 29, 33, 34, 36, 37, NEWEST] {
        let mut client = Raw::new(&rig, minor);
        // Goes on after the failure, which is one of the three.
        let mut keep_going = set_options(0);
        keep_going.0[16] = 1;
        client.send(&keep_going);
        client.done();
        client.send(&op(46).texts(&wanted).word(0));
        client.done();
        assert_eq!(client.word(), 3);
        for (asked, status) in wanted.iter().zip([Some(2), None, Some(2)]) {
            assert_eq!(client.text(), *asked);
            let result = build_result(&mut client, false);
            match status {
                Some(status) => assert_eq!((result.status, result.error.as_str()), (status, "")),
                None => assert!(result.status > 2 && !result.error.is_empty()),
            }
            assert_eq!(result.outputs.len(), usize::from(minor >= 28 && asked.contains('!')), "1.{minor} {asked}");
        }
        client.goes_on();
    }
}

/// Inside AddMultipleToStore's stream a path info has the layout of 1.16, whatever the connection's version is.
#[test]
fn trap_17_path_infos_inside_a_stream_have_one_layout() {
    let rig = Rig::new(true);
    let plain = [18, 21, 23, 28, 32, 37, NEWEST].map(|minor| Raw::new(&rig, minor));
    for (n, mut client) in plain.into_iter().chain([Raw::with_features(&rig, &[WITH_PATH, REFERRERS])]).enumerate() {
        let archives = [file_nar(format!("first {n}")), file_nar(format!("second {n}"))];
        let mut first = claim(&format!("first-{n}"), &archives[0]);
        first.ultimate = 1;
        let mut second = claim(&format!("second-{n}"), &archives[1]);
        second.references = vec![first.path.clone()];
        second.deriver = path("some.drv");
        second.signatures = vec!["key:AAAA".to_owned()];
        let stream = first.fields(Msg::default().word(2)).raw(&archives[0]);
        let stream = second.fields(stream).raw(&archives[1]);
        client.send(&op(44).word(0).word(1).framed(&stream.0));
        client.done();
        client.goes_on();
        // Nobody's word makes a path from elsewhere one that was built here.
        first.ultimate = 0;
        for (claim, archive) in [(first, &archives[0]), (second, &archives[1])] {
            let mut info = client.info(&claim.path).unwrap();
            assert!(std::mem::take(&mut info.time) > 0);
            assert_eq!(info, claim);
            assert!(client.nar(&claim.path) == *archive);
        }
    }
}
