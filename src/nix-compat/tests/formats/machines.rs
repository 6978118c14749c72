//! Lists of machines: what stock's own tests expect of them, stock's texts for what is wrong, and properties.

use std::collections::BTreeSet;

use nix_compat::machines::{Error, MAX_INCLUSIONS, Machine, decode_host_key, parse};
use proptest::prelude::*;

fn words(text: &str) -> BTreeSet<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

fn read(text: &str) -> Result<Vec<Machine>, Error> {
    parse(text, &words("TEST_ARCH-TEST_OS"), &mut |path| panic!("{path} is not to be read"))
}

fn one(text: &str) -> Machine {
    let mut machines = read(text).unwrap();
    assert_eq!(machines.len(), 1);
    machines.remove(0)
}

#[test]
fn a_name_is_enough() {
    let machine = one("nix@scratchy.labs.cs.uu.nl");
    assert_eq!(machine.store.to_string(), "ssh://nix@scratchy.labs.cs.uu.nl");
    assert_eq!(machine.systems, words("TEST_ARCH-TEST_OS"));
    assert_eq!((machine.max_jobs, machine.speed_factor), (1, 1.0));
    assert_eq!((machine.ssh_key, machine.public_host_key), (None, None));
    assert!(machine.supported_features.is_empty() && machine.mandatory_features.is_empty());
    assert_eq!(one("nix@far - - - - - - -"), one("nix@far"));
}

#[test]
fn every_field() {
    let machine = one(
        "nix@scratchy i686-linux,i586-linux /home/nix/.ssh/id_scratchy_auto 8 3 kvm,SUPPORTED SUPPORTED,MANDATORY \
         SSH+HOST+PUBLIC+KEY+BASE64+ENCODED==",
    );
    assert_eq!(machine.systems, words("i686-linux i586-linux"));
    assert_eq!(machine.ssh_key.as_deref(), Some("/home/nix/.ssh/id_scratchy_auto"));
    assert_eq!((machine.max_jobs, machine.speed_factor), (8, 3.0));
    assert_eq!(machine.supported_features, words("kvm SUPPORTED"));
    assert_eq!(machine.mandatory_features, words("SUPPORTED MANDATORY"));
    assert_eq!(machine.public_host_key.as_deref(), Some("SSH+HOST+PUBLIC+KEY+BASE64+ENCODED=="));
    assert_eq!(one("far - - 2 1.2").speed_factor, 1.2);
    assert_eq!(one("far - - 2 0").speed_factor, 1.0, "0 means nothing was said");
}

#[test]
fn stores() {
    for (text, store) in [
        ("far", "ssh://far"),
        ("ssh://far?compress=true", "ssh://far?compress=true"),
        ("ssh-ng://far", "ssh-ng://far"),
        ("unix:///x/socket", "unix:///x/socket"),
        ("/tmp/machine2", "/tmp/machine2"),
        ("auto", "auto"),
        ("local", "local"),
        ("daemon", "daemon"),
    ] {
        assert_eq!(one(text).store.to_string(), store);
    }
}

#[test]
fn lines_entries_and_comments() {
    let machines = read("a ; b\n\n  # nothing\nc - - 4 # and so on; d\n;;e;\n").unwrap();
    let hosts: Vec<_> = machines.iter().map(|machine| machine.store.authority.as_str()).collect();
    assert_eq!(hosts, ["a", "b", "c", "e"]);
    assert_eq!(read("").unwrap(), []);
    assert_eq!(read("#").unwrap(), []);
}

#[test]
fn files() {
    let mut include = |path: &str| match path {
        "/etc/nix/machines" => Ok(Some("far i686-linux\n@/missing\n@/more".to_owned())),
        "/more" => Ok(Some("further".to_owned())),
        "/missing" => Ok(None),
        "/secret" => Err("permission denied".to_owned()),
        "/again" => Ok(Some("@/again;@/again".to_owned())),
        other => panic!("{other}"),
    };
    let mut read = |text: &str| parse(text, &words("x"), &mut include);
    let machines = read("@ /etc/nix/machines ; near").unwrap();
    let hosts: Vec<_> = machines.iter().map(|machine| machine.store.authority.as_str()).collect();
    assert_eq!(hosts, ["far", "further", "near"]);
    assert_eq!(read("@/missing").unwrap(), []);
    let unreadable = read("@/secret").unwrap_err();
    assert_eq!(unreadable.to_string(), "cannot read the machines in '/secret': permission denied");
    assert_eq!(read("@/again"), Err(Error::Inclusions("/again".into())));
    let many = "@/missing\n".repeat(MAX_INCLUSIONS + 1);
    assert_eq!(read(&many), Err(Error::Inclusions("/missing".into())));
}

#[test]
fn what_is_wrong_in_stocks_words() {
    for (text, error) in [
        (
            "nix@scratchy.labs.cs.uu.nl - - eight",
            "bad machine specification: failed to convert column #3 in a row: 'nix@scratchy.labs.cs.uu.nl - - eight' \
             to 'unsigned int'",
        ),
        ("x - - -1", "bad machine specification: failed to convert column #3 in a row: 'x - - -1' to 'unsigned int'"),
        ("x - - 8 y", "bad machine specification: failed to convert column #4 in a row: 'x - - 8 y' to 'float'"),
        ("x - - 8 inf", "bad machine specification: failed to convert column #4 in a row: 'x - - 8 inf' to 'float'"),
        ("x - - 8 -2", "speed factor must be >= 0"),
        ("- x", "bad machine specification: store URL was not found at the first column of a row: '- x'"),
    ] {
        assert_eq!(read(text).unwrap_err().to_string(), error);
    }
    let error = read("x - - 8 1 - - bad_base64").unwrap_err().to_string();
    let start =
        "bad machine specification: a column #7 in a row: 'x - - 8 1 - - bad_base64' is not valid base64 string: ";
    assert!(error.starts_with(start), "{error}");
}

#[test]
fn what_a_machine_builds() {
    let machine = one("far i686-linux - 1 1 kvm,big big,nested");
    let builds = |system: &str, features: &str| machine.builds(system, features.split_whitespace());
    assert!(builds("i686-linux", "big nested"));
    assert!(builds("i686-linux", "kvm big nested"));
    assert!(builds("builtin", "big nested"));
    assert!(!builds("i686-linux", ""), "mandatory features must be asked for");
    assert!(!builds("i686-linux", "big"));
    assert!(!builds("i686-linux", "big nested other"));
    assert!(!builds("x86_64-linux", "big nested"));
    assert!(one("far").builds("TEST_ARCH-TEST_OS", "".split_whitespace()));
}

/// An entry as a list would have it, with what stands for defaults.
fn entry(machine: &Machine) -> String {
    let words = |words: &BTreeSet<String>| {
        if words.is_empty() { "-".to_owned() } else { words.iter().cloned().collect::<Vec<_>>().join(",") }
    };
    [
        machine.store.to_string(),
        words(&machine.systems),
        machine.ssh_key.clone().unwrap_or_else(|| "-".into()),
        machine.max_jobs.to_string(),
        machine.speed_factor.to_string(),
        words(&machine.supported_features),
        words(&machine.mandatory_features),
        machine.public_host_key.clone().unwrap_or_else(|| "-".into()),
    ]
    .join(" \t")
}

proptest! {
    #[test]
    fn what_is_read_can_be_written(
        host in "(ssh|ssh-ng|unix)://[a-z/]{1,9}",
        value in "[^\0]{0,9}",
        systems in proptest::collection::btree_set("[a-z_0-9-]{2,9}", 1..3),
        key in proptest::option::of("/[a-z]{1,9}"),
        max_jobs in any::<u32>(),
        speed_factor in 0.001f32..1000.0,
        features in proptest::collection::btree_set("[a-z]{1,9}", 0..3),
        host_key in proptest::option::of("([a-zA-Z0-9+/]{4}){1,9}"),
    ) {
        let mut machine = one("x");
        machine.store = nix_compat::store_uri::StoreUri::parse(&host).unwrap();
        machine.store.params.insert("p".into(), value);
        machine.systems = systems;
        machine.ssh_key = key;
        machine.max_jobs = max_jobs;
        machine.speed_factor = speed_factor;
        machine.mandatory_features = features.iter().take(1).cloned().collect();
        machine.supported_features = features;
        machine.public_host_key = host_key;
        let text = format!("{} ; {}", entry(&machine), entry(&machine));
        prop_assert_eq!(read(&text).unwrap(), [machine.clone(), machine]);
    }

    #[test]
    fn host_keys(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
        prop_assert_eq!(decode_host_key(&data_encoding::BASE64.encode(&bytes)), Ok(bytes));
    }

    #[test]
    fn nothing_panics(text in "([a-z@:/?=%&;#,0-9.\n -]|\\PC){0,200}") {
        let _ = parse(&text, &words("x"), &mut |path| Ok(Some(path.to_owned())));
    }
}
