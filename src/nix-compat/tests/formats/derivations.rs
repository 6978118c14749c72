//! Derivations against files of stock Nix's.

use std::collections::{BTreeMap, BTreeSet};

use nix_compat::content_address::{ContentAddress, Method};
use nix_compat::derivation::{
    BasicDerivation, Derivation, Error, HashModulo, InputOutputs, Output, OutputName, output_placeholder,
    upstream_placeholder,
};
use nix_compat::hash::{Algorithm, Hash};
use nix_compat::store_path::{StoreDir, StorePath, text_path};
use proptest::collection::{btree_map, btree_set, vec};
use proptest::prelude::*;

/// A store that holds nothing but the derivations in `data`.
struct Golden {
    dir: StoreDir,
    files: BTreeMap<StorePath, Vec<u8>>,
}

impl Golden {
    fn load() -> Self {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/derivations");
        let file = |entry: std::fs::DirEntry| {
            (entry.file_name().to_str().unwrap().parse().unwrap(), std::fs::read(entry.path()).unwrap())
        };
        let files: BTreeMap<_, _> = std::fs::read_dir(folder).unwrap().map(|entry| file(entry.unwrap())).collect();
        assert_eq!(files.len(), 11);
        Self { dir: StoreDir::default(), files }
    }

    fn path(&self, name: &str) -> StorePath {
        let is_it = |path: &&StorePath| path.name().strip_suffix(".drv") == Some(name);
        self.files.keys().find(is_it).unwrap().clone()
    }

    fn parse(&self, path: &StorePath) -> Derivation {
        Derivation::parse(&self.dir, path.name().strip_suffix(".drv").unwrap(), &self.files[path]).unwrap()
    }

    fn named(&self, name: &str) -> Derivation {
        self.parse(&self.path(name))
    }

    fn modulo(&self, path: &StorePath) -> HashModulo {
        self.parse(path).hash_modulo(&self.dir, &mut |input| Some(self.modulo(input))).unwrap()
    }

    fn verify(&self, derivation: &Derivation) -> Result<(), Error> {
        let path = self.path(&derivation.basic.name);
        derivation.verify_outputs(&self.dir, &path, &mut |input| Some(self.modulo(input)))
    }
}

fn out() -> OutputName {
    OutputName::default()
}

fn name(text: &str) -> OutputName {
    OutputName::new(text).unwrap()
}

#[test]
fn files_are_written_as_they_were_read() {
    let golden = Golden::load();
    for (path, contents) in &golden.files {
        assert_eq!(golden.parse(path).to_aterm(&golden.dir), *contents, "{path}");
    }
}

#[test]
fn files_have_the_paths_computed() {
    let golden = Golden::load();
    for (path, contents) in &golden.files {
        let references = golden.parse(path).references();
        assert_eq!(text_path(&golden.dir, path.name(), contents, &references).as_ref(), Ok(path));
    }
}

#[test]
fn outputs_have_the_paths_computed() {
    let golden = Golden::load();
    for path in golden.files.keys() {
        let derivation = golden.parse(path);
        assert_eq!(golden.verify(&derivation), Ok(()), "{path}");
        let mut filled = derivation.clone();
        for (output, kind) in &mut filled.basic.outputs {
            if let Output::InputAddressed(_) = kind {
                *kind = Output::Deferred;
                filled.basic.env.remove(output.as_str().as_bytes());
            }
        }
        filled.fill_outputs(&golden.dir, &mut |input| Some(golden.modulo(input))).unwrap();
        assert_eq!(filled, derivation);
    }
}

#[test]
fn kinds_of_outputs() {
    let golden = Golden::load();
    let lib = golden.named("lib-1.0");
    assert_eq!(lib.basic.outputs.len(), 3);
    assert!(lib.basic.outputs.values().all(|output| matches!(output, Output::InputAddressed(_))));
    assert_eq!(lib.basic.args[2], b"tab\there \"quoted\" back\\slash\r\n");
    let (_, ca) = golden.named("old").basic.fixed_output().map(|(path, ca)| (path.clone(), ca.clone())).unwrap();
    assert_eq!((ca.method, ca.hash.algorithm()), (Method::Nar, Algorithm::Sha1));
    let floating = golden.named("floating");
    let kind = Output::Floating { method: Method::Nar, algo: Algorithm::Sha256 };
    assert!(floating.basic.outputs.values().all(|output| *output == kind));
    assert!(floating.basic.is_content_addressed() && !lib.basic.is_content_addressed());
    assert_eq!(golden.named("deferred").basic.outputs[&out()], Output::Deferred);
    assert!(matches!(golden.named("impure").basic.outputs[&out()], Output::Impure { .. }));
    assert!(golden.named("attrs").basic.structured_attrs().is_some_and(|json| json.starts_with(b"{\"builder\"")));
    assert!(golden.named("tree").basic.is_builtin() && !lib.basic.is_builtin());
}

#[test]
fn how_a_file_is_fetched_does_not_matter() {
    let golden = Golden::load();
    let fetches: Vec<_> = golden.files.keys().filter(|path| path.name() == "hello.txt.drv").collect();
    let [one, two] = fetches[..] else { panic!("two derivations fetch the same file") };
    assert_ne!(golden.parse(one), golden.parse(two));
    assert_eq!(golden.modulo(one), golden.modulo(two));
    assert!(matches!(golden.modulo(one), HashModulo::Fixed(hashes) if hashes.len() == 1));
    // Replacing one by the other downstream changes the derivation, not its outputs.
    let mut lib = golden.named("lib-1.0");
    let (other, wanted) = lib.input_drvs.pop_first().unwrap();
    lib.input_drvs.insert(if other == *one { two.clone() } else { one.clone() }, wanted);
    assert_eq!(golden.verify(&lib), Ok(()));
}

#[test]
fn what_is_not_known_is_deferred_or_an_error() {
    let golden = Golden::load();
    for floating in ["floating", "deferred", "impure"] {
        assert!(matches!(golden.modulo(&golden.path(floating)), HashModulo::Deferred(_)), "{floating}");
    }
    let lib = golden.named("lib-1.0");
    let input = lib.input_drvs.keys().next().unwrap().clone();
    assert_eq!(lib.hash_modulo(&golden.dir, &mut |_| None), Err(Error::UnknownInput(input.clone())));
    let nothing = HashModulo::Fixed(BTreeMap::new());
    let unknown = Err(Error::UnknownOutput { input, output: out() });
    assert_eq!(lib.hash_modulo(&golden.dir, &mut |_| Some(nothing.clone())), unknown);
    let deferred = &mut |_: &StorePath| Some(HashModulo::Deferred([7; 32]));
    let stated = lib.verify_outputs(&golden.dir, &golden.path("lib-1.0"), deferred);
    assert!(matches!(stated, Err(Error::PathNotKnown { .. })));
}

#[test]
fn inputs_are_resolved() {
    let golden = Golden::load();
    let deferred = golden.named("deferred");
    let path: StorePath = "m6wswa7yn6x5gi6gdq7x1fqlwmlhfja9-made".parse().unwrap();
    assert!(deferred.needs_resolving(&mut |_, _| true));
    assert!(matches!(deferred.resolve(&golden.dir, &mut |_, _| None), Err(Error::UnresolvedInput { .. })));
    let resolved = deferred.resolve(&golden.dir, &mut |_, _| Some(path.clone())).unwrap();
    assert!(resolved.input_srcs.contains(&path));
    // Its own path is that of an ordinary derivation with that source.
    assert!(matches!(resolved.outputs[&out()], Output::InputAddressed(_)));
    let resolved = Derivation::from(resolved);
    let text = resolved.to_aterm(&golden.dir);
    for (input, wanted) in &deferred.input_drvs {
        for output in &wanted.outputs {
            let placeholder = upstream_placeholder(input, output);
            assert!(!text.windows(placeholder.len()).any(|window| window == placeholder.as_bytes()));
        }
    }
    assert_eq!(resolved.verify_outputs(&golden.dir, &golden.path("deferred"), &mut |_| None), Ok(()));
    // One with known paths all around stays what it is.
    assert!(!golden.named("lib-1.0").needs_resolving(&mut |_, _| true));
    assert!(golden.named("lib-1.0").needs_resolving(&mut |_, _| false));
}

#[test]
fn wrong_outputs_are_refused() {
    let golden = Golden::load();
    let stray: StorePath = "m6wswa7yn6x5gi6gdq7x1fqlwmlhfja9-lib-1.0".parse().unwrap();
    let lib = golden.named("lib-1.0");

    let mut wrong = lib.clone();
    wrong.basic.outputs.insert(out(), Output::InputAddressed(stray.clone()));
    assert!(matches!(golden.verify(&wrong), Err(Error::WrongOutputPath { output, .. }) if output == out()));

    let mut wrong = lib.clone();
    wrong.basic.args.push(b"more".to_vec());
    assert!(matches!(golden.verify(&wrong), Err(Error::WrongOutputPath { .. })));

    let mut wrong = lib.clone();
    wrong.basic.env.insert(b"dev".to_vec(), golden.dir.display(&stray).into_bytes());
    assert!(matches!(golden.verify(&wrong), Err(Error::WrongOutputVariable { output, .. }) if output == name("dev")));

    let mut wrong = lib.clone();
    wrong.basic.env.remove(b"doc".as_slice());
    // The path still follows from the derivation, as if it had the variable blank: so it does not follow.
    assert!(matches!(golden.verify(&wrong), Err(Error::WrongOutputPath { .. })));

    let mut wrong = golden.named("old");
    let Some(Output::Fixed { path, .. }) = wrong.basic.outputs.get_mut("out") else { panic!("fixed") };
    *path = stray.clone();
    assert!(matches!(golden.verify(&wrong), Err(Error::WrongOutputPath { .. })));

    let mut wrong = golden.named("old");
    wrong.basic.env.remove(b"out".as_slice());
    assert!(matches!(golden.verify(&wrong), Err(Error::MissingOutputVariable { .. })));

    let mut mixed = golden.named("old");
    mixed.basic.outputs.insert(name("dev"), Output::Deferred);
    assert!(matches!(golden.verify(&mixed), Err(Error::MixedOutputs(_))));

    let elsewhere = lib.verify_outputs(&golden.dir, &stray, &mut |input| Some(golden.modulo(input)));
    assert_eq!(elsewhere, Err(Error::NotADerivation(stray)));
}

#[test]
fn placeholders_are_those_of_stock_nix() {
    let golden = Golden::load();
    let env = golden.named("placeholders").basic.env;
    let (dev, floating) = (name("dev"), golden.path("floating"));
    assert_eq!(env[b"own".as_slice()], output_placeholder(&dev).into_bytes());
    assert_eq!(env[b"up".as_slice()], upstream_placeholder(&floating, &dev).into_bytes());
    let env = golden.named("deferred").basic.env;
    assert_eq!(env[b"floating".as_slice()], upstream_placeholder(&floating, &out()).into_bytes());
}

fn parse(text: &str) -> Result<Derivation, Error> {
    Derivation::parse(&StoreDir::default(), "x", text.as_bytes())
}

#[test]
fn what_is_refused() {
    const DRV: &str = "/nix/store/m6wswa7yn6x5gi6gdq7x1fqlwmlhfja9-y.drv";
    let with = |outputs: &str, inputs: &str, sources: &str, env: &str| {
        parse(&format!(r#"Derive([{outputs}],[{inputs}],[{sources}],"s","b",[],[{env}])"#))
    };
    let output = r#"("out","","","")"#;
    let input = format!(r#"("{DRV}",["out"])"#);
    assert!(with(output, &input, &format!("{DRV:?}"), r#"("a","b")"#).is_ok());

    assert_eq!(with("", "", "", ""), Err(Error::NoOutputs("x".into())));
    for outputs in [
        r#"("out","","","aa")"#,
        r#"("out","","sha256","zz")"#,
        r#"("out","","sha256","b94d27b9934d3e08a52e52d7da7dabfac484efe37a5380ee9088f7ace2efcde9")"#,
        r#"("out","/nix/store/m6wswa7yn6x5gi6gdq7x1fqlwmlhfja9-x","sha256","")"#,
        r#"("out","/nix/store/m6wswa7yn6x5gi6gdq7x1fqlwmlhfja9-x","sha256","impure")"#,
        r#"("out","/nix/store//m6wswa7yn6x5gi6gdq7x1fqlwmlhfja9-x","","")"#,
        r#"("out","/m6wswa7yn6x5gi6gdq7x1fqlwmlhfja9-x","","")"#,
        r#"("out","","r:md4","")"#,
        r#"("a/b","","","")"#,
        r#"("","","","")"#,
    ] {
        assert!(with(outputs, "", "", "").is_err(), "{outputs}");
    }
    for inputs in [format!(r#"("{DRV}",[])"#), format!("{input},{input}"), input.replace(".drv", ""), DRV.to_owned()] {
        assert!(with(output, &inputs, "", "").is_err(), "{inputs}");
    }
    for env in [r#"("b",""),("a","")"#, r#"("a",""),("a","")"#, r#"("a")"#, r#"("a","","")"#] {
        assert!(with(output, "", "", env).is_err(), "{env}");
    }
    assert!(matches!(with(output, "", &format!("{DRV:?},{DRV:?}"), ""), Err(Error::Order { .. })));
    for text in ["", "Derive", "Derive(", "Derive([])", r#"Derive([("out","","","")],[],[],"s","b",[],[]) "#] {
        assert!(matches!(parse(text), Err(Error::Syntax { .. } | Error::NoOutputs(_))), "{text}");
    }
    let versioned = |version: &str, inputs: &str| {
        parse(&format!(r#"DrvWithVersion("{version}",[{output}],[{inputs}],[],"s","b",[],[])"#))
    };
    let dynamic = format!(r#"("{DRV}",([],[("out",["out"])]))"#);
    assert!(versioned("xp-dyn-drv", &dynamic).is_ok());
    assert!(matches!(versioned("xp-dyn-drv", &input), Err(Error::Syntax { .. })));
    assert!(matches!(with(output, &dynamic, "", ""), Err(Error::Syntax { .. })));
    let deep = (0..50).fold(r#"["out"]"#.to_owned(), |inner, _| format!(r#"([],[("out",{inner})])"#));
    assert!(matches!(versioned("xp-dyn-drv", &format!(r#"("{DRV}",{deep})"#)), Err(Error::Syntax { .. })));
    assert_eq!(
        versioned("xp-other", &dynamic),
        Err(Error::UnsupportedVersion { name: "x".into(), version: "xp-other".into() })
    );
}

#[test]
fn every_beginning_of_a_file_is_an_error() {
    let golden = Golden::load();
    for contents in golden.files.values() {
        for len in 0..contents.len() {
            assert!(Derivation::parse(&golden.dir, "x", &contents[..len]).is_err());
        }
    }
}

fn store_path(suffix: &'static str) -> impl Strategy<Value = StorePath> {
    (any::<[u8; 20]>(), "[a-z]{1,4}")
        .prop_map(move |(digest, name)| StorePath::from_parts(digest, &format!("{name}{suffix}")).unwrap())
}

fn output_name() -> impl Strategy<Value = OutputName> {
    "out|[a-z]{1,3}".prop_map(|text| OutputName::new(&text).unwrap())
}

fn output() -> impl Strategy<Value = Output> {
    let method = || prop_oneof![Just(Method::Text), Just(Method::Flat), Just(Method::Nar)];
    let algo = || prop_oneof![Just(Algorithm::Md5), Just(Algorithm::Sha1), Just(Algorithm::Sha256)];
    prop_oneof![
        Just(Output::Deferred),
        store_path("").prop_map(Output::InputAddressed),
        (method(), algo()).prop_map(|(method, algo)| Output::Floating { method, algo }),
        (method(), algo()).prop_map(|(method, algo)| Output::Impure { method, algo }),
        (store_path(""), method(), algo()).prop_map(|(path, method, algo)| {
            let ca = ContentAddress { method, hash: Hash::of(algo, path.base_name().as_bytes()) };
            Output::Fixed { path, ca }
        }),
    ]
}

fn derivation() -> impl Strategy<Value = Derivation> {
    let bytes = || vec(any::<u8>(), 0..12);
    let outputs = || btree_set(output_name(), 1..3).prop_map(InputOutputs::from);
    let nested = (outputs(), btree_map(output_name(), outputs(), 1..3));
    let wanted = prop_oneof![
        3 => outputs(),
        1 => nested.prop_map(|(outputs, dynamic)| InputOutputs { dynamic, ..outputs }),
    ];
    let drv_inputs = btree_map(store_path(".drv"), wanted, 0..4);
    let fields = (
        btree_map(output_name(), output(), 1..4),
        drv_inputs,
        btree_set(store_path(""), 0..4),
        (bytes(), bytes()),
        vec(bytes(), 0..4),
        btree_map(bytes(), bytes(), 0..4),
    );
    fields.prop_map(|(outputs, input_drvs, input_srcs, (platform, builder), args, env)| Derivation {
        basic: BasicDerivation { name: "x".into(), outputs, input_srcs, platform, builder, args, env },
        input_drvs,
    })
}

proptest! {
    #[test]
    fn reads_what_it_writes(derivation in derivation()) {
        let dir = StoreDir::new("/gnu/store").unwrap();
        let aterm = derivation.to_aterm(&dir);
        prop_assert_eq!(Derivation::parse(&dir, "x", &aterm), Ok(derivation));
    }

    #[test]
    fn damaged_files_do_not_panic(at: prop::sample::Index, byte: u8, file: prop::sample::Index) {
        let golden = Golden::load();
        let mut contents = file.get(&golden.files.values().collect::<Vec<_>>()).to_vec();
        *at.get_mut(&mut contents) = byte;
        if let Ok(derivation) = Derivation::parse(&golden.dir, "x", &contents) {
            let again = derivation.to_aterm(&golden.dir);
            prop_assert_eq!(Derivation::parse(&golden.dir, "x", &again), Ok(derivation));
        }
    }

    #[test]
    fn filled_outputs_verify(mut derivation in derivation()) {
        let dir = StoreDir::default();
        let mut input = |_: &StorePath| Some(HashModulo::Regular([7; 32]));
        for output in derivation.basic.outputs.values_mut() {
            *output = Output::Deferred;
        }
        derivation.fill_outputs(&dir, &mut input).unwrap();
        let path = StorePath::from_parts([0; 20], "x.drv").unwrap();
        prop_assert_eq!(derivation.verify_outputs(&dir, &path, &mut input), Ok(()));
        let paths: BTreeSet<_> = derivation.basic.outputs.values().filter_map(Output::path).collect();
        prop_assert_eq!(paths.len(), derivation.basic.outputs.len());
    }
}
