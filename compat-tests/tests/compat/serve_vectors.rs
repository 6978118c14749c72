//! The serve protocol's codec and lists of machines against the data of stock's own unit tests (2.26.3), as
//! [`upstream_vectors`](crate::upstream_vectors) does for the worker protocol. Files that hold what both protocols encode
//! alike are the same as there, byte for byte.

use std::collections::{BTreeMap, BTreeSet};

use nix_compat::content_address::ContentAddress;
use nix_compat::hash::NarHash;
use nix_compat::machines;
use nix_compat::path_info::PathInfo;
use nix_compat::serve::{self, BuildOptions, HandshakeError, Protocol, Request, Response};
use nix_compat::store_path::{StoreDir, StorePath};
use nix_compat::wire::{Invalid, ReadError, Reader, Writer};
use nix_compat::worker::{BuildResult, BuildStatus, BuiltOutput};

use crate::unit_data;
use crate::upstream_vectors::each;

/// What is done with the contents of a file.
type Check = fn(&[u8]);

/// What only the serve protocol has.
const FILES: [(&str, Check); 10] = [
    ("build-options-2.1.bin", |bytes| build_options(1, bytes)),
    ("build-options-2.2.bin", |bytes| build_options(2, bytes)),
    ("build-options-2.3.bin", |bytes| build_options(3, bytes)),
    ("build-options-2.7.bin", |bytes| build_options(7, bytes)),
    ("build-result-2.2.bin", |bytes| build_results(2, bytes)),
    ("build-result-2.3.bin", |bytes| build_results(3, bytes)),
    ("build-result-2.6.bin", |bytes| build_results(6, bytes)),
    ("handshake-to-client.bin", handshake_to_client),
    ("unkeyed-valid-path-info-2.3.bin", path_infos_of_2_3),
    ("unkeyed-valid-path-info-2.4.bin", path_infos_of_2_4),
];

/// What both protocols encode alike, and the worker protocol's tests check.
const SHARED: [&str; 9] = [
    "content-address.bin",
    "drv-output.bin",
    "optional-content-address.bin",
    "optional-store-path.bin",
    "realisation.bin",
    "set.bin",
    "store-path.bin",
    "string.bin",
    "vector.bin",
];

#[test]
fn serve_protocol_vectors() {
    let Some(data) = unit_data("serve-protocol") else { return };
    let Some(of_worker_protocol) = unit_data("worker-protocol") else { return };
    let mut checks = BTreeMap::from(FILES);
    let mut shared = BTreeSet::from(SHARED);
    for (name, bytes) in data {
        println!("{name}: {} bytes", bytes.len());
        if shared.remove(name.as_str()) {
            assert!(of_worker_protocol[&name].starts_with(&bytes), "{name} is not that of the worker protocol");
            continue;
        }
        checks.remove(name.as_str()).unwrap_or_else(|| panic!("nothing is known of the file {name}"))(&bytes);
    }
    assert!(checks.is_empty() && shared.is_empty(), "no longer there: {:?} {shared:?}", checks.keys());
}

#[test]
fn lists_of_machines() {
    let Some(data) = unit_data("machines") else { return };
    let systems = ["TEST_ARCH-TEST_OS".to_owned()].into();
    let read = |name: &str| {
        let text = std::str::from_utf8(&data[name]).unwrap();
        machines::parse(&format!("@{name}"), &systems, &mut |_| Ok(Some(text.to_owned())))
    };
    let machines = read("valid").unwrap();
    let facts =
        |m: &machines::Machine| (m.store.authority.clone(), m.max_jobs, m.speed_factor, m.supported_features.len());
    let found: Vec<_> = machines.iter().map(facts).collect();
    let expected = [
        ("nix@scratchy.labs.cs.uu.nl".to_owned(), 8, 1.0, 1),
        ("nix@itchy.labs.cs.uu.nl".to_owned(), 8, 2.0, 0),
        ("nix@poochie.labs.cs.uu.nl".to_owned(), 1, 2.0, 1),
    ];
    assert_eq!(found, expected);
    assert!(machines.iter().all(|machine| machine.store.scheme == "ssh" && machine.systems.contains("i686-linux")));
    let poochie = &machines[2];
    assert_eq!(poochie.mandatory_features, ["benchmark".to_owned()].into());
    let key = machines::decode_host_key(poochie.public_host_key.as_ref().unwrap()).unwrap();
    assert!(key.starts_with(b"ssh-rsa AAAAB3NzaC1yc2E"), "{}", String::from_utf8_lossy(&key));
    let error = read("bad_format").unwrap_err().to_string();
    assert!(
        error.starts_with("bad machine specification: failed to convert column #3 in a row: 'nix@scratchy"),
        "{error}"
    );
}

fn protocol(minor: u16) -> Protocol {
    Protocol { minor, store_dir: StoreDir::default() }
}

fn path(name: &str) -> StorePath {
    StorePath::from_base_name(&format!("g1w7hy3qg1w7hy3qg1w7hy3qg1w7hy3q-{name}")).unwrap()
}

/// Options stand at the end of a request.
fn build_options(minor: u16, bytes: &[u8]) {
    let options = BuildOptions {
        max_silent_time: 5,
        timeout: 6,
        max_log_size: if minor < 2 { 0 } else { 7 },
        repeats: if minor < 3 { 0 } else { 8 },
        enforce_determinism: minor == 3,
        keep_failed: minor >= 7,
    };
    let request = Request::BuildPaths { paths: Vec::new(), options };
    let message = [&[6, 0, 0, 0, 0, 0, 0, 0], &[0; 8][..], bytes].concat();
    let protocol = protocol(minor);
    each(&message, &[request], |r| Request::decode(r, &protocol), |request, w| request.encode(&protocol, w));
}

const HASH_OF_QUUX: &str = "6f869f9ea2823bda165e06076fd0de4366dead2c0e8d2dbbad277d4f15c373f5";

fn build_results(minor: u16, bytes: &[u8]) {
    let rejected = BuildResult::new(BuildStatus::OutputRejected, "no idea why");
    let mut differs = BuildResult::new(BuildStatus::NotDeterministic, "no idea why");
    let mut built = BuildResult::new(BuildStatus::Built, "");
    if minor >= 3 {
        (differs.times_built, differs.is_non_deterministic) = (3, true);
        (differs.start_time, differs.stop_time) = (30, 50);
    }
    if minor >= 6 {
        built.times_built = 1;
        (built.start_time, built.stop_time) = (30, 50);
        let drv_hash = *NarHash::parse(HASH_OF_QUUX).unwrap().as_bytes();
        let output = |name: &str| (name.parse().unwrap(), BuiltOutput { drv_hash, path: path(name) });
        built.built_outputs = [output("foo"), output("bar")].into();
    } else if minor >= 3 {
        built.start_time = 30;
        built.stop_time = 50;
    }
    let protocol = protocol(minor);
    let read = |r: &mut Reader<'_>| serve::read_build_result(r, &protocol);
    each(bytes, &[rejected, differs, built], read, |result, w| serve::write_build_result(result, &protocol, w));
}

/// The server of the data is older than any that is spoken to: 2.0.
fn handshake_to_client(bytes: &[u8]) {
    let dir = StoreDir::default();
    let refused = serve::read_answer(&mut Reader::new(bytes), 7, &dir).unwrap_err();
    assert!(matches!(refused, HandshakeError::Version { major: 2, minor: 0 }), "{refused}");
    let mut writer = Writer::new();
    serve::write_answer(0, &mut writer);
    assert_eq!(writer.as_bytes(), bytes);
    let newer = [&bytes[..8], &[5][..], &bytes[9..]].concat();
    assert_eq!(serve::read_answer(&mut Reader::new(&newer), 7, &dir).unwrap(), protocol(5));
}

fn info(name: &str) -> PathInfo {
    PathInfo {
        path: path(name),
        deriver: None,
        nar_hash: NarHash::from([0; 32]),
        references: BTreeSet::new(),
        registration_time: 0,
        nar_size: 34878,
        ultimate: false,
        signatures: BTreeSet::new(),
        ca: None,
    }
}

fn path_infos(minor: u16, bytes: &[u8], infos: &[PathInfo]) {
    let protocol = protocol(minor);
    let read = |r: &mut Reader<'_>| serve::read_path_info(r, &protocol, path("x"));
    each(bytes, infos, read, |info, w| serve::write_path_info(info, &protocol, w));
    // As the answer to a request: a path in front of each, "" behind them.
    let named: Vec<PathInfo> = infos.to_vec();
    let mut writer = Writer::new();
    Response::PathInfos(named.clone()).encode(&protocol, &mut writer);
    let request = Request::QueryPathInfos(BTreeSet::new());
    let read = |r: &mut Reader<'_>| Response::decode(&request, r, &protocol);
    each(writer.as_bytes(), &[Response::PathInfos(named)], read, |answer, w| answer.encode(&protocol, w));
}

fn path_infos_of_2_3(bytes: &[u8]) {
    let plain = info("x");
    let mut full = plain.clone();
    full.deriver = Some(path("bar.drv"));
    full.references = [StorePath::from_base_name("g1w7hyyyy1w7hy3qg1w7hy3qgqqqqy3q-foo.drv").unwrap()].into();
    path_infos(3, bytes, &[plain, full]);
}

/// As for the worker protocol: what stands for signatures is refused and replaced.
fn path_infos_of_2_4(bytes: &[u8]) {
    let mut first = info("x");
    first.deriver = Some(path("bar.drv"));
    first.references = [StorePath::from_base_name("g1w7hyyyy1w7hy3qg1w7hy3qgqqqqy3q-foo.drv").unwrap()].into();
    first.nar_hash = NarHash::parse("sha256:09ymwqf5i9q7d4dm7x4pjjcqqj0qrcp5lnznbh42gfsci5hcbqqm").unwrap();
    let mut second = first.clone();
    let own = StorePath::from_base_name("n5wkd9frr45pa74if5gpz9j7mifg27fh-foo").unwrap();
    second.references = [path("bar"), own].into();
    second.ca = ContentAddress::parse("fixed:r:sha256:1lr187v6dck1rjh2j6svpikcfz53wyl3qrlcbb405zlh13x0khhh").ok();

    let refused = serve::read_path_info(&mut Reader::new(&bytes[0xf0..]), &protocol(4), path("x")).unwrap_err();
    assert!(matches!(refused, ReadError::Invalid(Invalid::Signature(_))), "{refused}");
    let mut bytes = bytes.to_vec();
    for (text, signature) in [("fake-sig-1", "f:c2lnLTEx"), ("fake-sig-2", "f:c2lnLTIy")] {
        let at = bytes.windows(text.len()).position(|window| window == text.as_bytes()).unwrap();
        bytes[at..at + signature.len()].copy_from_slice(signature.as_bytes());
        second.signatures.insert(signature.parse().unwrap());
    }
    path_infos(4, &bytes, &[first, second]);
}
