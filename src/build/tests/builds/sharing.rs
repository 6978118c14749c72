//! Several clients, one machine.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nix_compat::worker::{BuildMode, BuildStatus};

use crate::rig::{Rig, all_outputs};

/// Waits for something that must happen soon.
async fn soon(what: &str, mut happened: impl FnMut() -> bool) {
    let start = Instant::now();
    while !happened() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what} did not happen");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

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
