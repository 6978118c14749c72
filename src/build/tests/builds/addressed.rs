//! Outputs whose paths follow from their contents, and what else is known only when something is built.

use nix_compat::content_address::Method;
use nix_compat::derivation::{Output, OutputName};
use nix_compat::hash::Algorithm;
use nix_compat::realisation::DrvOutput;
use nix_compat::signature::SecretKey;
use nix_compat::store_path::StorePath;
use nix_compat::worker::{BuildMode, BuildResult, BuildStatus, DerivedPath, OutputsSpec};
use store::{NewPath, SignaturePolicy};

use crate::rig::Rig;

const FLOATING: Output = Output::Floating { method: Method::Nar, algo: Algorithm::Sha256 };
const IMPURE: Output = Output::Impure { method: Method::Nar, algo: Algorithm::Sha256 };
const TEXT: Output = Output::Floating { method: Method::Text, algo: Algorithm::Sha256 };
const FEATURES: (&str, &str) = ("experimental-features", "ca-derivations impure-derivations dynamic-derivations");

fn out(result: &BuildResult) -> StorePath {
    result.built_outputs.get("out").unwrap_or_else(|| panic!("{result:?}")).path.clone()
}

async fn build(rig: &Rig, drv: &StorePath, extra: &[(&str, &str)]) -> BuildResult {
    let (mut results, log) = rig.build(&[drv], &[&[FEATURES], extra].concat()).await;
    let result = results.remove(0);
    assert!(result.status.is_success(), "{result:?}\n{:?}", log.lines());
    result
}

/// The contents really have the address under which they are registered.
fn assert_addressed(rig: &Rig, path: &StorePath) {
    let entry = rig.store.entry(path).unwrap().unwrap();
    assert!(entry.info.ca.is_some() && entry.info.is_content_addressed(rig.store.store_dir()));
    rig.store.check_contents(&NewPath { info: entry.info, node: entry.node, pin: None }).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_without_effect_stops_spreading() {
    let Some(rig) = Rig::new() else { return };
    let root = |seed: &str| {
        rig.add(&rig.derivation("root", "echo built; echo same > $out").env("seed", seed).outputs(&FLOATING))
    };
    let user = |name: &str, drv: &StorePath, script: &str| rig.derivation(name, script).needs_unknown("dep", drv);
    let (first, second) = (root("1"), root("2"));
    let chain = |root: &StorePath| {
        let middle = rig.add(&user("middle", root, "read x < $dep; echo $x $dep > $out").outputs(&FLOATING));
        // Of this one the path follows from the derivation, once its inputs' are known.
        (rig.add(&user("end", &middle, "read x < $dep; echo end $x > $out")), middle)
    };
    let ((end, middle), (other_end, other_middle)) = (chain(&first), chain(&second));
    assert_ne!(end, other_end);

    let result = build(&rig, &end, &[]).await;
    assert_eq!(result.status, BuildStatus::Built);
    let path = out(&build(&rig, &middle, &[]).await);
    let made = rig.read(&out(&result));
    assert!(made.starts_with("end same ") && made.contains("-root"), "{made}");
    assert_addressed(&rig, &path);
    // What an output is, is known by the derivation's own name, too.
    let id = DrvOutput::Path { drv: middle.clone(), output: OutputName::default() };
    assert_eq!(rig.store.realisation(&id).unwrap().unwrap().out_path, path);

    // Only the root is built again; without jobs the rest could not be.
    assert_eq!(build(&rig, &second, &[]).await.status, BuildStatus::Built);
    let again = build(&rig, &other_end, &[("max-jobs", "0"), ("builders", "")]).await;
    assert_eq!((again.status, out(&again)), (BuildStatus::ResolvesToAlreadyValid, out(&result)));
    assert_eq!(out(&build(&rig, &other_middle, &[("max-jobs", "0"), ("builders", "")]).await), path);
    assert_eq!(build(&rig, &end, &[]).await.status, BuildStatus::AlreadyValid);
}

#[tokio::test(flavor = "multi_thread")]
async fn outputs_may_mention_themselves_and_each_other_but_not_in_circles() {
    let Some(rig) = Rig::new() else { return };
    let script = "$b mkdir $out; echo $out/here > $out/self; $b ln -s $out/self $out/link; echo $out > $dev; \
                  echo $dev > $doc";
    let drv = rig.add(&rig.derivation("selfish", script).output("dev").output("doc").outputs(&FLOATING));
    let result = build(&rig, &drv, &[]).await;
    let path = |name: &str| result.built_outputs[name].path.clone();
    let display = |path: &StorePath| rig.store.store_dir().display(path);
    let (out, dev, doc) = (path("out"), path("dev"), path("doc"));
    assert_eq!(std::fs::read_to_string(display(&out) + "/link").unwrap(), format!("{}/here\n", display(&out)));
    assert_eq!(rig.read(&dev), display(&out) + "\n");
    assert_eq!(rig.read(&doc), display(&dev) + "\n");
    let references = |path: &StorePath| rig.store.path_info(path).unwrap().unwrap().references;
    assert_eq!(references(&out), [out.clone()].into());
    assert_eq!(references(&dev), [out.clone()].into());
    assert_eq!(references(&doc), [dev.clone()].into());
    [&out, &dev, &doc].into_iter().for_each(|path| assert_addressed(&rig, path));

    // Rebuilt, they are the same.
    let (results, _) = rig.build_mode(&[&drv], &[FEATURES], BuildMode::Check).await;
    assert!(results[0].status.is_success(), "{results:?}");

    for kind in [FLOATING, Output::Deferred] {
        let draft = rig.derivation("circle", "echo $dev > $out; echo $out > $dev").output("dev").outputs(&kind);
        let drv = rig.add(&draft);
        let (results, _) = rig.build(&[&drv], &[FEATURES]).await;
        assert_eq!(results[0].status, BuildStatus::OutputRejected);
        assert!(results[0].error.contains("cycle detected"), "{}", results[0].error);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn impure_ones_are_built_each_time() {
    let Some(rig) = Rig::new() else { return };
    let script = "$b cat /proc/sys/kernel/random/uuid > $out";
    let impure = rig.add(&rig.derivation("impure", script).outputs(&IMPURE));
    let (first, second) = (out(&build(&rig, &impure, &[]).await), out(&build(&rig, &impure, &[]).await));
    assert_ne!(first, second);
    assert_addressed(&rig, &first);

    let copy = "read x < $dep; echo copy $x > $out";
    let follows = rig.add(&rig.derivation("follows", copy).needs_unknown("dep", &impure).outputs(&IMPURE));
    let copied = rig.read(&out(&build(&rig, &follows, &[]).await));
    assert!(copied.starts_with("copy ") && copied.len() > 20, "{copied}");

    let pure = rig.add(&rig.derivation("pure", copy).needs_unknown("dep", &impure).outputs(&FLOATING));
    let (results, _) = rig.build(&[&pure], &[FEATURES]).await;
    assert!(results[0].error.contains("depends on impure derivation"), "{results:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn derivations_are_made_by_derivations() {
    let Some(rig) = Rig::new() else { return };
    let inner = rig.complete(&rig.derivation("inner", "echo inner > $out")).to_aterm(rig.store.store_dir());
    let text = String::from_utf8(inner).unwrap();
    let make = rig.derivation("inner.drv", "$b printf %s \"$text\" > $out").env("text", &text).outputs(&TEXT);
    let make = rig.add(&make);

    let (_, client) = rig.client();
    let dynamic =
        DerivedPath::Dynamic { drv: make.clone(), through: vec![OutputName::default()], outputs: OutputsSpec::All };
    let results = rig.scheduler.realise(vec![dynamic], BuildMode::Normal, rig.settings(&[FEATURES]), client).await;
    let result = &results[0].1;
    assert!(result.status.is_success(), "{result:?}");
    assert_eq!(rig.read(&out(result)), "inner\n");
    assert!(out(&build(&rig, &make, &[]).await).is_derivation());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_experimental_must_be_enabled() {
    let Some(rig) = Rig::new() else { return };
    for (kind, feature) in [(FLOATING, "ca-derivations"), (IMPURE, "impure-derivations")] {
        let drv = rig.add(&rig.derivation("new", "echo x > $out").outputs(&kind));
        let (results, _) = rig.build(&[&drv], &[]).await;
        let expected = format!("experimental Nix feature '{feature}' is disabled");
        assert!(results[0].error.contains(&expected), "{results:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_built_is_signed() {
    let Some(rig) = Rig::new() else { return };
    const SECRET: &str =
        "test:nWGxne/9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2DXWpgBgrEKt9VL/tPJZAc6DuFy89qmIyWvAhpo9wdRGg==";
    let key = SecretKey::parse(SECRET).unwrap();
    let file = rig.path("secret");
    std::fs::write(&file, SECRET).unwrap();
    let setting = ("secret-key-files", file.to_str().unwrap());
    let trusted = [key.public_key()];
    let floating = rig.add(&rig.derivation("floating", "echo x > $out").outputs(&FLOATING));
    let ordinary = rig.add(&rig.derivation("ordinary", "echo x > $out"));
    for drv in [&floating, &ordinary] {
        let path = out(&build(&rig, drv, &[setting]).await);
        let info = rig.store.path_info(&path).unwrap().unwrap();
        assert!(info.is_signed_by(rig.store.store_dir(), &trusted));
    }
    let id = DrvOutput::Path { drv: floating.clone(), output: OutputName::default() };
    let found = rig.store.realisation(&id).unwrap().unwrap();
    let hash = rig.store.output_hash_modulo(&floating, &rig.store.derivation(&floating).unwrap()).unwrap();
    let id = DrvOutput::Modulo { hash: hash.of(&OutputName::default()).unwrap(), output: OutputName::default() };
    let realisation = rig.store.realisation(&id).unwrap().unwrap();
    assert_eq!(realisation.out_path, found.out_path);
    rig.store.register_realisation(&realisation, SignaturePolicy::Require(&trusted)).unwrap();

    std::fs::remove_file(&file).unwrap();
    let unsigned = rig.add(&rig.derivation("unsigned", "echo x > $out"));
    let (results, _) = rig.build(&[&unsigned], &[FEATURES, setting]).await;
    assert!(results[0].error.contains("secret key file"), "{results:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_another_hash_is_kept_under_its_own() {
    let Some(rig) = Rig::new() else { return };
    let fixed = |text| rig.add(&rig.derivation("fixed", "echo right > $out").fixed(&rig, text));
    let (wrong, right) = (fixed("wrong\n"), fixed("right\n"));
    let (promised, made) = (rig.output(&wrong, "out"), rig.output(&right, "out"));
    let (results, _) = rig.build(&[&wrong], &[]).await;
    assert!(results[0].error.contains("hash mismatch"), "{results:?}");
    assert!(!rig.store.is_valid(&promised).unwrap());
    assert_eq!(rig.read(&made), "right\n");
    // With the hash corrected there is nothing to be done.
    assert_eq!(build(&rig, &right, &[("max-jobs", "0")]).await.status, BuildStatus::AlreadyValid);
}

#[tokio::test(flavor = "multi_thread")]
async fn closures_are_exported() {
    let Some(rig) = Rig::new() else { return };
    let first = rig.add(&rig.derivation("first", "echo first > $out"));
    let second = rig.add(&rig.derivation("second", "echo $dep > $out").needs(&rig, "dep", &first));
    let display = |drv| rig.store.store_dir().display(&rig.output(drv, "out"));
    let (one, two) = (display(&first), display(&second));
    let script = "$b cat graph > $out";
    let plain = rig.derivation("plain", script).needs(&rig, "dep", &second);
    let plain = plain.env("exportReferencesGraph", &format!("graph {two}"));
    let mut expected = [format!("{one}\n\n0\n"), format!("{two}\n\n1\n{one}\n")];
    expected.sort();
    assert_eq!(rig.read(&out(&build(&rig, &rig.add(&plain), &[]).await)), expected.concat());

    let json = serde_json::json!({
        "name": "json", "exportReferencesGraph": { "graph": [&two] },
        "builder": "/bin/sh", "system": "x", "dep": &two,
    });
    let script = "/busybox cat /build/.attrs.json > $(/busybox sed -n 's/.*\"out\":\"\\([^\"]*\\)\".*/\\1/p' /build/.attrs.json)";
    let structured = rig.derivation("json", script).needs(&rig, "dep", &second).env("__json", &json.to_string());
    let text = rig.read(&out(&build(&rig, &rig.add(&structured), &[]).await));
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let graph = json["graph"].as_array().unwrap();
    let found = graph.iter().find(|entry| entry["path"] == two.as_str()).unwrap();
    let info = |drv| rig.store.path_info(&rig.output(drv, "out")).unwrap().unwrap();
    assert_eq!(graph.len(), 2);
    assert_eq!(found["references"], serde_json::json!([one]));
    assert_eq!(found["closureSize"], info(&first).nar_size + info(&second).nar_size);
    assert_eq!(found["narHash"], info(&second).nar_hash.to_prefixed_nix32());

    let outside = rig.derivation("outside", "echo > $out").env("exportReferencesGraph", &format!("graph {two}"));
    let (result, _) = rig.fail(&outside, &[]).await;
    assert!(result.error.contains("not in the input closure"), "{}", result.error);
}
