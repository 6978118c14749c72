//! What arrives of a value: each version drops or merges what it has no words for.

use std::collections::BTreeSet;

use nix_compat::content_address::Method;
use nix_compat::store_path::StorePath;
use nix_compat::worker::stderr::{ErrorMessage, Message, Verbosity};
use nix_compat::worker::{
    AddToStore, BuildResult, ClientOptions, DerivedPath, DrvOutput, Features, GcAction, GcTargets, MethodText,
    OutputsSpec, Protocol, Realisation, Request, Response,
};

/// The request as far as `protocol` can express it.
pub(crate) fn expressible(request: Request, protocol: &Protocol) -> Request {
    match request {
        Request::AddToStore(AddToStore { name, method, .. }) if !protocol.since(25) => {
            let method = match method.resolve().unwrap() {
                (Method::Text, algorithm) => MethodText::new(Method::Flat, algorithm),
                _ => method,
            };
            Request::AddToStoreOld { name, method }
        }
        Request::BuildPaths { paths, mode } => {
            Request::BuildPaths { paths: paths.into_iter().map(|path| derived(path, protocol)).collect(), mode }
        }
        Request::BuildPathsWithResults { paths, mode } => {
            let paths = paths.into_iter().map(|path| derived(path, protocol)).collect();
            Request::BuildPathsWithResults { paths, mode }
        }
        Request::QueryMissing(paths) => {
            Request::QueryMissing(paths.into_iter().map(|path| derived(path, protocol)).collect())
        }
        Request::SetOptions(options) => Request::SetOptions(ClientOptions {
            verbosity: level(options.verbosity, protocol),
            build_verbosity: level(options.build_verbosity, protocol),
            ..options
        }),
        Request::CollectGarbage(mut collect) if !protocol.has(Features::DELETE_REFERRERS) => {
            let paths = match collect.targets {
                GcTargets::WholeStore => BTreeSet::new(),
                GcTargets::Paths { paths, .. } => paths,
            };
            collect.targets = if paths.is_empty() && collect.action != GcAction::DeleteSpecific {
                GcTargets::WholeStore
            } else {
                GcTargets::Paths { paths, delete_referrers: false }
            };
            Request::CollectGarbage(collect)
        }
        Request::QuerySubstitutablePathInfos(paths) if !protocol.since(22) => {
            Request::QuerySubstitutablePathInfos(paths.into_keys().map(|path| (path, None)).collect())
        }
        Request::QueryValidPaths { paths, .. } if !protocol.since(27) => {
            Request::QueryValidPaths { paths, substitute: false }
        }
        Request::RegisterDrvOutput(realisation) => Request::RegisterDrvOutput(realised(realisation, protocol)),
        Request::QueryRealisation(id) => Request::QueryRealisation(output_id(id, protocol)),
        other => other,
    }
}

/// The response as far as `protocol` can express it.
pub(crate) fn expressible_response(response: Response, protocol: &Protocol) -> Response {
    match response {
        Response::BuildResult(built) => Response::BuildResult(result(built, protocol)),
        Response::KeyedBuildResults(results) => Response::KeyedBuildResults(
            results.into_iter().map(|(path, built)| (derived(path, protocol), result(built, protocol))).collect(),
        ),
        Response::Realisation(Some(realisation)) => Response::Realisation(Some(realised(realisation, protocol))),
        other => other,
    }
}

/// What arrives of a message over `protocol`.
pub(crate) fn expressible_message(message: Message, protocol: &Protocol) -> Option<Message> {
    Some(match message {
        Message::Error(mut error) if !protocol.since(26) => {
            for trace in std::mem::take(&mut error.traces) {
                error.message.push(b'\n');
                error.message.extend(trace);
            }
            Message::Error(ErrorMessage { level: Verbosity::Error, ..error })
        }
        Message::Error(error) => Message::Error(ErrorMessage { status: 1, ..error }),
        Message::StartActivity { text, .. } if !protocol.since(20) => {
            if text.is_empty() {
                return None;
            }
            Message::Next([text, b"...".to_vec()].concat())
        }
        Message::StopActivity(_) | Message::Result { .. } if !protocol.since(20) => return None,
        Message::StartActivity { id, level: at, kind, text, fields, parent } => {
            Message::StartActivity { id, level: level(at, protocol), kind, text, fields, parent }
        }
        other => other,
    })
}

fn level(level: Verbosity, protocol: &Protocol) -> Verbosity {
    if !protocol.since(22) && level == Verbosity::Notice { Verbosity::Info } else { level }
}

fn derived(path: DerivedPath, protocol: &Protocol) -> DerivedPath {
    match path {
        DerivedPath::Opaque(drv) if drv.is_derivation() && !protocol.since(30) => {
            DerivedPath::Built { drv, outputs: OutputsSpec::All }
        }
        // Nothing says "all" there, so the last name is that of an output.
        DerivedPath::Dynamic { drv, mut through, outputs: OutputsSpec::All } if !protocol.since(30) => {
            let outputs = OutputsSpec::Names(through.pop().into_iter().collect());
            if through.is_empty() {
                DerivedPath::Built { drv, outputs }
            } else {
                DerivedPath::Dynamic { drv, through, outputs }
            }
        }
        other => other,
    }
}

fn output_id(id: DrvOutput, protocol: &Protocol) -> DrvOutput {
    match (id, protocol.has(Features::REALISATION_WITH_PATH)) {
        (DrvOutput::Modulo { hash, output }, true) => {
            let drv = StorePath::from_parts(hash[..20].try_into().unwrap(), "x.drv").unwrap();
            DrvOutput::Path { drv, output }
        }
        (DrvOutput::Path { output, .. }, false) => DrvOutput::Modulo { hash: [7; 32], output },
        (id, _) => id,
    }
}

fn realised(realisation: Realisation, protocol: &Protocol) -> Realisation {
    let with_path = protocol.has(Features::REALISATION_WITH_PATH);
    let Realisation { id, out_path, mut signatures, mut dependencies } = realisation;
    let id = output_id(id, protocol);
    if with_path || !protocol.since(31) {
        dependencies.clear();
    }
    if !with_path && !protocol.since(31) {
        signatures.clear();
    }
    let dependencies = dependencies.into_iter().map(|(id, path)| (output_id(id, protocol), path)).collect();
    Realisation { id, out_path, signatures, dependencies }
}

fn result(mut result: BuildResult, protocol: &Protocol) -> BuildResult {
    if !protocol.since(28) {
        result.built_outputs.clear();
    }
    if protocol.has(Features::REALISATION_WITH_PATH) {
        result.built_outputs.values_mut().for_each(|built| built.drv_hash = [0; 32]);
    }
    if !protocol.since(29) {
        let BuildResult { status, error, built_outputs, .. } = result;
        return BuildResult { built_outputs, ..BuildResult::new(status, error) };
    }
    if !protocol.since(37) {
        (result.cpu_user, result.cpu_system) = (None, None);
    }
    result
}
