//! Programs run around a build.

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use nix_compat::worker::stderr::{ActivityKind, Field, Message, ResultKind, Verbosity};
use nix_compat::worker::{BuildMode, BuildStatus};

use crate::rig::{Log, Rig, all_outputs, soon};

/// Writes a script that is a hook; gives its path.
pub(crate) fn hook(rig: &Rig, name: &str, script: &str) -> String {
    let path = rig.path(name);
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path.to_str().unwrap().to_owned()
}

pub(crate) fn hook_lines(log: &Log) -> Vec<String> {
    let line = |message: Message| match message {
        Message::Result { kind: ResultKind::PostBuildLogLine, fields, .. } => match fields.as_slice() {
            [Field::Text(line)] => Some(String::from_utf8_lossy(line).into_owned()),
            _ => None,
        },
        _ => None,
    };
    log.messages().into_iter().filter_map(line).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_post_build_hook_learns_of_all_outputs() {
    let Some(rig) = Rig::new() else { return };
    let script = "echo \"$DRV_PATH\"; echo \"$OUT_PATHS\" >&2; echo \"$NIX_CONFIG\"; cat $OUT_PATHS; pwd";
    let path = hook(&rig, "hook", script);
    let draft = rig.derivation("hooked", "echo one > $out; echo two > $dev").output("dev");
    let (drv, log) = rig.succeed(&draft, &[("post-build-hook", &path), ("cores", "3")]).await;

    let dir = rig.store.store_dir();
    let mut outputs = [rig.output(&drv, "out"), rig.output(&drv, "dev")];
    outputs.sort();
    let lines = hook_lines(&log);
    assert_eq!(lines[..2], [dir.display(&drv), outputs.map(|path| dir.display(&path)).join(" ")]);
    assert!(
        lines.contains(&"cores = 3".to_owned()) && lines.contains(&format!("post-build-hook = {path}")),
        "{lines:?}"
    );
    assert!(lines.contains(&"one".to_owned()) && lines.contains(&"two".to_owned()), "{lines:?}");
    assert_eq!(lines.last().map(String::as_str), Some("/"));
    let text = format!("running post-build-hook '{path}'").into_bytes();
    let announced = log.messages().into_iter().any(|message| match message {
        Message::StartActivity { kind: ActivityKind::PostBuildHook, level, text: said, fields, .. } => {
            (level, said, fields) == (Verbosity::Talkative, text.clone(), vec![Field::Text(dir.display(&drv).into())])
        }
        _ => false,
    });
    assert!(announced, "{:?}", log.messages());

    // Neither what is there already nor a check is a build that the hook is for.
    let (_, log) = rig.build(&[&drv], &[("post-build-hook", &path)]).await;
    assert!(hook_lines(&log).is_empty());
    let (_, log) = rig.build_mode(&[&drv], &[("post-build-hook", &path)], BuildMode::Check).await;
    assert!(hook_lines(&log).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_post_build_hook_that_fails_leaves_the_outputs_valid() {
    let Some(rig) = Rig::new() else { return };
    let path = hook(&rig, "hook", "echo trying; exit 3");
    let drv = rig.add(&rig.derivation("hooked", "echo one > $out"));
    let top = rig.add(&rig.derivation("top", "echo > $out").needs(&rig, "dep", &drv));
    let settings = [("post-build-hook", path.as_str())];
    let (results, log) = rig.build(&[&top], &settings).await;
    assert_eq!(results[0].status, BuildStatus::DependencyFailed);
    assert_eq!(log.notes(), [format!("error: program \"{path}\" failed with exit code 3")]);
    assert!(rig.store.is_valid(&rig.output(&drv, "out")).unwrap());
    let (results, log) = rig.build(&[&top], &settings).await;
    assert_eq!(results[0].status, BuildStatus::MiscFailure);
    assert_eq!(results[0].error, format!("program \"{path}\" failed with exit code 3"));
    assert_eq!((build::exit_status(&results[0]), hook_lines(&log)), (1, vec!["trying".to_owned()]));

    let gone = rig.path("gone");
    let drv = rig.add(&rig.derivation("other", "echo one > $out"));
    let (results, _) = rig.build(&[&drv], &[("post-build-hook", gone.to_str().unwrap())]).await;
    assert!(results[0].error.starts_with("cannot run \""), "{}", results[0].error);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_post_build_hook_holds_no_job_and_ends_with_its_client() {
    let Some(rig) = Rig::new() else { return };
    let path = hook(&rig, "hook", "case $DRV_PATH in *slow*) echo slow; sleep 60;; esac");
    let slow = rig.add(&rig.derivation("slow", "echo > $out"));
    let settings = [("post-build-hook", path.as_str()), ("max-jobs", "1")];
    let (log, client) = rig.client();
    let (late_log, late) = rig.client();
    let realise = |client| {
        let (scheduler, settings, paths) = (rig.scheduler.clone(), rig.settings(&settings), vec![all_outputs(&slow)]);
        tokio::spawn(async move { scheduler.realise(paths, BuildMode::Normal, settings, client).await })
    };
    let waiting = realise(client);
    soon("the hook", || !hook_lines(&log).is_empty()).await;
    // All the jobs that there are.
    let others: Vec<_> = (0..4).map(|i| rig.add(&rig.derivation(&format!("quick{i}"), "echo > $out"))).collect();
    let others: Vec<_> = others.iter().collect();
    let quick = rig.build(&others, &[("max-jobs", "4")]);
    let (results, _) = tokio::time::timeout(Duration::from_secs(20), quick).await.expect("others build");
    assert!(results.iter().all(|result| result.status == BuildStatus::Built));

    // The outputs are valid, so whoever comes now waits for no hook.
    let results = tokio::time::timeout(Duration::from_secs(20), realise(late)).await.expect("an answer").unwrap();
    assert_eq!(results[0].1.status, BuildStatus::AlreadyValid);
    assert!(hook_lines(&late_log).is_empty());

    let cancelled = Instant::now();
    waiting.abort();
    soon("the end of the goal", || rig.scheduler.status().is_empty()).await;
    assert!(cancelled.elapsed() < Duration::from_secs(5));
    assert!(waiting.await.is_err());
    log.assert_activities_balance();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pre_build_hook_adds_sandbox_paths() {
    let Some(rig) = Rig::new() else { return };
    std::fs::write(rig.path("secret"), "from outside\n").unwrap();
    let secret = rig.path("secret");
    let script = format!(
        "echo \"$1 $2\" >> {}; echo extra-sandbox-paths; echo /given={}; echo; echo extra-sandbox-paths; echo {}",
        rig.path("called").display(),
        secret.display(),
        rig.path("secret").display()
    );
    let path = hook(&rig, "hook", &script);
    let settings = [("pre-build-hook", path.as_str())];
    let script = format!("$b cat /given {}; echo > $out", secret.display());
    let (drv, log) = rig.succeed(&rig.derivation("given", &script), &settings).await;
    assert_eq!(log.lines(), ["from outside", "from outside"]);
    let called = std::fs::read_to_string(rig.path("called")).unwrap();
    let (first, root) = called.trim_end().split_once(' ').unwrap();
    assert_eq!(first, rig.store.store_dir().display(&drv));
    assert!(root.starts_with(rig.path("state/castored/builds").to_str().unwrap()), "{root}");

    for (script, text) in [
        ("exit 2", "program \"HOOK\" failed with exit code 2"),
        ("echo rm -rf /", "unknown pre-build hook command 'rm -rf /'"),
    ] {
        let path = hook(&rig, "bad-hook", script);
        let (result, _) = rig.fail(&rig.derivation("bad", "echo > $out"), &[("pre-build-hook", &path)]).await;
        assert_eq!(result.error, text.replace("HOOK", &path));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_diff_hook_is_shown_what_differs_as_the_builds_user() {
    let Some(rig) = Rig::new() else { return };
    let draft = rig.derivation("random", "read x < /proc/sys/kernel/random/uuid; $b mkdir $out; echo $x > $out/file");
    let (drv, _) = rig.succeed(&draft, &[]).await;
    let valid = rig.store.store_dir().display(&rig.output(&drv, "out"));
    let script = "id -u; id -G; echo \"$1 $3\"; echo \"$2\"; test -d \"$4\"; cat $1/file $2/file; exit 5";
    let path = hook(&rig, "hook", script);

    let settings = [("diff-hook", path.as_str())];
    let (results, log) = rig.build_mode(&[&drv], &settings, BuildMode::Check).await;
    assert!(results[0].error.ends_with("-random\" differs"), "{}", results[0].error);
    assert!(log.notes().is_empty(), "run without run-diff-hook");

    for keep in ["false", "true"] {
        let settings = [("diff-hook", path.as_str()), ("run-diff-hook", "true"), ("keep-failed", keep)];
        let (results, log) = rig.build_mode(&[&drv], &settings, BuildMode::Check).await;
        assert_eq!((results[0].status, build::exit_status(&results[0])), (BuildStatus::NotDeterministic, 104));
        let notes = log.notes();
        if nix::unistd::geteuid().is_root() {
            assert!(notes[0].parse::<u32>().unwrap() >= 872_415_232 && notes[1] == notes[0], "{notes:?}");
        }
        assert_eq!(notes[2], format!("{valid} {}", rig.store.store_dir().display(&drv)));
        let rebuilt = format!("{}/nix-build-random.drv-0/", rig.path("state/builds").display());
        let rebuilt = format!("{rebuilt}{}.check", rig.output(&drv, "out").base_name());
        assert_eq!(notes[3], rebuilt);
        assert_ne!(notes[4], notes[5]);
        assert_eq!(notes[6], format!("diff hook execution failed: program \"{path}\" failed with exit code 5"));
        assert_eq!(std::path::Path::new(&rebuilt).exists(), keep == "true");
        let said = format!(" may not be deterministic: output \"{valid}\" differs from \"{rebuilt}\"");
        assert_eq!(results[0].error.ends_with(&said), keep == "true", "{}", results[0].error);
        if keep == "true" {
            assert_eq!(std::fs::read_to_string(format!("{rebuilt}/file")).unwrap().trim_end(), notes[5]);
        }
    }
    assert_eq!(std::fs::read_dir(rig.path("state/castored/builds")).unwrap().count(), 0);
}
