//! Several clients, one machine.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nix_compat::content_address::{ContentAddress, Method};
use nix_compat::derivation::{BasicDerivation, Output, OutputName};
use nix_compat::hash::{Algorithm, Hash};
use nix_compat::store_path::fixed_output_path;
use nix_compat::worker::{BuildMode, BuildStatus};
use store::{GcAction, GcOptions, GcScope};

use crate::rig::{Rig, all_outputs, soon};

#[tokio::test(flavor = "multi_thread")]
async fn two_clients_share_one_build_and_both_see_all_of_it() {
    let Some(rig) = Rig::new() else { return };
    let input = rig.add(&rig.derivation("input", "echo early; echo > $out; $b sleep 0.5; echo middle"));
    let drv = rig.add(&rig.derivation("shared", "echo late; echo > $out").needs(&rig, "dep", &input));
    let (first_log, first) = rig.client();
    let (second_log, second) = rig.client();
    let build = |client| rig.scheduler.realise(vec![all_outputs(&drv)], BuildMode::Normal, rig.settings(&[]), client);
    let (one, two) = tokio::join!(build(first), async {
        soon("the first line", || !first_log.lines().is_empty()).await;
        build(second).await
    });
    assert_eq!((one[0].1.status, two[0].1.status), (BuildStatus::Built, BuildStatus::Built));
    for log in [&first_log, &second_log] {
        assert_eq!(log.lines(), ["early", "middle", "late"]);
        assert_eq!(log.builds().len(), 2);
        log.assert_activities_balance();
    }
    assert_eq!(one[0].1.start_time, two[0].1.start_time);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_lives_as_long_as_somebody_wants_it() {
    let Some(rig) = Rig::new() else { return };
    let rig = Arc::new(rig);
    let input = rig.add(&rig.derivation("input", "echo started; $b sleep 100 & $b sleep 100"));
    let drv = rig.add(&rig.derivation("user", "echo > $out").needs(&rig, "dep", &input));
    let start = |log_and_client: (Arc<crate::rig::Log>, build::Client), drv| {
        let (log, client) = log_and_client;
        let (scheduler, settings) = (rig.scheduler.clone(), rig.settings(&[]));
        let paths = vec![all_outputs(drv)];
        (log, tokio::spawn(async move { scheduler.realise(paths, BuildMode::Normal, settings, client).await }))
    };
    let (first_log, first) = start(rig.client(), &drv);
    let (second_log, second) = start(rig.client(), &input);
    soon("both watching", || !first_log.lines().is_empty() && !second_log.lines().is_empty()).await;
    let rooms = || std::fs::read_dir(rig.path("state/castored/builds")).unwrap().count();
    assert_eq!(rooms(), 1);

    first.abort();
    assert!(first.await.is_err());
    first_log.assert_activities_balance();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(rooms(), 1, "the second client still wants the build");

    let cancelled = Instant::now();
    second.abort();
    soon("the end of the build", || rooms() == 0).await;
    assert!(cancelled.elapsed() < Duration::from_secs(1), "{:?}", cancelled.elapsed());
    assert!(rig.scheduler.status().is_empty());
    second_log.assert_activities_balance();
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_are_bounded() {
    let Some(rig) = Rig::new() else { return };
    let drvs: Vec<_> =
        (0..3).map(|i| rig.add(&rig.derivation(&format!("job{i}"), "$b sleep 0.3; echo > $out"))).collect();
    let start = Instant::now();
    let (results, _) = rig.build(&drvs.iter().collect::<Vec<_>>(), &[("max-jobs", "1")]).await;
    assert!(results.iter().all(|result| result.status == BuildStatus::Built));
    assert!(start.elapsed() >= Duration::from_millis(900), "more than one at a time");
}

/// A derivation that a client sends along, with the fixed output that `text` makes.
fn inline(rig: &Rig, name: &str, script: &str, text: &str) -> BasicDerivation {
    let mut draft = rig.derivation(name, script);
    let hash = Hash::of(Algorithm::Sha256, text.as_bytes());
    let path = fixed_output_path(rig.store.store_dir(), name, Method::Flat, &hash).unwrap();
    draft
        .outputs
        .insert(OutputName::default(), Output::Fixed { path, ca: ContentAddress { method: Method::Flat, hash } });
    rig.complete(&draft).basic
}

#[tokio::test(flavor = "multi_thread")]
async fn a_derivation_sent_along_is_never_taken_for_a_stored_one() {
    let Some(rig) = Rig::new() else { return };
    let drv = rig.add(&rig.derivation("victim", "echo honest > $out"));
    let (log, client) = rig.client();
    let (_, other_client) = rig.client();
    let settings = || rig.settings(&[]);
    let evil = inline(&rig, "victim", "echo evil; $b sleep 1; echo -n evil > $out", "evil");
    let other = inline(&rig, "victim", "echo -n other > $out", "other");
    let send = |derivation, client| {
        rig.scheduler.build_derivation(drv.clone(), derivation, BuildMode::Normal, settings(), client)
    };
    let (sent, (other_sent, built)) = tokio::join!(send(evil, client), async {
        soon("the first line", || !log.lines().is_empty()).await;
        (send(other.clone(), other_client).await, rig.build(&[&drv], &[]).await.0)
    });
    assert_eq!((sent.status, built[0].status), (BuildStatus::Built, BuildStatus::Built));
    assert_eq!(rig.read(&rig.output(&drv, "out")), "honest\n");
    assert_eq!(other_sent.status, BuildStatus::Built);
    assert_eq!(rig.read(other.outputs["out"].path().unwrap()), "other");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fixed_output_has_the_path_of_its_hash() {
    let Some(rig) = Rig::new() else { return };
    let drv = rig.add(&rig.derivation("victim", "echo honest > $out"));
    let mut evil = inline(&rig, "victim", "echo -n evil > $out", "evil");
    let mut variable = evil.clone();
    if let Some(Output::Fixed { path, .. }) = evil.outputs.get_mut("out") {
        *path = rig.output(&drv, "out");
    }
    evil.env.remove(&b"out"[..]);
    variable.env.insert(b"out".to_vec(), rig.store.store_dir().display(&rig.output(&drv, "out")).into_bytes());
    for derivation in [evil, variable] {
        let (_, client) = rig.client();
        let settings = rig.settings(&[]);
        let result = rig.scheduler.build_derivation(drv.clone(), derivation, BuildMode::Normal, settings, client).await;
        assert_eq!(result.status, BuildStatus::InputRejected, "{}", result.error);
    }
    assert!(!rig.store.is_valid(&rig.output(&drv, "out")).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn inputs_of_a_build_that_waits_are_not_collected() {
    let Some(rig) = Rig::new() else { return };
    let (input, _) = rig.succeed(&rig.derivation("input", "echo found > $out"), &[]).await;
    let first = rig.add(&rig.derivation("first", "echo first; $b sleep 1; echo > $out"));
    let second = rig.add(&rig.derivation("second", "read x < $dep; echo $x > $out").needs(&rig, "dep", &input));
    let (log, client) = rig.client();
    let paths = vec![all_outputs(&first), all_outputs(&second)];
    let settings = rig.settings(&[("max-jobs", "1")]);
    let (results, ()) = tokio::join!(rig.scheduler.realise(paths, BuildMode::Normal, settings, client), async {
        soon("a build", || !log.builds().is_empty()).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        let options = GcOptions {
            action: GcAction::DeleteDead,
            scope: GcScope::WholeStore,
            max_freed: u64::MAX,
            keep_derivations: false,
            keep_outputs: false,
        };
        rig.store.collect_garbage(&options).unwrap();
    });
    assert!(results.iter().all(|(_, result)| result.status == BuildStatus::Built), "{results:?}");
    assert_eq!(rig.read(&rig.output(&second, "out")), "found\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_are_those_of_each_client() {
    let Some(rig) = Rig::new() else { return };
    let input = rig.add(&rig.derivation("input", "echo begun; $b sleep 2; echo > $out"));
    let drv = rig.add(&rig.derivation("user", "echo > $out").needs(&rig, "dep", &input));
    let (log, client) = rig.client();
    let settings = rig.settings(&[("timeout", "1")]);
    let (first, second) =
        tokio::join!(rig.scheduler.realise(vec![all_outputs(&drv)], BuildMode::Normal, settings, client), async {
            soon("the first line", || !log.lines().is_empty()).await;
            rig.build(&[&drv], &[]).await.0
        });
    assert_eq!(first[0].1.status, BuildStatus::DependencyFailed);
    assert_eq!(second[0].status, BuildStatus::Built, "{}", second[0].error);
}
