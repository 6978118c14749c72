//! The builders that are part of Nix.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use nix_compat::store_path::StorePath;
use nix_compat::worker::BuildStatus;

use crate::rig::{Draft, Rig};

/// A package made by a script, which finds its name in `$name`.
async fn package(rig: &Rig, name: &str, script: &str) -> StorePath {
    let script = format!("$b mkdir -p $out/bin $out/share; echo $name > $out/bin/$name; {script}");
    rig.succeed(&rig.derivation(name, &script), &[]).await.0
}

/// A profile of packages with their priorities.
fn profile(rig: &Rig, packages: &[(&str, i64, &StorePath)]) -> Draft {
    let mut draft = rig.builtin("buildenv", "profile").env("manifest", "/the/manifest");
    let mut words = Vec::new();
    for (active, priority, drv) in packages {
        words.push(format!("{active} {priority} 1 {}", rig.store.store_dir().display(&rig.output(drv, "out"))));
        draft = draft.needs(rig, "unused", drv);
    }
    draft.env("derivations", &words.join(" "))
}

/// Everything below a directory: what links point to, `/` for directories. Nothing in a profile is a file.
fn tree(root: &Path) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(root.join(&dir)).unwrap() {
            let path = dir.join(entry.unwrap().file_name());
            let text = match std::fs::read_link(root.join(&path)) {
                Ok(target) => target.to_str().unwrap().to_owned(),
                Err(_) => {
                    todo.push(path.clone());
                    "/".into()
                }
            };
            all.insert(path.to_str().unwrap().to_owned(), text);
        }
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn a_profile_links_what_its_packages_have() {
    let Some(rig) = Rig::new() else { return };
    let path = |drv: &StorePath| rig.store.store_dir().display(&rig.output(drv, "out"));
    let late = package(&rig, "late", "echo > $out/share/late").await;
    let third = rig.derivation(
        "third",
        "$b mkdir -p $out/nix-support $out/bin; echo third > $out/bin/first; echo > $out/bin/third; \
         echo $late > $out/nix-support/propagated-user-env-packages",
    );
    let third = rig.succeed(&third.needs(&rig, "late", &late), &[]).await.0;
    let first =
        package(&rig, "first", "$b mkdir $out/log $out/share/info; echo > $out/share/info/dir; echo > $out/.x").await;
    let second =
        package(&rig, "second", "$b mkdir -p $out/share/doc $out/share/info $out/etc/x; ln -s /no $out/lost").await;
    let off = package(&rig, "off", "").await;

    for sandbox in ["true", "false"] {
        let draft =
            profile(&rig, &[("true", 6, &third), ("true", 5, &first), ("true", 5, &second), ("false", 1, &off)])
                .env("sandbox", sandbox);
        let (drv, log) = rig.succeed(&draft, &[("sandbox", sandbox), ("max-jobs", "0")]).await;
        let out = rig.output(&drv, "out");
        let [first, second, third, late] = [&first, &second, &third, &late].map(path);
        let expected = [
            ("bin", "/".into()),
            ("bin/first", format!("{first}/bin/first")),
            ("bin/late", format!("{late}/bin/late")),
            ("bin/second", format!("{second}/bin/second")),
            ("bin/third", format!("{third}/bin/third")),
            ("etc", format!("{second}/etc")),
            ("manifest.nix", "/the/manifest".into()),
            ("share", "/".into()),
            ("share/doc", format!("{second}/share/doc")),
            ("share/info", "/".into()),
            ("share/late", format!("{late}/share/late")),
        ];
        let expected = expected.map(|(name, target)| (name.to_owned(), target)).into();
        assert_eq!(tree(Path::new(&rig.store.store_dir().display(&out))), expected);
        let info = rig.store.path_info(&out).unwrap().unwrap();
        assert_eq!(info.references.len(), 4);
        let warning = format!("warning: skipping dangling symlink '{}/lost'", rig.store.store_dir().display(&out));
        assert_eq!(log.lines(), [warning]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn packages_that_do_not_go_together() {
    let Some(rig) = Rig::new() else { return };
    let path = |drv: &StorePath| rig.store.store_dir().display(&rig.output(drv, "out"));
    let one = package(&rig, "one", "echo > $out/bin/both").await;
    let two = package(&rig, "two", "echo > $out/bin/both").await;
    let (result, log) = rig.fail(&profile(&rig, &[("true", 5, &one), ("true", 5, &two)]), &[]).await;
    assert_eq!(result.status, BuildStatus::PermanentFailure);
    assert!(result.error.contains("builder failed with exit code 1."), "{}", result.error);
    let mut files = [&one, &two].map(|drv| format!("         \"{}/bin/both\"", path(drv)));
    files.sort();
    let expected = [
        "error: Unable to build profile. There is a conflict for the following files:",
        "       ",
        &files[0],
        &files[1],
    ];
    assert_eq!(log.lines(), expected);
    rig.succeed(&profile(&rig, &[("true", 5, &one), ("true", 6, &two)]), &[]).await;

    let flat = rig.succeed(&rig.derivation("flat", "$b mkdir $out; echo > $out/bin"), &[]).await.0;
    let (_, log) = rig.fail(&profile(&rig, &[("true", 5, &flat), ("true", 6, &one)]), &[]).await;
    let expected = format!("error: collision between \"{}/bin\" and non-directory \"{}/bin\"", path(&one), path(&flat));
    assert_eq!(log.lines(), [expected]);
    let (_, log) = rig.fail(&profile(&rig, &[("true", 4, &one), ("true", 5, &two), ("true", 6, &flat)]), &[]).await;
    let start = format!("error: collision between non-directory '{}/bin' and directory '", path(&flat));
    assert!(log.lines()[0].starts_with(&start), "{:?}", log.lines());

    let file = rig.succeed(&rig.derivation("file", "echo > $out"), &[]).await.0;
    let (_, log) = rig.succeed(&profile(&rig, &[("true", 5, &file)]), &[]).await;
    let expected =
        format!("warning: not including \"{}\" in the user environment because it's not a directory", path(&file));
    assert_eq!(log.lines(), [expected]);
}

#[tokio::test(flavor = "multi_thread")]
async fn profiles_that_make_no_sense() {
    let Some(rig) = Rig::new() else { return };
    for (derivations, error) in [
        (Some("true five 1 /x"), "error: attribute 'derivations' has 'five' where a priority should be"),
        (Some("true 5 2 /"), "error: attribute 'derivations' has '' where the path of an output should be"),
        (
            Some("true 5 1 /no/such"),
            "error: cannot read the directory \"/no/such\": No such file or directory (os error 2)",
        ),
        (None, "error: attribute 'derivations' missing"),
    ] {
        let mut draft = rig.builtin("buildenv", "bad");
        if let Some(derivations) = derivations {
            draft = draft.env("derivations", derivations);
        }
        let (_, log) = rig.fail(&draft, &[]).await;
        assert_eq!(log.lines(), [error]);
    }
    let (_, log) = rig.fail(&rig.builtin("buildenv", "bad").env("derivations", ""), &[]).await;
    assert_eq!(log.lines(), ["error: attribute 'manifest' missing"]);

    let json = r#"{"name":"json","manifest":"/m","derivations":["true",5,1,"/proc/self"]}"#;
    let (drv, _) = rig.succeed(&rig.builtin("buildenv", "json").env("__json", json), &[]).await;
    assert!(tree(Path::new(&rig.store.store_dir().display(&rig.output(&drv, "out")))).contains_key("manifest.nix"));

    let (result, _) = rig.fail(&rig.builtin("nothing", "unknown"), &[]).await;
    assert_eq!(result.status, BuildStatus::InputRejected);
    assert!(result.error.contains("Reason: unsupported builtin builder 'builtin:nothing'"), "{}", result.error);
}
