//! How builds fail, and what clients are told.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix_compat::worker::{BuildMode, BuildStatus};

use crate::rig::{Rig, all_outputs, soon};

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

    // The first failure ends the request; the other is no success, but has no reason of its own.
    let slow = rig.add(&rig.derivation("slow", "$b sleep 20; echo > $out"));
    let (results, _) = rig.build(&[&user, &slow], &[]).await;
    assert_eq!((results[1].status, results[1].error.as_str()), (BuildStatus::MiscFailure, ""));
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
async fn structured_demands_on_outputs() {
    let Some(rig) = Rig::new() else { return };
    // The shell has no arrays, so the path of the output comes from the other file.
    let write = "x=$(/busybox sed 's/.*\"out\":\"\\([^\"]*\\)\".*/\\1/' $NIX_ATTRS_JSON_FILE); echo $x 12345678 > $x";
    let draft = |name: &str, attributes: &str| {
        rig.derivation(name, write).env("__json", &format!(r#"{{"name":"{name}",{attributes}}}"#))
    };
    for (name, checks, reason) in [
        ("size", r#""maxSize":100"#, "is too large at "),
        ("closure", r#""maxClosureSize":100"#, "closure of path '"),
        ("itself", r#""allowedRequisites":[]"#, "is not allowed to refer to"),
    ] {
        let (result, _) = rig.fail(&draft(name, &format!(r#""outputChecks":{{"out":{{{checks}}}}}"#)), &[]).await;
        assert_eq!(result.status, BuildStatus::OutputRejected, "{}", result.error);
        assert!(result.error.contains(reason), "{}", result.error);
    }
    let fine = r#""outputChecks":{"out":{"maxSize":1000,"maxClosureSize":1000,"allowedRequisites":["out"]}}"#;
    rig.succeed(&draft("fine", fine), &[]).await;

    let (drv, _) = rig.succeed(&draft("discards", r#""unsafeDiscardReferences":{"out":true}"#), &[]).await;
    assert!(rig.store.path_info(&rig.output(&drv, "out")).unwrap().unwrap().references.is_empty());

    let (result, _) = rig.fail(&draft("graph", r#""exportReferencesGraph":{"g":["/x"]}"#), &[]).await;
    assert_eq!(result.status, BuildStatus::InputRejected, "{}", result.error);
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_end_a_build() {
    let Some(rig) = Rig::new() else { return };
    // The words are those of Nix 2.34.8.
    let too_long = "building derivation 'DRV' killed after writing more than 1000 bytes of log output";
    for (setting, status, text) in [
        (("timeout", "1"), BuildStatus::TimedOut, "timed out after 1 seconds"),
        (("timeout", "2"), BuildStatus::TimedOut, "timed out after 2 seconds"),
        (("max-silent-time", "1"), BuildStatus::TimedOut, "timed out after 1 seconds"),
        (("max-build-log-size", "1000"), BuildStatus::LogLimitExceeded, too_long),
    ] {
        let script = match setting {
            ("max-silent-time", _) => "$b sleep 30",
            ("timeout", "2") => "$b yes",
            _ => "while :; do echo line; $b sleep 0.01; done",
        };
        let start = Instant::now();
        let draft = rig.derivation(setting.0, script);
        let (result, _) = rig.fail(&draft, &[setting]).await;
        assert_eq!(result.status, status, "{}", result.error);
        assert_eq!(result.error, text.replace("DRV", &rig.store.store_dir().display(&rig.add(&draft))));
        assert!(start.elapsed() < Duration::from_secs(10));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_somebody_outside_holds_open_ends_with_the_build() {
    let Some(rig) = Rig::new() else { return };
    let drv = rig.add(&rig.derivation("leak", "echo first; $b sleep 1; echo last; echo > $out"));
    let (log, client) = rig.client();
    let build = rig.scheduler.realise(vec![all_outputs(&drv)], BuildMode::Normal, rig.settings(&[]), client);
    let leak = async {
        soon("the first line", || !log.lines().is_empty()).await;
        let variable = format!("out={}", rig.store.store_dir().display(&rig.output(&drv, "out")));
        let processes = std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
        let ours = |path: &std::path::PathBuf| {
            std::fs::read(path.join("environ"))
                .is_ok_and(|environ| environ.split(|&b| b == 0).any(|entry| entry == variable.as_bytes()))
        };
        let held: Vec<_> = processes
            .filter(ours)
            .map(|path| std::fs::OpenOptions::new().write(true).open(path.join("fd/2")).unwrap())
            .collect();
        assert!(!held.is_empty(), "no process of the build found");
        held
    };
    let both = async { tokio::join!(build, leak) };
    let (results, _held) = tokio::time::timeout(Duration::from_secs(20), both).await.expect("an end of the build");
    assert_eq!(results[0].1.status, BuildStatus::Built, "{}", results[0].1.error);
    assert_eq!(log.lines(), ["first", "last"]);
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
    let draft = rig.derivation("kept", "echo evidence > file; $b mkdir sub; echo more > sub/file; exit 1");
    let build_dir = rig.path("elsewhere");
    std::fs::create_dir(&build_dir).unwrap();
    for (setting, place, uid) in [
        (None, rig.path("state/builds"), Some(54_321)),
        (None, rig.path("state/builds"), None),
        (Some(build_dir.to_str().unwrap()), build_dir.clone(), Some(54_321)),
    ] {
        let mut settings = vec![("keep-failed", "true")];
        settings.extend(setting.map(|dir| ("build-dir", dir)));
        let drv = rig.add(&draft);
        let (log, mut client) = rig.client();
        client.uid = uid;
        let paths = vec![all_outputs(&drv)];
        rig.scheduler.realise(paths, BuildMode::Normal, rig.settings(&settings), client).await;
        let notes = log.notes();
        let path = notes[0].strip_prefix("note: keeping build directory \"").unwrap().strip_suffix('"').unwrap();
        let number = if uid.is_none() { 1 } else { 0 };
        assert_eq!(Path::new(path), place.join(format!("nix-build-kept.drv-{number}/build")));
        for (name, text) in [("file", "evidence\n"), ("sub/file", "more\n")] {
            assert_eq!(std::fs::read_to_string(format!("{path}/{name}")).unwrap(), text);
            let owner = std::fs::metadata(format!("{path}/{name}")).unwrap().uid();
            if nix::unistd::geteuid().is_root() {
                assert_eq!(owner == 54_321, uid.is_some(), "{owner}");
            }
        }
        // Everybody may enter.
        for dir in Path::new(path).ancestors().take_while(|dir| *dir != rig.path("")) {
            assert_eq!(std::fs::metadata(dir).unwrap().mode() & 0o005, 0o005, "{}", dir.display());
        }
    }
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
    let (settings, (_, client)) = (rig.settings(&[]), rig.client());
    let missing = rig.scheduler.query_missing(vec![all_outputs(&top)], settings, client).await.unwrap();
    assert_eq!(missing.will_build.len(), LENGTH + 1);
    let (results, log) = rig.build(&[&top], &[]).await;
    assert_eq!(results[0].status, BuildStatus::DependencyFailed);
    assert_eq!(log.notes().len(), LENGTH);
}
