//! What settings change about a build.

use std::path::Path;

use nix_compat::worker::{BuildMode, BuildStatus};

use crate::rig::{Rig, all_outputs, soon};

#[tokio::test(flavor = "multi_thread")]
async fn impure_variables_come_from_the_setting_first() {
    let Some(rig) = Rig::new() else { return };
    let draft = rig.derivation("impure", "echo \"$x/$y/$PATH\"; echo -n same > $out");
    let draft = draft.env("impureEnvVars", "x y PATH").fixed(&rig, "same");
    let here = std::env::var("PATH").unwrap();
    let on = ("experimental-features", "configurable-impure-env");
    let mut run = 0;
    for (settings, said) in [
        (vec![("impure-env", "x=1 y=a=b")], format!("//{here}")),
        (vec![on, ("impure-env", "x=1 y=a=b PATH=z z=2")], "1/a=b/z".to_owned()),
    ] {
        run += 1;
        let (drv, mode) = (rig.add(&draft), if run == 1 { BuildMode::Normal } else { BuildMode::Check });
        let (results, log) = rig.build_mode(&[&drv], &settings, mode).await;
        assert_eq!((results[0].status, log.lines()), (BuildStatus::Built, vec![said]), "{}", results[0].error);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_range_of_users_is_had_where_users_are_allocated() {
    let Some(rig) = Rig::new() else { return };
    let script = "$b id -u; $b mkdir $out; echo x > $out/file; $b chown 7:7 $out/file; $b chmod 0600 $out/file";
    let draft = rig.derivation("range", script).env("requiredSystemFeatures", "uid-range");
    let (result, _) = rig.fail(&draft, &[]).await;
    assert_eq!(result.error, "feature 'uid-range' requires the setting 'auto-allocate-uids' to be enabled");
    // An experimental setting counts only where the feature is enabled.
    let (result, _) = rig.fail(&draft, &[("auto-allocate-uids", "true")]).await;
    assert!(result.error.contains("requires the setting"), "{}", result.error);
    let settings = [("auto-allocate-uids", "true"), ("experimental-features", "auto-allocate-uids")];
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED: the rest needs root");
        return;
    }
    let unsandboxed = [settings[0], settings[1], ("sandbox", "false")];
    let (result, _) = rig.fail(&draft, &unsandboxed).await;
    assert_eq!(result.error, "feature 'uid-range' is only supported in sandboxed builds");
    let (drv, log) = rig.succeed(&draft, &settings).await;
    assert_eq!(log.lines(), ["0"]);
    assert_eq!(rig.read_below(&rig.output(&drv, "out"), "file"), "x\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_relaxed_sandbox_lets_out() {
    let Some(rig) = Rig::new() else { return };
    let probe = format!("if [ -e {} ]; then echo host; else echo sandbox; fi; ", rig.path("state").display());
    let plain = rig.derivation("plain", &format!("{probe} echo > $out"));
    let open = rig.derivation("open", &format!("{probe} echo > $out")).env("__noChroot", "1");
    let fetched = rig.derivation("fetched", &format!("{probe} echo -n x > $out")).fixed(&rig, "x");
    let (result, _) = rig.fail(&open, &[]).await;
    assert!(result.error.ends_with("has '__noChroot' set, but that's not allowed when 'sandbox' is 'true'"));
    // Outside, /bin/sh need not be the one that knows $b, but both have `[`.
    for (draft, seen) in [(plain, "sandbox"), (open, "host"), (fetched, "host")] {
        let (_, log) = rig.succeed(&draft, &[("sandbox", "relaxed")]).await;
        assert_eq!(log.lines(), [seen], "{}", draft.name);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn places_and_devices_of_the_sandbox() {
    let Some(rig) = Rig::new() else { return };
    std::fs::write(rig.path("file"), "shown\n").unwrap();
    let paths = format!("/busybox=/usr/bin/busybox /shown={} /gone=/no/such?", rig.path("file").display());
    let settings = [("sandbox-build-dir", "/work"), ("sandbox-dev-shm-size", "1M"), ("sandbox-paths", paths.as_str())];
    let script = "$b pwd; $b cat /shown; [ -e /gone ] && echo gone; [ -e /dev/kvm ] && echo kvm; \
                  $b dd if=/dev/zero of=/dev/shm/x bs=1k count=2000 2>/dev/null || echo full; echo > $out";
    let (_, log) = rig.succeed(&rig.derivation("places", script), &settings).await;
    assert_eq!(log.lines(), ["/work", "shown", "full"]);

    let draft = rig.derivation("kvm", "[ -e /dev/kvm ] && echo kvm; echo > $out");
    let (_, log) = rig.succeed(&draft.env("requiredSystemFeatures", "kvm"), &[("system-features", "kvm")]).await;
    assert_eq!(!log.lines().is_empty(), Path::new("/dev/kvm").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn builds_have_control_groups_of_their_own() {
    let Some(rig) = Rig::new() else { return };
    let settings = [("use-cgroups", "true"), ("experimental-features", "cgroups")];
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let mount = mounts.lines().find_map(|line| line.split_once(" cgroup2 ")?.0.split(' ').nth(1));
    let Some(mount) = mount else {
        let (result, _) = rig.fail(&rig.derivation("cgroups", "echo > $out"), &settings).await;
        assert_eq!(result.error, "cannot determine the cgroups file system");
        return;
    };
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED: needs root");
        return;
    }
    let groups = || {
        let mut found = Vec::new();
        let mut todo = vec![std::path::PathBuf::from(mount)];
        while let Some(dir) = todo.pop() {
            for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                if entry.file_name().to_string_lossy().starts_with(&format!("nix-build-pid-{}-", std::process::id())) {
                    found.push(entry.path());
                } else if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    todo.push(entry.path());
                }
            }
        }
        found
    };
    let before = groups();
    for (name, sandbox) in [("inside", "true"), ("outside", "false")] {
        // Half a second of work, and something left behind.
        let script = "$b cat /proc/self/cgroup; ($b setsid $b sleep 1000 &); x=$($b date +%s); \
                      while [ $(( $($b date +%s) - x )) -lt 2 ]; do :; done; echo > $out";
        let draft = rig.derivation(name, script).env("sandbox", sandbox);
        let draft = if sandbox == "true" { draft } else { draft.env("b", "/usr/bin/busybox") };
        let drv = rig.add(&draft);
        let settings = [settings[0], settings[1], ("sandbox", sandbox)];
        let (log, client) = rig.client();
        let build = rig.scheduler.realise(vec![all_outputs(&drv)], BuildMode::Normal, rig.settings(&settings), client);
        let watch = async {
            soon("the first line", || !log.lines().is_empty()).await;
            let group = groups().into_iter().find(|group| !before.contains(group)).expect("a group");
            let processes = std::fs::read_to_string(group.join("cgroup.procs")).unwrap();
            assert!(processes.lines().count() >= 2, "{processes}");
            group
        };
        let (results, group) = tokio::join!(build, watch);
        let result = &results[0].1;
        assert_eq!(result.status, BuildStatus::Built, "{}", result.error);
        assert!(!group.exists(), "the group is left");
        let cpu = result.cpu_user.unwrap() + result.cpu_system.unwrap();
        assert!((10_000..4_000_000).contains(&cpu), "{cpu}");
        let own = log.lines().into_iter().find(|line| line.starts_with("0::")).unwrap();
        if sandbox == "true" {
            assert_eq!(own, "0::/", "the build sees where its group is");
        } else {
            assert!(own.ends_with(group.file_name().unwrap().to_str().unwrap()), "{own}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_are_kept_as_the_settings_say() {
    let Some(rig) = Rig::new() else { return };
    for (i, (settings, kept)) in [
        (&[][..], Some(".bz2")),
        (&[("compress-build-log", "true")], Some(".bz2")),
        (&[("compress-build-log", "false")], Some("")),
        (&[("keep-build-log", "false")], None),
    ]
    .into_iter()
    .enumerate()
    {
        let (drv, log) = rig.succeed(&rig.derivation(&format!("log{i}"), "echo a line; echo > $out"), settings).await;
        assert_eq!(log.lines(), ["a line"]);
        let (directory, name) = drv.base_name().split_at(2);
        let directory = rig.path("log/drvs").join(directory);
        let path = |ending: &str| directory.join(format!("{name}{ending}"));
        let found: Vec<&str> = [".bz2", ""].into_iter().filter(|ending| path(ending).exists()).collect();
        assert_eq!(found, kept.into_iter().collect::<Vec<_>>(), "{settings:?}");
        let text = match kept {
            Some(".bz2") => {
                let mut text = String::new();
                let file = std::fs::File::open(path(".bz2")).unwrap();
                std::io::Read::read_to_string(&mut bzip2::read::BzDecoder::new(file), &mut text).unwrap();
                text
            }
            Some(_) => std::fs::read_to_string(path("")).unwrap(),
            None => continue,
        };
        assert_eq!(text, "a line\n");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_profile_means_nothing_here() {
    let Some(rig) = Rig::new() else { return };
    let profile = "(version 1) (deny default) (import \"/no/such/profile.sb\")";
    let draft = rig.derivation("profile", "[ -e /etc/hostname ] && echo seen; echo > $out");
    let (_, log) = rig.succeed(&draft.env("__sandboxProfile", profile), &[]).await;
    assert!(log.lines().is_empty(), "{:?}", log.lines());
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_the_machine_are_shown_where_the_settings_allow_it() {
    let Some(rig) = Rig::new() else { return };
    std::fs::create_dir(rig.path("open")).unwrap();
    for name in ["open/file", "closed"] {
        std::fs::write(rig.path(name), name).unwrap();
    }
    let (open, file, closed) = (rig.path("open"), rig.path("open/file"), rig.path("closed"));
    let around = format!("{}/../closed", open.display());
    let settings = [("allowed-impure-host-deps", open.to_str().unwrap())];
    let draft = |name: &str, wanted: &str| {
        let script = format!("$b cat {}; echo; $b ls {}; echo > $out", file.display(), rig.path("").display());
        rig.derivation(name, &script).env("__impureHostDeps", wanted)
    };
    let wanted = format!("{} {}/none", file.display(), open.display());
    let (_, log) = rig.succeed(&draft("open", &wanted), &settings).await;
    assert_eq!(log.lines(), ["open/file", "open", "store"]);
    for (i, wanted) in [closed.to_str().unwrap(), &around, "closed", "/"].into_iter().enumerate() {
        let draft = draft(&format!("closed{i}"), wanted);
        let (result, _) = rig.fail(&draft, &settings).await;
        let (drv, dir) = (rig.add(&draft), rig.store.store_dir());
        let reason = format!("requested impure path '{wanted}', but it was not in allowed-impure-host-deps");
        assert_eq!(result.error, format!("derivation '{}' {reason}", dir.display(&drv)));
    }
}
