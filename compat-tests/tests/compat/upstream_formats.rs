//! The pure formats against the data of stock's own unit tests (2.26.3): derivations, narinfos and path infos. What has
//! no type in `nix-compat` is listed with the reason, so that nothing is left out unseen.

use std::collections::{BTreeMap, BTreeSet};

use nix_compat::content_address::{ContentAddress, Method};
use nix_compat::derivation::{Derivation, Error, Output, OutputName};
use nix_compat::hash::{Hash, NarHash};
use nix_compat::narinfo::{Compression, NarInfo};
use nix_compat::path_info::PathInfo;
use nix_compat::signature::Signature;
use nix_compat::store_path::{StoreDir, StorePath, content_address_path, text_path};
use serde_json::{Value, json};

use crate::unit_data;

/// Directories with a test of their own, and the others with the reason why they have none.
const DIRECTORIES: [(&str, &str); 8] = [
    ("common-protocol", "tested: the files are those of worker-protocol"),
    ("derivation", "tested"),
    ("machines", "not ours: lists of remote builders, which nothing here uses"),
    ("nar-info", "tested"),
    ("path-info", "tested"),
    ("serve-protocol", "not ours: nix-store --serve is stock's client in front of the worker protocol"),
    ("store-reference", "not ours: store URLs are for clients"),
    ("worker-protocol", "tested: upstream_vectors"),
];

#[test]
fn every_directory_of_unit_data_is_known() {
    let Some(machine) = crate::prepared() else { return };
    let names = std::fs::read_dir(&machine.unit_data).unwrap().map(|entry| entry.unwrap().file_name());
    let names: BTreeSet<String> = names.map(|name| name.into_string().unwrap()).collect();
    let known = DIRECTORIES.map(|(name, _)| name.to_owned());
    assert_eq!(names, known.into());
}

/// What several of stock's protocols share is the same on each of them.
#[test]
fn the_common_protocol_is_the_worker_protocol() {
    let Some(common) = unit_data("common-protocol") else { return };
    let worker = unit_data("worker-protocol").unwrap();
    assert!(!common.is_empty());
    for (name, bytes) in common {
        assert_eq!(worker.get(&name), Some(&bytes), "{name}");
    }
}

/// Derivations, and whether they are there as JSON, too.
const DERIVATIONS: [(&str, bool); 4] = [
    ("advanced-attributes", false),
    ("advanced-attributes-defaults", true),
    ("advanced-attributes-structured-attrs", true),
    ("advanced-attributes-structured-attrs-defaults", true),
];

/// Derivations that cannot be read here, for they have no outputs or are of an unknown version. Their JSON is the same
/// again.
const REFUSED: [&str; 4] = ["bad-old-version-dyn-deps", "bad-version", "dynDerivationDeps", "simple"];

#[test]
fn derivations() {
    let Some(mut files) = unit_data("derivation") else { return };
    let mut take = |name: String| files.remove(&name).unwrap_or_else(|| panic!("there is no {name}"));
    for (name, has_json) in DERIVATIONS {
        let derivation = derivation(name, &take(format!("{name}.drv")));
        if has_json {
            let json: Value = serde_json::from_slice(&take(format!("{name}.json"))).unwrap();
            assert_eq!(as_json(&derivation), json, "{name}");
        }
    }
    for name in REFUSED {
        let text = take(format!("{name}.drv"));
        let error = Derivation::parse(&dir(), name, &text).unwrap_err();
        if name == "dynDerivationDeps" {
            dynamic(&text);
        }
        match name {
            "bad-version" => {
                assert!(matches!(&error, Error::UnsupportedVersion { version, .. } if version == "invalid-version"));
            }
            _ => assert!(matches!(error, Error::NoOutputs(_)), "{error}"),
        }
    }
    for name in ["dynDerivationDeps", "simple"] {
        take(format!("{name}.json"));
    }
    let outputs = ["caFixedFlat", "caFixedNAR", "caFixedText", "caFloating", "deferred", "impure", "inputAddressed"];
    for kind in outputs {
        let json = take(format!("output-{kind}.json"));
        output(kind, &serde_json::from_slice(&json).unwrap());
    }
    assert!(files.is_empty(), "nothing is known of {:?}", files.keys());
}

/// The data's derivation with outputs of outputs has no output itself; given one, it is read and written.
fn dynamic(text: &[u8]) {
    let text = String::from_utf8(text.to_vec()).unwrap();
    let text = text.replacen(r#""xp-dyn-drv",[]"#, r#""xp-dyn-drv",[("out","","","")]"#, 1);
    let derivation = Derivation::parse(&dir(), "dynDerivationDeps", text.as_bytes()).unwrap();
    assert!(derivation.is_dynamic());
    assert_eq!(String::from_utf8(derivation.to_aterm(&dir())).unwrap(), text);
}

fn dir() -> StoreDir {
    StoreDir::default()
}

/// A `.drv` is read and written again, and its output paths are right.
fn derivation(name: &str, text: &[u8]) -> Derivation {
    let derivation = Derivation::parse(&dir(), name, text).unwrap();
    assert_eq!(derivation.to_aterm(&dir()), text, "{name}");
    let path = text_path(&dir(), &format!("{name}.drv"), text, &derivation.references()).unwrap();
    let verified = derivation.verify_outputs(&dir(), &path, &mut |_| None);
    // The inputs of two of them are not in the data.
    match derivation.input_drvs.first_key_value() {
        None => verified.unwrap(),
        Some((input, _)) => assert!(matches!(verified, Err(Error::UnknownInput(unknown)) if unknown == *input)),
    }
    derivation
}

/// The JSON of stock's `nix derivation show`, of derivations whose outputs are not content-addressed.
fn as_json(derivation: &Derivation) -> Value {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let (dir, basic) = (dir(), &derivation.basic);
    let outputs = basic.outputs.iter().map(|(name, output)| {
        let Output::InputAddressed(path) = output else { panic!("{output:?}") };
        (name.to_string(), json!({ "path": dir.display(path) }))
    });
    let inputs = derivation.input_drvs.iter().map(|(path, outputs)| {
        let outputs: Vec<&str> = outputs.outputs.iter().map(OutputName::as_str).collect();
        (dir.display(path), json!({ "dynamicOutputs": {}, "outputs": outputs }))
    });
    json!({
        "args": basic.args.iter().map(|arg| text(arg)).collect::<Vec<_>>(),
        "builder": text(&basic.builder),
        "env": basic.env.iter().map(|(name, value)| (text(name), text(value))).collect::<BTreeMap<_, _>>(),
        "inputDrvs": inputs.collect::<BTreeMap<_, _>>(),
        "inputSrcs": basic.input_srcs.iter().map(|path| dir.display(path)).collect::<Vec<_>>(),
        "name": basic.name,
        "outputs": outputs.collect::<BTreeMap<_, _>>(),
        "system": text(&basic.platform),
    })
}

/// The name that an output's path has in the data.
const OUTPUT: &str = "drv-name-output-name";

/// An output as JSON: put into the three fields of a `.drv`, it is read as the kind it is, and a fixed path follows from
/// the hash.
fn output(kind: &str, json: &Value) {
    let field = |name: &str| json[name].as_str().unwrap_or_default();
    let (method, hash) = match field("method") {
        "" => (None, field("hash")),
        "flat" => (Some(Method::Flat), field("hash")),
        "nar" if json["impure"] == true => (Some(Method::Nar), "impure"),
        "nar" => (Some(Method::Nar), field("hash")),
        "text" => (Some(Method::Text), field("hash")),
        other => panic!("method {other}"),
    };
    let algorithm = method.map(|method| format!("{}{}", method.prefix(), field("hashAlgo"))).unwrap_or_default();
    let output = Output::from_fields(&dir(), field("path"), &algorithm, hash).unwrap();
    assert_eq!(output.to_fields(&dir()), (field("path").to_owned(), algorithm.clone(), hash.to_owned()));
    match (&output, kind) {
        (Output::Fixed { path, ca }, "caFixedFlat" | "caFixedNAR" | "caFixedText") => {
            assert_eq!(Some(ca.method), method);
            assert_eq!(ca.hash.to_base16(), hash);
            assert_eq!(content_address_path(&dir(), OUTPUT, ca, &BTreeSet::new(), false).as_ref(), Ok(path));
        }
        (Output::Floating { .. }, "caFloating") | (Output::Impure { .. }, "impure") => {
            assert_eq!(algorithm, "r:sha256");
        }
        (Output::Deferred, "deferred") => {}
        (Output::InputAddressed(path), "inputAddressed") => assert_eq!(path.name(), OUTPUT),
        _ => panic!("{kind} is read as {output:?}"),
    }
}

/// The path whose info the data has. Not in it: JSON has the path outside.
const PATH: &str = "n5wkd9frr45pa74if5gpz9j7mifg27fh-foo";

/// What stands for signatures in the data, and the signatures that are put there: stock refuses the former since 2.34.
const SIGNATURES: [(&str, &str); 2] = [("asdf", "a:c2ln"), ("qwer", "q:c2ln")];

/// A path info from JSON. *Pure* ones have only what follows from the contents.
fn path_info(json: &Value) -> PathInfo {
    let path = |text: &str| dir().parse(text).unwrap();
    let texts = |name: &str| json[name].as_array().into_iter().flatten().map(|text| text.as_str().unwrap());
    for text in texts("signatures") {
        assert!(SIGNATURES.iter().any(|(known, _)| *known == text) && Signature::parse(text).is_err(), "{text}");
    }
    let count = texts("signatures").count();
    PathInfo {
        path: StorePath::from_base_name(PATH).unwrap(),
        deriver: json["deriver"].as_str().map(path),
        nar_hash: NarHash::parse(json["narHash"].as_str().unwrap()).unwrap(),
        references: texts("references").map(path).collect(),
        registration_time: json["registrationTime"].as_u64().unwrap_or_default(),
        nar_size: json["narSize"].as_u64().unwrap(),
        ultimate: json["ultimate"].as_bool().unwrap_or_default(),
        signatures: SIGNATURES[..count].iter().map(|(_, text)| text.parse().unwrap()).collect(),
        ca: json["ca"].as_str().map(|text| ContentAddress::parse(text).unwrap()),
    }
}

const HASH: &str = "15e3c560894cbb27085cf65b5a2ecb18488c999497f4531b6907a7581ce6d527";

#[test]
fn path_infos() {
    let Some(mut files) = unit_data("path-info") else { return };
    let mut take = |name: &str| path_info(&serde_json::from_slice(&files.remove(name).unwrap()).unwrap());
    for info in [take("empty_impure.json"), take("empty_pure.json")] {
        assert_eq!((info.nar_hash.to_base16().as_str(), info.nar_size), (HASH, 0));
        assert!(info.references.is_empty() && info.signatures.is_empty() && info.ca.is_none());
        assert!(!info.is_content_addressed(&dir()));
    }
    let (pure, impure) = (take("pure.json"), take("impure.json"));
    addressed(&pure);
    addressed(&impure);
    assert_eq!((impure.registration_time, impure.ultimate, impure.signatures.len()), (23_423, true, 2));
    assert_eq!(pure.fingerprint(&dir()), impure.fingerprint(&dir()));
    assert!(files.is_empty(), "nothing is known of {:?}", files.keys());
}

/// The path follows from the content address and the references, of which one is its own.
fn addressed(info: &PathInfo) {
    assert_eq!((info.nar_hash.to_base16().as_str(), info.nar_size), (HASH, 34_878));
    assert!(info.references.contains(PATH) && info.references.len() == 2);
    assert!(info.is_content_addressed(&dir()));
}

#[test]
fn narinfos() {
    let Some(mut files) = unit_data("nar-info") else { return };
    let mut take = |name: &str| serde_json::from_slice::<Value>(&files.remove(name).unwrap()).unwrap();
    addressed(&path_info(&take("pure.json")));
    let json = take("impure.json");
    let info = path_info(&json);
    addressed(&info);
    assert_eq!(json["compression"].as_str().map(str::parse), Some(Ok(Compression::Xz)));

    // A narinfo says neither when its path was registered nor that it is trusted.
    let info = PathInfo { registration_time: 0, ultimate: false, ..info };
    let mut narinfo = NarInfo::new(info, json["url"].as_str().unwrap(), Compression::Xz).unwrap();
    narinfo.file_hash = Some(Hash::parse(json["downloadHash"].as_str().unwrap(), None).unwrap());
    narinfo.file_size = json["downloadSize"].as_u64();
    let text = narinfo.to_text(&dir());
    assert_eq!(NarInfo::parse(&dir(), &text), Ok(narinfo));
    for (field, value) in [
        ("StorePath", "/nix/store/n5wkd9frr45pa74if5gpz9j7mifg27fh-foo"),
        ("URL", "nar/1w1fff338fvdw53sqgamddn1b2xgds473pv6y13gizdbqjv4i5p3.nar.xz"),
        ("FileSize", "4029176"),
        ("NarSize", "34878"),
        ("References", "g1w7hy3qg1w7hy3qg1w7hy3qg1w7hy3q-bar n5wkd9frr45pa74if5gpz9j7mifg27fh-foo"),
        ("Deriver", "g1w7hy3qg1w7hy3qg1w7hy3qg1w7hy3q-bar.drv"),
        ("Sig", "q:c2ln"),
        ("CA", "fixed:r:sha256:1lr187v6dck1rjh2j6svpikcfz53wyl3qrlcbb405zlh13x0khhh"),
    ] {
        assert!(text.lines().any(|line| line == format!("{field}: {value}")), "{field}: {value} is not in\n{text}");
    }
    assert!(files.is_empty(), "nothing is known of {:?}", files.keys());
}
