//! What builds make.

use std::io::Read;

use nix_compat::content_address::{ContentAddress, Method};
use nix_compat::derivation::{Output, OutputName};
use nix_compat::hash::{Algorithm, Hash};
use nix_compat::worker::{BuildMode, BuildStatus};

use crate::rig::Rig;

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_is_built_once_and_registered_with_its_references() {
    let Some(rig) = Rig::new() else { return };
    let first = rig.add(&rig.derivation("first", "echo one; echo first > $out"));
    let second = rig.derivation("second", "echo two; read x < $dep; echo \"$x then second in $dep\" > $out");
    let second = rig.add(&second.needs(&rig, "dep", &first));
    let third = rig.derivation("third", "read x < $dep; $b mkdir $out; echo \"$x then third\" > $out/text");
    let (drv, log) = rig.succeed(&third.needs(&rig, "dep", &second), &[]).await;

    let path = |drv| rig.output(drv, "out");
    let text = rig.store.store_dir().display(&path(&first));
    assert_eq!(rig.read(&path(&second)), format!("first then second in {text}\n"));
    let info = rig.store.path_info(&path(&second)).unwrap().unwrap();
    assert_eq!(info.references, [path(&first)].into());
    assert_eq!(info.deriver, Some(second.clone()));
    assert!(info.ultimate);
    assert_eq!(log.lines(), ["one", "two"]);
    assert_eq!(log.builds().len(), 3);
    assert!(log.builds()[0].starts_with("building '") && log.builds()[0].ends_with("-first.drv'"));

    let (results, log) = rig.build(&[&drv], &[]).await;
    assert_eq!(results[0].status, BuildStatus::AlreadyValid);
    assert_eq!(results[0].built_outputs[&OutputName::default()].path, path(&drv));
    assert!(log.builds().is_empty());
    // Nothing of the builds is left.
    assert_eq!(std::fs::read_dir(rig.path("state/castored/builds")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn several_outputs_and_all_kinds_of_files() {
    let Some(rig) = Rig::new() else { return };
    let draft = rig
        .derivation(
            "kinds",
            "$b mkdir -p $out/dir/empty; echo $dev > $out/dir/dev; echo x > $out/prog; $b chmod 0711 $out/prog; \
             $b ln -s dir/dev $out/link; $b ln $out/prog $out/again; $b chmod 000 $out/dir/dev; echo x > $dev; \
             echo \"$fooPath\"; $b cat $fooPath; echo; $b id -u",
        )
        .output("dev")
        .env("foo", "from a file")
        .env("passAsFile", "foo");
    let (drv, log) = rig.succeed(&draft, &[]).await;
    let (out, dev) = (rig.output(&drv, "out"), rig.output(&drv, "dev"));
    assert_eq!(rig.store.path_info(&out).unwrap().unwrap().references, [dev.clone()].into());
    assert!(rig.store.path_info(&dev).unwrap().unwrap().references.is_empty());
    let root = rig.store.store_dir().display(&out);
    let mode = |name: &str| {
        let meta = std::fs::symlink_metadata(format!("{root}/{name}")).unwrap();
        std::os::unix::fs::PermissionsExt::mode(&meta.permissions()) & 0o777
    };
    assert_eq!((mode("prog"), mode("again"), mode("dir/dev")), (0o555, 0o555, 0o444));
    assert_eq!(std::fs::read_link(format!("{root}/link")).unwrap().to_str(), Some("dir/dev"));
    let lines = log.lines();
    assert!(lines[0].starts_with("/build/.attr-"), "{lines:?}");
    assert_eq!(lines[1..], ["from a file", "1000"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn fixed_outputs_are_held_to_their_hash() {
    let Some(rig) = Rig::new() else { return };
    let draft = |method, hash: &[u8]| {
        let mut draft = rig.derivation("fixed", "echo $NIX_OUTPUT_CHECKED; echo -n hello > $out");
        let hash = Hash::of(Algorithm::Sha256, hash);
        let path = nix_compat::store_path::fixed_output_path(rig.store.store_dir(), "fixed", method, &hash).unwrap();
        let ca = ContentAddress { method, hash };
        draft.outputs.insert(OutputName::default(), Output::Fixed { path, ca });
        draft
    };
    let (drv, log) = rig.succeed(&draft(Method::Flat, b"hello"), &[]).await;
    assert_eq!(log.lines(), ["1"]);
    let info = rig.store.path_info(&rig.output(&drv, "out")).unwrap().unwrap();
    assert!(info.is_content_addressed(rig.store.store_dir()));

    for method in [Method::Flat, Method::Nar] {
        let (result, _) = rig.fail(&draft(method, b"other"), &[]).await;
        assert_eq!(result.status, BuildStatus::OutputRejected);
        assert!(result.error.starts_with("hash mismatch in fixed-output derivation '"), "{}", result.error);
        assert_eq!(build::exit_status(&result), 102);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn checking_finds_what_differs() {
    let Some(rig) = Rig::new() else { return };
    let (same, _) = rig.succeed(&rig.derivation("same", "echo same > $out"), &[]).await;
    let (results, log) = rig.build_mode(&[&same], &[], BuildMode::Check).await;
    assert_eq!(results[0].status, BuildStatus::Built);
    assert!(log.builds()[0].starts_with("checking outputs of '"));

    let (other, _) =
        rig.succeed(&rig.derivation("other", "read x < /proc/sys/kernel/random/uuid; echo $x > $out"), &[]).await;
    let before = rig.read(&rig.output(&other, "out"));
    for sandbox in ["true", "false"] {
        let (results, _) = rig.build_mode(&[&same], &[("sandbox", sandbox)], BuildMode::Check).await;
        assert_eq!(results[0].status, BuildStatus::Built, "{}", results[0].error);
    }
    let (results, _) = rig.build_mode(&[&other], &[], BuildMode::Check).await;
    assert_eq!(results[0].status, BuildStatus::NotDeterministic);
    assert!(results[0].error.contains("may not be deterministic: output \""), "{}", results[0].error);
    assert_eq!(rig.read(&rig.output(&other, "out")), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_sandbox_too() {
    let Some(rig) = Rig::new() else { return };
    let first = rig.add(&rig.derivation("first", "echo first > $out"));
    let draft = rig
        .derivation("plain", "read x < $dep; echo \"$x $TMPDIR\"; echo y > $TMPDIR/file; echo $dep > $out")
        .needs(&rig, "dep", &first);
    let (drv, log) = rig.succeed(&draft, &[("sandbox", "false")]).await;
    let line = log.lines()[0].clone();
    assert!(line.starts_with(&format!("first {}", rig.path("state/castored/builds").display())), "{line}");
    let info = rig.store.path_info(&rig.output(&drv, "out")).unwrap().unwrap();
    assert_eq!(info.references, [rig.output(&first, "out")].into());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_is_kept_compressed() {
    let Some(rig) = Rig::new() else { return };
    let draft = rig.derivation(
        "log",
        "echo '@nix { \"action\": \"setPhase\", \"phase\": \"shouting\" }'; echo hello; echo > $out",
    );
    let (drv, log) = rig.succeed(&draft, &[]).await;
    assert_eq!(log.lines(), ["hello"]);
    let said = log.messages().iter().any(|message| format!("{message:?}").contains("SetPhase"));
    assert!(said, "no phase: {:?}", log.messages());
    let (directory, rest) = drv.base_name().split_at(2);
    let file = std::fs::File::open(rig.path("log/drvs").join(directory).join(format!("{rest}.bz2"))).unwrap();
    let mut text = String::new();
    bzip2::read::BzDecoder::new(file).read_to_string(&mut text).unwrap();
    assert!(text.ends_with("hello\n"), "{text}");
}
