//! The worker protocol's codec against the data of stock's own unit tests (2.26.3): every file is read with
//! `nix-compat`, compared with what it is known to hold, and written again byte for byte; first the value alone, then as
//! part of a message of the client or the daemon.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

use nix_compat::content_address::ContentAddress;
use nix_compat::hash::NarHash;
use nix_compat::path_info::PathInfo;
use nix_compat::signature::Signature;
use nix_compat::store_path::{StoreDir, StorePath};
use nix_compat::wire::{Invalid, ReadError, Reader, Writer};
use nix_compat::worker::handshake::{ClientHandshake, HandshakeError, Progress, ServerHandshake, Trust};
use nix_compat::worker::{
    AddToStoreNar, BuildMode, BuildResult, BuildStatus, BuiltOutput, DerivedPath, DrvOutput, Features, OutputsSpec,
    Protocol, Realisation, Request, Response, Value, read_path_info, read_unkeyed_path_info, write_path_info,
    write_unkeyed_path_info,
};

use crate::unit_data;

/// The minor version of stock's tests whose name says nothing else.
const DEFAULT: u16 = 35;

/// What is done with the contents of a file.
type Check = fn(&[u8]);

const FILES: [(&str, Check); 25] = [
    ("build-mode.bin", build_modes),
    ("build-result-1.27.bin", |bytes| build_results(27, bytes)),
    ("build-result-1.28.bin", |bytes| build_results(28, bytes)),
    ("build-result-1.29.bin", |bytes| build_results(29, bytes)),
    ("build-result-1.37.bin", |bytes| build_results(37, bytes)),
    ("client-handshake-info_1_30.bin", |bytes| handshake_infos(30, bytes, &[(None, Trust::Unknown); 2])),
    ("client-handshake-info_1_33.bin", |bytes| {
        handshake_infos(33, bytes, &[(Some("foo"), Trust::Unknown), (Some("bar"), Trust::Unknown)]);
    }),
    ("client-handshake-info_1_35.bin", |bytes| {
        handshake_infos(35, bytes, &[(Some("foo"), Trust::NotTrusted), (Some("bar"), Trust::Trusted)]);
    }),
    ("content-address.bin", content_addresses),
    ("derived-path-1.29.bin", |bytes| derived_paths(29, bytes, &old_derived_paths())),
    ("derived-path-1.30.bin", |bytes| derived_paths(30, bytes, &new_derived_paths())),
    ("drv-output.bin", drv_outputs),
    ("handshake-to-client.bin", handshake_to_client),
    ("keyed-build-result-1.29.bin", keyed_build_results),
    ("optional-content-address.bin", |bytes| {
        let some = ContentAddress::parse("fixed:sha1:1amk6n7wxjlw4qkq6dcj6mm7hw3acrw0").unwrap();
        values(DEFAULT, bytes, &[None, Some(some)]);
    }),
    ("optional-store-path.bin", |bytes| values(DEFAULT, bytes, &[None, Some(path("foo-bar"))])),
    ("optional-trusted-flag.bin", trust),
    ("realisation.bin", realisations),
    ("set.bin", |bytes| strings(bytes, &["", "bar", "foo"])),
    ("store-path.bin", store_paths),
    ("string.bin", texts),
    ("unkeyed-valid-path-info-1.15.bin", unkeyed_path_infos_of_1_15),
    ("valid-path-info-1.15.bin", path_infos_of_1_15),
    ("valid-path-info-1.16.bin", path_infos_of_1_16),
    ("vector.bin", |bytes| strings(bytes, &["", "foo", "bar"])),
];

#[test]
fn worker_protocol_vectors() {
    let Some(data) = unit_data("worker-protocol") else { return };
    let mut checks = BTreeMap::from(FILES);
    for (name, bytes) in data {
        let check = checks.remove(name.as_str()).unwrap_or_else(|| panic!("nothing is known of the file {name}"));
        println!("{name}: {} bytes", bytes.len());
        check(&bytes);
    }
    assert!(checks.is_empty(), "files that are not there any more: {:?}", checks.keys());
}

fn protocol(minor: u16) -> Protocol {
    Protocol { minor, features: Features::NONE, store_dir: StoreDir::default() }
}

/// The store path that nearly everything in the data is about, with this name.
fn path(name: &str) -> StorePath {
    StorePath::from_base_name(&format!("g1w7hy3qg1w7hy3qg1w7hy3qg1w7hy3q-{name}")).unwrap()
}

/// Checks that the bytes are these values one after the other, and nothing else.
fn values<T: Value + PartialEq + Debug>(minor: u16, bytes: &[u8], wanted: &[T]) {
    let protocol = protocol(minor);
    each(bytes, wanted, |reader| T::read(reader, &protocol), |value, writer| value.write(&protocol, writer));
}

/// The same with functions that read and write.
pub(crate) fn each<T: PartialEq + Debug>(
    bytes: &[u8],
    wanted: &[T],
    read: impl Fn(&mut Reader<'_>) -> Result<T, ReadError>,
    write: impl Fn(&T, &mut Writer),
) {
    let (mut reader, mut writer) = (Reader::new(bytes), Writer::new());
    for value in wanted {
        let start = reader.position();
        assert_eq!(&read(&mut reader).unwrap(), value);
        for end in start..reader.position() {
            let cut = read(&mut Reader::new(&bytes[start..end]));
            assert!(matches!(cut, Err(ReadError::Incomplete { .. })), "{value:?} from {} bytes", end - start);
        }
        write(value, &mut writer);
        assert_eq!(writer.as_bytes(), &bytes[..reader.position()], "{value:?} is written another way");
    }
    reader.finish().unwrap();
}

/// Checks that a client sends `request` as these words and bytes, and that a daemon understands it.
fn client_sends(minor: u16, request: &Request, bytes: &[u8]) {
    let (protocol, mut writer) = (protocol(minor), Writer::new());
    request.encode(&protocol, &mut writer);
    assert_eq!(writer.as_bytes(), bytes, "{request:?}");
    let mut reader = Reader::new(bytes);
    assert_eq!(&Request::decode(&mut reader, &protocol).unwrap(), request);
    reader.finish().unwrap();
}

/// Checks that a daemon answers `request` with these words and bytes, and that a client understands it.
fn daemon_answers(minor: u16, request: &Request, response: &Response, bytes: &[u8]) {
    let (protocol, mut writer) = (protocol(minor), Writer::new());
    response.encode(&protocol, &mut writer);
    assert_eq!(writer.as_bytes(), bytes, "{response:?}");
    let mut reader = Reader::new(bytes);
    assert_eq!(&Response::decode(request, &mut reader, &protocol).unwrap(), response);
    reader.finish().unwrap();
}

/// Words before some bytes.
fn after(words: &[u64], bytes: &[u8]) -> Vec<u8> {
    [words.iter().flat_map(|word| word.to_le_bytes()).collect(), bytes.to_vec()].concat()
}

/// A string as the protocol has it, written without the code under test.
fn string(text: &str) -> Vec<u8> {
    let mut bytes = after(&[text.len() as u64], text.as_bytes());
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

fn texts(bytes: &[u8]) {
    let wanted = ["", "hi", "white rabbit", "大白兔", "oh no "].map(str::as_bytes);
    each(bytes, &wanted.map(<[u8]>::to_vec), |r| Ok(r.bytes(100)?.to_vec()), |text, w| w.bytes(text));
}

/// Lists of strings, and a list of such lists. Sets are lists whose elements the writer sorts.
fn strings(bytes: &[u8], three: &[&str]) {
    let lists: [&[&str]; 3] = [&[], &[""], three];
    let list = |texts: &[&str]| texts.iter().map(|text| text.as_bytes().to_vec()).collect::<Vec<_>>();
    let read = |reader: &mut Reader<'_>| reader.list(1, |reader| Ok(reader.bytes(100)?.to_vec()));
    let write = |texts: &Vec<Vec<u8>>, writer: &mut Writer| writer.list(texts, |writer, text| writer.bytes(text));
    let nested_at: usize = lists.iter().map(|texts| 8 + texts.iter().map(|t| string(t).len()).sum::<usize>()).sum();
    let (plain, nested) = bytes.split_at(nested_at);
    each(plain, &lists.map(list), read, write);
    let lists = vec![list(&[]), list(&[""]), list(&["", "1", "2"])];
    each(nested, &[lists], |r| r.list(1, read), |lists, w| w.list(lists, |w, texts| write(texts, w)));
}

fn store_paths(bytes: &[u8]) {
    let paths = [path("foo"), path("foo-bar")];
    values(DEFAULT, bytes, &paths);
    // Both ends may send sets of paths.
    let paths = BTreeSet::from(paths);
    let request = Request::QuerySubstitutablePaths(paths.clone());
    client_sends(DEFAULT, &request, &after(&[32, 2], bytes));
    daemon_answers(DEFAULT, &request, &Response::Paths(paths), &after(&[2], bytes));
}

fn content_addresses(bytes: &[u8]) {
    let addresses = [
        "text:sha256:1vb2xd67750jrvqgykxrf5ipl3h1q57sxc57q5nzjw56bqp3sxzr",
        "fixed:sha1:1amk6n7wxjlw4qkq6dcj6mm7hw3acrw0",
        "fixed:r:sha256:1lr187v6dck1rjh2j6svpikcfz53wyl3qrlcbb405zlh13x0khhh",
    ]
    .map(|text| ContentAddress::parse(text).unwrap());
    values(DEFAULT, bytes, &addresses);
}

fn drv_output(hash: &str, output: &str) -> DrvOutput {
    let hash = *NarHash::parse(hash).unwrap().as_bytes();
    DrvOutput::Modulo { hash, output: output.parse().unwrap() }
}

const HASH_OF_BAZ: &str = "15e3c560894cbb27085cf65b5a2ecb18488c999497f4531b6907a7581ce6d527";
const HASH_OF_QUUX: &str = "6f869f9ea2823bda165e06076fd0de4366dead2c0e8d2dbbad277d4f15c373f5";

fn drv_outputs(bytes: &[u8]) {
    let outputs = [drv_output(HASH_OF_BAZ, "baz"), drv_output(HASH_OF_QUUX, "quux")];
    values(DEFAULT, bytes, &outputs);
    let second = &bytes[string(&outputs[0].to_string()).len()..];
    client_sends(DEFAULT, &Request::QueryRealisation(outputs[1].clone()), &after(&[43], second));
}

/// The signatures in the data are no signatures: stock reads them as any text before 2.34, and refuses them since.
/// They are refused here too, and replaced by real ones.
fn realisations(bytes: &[u8]) {
    let protocol = protocol(DEFAULT);
    let refused = Realisation::read(&mut Reader::new(bytes), &protocol).unwrap_err();
    assert!(matches!(refused, ReadError::Invalid(Invalid::Realisation(_))), "{refused}");

    let mut reader = Reader::new(bytes);
    let texts: Vec<Vec<u8>> = (0..2)
        .map(|_| string(&reader.text(1000).unwrap().replace("asdf", "a:c2ln").replace("qwer", "q:c2ln")))
        .collect();
    reader.finish().unwrap();
    let mut first = Realisation::new(drv_output(HASH_OF_BAZ, "baz"), path("foo"));
    first.signatures = ["a:c2ln", "q:c2ln"].map(|text| Signature::parse(text).unwrap()).into();
    let mut second = first.clone();
    second.dependencies.insert(drv_output(HASH_OF_QUUX, "quux"), path("foo"));
    values(DEFAULT, &texts.concat(), &[first.clone(), second.clone()]);
    for (realisation, text) in [first, second].into_iter().zip(texts) {
        client_sends(DEFAULT, &Request::RegisterDrvOutput(realisation.clone()), &after(&[42], &text));
        let query = Request::QueryRealisation(realisation.id.clone());
        daemon_answers(DEFAULT, &query, &Response::Realisation(Some(realisation)), &after(&[1], &text));
    }
}

fn build_modes(bytes: &[u8]) {
    values(DEFAULT, bytes, &[BuildMode::Normal, BuildMode::Repair, BuildMode::Check]);
    for (mode, word) in BuildMode::ALL.iter().zip(bytes.chunks(8)) {
        client_sends(DEFAULT, &Request::BuildPaths { paths: Vec::new(), mode: *mode }, &after(&[9, 0], word));
    }
}

/// "Not deterministic": the second result in all the files, as far as 1.`minor` tells it.
fn not_deterministic(minor: u16) -> BuildResult {
    let mut result = BuildResult::new(BuildStatus::NotDeterministic, "no idea why");
    if minor >= 29 {
        result.times_built = 3;
        result.is_non_deterministic = true;
        (result.start_time, result.stop_time) = (30, 50);
    }
    result
}

fn build_results(minor: u16, bytes: &[u8]) {
    let mut built = BuildResult::new(BuildStatus::Built, "");
    if minor >= 28 {
        let drv_hash = *NarHash::parse(HASH_OF_QUUX).unwrap().as_bytes();
        let output = |name: &str| (name.parse().unwrap(), BuiltOutput { drv_hash, path: path(name) });
        built.built_outputs = [output("foo"), output("bar")].into();
    }
    if minor >= 29 {
        built.times_built = 1;
        (built.start_time, built.stop_time) = (30, 50);
    }
    if minor >= 37 {
        // Only the last of them has times of the processor, in microseconds.
        (built.cpu_user, built.cpu_system) = (Some(500_000_000), Some(604_000_000));
    }
    let results = [BuildResult::new(BuildStatus::OutputRejected, "no idea why"), not_deterministic(minor), built];
    values(minor, bytes, &results);

    // The same as answers to BuildDerivation, each with its own part of the bytes.
    let mut reader = Reader::new(bytes);
    for result in results {
        let start = reader.position();
        let response = Response::BuildResult(BuildResult::read(&mut reader, &protocol(minor)).unwrap());
        assert_eq!(response, Response::BuildResult(result));
        daemon_answers(minor, &build_derivation(), &response, &bytes[start..reader.position()]);
    }
}

/// Some request that is answered by a build result.
fn build_derivation() -> Request {
    let derivation = nix_compat::derivation::BasicDerivation {
        name: "x".to_owned(),
        outputs: BTreeMap::from([("out".parse().unwrap(), nix_compat::derivation::Output::Deferred)]),
        input_srcs: BTreeSet::new(),
        platform: Vec::new(),
        builder: Vec::new(),
        args: Vec::new(),
        env: BTreeMap::new(),
    };
    Request::BuildDerivation { drv_path: path("x.drv"), derivation, mode: BuildMode::Normal }
}

fn keyed_build_results(bytes: &[u8]) {
    let rejected = BuildResult::new(BuildStatus::OutputRejected, "no idea why");
    let results =
        vec![(DerivedPath::Opaque(path("xxx")), rejected), (built(path("bar.drv"), &["out"]), not_deterministic(29))];
    let paths = results.iter().map(|(path, _)| path.clone()).collect();
    let request = Request::BuildPathsWithResults { paths, mode: BuildMode::Normal };
    daemon_answers(29, &request, &Response::KeyedBuildResults(results.clone()), &after(&[2], bytes));
    let protocol = protocol(29);
    let read = |reader: &mut Reader<'_>| Ok((Value::read(reader, &protocol)?, Value::read(reader, &protocol)?));
    each(bytes, &results, read, |(path, result): &(DerivedPath, BuildResult), writer| {
        path.write(&protocol, writer);
        result.write(&protocol, writer);
    });
}

fn built(drv: StorePath, outputs: &[&str]) -> DerivedPath {
    let names = outputs.iter().map(|name| name.parse().unwrap()).collect();
    DerivedPath::Built { drv, outputs: OutputsSpec::Names(names) }
}

fn old_derived_paths() -> [DerivedPath; 3] {
    [
        DerivedPath::Opaque(path("foo")),
        DerivedPath::Built { drv: path("bar.drv"), outputs: OutputsSpec::All },
        built(path("bar.drv"), &["x", "y"]),
    ]
}

fn new_derived_paths() -> [DerivedPath; 4] {
    let [opaque, all, some] = old_derived_paths();
    [opaque, DerivedPath::Opaque(path("foo.drv")), all, some]
}

fn derived_paths(minor: u16, bytes: &[u8], paths: &[DerivedPath]) {
    values(minor, bytes, paths);
    let request = Request::QueryMissing(paths.to_vec());
    client_sends(minor, &request, &after(&[40, paths.len() as u64], bytes));
}

fn trust(bytes: &[u8]) {
    let read = |reader: &mut Reader<'_>| {
        let value = reader.u64()?;
        Trust::from_code(value).ok_or(Invalid::UnknownTag { what: "trust level", value }.into())
    };
    let levels = [Trust::Unknown, Trust::Trusted, Trust::NotTrusted];
    each(bytes, &levels, read, |level, writer| writer.u64(level.code()));
}

const CLIENT_MAGIC: u64 = 0x6e69_7863;
const SERVER_MAGIC: u64 = 0x6478_696f;

/// A daemon that speaks 1.10, which is older than what is spoken here.
fn handshake_to_client(bytes: &[u8]) {
    assert_eq!(bytes, after(&[SERVER_MAGIC, 0x10a], &[]));
    let mut writer = Writer::new();
    let mut client = ClientHandshake::new(StoreDir::default(), 38, Features::NONE, &mut writer);
    assert!(matches!(client.advance(bytes, &mut writer), Err(HandshakeError::TooOld(10))));
    // Ours begins with the same magic.
    let (mut server, mut writer) = (server(Trust::Unknown, ""), Writer::new());
    server.advance(&after(&[CLIENT_MAGIC], &[]), &mut writer).unwrap();
    assert_eq!(writer.as_bytes()[..8], bytes[..8]);
}

fn server(trust: Trust, version: &str) -> ServerHandshake {
    ServerHandshake::new(StoreDir::default(), version, trust, Features::NONE)
}

/// The end of the handshake: what the daemon says of itself, several times.
fn handshake_infos(minor: u16, bytes: &[u8], infos: &[(Option<&str>, Trust)]) {
    let version = u64::from(0x100 | minor);
    let mut rest = bytes;
    for &(name, trust) in infos {
        let mut sent = Writer::new();
        let mut client = ClientHandshake::new(StoreDir::default(), minor, Features::NONE, &mut sent);
        let beginning = after(&[SERVER_MAGIC, version], &[]);
        let received = [beginning.as_slice(), rest].concat();
        let (used, progress) = client.advance(&received, &mut sent).unwrap();
        let Progress::Done(welcome) = progress else { panic!("the handshake goes on behind the data") };
        assert_eq!((welcome.protocol.minor, welcome.server_version.as_deref(), welcome.trust), (minor, name, trust));
        let (info, behind) = rest.split_at(used - beginning.len());
        rest = behind;

        let mut written = Writer::new();
        let mut server = server(trust, name.unwrap_or("unsaid"));
        let (used, progress) = server.advance(sent.as_bytes(), &mut written).unwrap();
        assert!(used == sent.len() && matches!(progress, Progress::Done(_)));
        assert_eq!(&written.as_bytes()[16..], info);
    }
    assert!(rest.is_empty());
}

/// The path infos of the data have this NAR hash, time and size in common.
fn path_info(path: StorePath) -> PathInfo {
    PathInfo {
        path,
        deriver: None,
        nar_hash: NarHash::parse(HASH_OF_BAZ).unwrap(),
        references: BTreeSet::new(),
        registration_time: 23_423,
        nar_size: 34_878,
        ultimate: false,
        signatures: BTreeSet::new(),
        ca: None,
    }
}

fn other_foo(name: &str) -> StorePath {
    StorePath::from_base_name(&format!("g1w7hyyyy1w7hy3qg1w7hy3qgqqqqy3q-{name}")).unwrap()
}

/// What 1.16 added to the end of a path info: not ultimate, no signatures, no content address. Older versions are not
/// spoken here, so their files are read with this put in.
const ADDED_IN_1_16: [u64; 3] = [0, 0, 0];

/// Inserts [`ADDED_IN_1_16`] behind each info; `ends` are the places where they end.
fn as_1_16(bytes: &[u8], ends: &[usize]) -> Vec<Vec<u8>> {
    assert_eq!(ends.last(), Some(&bytes.len()));
    let starts = std::iter::once(&0).chain(ends);
    starts.zip(ends).map(|(&start, &end)| [&bytes[start..end], &after(&ADDED_IN_1_16, &[])].concat()).collect()
}

fn unkeyed_path_infos_of_1_15(bytes: &[u8]) {
    let plain = path_info(path("bar"));
    let mut full = plain.clone();
    full.deriver = Some(path("bar.drv"));
    full.references = [other_foo("foo.drv")].into();
    let protocol = protocol(DEFAULT);
    // Deriver, hash, references, time and size: five words and the hash's 64 digits.
    for (info, bytes) in [plain, full].into_iter().zip(as_1_16(bytes, &[104, bytes.len()])) {
        let of = info.path.clone();
        let read = |reader: &mut Reader<'_>| read_unkeyed_path_info(reader, &protocol, of.clone());
        each(&bytes, std::slice::from_ref(&info), read, |info, writer| {
            write_unkeyed_path_info(info, &protocol, writer)
        });
        let request = Request::QueryPathInfo(of);
        daemon_answers(DEFAULT, &request, &Response::PathInfo(Some(info)), &after(&[1], &bytes));
    }
}

/// Two path infos, the second with a deriver and references; both are in the files of either version.
fn keyed_path_infos() -> [PathInfo; 2] {
    let plain = path_info(path("bar"));
    let mut full = plain.clone();
    full.deriver = Some(path("bar.drv"));
    full.references = [path("bar"), other_foo("foo")].into();
    [plain, full]
}

fn path_infos_of_1_15(bytes: &[u8]) {
    let first = string("/nix/store/g1w7hy3qg1w7hy3qg1w7hy3qg1w7hy3q-bar").len() + 104;
    for (info, bytes) in keyed_path_infos().into_iter().zip(as_1_16(bytes, &[first, bytes.len()])) {
        keyed_path_info(&info, &bytes);
    }
}

/// A path info in the middle of requests and answers.
fn keyed_path_info(info: &PathInfo, bytes: &[u8]) {
    let protocol = protocol(DEFAULT);
    let read = |reader: &mut Reader<'_>| read_path_info(reader, &protocol);
    each(bytes, std::slice::from_ref(info), read, |info, writer| write_path_info(info, &protocol, writer));
    let add = AddToStoreNar { info: info.clone(), repair: true, dont_check_sigs: false };
    let message = [after(&[39], bytes), after(&[1, 0], &[])].concat();
    client_sends(DEFAULT, &Request::AddToStoreNar(add), &message);
    let text = string("text:sha256");
    let add = [after(&[7], &string("x")), text, after(&[0, 0], &[])].concat();
    let add = Request::decode(&mut Reader::new(&add), &protocol).unwrap();
    daemon_answers(DEFAULT, &add, &Response::AddedPath(info.clone()), bytes);
}

/// As for realisations: what stands for signatures is refused and replaced.
fn path_infos_of_1_16(bytes: &[u8]) {
    let protocol = protocol(DEFAULT);
    let [mut ultimate, mut signed] = keyed_path_infos();
    ultimate.ultimate = true;
    let mut reader = Reader::new(bytes);
    assert_eq!(read_path_info(&mut reader, &protocol).unwrap(), ultimate);
    let first = reader.position();
    let refused = read_path_info(&mut reader, &protocol).unwrap_err();
    assert!(matches!(refused, ReadError::Invalid(Invalid::Signature(_))), "{refused}");

    let mut bytes = bytes.to_vec();
    for (text, signature) in [("fake-sig-1", "f:c2lnLTEx"), ("fake-sig-2", "f:c2lnLTIy")] {
        let at = bytes.windows(text.len()).position(|window| window == text.as_bytes()).unwrap();
        bytes[at..at + signature.len()].copy_from_slice(signature.as_bytes());
        signed.signatures.insert(signature.parse().unwrap());
    }
    let own = StorePath::from_base_name("n5wkd9frr45pa74if5gpz9j7mifg27fh-foo").unwrap();
    let mut addressed = path_info(own.clone());
    addressed.references = [path("bar"), own].into();
    addressed.ca = ContentAddress::parse("fixed:r:sha256:1lr187v6dck1rjh2j6svpikcfz53wyl3qrlcbb405zlh13x0khhh").ok();
    assert!(addressed.is_content_addressed(&StoreDir::default()));

    let mut reader = Reader::new(&bytes[first..]);
    assert_eq!(read_path_info(&mut reader, &protocol).unwrap(), signed);
    let second = first + reader.position();
    keyed_path_info(&ultimate, &bytes[..first]);
    keyed_path_info(&signed, &bytes[first..second]);
    keyed_path_info(&addressed, &bytes[second..]);
}
