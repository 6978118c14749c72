//! The serve protocol: properties of every message at every version, and its beginning word by word.

use nix_compat::hash::NarHash;
use nix_compat::serve::{self, BuildOptions, HandshakeError, NEWEST_MINOR, OLDEST_MINOR};
use nix_compat::store_path::StoreDir;
use nix_compat::wire::{Reader, Writer};
use nix_compat::worker::{AddToStoreNar, Features, Operation, Request, Response};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use crate::expressible::{expressible, expressible_response};
use crate::properties::{check, sample};
use crate::strategies::{request, response};
use crate::support::{self, N, S, bytes, path};

/// How many values of each kind are tried at each version.
const SAMPLES: u32 = 20;

fn serve_protocol(minor: u16) -> serve::Protocol {
    serve::Protocol { minor, store_dir: StoreDir::default() }
}

fn options(protocol: &serve::Protocol) -> impl Strategy<Value = BuildOptions> + use<> {
    let minor = protocol.minor;
    any::<(u64, u64, u64, u64, bool, bool)>().prop_map(move |drawn| BuildOptions {
        max_silent_time: drawn.0,
        timeout: drawn.1,
        max_log_size: if minor < 2 { 0 } else { drawn.2 },
        repeats: if minor < 3 { 0 } else { drawn.3 },
        enforce_determinism: minor >= 3 && drawn.4,
        keep_failed: minor >= 7 && drawn.5,
    })
}

/// Requests of every kind, with an answer for each: the worker protocol's values in the serve protocol's messages.
fn exchanges(runner: &mut TestRunner, protocol: &serve::Protocol) -> Vec<(serve::Request, serve::Response)> {
    let values = support::protocol(29, Features::NONE);
    let mut exchanges = Vec::new();
    for operation in [
        Operation::QueryValidPaths,
        Operation::QueryPathInfo,
        Operation::BuildPaths,
        Operation::BuildDerivation,
        Operation::AddToStoreNar,
        Operation::ImportPaths,
        Operation::NarFromPath,
    ] {
        let request = expressible(sample(runner, &request(operation)), &values);
        let answer = expressible_response(sample(runner, &response(&request)), &values);
        let options = sample(runner, &options(protocol));
        let exchange = match (request, answer) {
            (Request::QueryValidPaths { paths, substitute }, Response::Paths(found)) => {
                let closure = serve::Request::QueryClosure { include_outputs: substitute, paths: paths.clone() };
                exchanges.push((closure, serve::Response::Paths(found.clone())));
                let request = serve::Request::QueryValidPaths { lock: !substitute, substitute, paths };
                (request, serve::Response::Paths(found))
            }
            (Request::QueryPathInfo(path), Response::PathInfo(info)) => {
                let infos = info.into_iter().map(|mut info| {
                    (info.registration_time, info.ultimate) = (0, false);
                    if !protocol.since(4) {
                        info.nar_hash = NarHash::from([0; 32]);
                        info.ca = None;
                        info.signatures.clear();
                    }
                    info
                });
                (serve::Request::QueryPathInfos([path].into()), serve::Response::PathInfos(infos.collect()))
            }
            (Request::BuildPaths { paths, .. }, _) => {
                let status = sample(runner, &proptest::sample::select(nix_compat::worker::BuildStatus::ALL));
                let error = if status.is_success() { String::new() } else { "why".to_owned() };
                (serve::Request::BuildPaths { paths, options }, serve::Response::Built(status, error))
            }
            (Request::BuildDerivation { drv_path, derivation, .. }, Response::BuildResult(mut result)) => {
                (result.cpu_user, result.cpu_system) = (None, None);
                if !protocol.since(3) {
                    (result.times_built, result.is_non_deterministic) = (0, false);
                    (result.start_time, result.stop_time) = (0, 0);
                }
                if !protocol.since(6) {
                    result.built_outputs.clear();
                }
                let request = serve::Request::BuildDerivation { drv_path, derivation, options };
                (request, serve::Response::BuildResult(result))
            }
            (Request::AddToStoreNar(AddToStoreNar { info, repair, .. }), _) => {
                (serve::Request::AddToStoreNar(info), serve::Response::Done(repair))
            }
            (Request::ImportPaths, _) => (serve::Request::ImportPaths, serve::Response::Done(true)),
            (Request::NarFromPath(path), _) => (serve::Request::DumpStorePath(path), serve::Response::Nar),
            other => panic!("{other:?}"),
        };
        exchanges.push(exchange);
    }
    exchanges
}

#[test]
fn messages_come_back_from_their_encoding() {
    let mut runner = TestRunner::deterministic();
    for protocol in (OLDEST_MINOR..=NEWEST_MINOR).map(serve_protocol) {
        for (request, response) in (0..SAMPLES).flat_map(|_| exchanges(&mut runner, &protocol)).collect::<Vec<_>>() {
            let mut writer = Writer::new();
            request.encode(&protocol, &mut writer);
            check(&request, writer.as_bytes(), |reader| serve::Request::decode(reader, &protocol));
            let mut writer = Writer::new();
            response.encode(&protocol, &mut writer);
            check(&response, writer.as_bytes(), |reader| serve::Response::decode(&request, reader, &protocol));
        }
    }
}

#[test]
fn a_request_word_by_word() {
    let path = path('a', "x");
    let request = serve::Request::QueryValidPaths { lock: true, substitute: false, paths: [path.clone()].into() };
    let mut writer = Writer::new();
    request.encode(&serve_protocol(7), &mut writer);
    let text = StoreDir::default().display(&path);
    assert_eq!(writer.as_bytes(), bytes(&[N(1), N(1), N(0), N(1), S(&text)]));
}

#[test]
fn both_ends_take_the_lower_version() {
    let dir = StoreDir::default();
    for (client, server, wanted) in [(7, 5, 5), (5, 7, 5), (7, 8, 7), (9, 9, 7), (1, 3, 1)] {
        let mut writer = Writer::new();
        serve::write_greeting(client, &mut writer);
        assert_eq!(writer.as_bytes(), bytes(&[N(0x390c_9deb), N(0x200 + u64::from(client))]));
        let found = serve::read_greeting(&mut Reader::new(writer.as_bytes()), server, &dir).unwrap();
        assert_eq!(found, serve_protocol(wanted));
        let mut writer = Writer::new();
        serve::write_answer(server, &mut writer);
        assert_eq!(serve::read_answer(&mut Reader::new(writer.as_bytes()), client, &dir).unwrap(), found);
    }
}

#[test]
fn what_is_no_server() {
    let dir = StoreDir::default();
    let read = |items: &[support::Item<'_>]| serve::read_answer(&mut Reader::new(&bytes(items)), 7, &dir);
    assert!(matches!(read(&[N(0x390c_9deb), N(0x207)]), Err(HandshakeError::Magic(0x390c_9deb))));
    assert!(matches!(read(&[N(0x5452_eecb), N(0x107)]), Err(HandshakeError::Version { major: 1, minor: 7 })));
    assert!(matches!(read(&[N(0x5452_eecb), N(0x200)]), Err(HandshakeError::Version { major: 2, minor: 0 })));
    assert!(matches!(read(&[N(0x5452_eecb)]), Err(HandshakeError::Read(_))));
}
