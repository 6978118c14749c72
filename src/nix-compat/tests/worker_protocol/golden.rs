//! Messages written out by hand from the protocol's description, byte for byte.

use std::collections::{BTreeMap, BTreeSet};

use nix_compat::derivation::OutputName;
use nix_compat::hash::NarHash;
use nix_compat::path_info::PathInfo;
use nix_compat::signature::Signature;
use nix_compat::wire::{Invalid, ReadError, Reader, Writer};
use nix_compat::worker::stderr::{ActivityKind, ErrorMessage, Field, Message, ResultKind, Verbosity};
use nix_compat::worker::{
    BuildMode, BuildResult, BuildStatus, BuiltOutput, ClientOptions, CollectGarbage, DerivedPath, DerivedPathError,
    DrvOutput, Features, GcAction, GcTargets, MethodText, OutputsSpec, Payload, Protocol, Realisation, Request,
    Response, UNLIMITED, read_path_info,
};

use crate::support::{N, S, bytes, path, protocol};

const A: &str = "/nix/store/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa-a";
const DRV: &str = "/nix/store/dddddddddddddddddddddddddddddddd-x.drv";

/// Decodes a whole request.
fn decode(message: &[u8], protocol: &Protocol) -> Result<Request, ReadError> {
    let mut reader = Reader::new(message);
    let request = Request::decode(&mut reader, protocol)?;
    reader.finish()?;
    Ok(request)
}

fn old() -> Protocol {
    protocol(21, Features::NONE)
}

fn new() -> Protocol {
    protocol(38, Features::NONE)
}

fn newest() -> Protocol {
    protocol(38, Features::ALL)
}

/// Checks a request in both directions.
fn request(protocol: &Protocol, message: &[u8], value: &Request) {
    assert_eq!(&decode(message, protocol).unwrap(), value);
    let mut writer = Writer::new();
    value.encode(protocol, &mut writer);
    assert_eq!(writer.as_bytes(), message);
}

/// Checks a response in both directions.
fn response(protocol: &Protocol, to: &Request, message: &[u8], value: &Response) {
    let mut writer = Writer::new();
    value.encode(protocol, &mut writer);
    assert_eq!(writer.as_bytes(), message);
    let mut reader = Reader::new(message);
    assert_eq!(&Response::decode(to, &mut reader, protocol).unwrap(), value);
    reader.finish().unwrap();
}

fn encoded(message: &Message, protocol: &Protocol) -> Vec<u8> {
    let mut writer = Writer::new();
    message.encode(protocol, &mut writer);
    writer.as_bytes().to_vec()
}

fn invalid(message: &[u8], protocol: &Protocol) -> Invalid {
    match decode(message, protocol) {
        Err(ReadError::Invalid(invalid)) => invalid,
        other => panic!("{other:?}"),
    }
}

#[test]
fn is_valid_path_in_plain_bytes() {
    let message = b"\x01\0\0\0\0\0\0\0\x2d\0\0\0\0\0\0\0/nix/store/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa-a\0\0\0";
    request(&new(), message, &Request::IsValidPath(path('a', "a")));
    response(&new(), &Request::IsValidPath(path('a', "a")), b"\x01\0\0\0\0\0\0\0", &Response::Bool(true));
}

#[test]
fn adding_a_tree_by_name_and_method() {
    let message = bytes(&[N(7), S("tree"), S("fixed:r:sha256"), N(1), S(A), N(0)]);
    let decoded = decode(&message, &new()).unwrap();
    assert_eq!(decoded.payload(&new()), Payload::Framed);
    let Request::AddToStore(add) = decoded else { panic!("{decoded:?}") };
    assert_eq!((add.name.as_str(), add.repair), ("tree", false));
    assert_eq!(add.references, BTreeSet::from([path('a', "a")]));
    assert!(add.method.resolve().is_ok());
}

#[test]
fn an_unknown_method_leaves_the_connection_in_step() {
    let message = bytes(&[N(7), S("a/b"), S("fixed:r:crc32"), N(0), N(0)]);
    let Request::AddToStore(add) = decode(&message, &new()).unwrap() else { panic!("another request") };
    assert!(add.method.resolve().is_err());
    let message = bytes(&[N(7), S("a"), N(1), N(1), S("crc32")]);
    let Request::AddToStoreOld { method, .. } = decode(&message, &old()).unwrap() else { panic!("another request") };
    assert!(method.resolve().is_err());
}

#[test]
fn adding_for_nix_2_3_takes_recursive_sha256_when_not_fixed() {
    let recursive = decode(&bytes(&[N(7), S("a"), N(0), N(1), S("sha256")]), &old()).unwrap();
    assert_eq!(recursive.payload(&old()), Payload::InlineNar);
    let ignored = decode(&bytes(&[N(7), S("a"), N(0), N(0), S("md5")]), &old()).unwrap();
    assert_eq!(recursive, ignored);
    let flat = decode(&bytes(&[N(7), S("a"), N(1), N(0), S("sha1")]), &old()).unwrap();
    let Request::AddToStoreOld { method, .. } = flat else { panic!("{flat:?}") };
    assert_eq!(method, MethodText::new(nix_compat::content_address::Method::Flat, nix_compat::hash::Algorithm::Sha1));
    let third = invalid(&bytes(&[N(7), S("a"), N(1), N(2), S("sha1")]), &old());
    assert!(matches!(third, Invalid::UnknownTag { value: 2, .. }));
}

#[test]
fn what_a_bare_derivation_means_depends_on_the_version() {
    let message = bytes(&[N(9), N(2), S(DRV), S(&format!("{DRV}!dev,out")), N(2)]);
    let drv = path('d', "x.drv");
    let names = ["dev", "out"].map(|name| OutputName::new(name).unwrap());
    let named = DerivedPath::Built { drv: drv.clone(), outputs: OutputsSpec::Names(names.into()) };
    let all = DerivedPath::Built { drv: drv.clone(), outputs: OutputsSpec::All };

    let paths = vec![all.clone(), named.clone()];
    request(&old(), &message, &Request::BuildPaths { paths, mode: BuildMode::Check });
    let paths = vec![DerivedPath::Opaque(drv), named];
    request(&new(), &message, &Request::BuildPaths { paths, mode: BuildMode::Check });
    let star = bytes(&[N(40), N(1), S(&format!("{DRV}!*"))]);
    request(&new(), &star, &Request::QueryMissing(vec![all]));
    assert!(matches!(invalid(&star, &old()), Invalid::DerivedPath(DerivedPathError::Output(_))));
}

#[test]
fn derived_paths_without_outputs_or_of_dynamic_derivations_are_refused() {
    let parse = |suffix: &str| DerivedPath::parse(&format!("{DRV}{suffix}"), &new()).unwrap_err();
    assert!(matches!(parse("!"), DerivedPathError::NoOutputs(_)));
    assert!(matches!(parse(&"!out".repeat(18)), DerivedPathError::TooDeep(_)));
    let dynamic = format!("{DRV}!out!x!*");
    assert_eq!(DerivedPath::parse(&dynamic, &new()).unwrap().print(&new()), dynamic);
    assert!(matches!(parse("!out,"), DerivedPathError::Output(_)));
    assert!(matches!(DerivedPath::parse("/tmp/x!out", &new()).unwrap_err(), DerivedPathError::StorePath(_)));
}

#[test]
fn verbosity_of_nix_2_3_lacks_a_level() {
    let options = ClientOptions {
        verbosity: Verbosity::Info,
        build_verbosity: Verbosity::Vomit,
        overrides: BTreeMap::from([("cores".into(), "2".into())]),
        ..ClientOptions::default()
    };
    let set_options = |info, vomit| {
        let numbers = [0, 0, 0, info, 1, 0, 1, vomit, 0, 0, 0, 1].map(N);
        let mut message = bytes(&[N(19)]);
        message.extend(bytes(&numbers));
        message.extend(bytes(&[N(1), S("cores"), S("2")]));
        message
    };
    request(&old(), &set_options(2, 6), &Request::SetOptions(options.clone()));
    request(&new(), &set_options(3, 7), &Request::SetOptions(options));
}

#[test]
fn the_scope_of_a_collection_has_two_forms() {
    let targets = GcTargets::Paths { paths: [path('a', "a")].into(), delete_referrers: false };
    let specific =
        CollectGarbage { action: GcAction::DeleteSpecific, targets, ignore_liveness: false, max_freed: UNLIMITED };
    let tail = [N(0), N(u64::MAX), N(0), N(0), N(0)];
    let message = [bytes(&[N(20), N(3), N(1), S(A)]), bytes(&tail)].concat();
    request(&new(), &message, &Request::CollectGarbage(specific.clone()));
    let message = [bytes(&[N(20), N(3), N(0), N(1), S(A), N(0)]), bytes(&tail)].concat();
    request(&newest(), &message, &Request::CollectGarbage(specific.clone()));

    let whole = CollectGarbage { action: GcAction::DeleteDead, targets: GcTargets::WholeStore, ..specific };
    let message = [bytes(&[N(20), N(2), N(0)]), bytes(&tail)].concat();
    request(&new(), &message, &Request::CollectGarbage(whole.clone()));
    let message = [bytes(&[N(20), N(2), N(1)]), bytes(&tail)].concat();
    request(&newest(), &message, &Request::CollectGarbage(whole));
    assert!(matches!(invalid(&bytes(&[N(20), N(4)]), &new()), Invalid::UnknownTag { value: 4, .. }));
}

#[test]
fn path_infos_have_a_bare_base_16_hash() {
    let hash = "0123456789abcdef".repeat(4);
    let info = PathInfo {
        path: path('a', "a"),
        deriver: Some(path('d', "x.drv")),
        nar_hash: NarHash::parse(&hash).unwrap(),
        references: [path('a', "a")].into(),
        registration_time: 1_700_000_000,
        nar_size: 120,
        ultimate: true,
        signatures: [Signature::parse("k:AAAA").unwrap()].into(),
        ca: None,
    };
    let unkeyed = [S(DRV), S(&hash), N(1), S(A), N(1_700_000_000), N(120), N(1), N(1), S("k:AAAA"), S("")];
    let to = Request::QueryPathInfo(info.path.clone());
    response(&new(), &to, &[bytes(&[N(1)]), bytes(&unkeyed)].concat(), &Response::PathInfo(Some(info.clone())));
    response(&new(), &to, &bytes(&[N(0)]), &Response::PathInfo(None));

    let prefixed = info.nar_hash.to_prefixed_nix32();
    let keyed = [S(A), S(DRV), S(&prefixed), N(1), S(A), N(1_700_000_000), N(120), N(7), N(1), S("k:AAAA"), S("")];
    assert_eq!(read_path_info(&mut Reader::new(&bytes(&keyed)), &new()).unwrap(), info);
}

#[test]
fn build_results_grow_with_the_versions() {
    let (drv, out) = (path('d', "x.drv"), OutputName::new("out").unwrap());
    let result = BuildResult {
        times_built: 1,
        start_time: 10,
        stop_time: 12,
        cpu_user: Some(5),
        built_outputs: [(out.clone(), BuiltOutput { drv_hash: [0; 32], path: path('a', "a") })].into(),
        ..BuildResult::new(BuildStatus::Built, "")
    };
    let built = DerivedPath::Built { drv, outputs: OutputsSpec::Names([out].into()) };
    let to = Request::BuildPathsWithResults { paths: vec![built.clone()], mode: BuildMode::Normal };

    let id = format!("sha256:{}!out", "0".repeat(64));
    let json = format!(
        r#"{{"dependentRealisations":{{}},"id":"{id}","outPath":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa-a","signatures":[]}}"#
    );
    let key = format!("{DRV}!out");
    let head = [N(1), S(&key), N(0), S("")];
    let times = [N(1), N(0), N(10), N(12)];
    let cpu = [N(1), N(5), N(0)];
    let legacy = [N(1), S(&id), S(&json)];

    let keyed = |result: BuildResult| Response::KeyedBuildResults(vec![(built.clone(), result)]);
    let of_37 = [bytes(&head), bytes(&times), bytes(&cpu), bytes(&legacy)].concat();
    response(&new(), &to, &of_37, &keyed(result.clone()));
    let of_29 = [bytes(&head), bytes(&times), bytes(&legacy)].concat();
    response(&protocol(34, Features::NONE), &to, &of_29, &keyed(BuildResult { cpu_user: None, ..result.clone() }));
    let with_path = [bytes(&head), bytes(&times), bytes(&cpu), bytes(&[N(1), S("out"), S(A), N(0)])].concat();
    response(&newest(), &to, &with_path, &keyed(result.clone()));

    let timed_out = BuildResult { times_built: 3, ..BuildResult::new(BuildStatus::TimedOut, "too long") };
    let mut writer = Writer::new();
    Response::BuildResult(timed_out).encode(&old(), &mut writer);
    assert_eq!(writer.as_bytes(), bytes(&[N(8), S("too long")]));
}

#[test]
fn realisations_have_three_forms() {
    let hash = [0x11; 32];
    let id = format!("sha256:{}!out", "11".repeat(32));
    let (output, base_name) = (OutputName::new("out").unwrap(), "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa-a");
    let realisation = Realisation::new(DrvOutput::Modulo { hash, output: output.clone() }, path('a', "a"));
    let register = Request::RegisterDrvOutput(realisation.clone());
    request(&protocol(27, Features::NONE), &bytes(&[N(42), S(&id), S(base_name)]), &register);
    let json = format!(r#"{{"dependentRealisations":{{}},"id":"{id}","outPath":"{base_name}","signatures":[]}}"#);
    request(&new(), &bytes(&[N(42), S(&json)]), &register);
    let with_path = Realisation::new(DrvOutput::Path { drv: path('d', "x.drv"), output }, path('a', "a"));
    request(&newest(), &bytes(&[N(42), S(DRV), S("out"), S(A), N(0)]), &Request::RegisterDrvOutput(with_path.clone()));

    let query = Request::QueryRealisation(realisation.id.clone());
    response(&new(), &query, &bytes(&[N(1), S(&json)]), &Response::Realisation(Some(realisation.clone())));
    let old_form = protocol(30, Features::NONE);
    response(&old_form, &query, &bytes(&[N(1), S(A)]), &Response::Realisation(Some(realisation)));
    let query = Request::QueryRealisation(with_path.id.clone());
    response(&newest(), &query, &bytes(&[N(1), S(A), N(0)]), &Response::Realisation(Some(with_path)));
    response(&newest(), &query, &bytes(&[N(0)]), &Response::Realisation(None));

    // Optional members may be missing.
    let short = format!(r#"{{"outPath":"{base_name}","id":"{id}"}}"#);
    assert!(decode(&bytes(&[N(42), S(&short)]), &new()).is_ok());
    assert!(matches!(invalid(&bytes(&[N(42), S("{")]), &new()), Invalid::Realisation(_)));
}

#[test]
fn answers_without_and_with_a_word() {
    response(&new(), &Request::SyncWithGc, &bytes(&[N(1)]), &Response::One);
    let multiple = Request::AddMultipleToStore { repair: false, dont_check_sigs: true };
    request(&new(), &bytes(&[N(44), N(0), N(1)]), &multiple);
    response(&new(), &multiple, b"", &Response::Nothing);
    let collect = Request::CollectGarbage(CollectGarbage {
        action: GcAction::ReturnDead,
        targets: GcTargets::WholeStore,
        ignore_liveness: false,
        max_freed: 0,
    });
    let collected = Response::Collected { paths: [b"/nix/store/trash".to_vec()].into(), bytes_freed: 9 };
    response(&new(), &collect, &bytes(&[N(1), S("/nix/store/trash"), N(9), N(0)]), &collected);
}

#[test]
fn a_build_log_is_named_by_base_name() {
    let message = bytes(&[N(45), S("dddddddddddddddddddddddddddddddd-x.drv")]);
    request(&new(), &message, &Request::AddBuildLog(path('d', "x.drv")));
    assert!(matches!(invalid(&bytes(&[N(45), S(DRV)]), &new()), Invalid::StorePath(_)));
}

#[test]
fn errors_have_two_forms() {
    let error =
        ErrorMessage { status: 100, traces: vec![b"while building".to_vec()], ..ErrorMessage::new("it failed") };
    let tag = N(0x6378_7470);
    assert_eq!(encoded(&Message::Error(error.clone()), &old()), bytes(&[tag, S("it failed\nwhile building"), N(100)]));
    let structured =
        [N(0x6378_7470), S("Error"), N(0), S("Error"), S("it failed"), N(0), N(1), N(0), S("while building")];
    assert_eq!(encoded(&Message::Error(error), &new()), bytes(&structured));
    // Nix 2.3.7 takes 0 for success.
    let zero = ErrorMessage { status: 0, ..ErrorMessage::new("x") };
    assert_eq!(encoded(&Message::Error(zero), &old()), bytes(&[N(0x6378_7470), S("x"), N(1)]));
}

#[test]
fn activities_and_results() {
    let start = |level| Message::StartActivity {
        id: 5,
        level,
        kind: ActivityKind::Build,
        text: b"building".to_vec(),
        fields: vec![Field::Text(b"x.drv".to_vec()), Field::Int(1)],
        parent: 4,
    };
    let message = |level| {
        let fields = [N(2), N(1), S("x.drv"), N(0), N(1), N(4)];
        [bytes(&[N(0x5354_5254), N(5), N(level), N(105), S("building")]), bytes(&fields)].concat()
    };
    assert_eq!(encoded(&start(Verbosity::Info), &new()), message(3));
    assert_eq!(encoded(&start(Verbosity::Info), &old()), message(2));
    assert_eq!(encoded(&start(Verbosity::Notice), &old()), message(2));
    let log = Message::Result { id: 5, kind: ResultKind::BuildLogLine, fields: vec![Field::Text(b"\xff".to_vec())] };
    let mut line = bytes(&[N(0x5253_4c54), N(5), N(101), N(1), N(1), N(1)]);
    line.extend(b"\xff\0\0\0\0\0\0\0");
    assert_eq!(encoded(&log, &new()), line);
    assert_eq!(encoded(&Message::StopActivity(5), &new()), bytes(&[N(0x5354_4f50), N(5)]));

    let ancient = protocol(19, Features::NONE);
    assert_eq!(encoded(&start(Verbosity::Info), &ancient), bytes(&[N(0x6f6c_6d67), S("building...")]));
    assert_eq!(encoded(&log, &ancient), b"");
}

#[test]
fn malformed_requests_are_named_as_stock_names_them() {
    let text = |message: &[u8]| invalid(message, &new()).to_string();
    assert_eq!(text(&bytes(&[N(2)])), "invalid operation 2");
    assert_eq!(text(&bytes(&[N(1000)])), "invalid operation 1000");
    assert!(text(&bytes(&[N(1 << 32)])).contains("too large"));
    assert!(text(&bytes(&[N(1), S("/tmp/x")])).contains("path '/tmp/x' is not in the "));
    let mut padding = bytes(&[N(1), S(A)]);
    *padding.last_mut().unwrap() = 1;
    assert_eq!(text(&padding), "non-zero padding");
    assert!(matches!(invalid(&bytes(&[N(46), N(0), N(3)]), &new()), Invalid::UnknownTag { what: "build mode", .. }));
    assert!(matches!(
        invalid(&bytes(&[N(36), S(A), N(0), N(0), S(""), S(""), N(0), N(0)]), &new()),
        Invalid::Derivation(_)
    ));
}

#[test]
fn lengths_from_outside_allocate_nothing_and_are_bounded() {
    let string = invalid(&bytes(&[N(1), N(1 << 62)]), &new());
    assert!(matches!(string, Invalid::StringTooLong { length, .. } if length == 1 << 62));
    let list = invalid(&bytes(&[N(31), N(u64::MAX)]), &new());
    assert!(matches!(list, Invalid::ListTooLong { count: u64::MAX, .. }));
    let Err(ReadError::Incomplete { needed }) = decode(&bytes(&[N(31), N(1_000_000)]), &new()) else { panic!() };
    assert_eq!(needed, 16 + 8_000_000);
}
