//! How builds fail, and what clients are told.

use std::time::{Duration, Instant};

use nix_compat::worker::BuildStatus;

use crate::rig::{Rig, all_outputs};

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_builder() {
    let Some(rig) = Rig::new() else { return };
    let draft = rig.derivation("fail", "for i in 1 2 3; do echo line $i; done; exit 3");
    let (result, _) = rig.fail(&draft, &[("log-lines", "2")]).await;
    let dir = rig.store.store_dir();
    let drv = rig.add(&draft);
    let expected = format!(
        "Cannot build '{drv}'.\nReason: builder failed with exit code 3.\nOutput paths:\n  {out}\n\
         Last 2 log lines:\n> line 2\n> line 3\nFor full logs, run:\n  nix log {drv}",
        drv = dir.display(&drv),
        out = dir.display(&rig.output(&drv, "out")),
    );
    assert_eq!(result.error, expected);
    assert_eq!((result.status, build::exit_status(&result)), (BuildStatus::PermanentFailure, 100));
    assert!(result.built_outputs.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_depends_on_a_failure_fails_too() {
    let Some(rig) = Rig::new() else { return };
    let broken = rig.add(&rig.derivation("broken", "exit 1"));
    let draft = rig.derivation("user", "echo > $out").needs(&rig, "dep", &broken);
    let (result, log) = rig.fail(&draft, &[]).await;
    assert_eq!(result.status, BuildStatus::DependencyFailed);
    assert!(result.error.contains("\nReason: 1 dependency failed.\nOutput paths:\n  "), "{}", result.error);
    assert_eq!(log.notes().len(), 1, "{:?}", log.notes());
    assert!(log.notes()[0].starts_with("error: Cannot build '"), "{:?}", log.notes());

    let user = rig.add(&draft);
    let fine = rig.add(&rig.derivation("fine", "$b sleep 0.5; echo > $out"));
    let (results, _) = rig.build(&[&user, &fine], &[("keep-going", "true")]).await;
    assert_eq!(results.len(), 2);
    assert_eq!(results[1].status, BuildStatus::Built);
}

#[tokio::test(flavor = "multi_thread")]
async fn outputs_that_are_not_there_or_not_allowed() {
    let Some(rig) = Rig::new() else { return };
    let (result, _) = rig.fail(&rig.derivation("nothing", "echo hi"), &[]).await;
    assert!(result.error.contains("failed to produce output path for output 'out' at \""), "{}", result.error);

    let (result, _) = rig.fail(&rig.derivation("pipe", "$b mkdir $out; $b mkfifo $out/pipe"), &[]).await;
    assert_eq!(result.status, BuildStatus::OutputRejected);
    assert!(result.error.contains("pipe' has an unsupported type"), "{}", result.error);

    let input = rig.add(&rig.derivation("input", "echo > $out"));
    for (attribute, value, allowed) in [
        ("allowedReferences", "", false),
        ("allowedReferences", "out", false),
        ("allowedRequisites", "", false),
        ("disallowedReferences", "out", true),
    ] {
        let draft = rig
            .derivation(&format!("refers{}", value.len() + attribute.len()), "echo $dep > $out")
            .needs(&rig, "dep", &input)
            .env(attribute, value);
        if allowed {
            rig.succeed(&draft, &[]).await;
        } else {
            let (result, _) = rig.fail(&draft, &[]).await;
            assert!(result.error.contains("is not allowed to refer to the following paths:\n  "), "{}", result.error);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_end_a_build() {
    let Some(rig) = Rig::new() else { return };
    for (setting, status) in [
        (("timeout", "1"), BuildStatus::TimedOut),
        (("max-silent-time", "1"), BuildStatus::TimedOut),
        (("max-build-log-size", "1000"), BuildStatus::LogLimitExceeded),
    ] {
        let script =
            if setting.0 == "max-silent-time" { "$b sleep 30" } else { "while :; do echo line; $b sleep 0.01; done" };
        let start = Instant::now();
        let (result, _) = rig.fail(&rig.derivation(setting.0, script), &[setting]).await;
        assert_eq!(result.status, status, "{}", result.error);
        assert!(start.elapsed() < Duration::from_secs(10));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_built_here() {
    let Some(rig) = Rig::new() else { return };
    let mut draft = rig.derivation("foreign", "echo > $out");
    draft.platform = "vax-ultrix".into();
    let (result, _) = rig.fail(&draft, &[]).await;
    assert!(result.error.contains("Reason: platform mismatch\nRequired system: 'vax-ultrix'"), "{}", result.error);

    let draft = rig.derivation("feature", "echo > $out").env("requiredSystemFeatures", "quantum");
    let (result, _) = rig.fail(&draft, &[]).await;
    assert!(result.error.contains("Required features: {quantum}"), "{}", result.error);

    let (result, _) = rig.fail(&rig.derivation("jobless", "echo > $out"), &[("max-jobs", "0")]).await;
    assert!(result.error.contains("local builds are disabled (max-jobs = 0)"), "{}", result.error);

    let missing =
        rig.store.store_dir().parse(&format!("{}/{}-x", rig.store.store_dir().as_str(), "0".repeat(32))).unwrap();
    let (_, client) = rig.client();
    let paths = vec![nix_compat::worker::DerivedPath::Opaque(missing)];
    let results = rig.scheduler.realise(paths, nix_compat::worker::BuildMode::Normal, rig.settings(&[]), client).await;
    assert_eq!(results[0].1.status, BuildStatus::NoSubstituters);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_build_can_be_kept() {
    let Some(rig) = Rig::new() else { return };
    let draft = rig.derivation("kept", "echo evidence > file; exit 1");
    let (_, log) = rig.fail(&draft, &[("keep-failed", "true")]).await;
    let notes = log.notes();
    let path = notes[0].strip_prefix("note: keeping build directory \"").unwrap().strip_suffix('"').unwrap();
    assert_eq!(std::fs::read_to_string(format!("{path}/file")).unwrap(), "evidence\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_very_long_chain_costs_no_stack() {
    const LENGTH: usize = 10_000;
    let Some(rig) = Rig::new() else { return };
    let mut draft = rig.derivation("link", "echo > $out");
    draft.platform = "vax-ultrix".into();
    let mut top = rig.add(&draft);
    for i in 0..LENGTH {
        top = rig.add(&rig.derivation("link", &format!("echo {i} > $out")).needs(&rig, "dep", &top));
    }
    let missing = rig.scheduler.query_missing(vec![all_outputs(&top)]).await.unwrap();
    assert_eq!(missing.will_build.len(), LENGTH + 1);
    let (results, log) = rig.build(&[&top], &[]).await;
    assert_eq!(results[0].status, BuildStatus::DependencyFailed);
    assert_eq!(log.notes().len(), LENGTH);
}
