//! Generators of everything that can be said on a connection, whatever its version.

use std::collections::{BTreeMap, BTreeSet};

use nix_compat::content_address::{ContentAddress, Method};
use nix_compat::derivation::{BasicDerivation, Output, OutputName};
use nix_compat::hash::{Algorithm, Hash, NarHash};
use nix_compat::path_info::PathInfo;
use nix_compat::signature::Signature;
use nix_compat::store_path::StorePath;
use nix_compat::worker::stderr::{ActivityKind, ErrorMessage, Field, Message, ResultKind, Verbosity};
use nix_compat::worker::{
    AddToStore, AddToStoreNar, BuildMode, BuildResult, BuildStatus, BuiltOutput, ClientOptions, CollectGarbage,
    DerivedPath, DrvOutput, GcAction, GcTargets, MethodText, Missing, Operation, OutputsSpec, Realisation, Request,
    Response, SubstitutableInfo,
};
use proptest::collection::{btree_map, btree_set, vec};
use proptest::prelude::*;
use proptest::sample::select;

pub(crate) fn store_path() -> impl Strategy<Value = StorePath> {
    (any::<[u8; 20]>(), "[a-zA-Z0-9+_?=][a-zA-Z0-9+._?=-]{0,12}")
        .prop_map(|(digest, name)| StorePath::from_parts(digest, &name).unwrap())
}

fn drv_path() -> impl Strategy<Value = StorePath> {
    (any::<[u8; 20]>(), "[a-z]{1,9}")
        .prop_map(|(digest, name)| StorePath::from_parts(digest, &format!("{name}.drv")).unwrap())
}

fn paths() -> impl Strategy<Value = BTreeSet<StorePath>> {
    btree_set(store_path(), 0..4)
}

fn output_name() -> impl Strategy<Value = OutputName> {
    "[a-z]{1,5}".prop_map(|name| OutputName::new(&name).unwrap())
}

fn algorithm() -> impl Strategy<Value = Algorithm> {
    select(vec![Algorithm::Md5, Algorithm::Sha1, Algorithm::Sha256, Algorithm::Sha512])
}

fn method() -> impl Strategy<Value = Method> {
    select(vec![Method::Text, Method::Flat, Method::Nar, Method::Git])
}

fn content_address() -> impl Strategy<Value = ContentAddress> {
    (method(), algorithm(), any::<u64>())
        .prop_map(|(method, algorithm, seed)| ContentAddress { method, hash: Hash::of(algorithm, &seed.to_le_bytes()) })
}

fn signatures() -> impl Strategy<Value = BTreeSet<Signature>> {
    let data = vec(any::<u8>(), 64);
    let signature = ("[a-z.]{1,9}-[0-9]", data).prop_map(|(name, data)| Signature::from_parts(&name, &data).unwrap());
    btree_set(signature, 0..3)
}

fn raw() -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 0..20)
}

fn time() -> impl Strategy<Value = u64> {
    0..=i64::MAX.unsigned_abs()
}

fn path_info() -> impl Strategy<Value = PathInfo> {
    (
        (store_path(), proptest::option::of(drv_path()), any::<[u8; 32]>(), paths(), time()),
        (any::<u64>(), any::<bool>(), signatures(), proptest::option::of(content_address())),
    )
        .prop_map(
            |((path, deriver, nar_hash, references, registration_time), (nar_size, ultimate, signatures, ca))| {
                let nar_hash = NarHash::from(nar_hash);
                PathInfo { path, deriver, nar_hash, references, registration_time, nar_size, ultimate, signatures, ca }
            },
        )
}

fn derived_path() -> impl Strategy<Value = DerivedPath> {
    let names = btree_set(output_name(), 1..3).prop_map(OutputsSpec::Names);
    let outputs = prop_oneof![Just(OutputsSpec::All), names];
    prop_oneof![
        store_path().prop_map(DerivedPath::Opaque),
        drv_path().prop_map(DerivedPath::Opaque),
        (drv_path(), outputs.clone()).prop_map(|(drv, outputs)| DerivedPath::Built { drv, outputs }),
        (drv_path(), vec(output_name(), 1..3), outputs).prop_map(|(drv, through, outputs)| DerivedPath::Dynamic {
            drv,
            through,
            outputs
        }),
    ]
}

fn derived_paths() -> impl Strategy<Value = Vec<DerivedPath>> {
    vec(derived_path(), 0..4)
}

fn build_mode() -> impl Strategy<Value = BuildMode> {
    select(BuildMode::ALL)
}

fn derivation() -> impl Strategy<Value = (StorePath, BasicDerivation)> {
    let output = prop_oneof![
        store_path().prop_map(Output::InputAddressed),
        (store_path(), content_address()).prop_map(|(path, ca)| Output::Fixed { path, ca }),
        (method(), algorithm()).prop_map(|(method, algo)| Output::Floating { method, algo }),
        Just(Output::Deferred),
        (method(), algorithm()).prop_map(|(method, algo)| Output::Impure { method, algo }),
    ];
    let outputs = btree_map(output_name(), output, 1..4);
    (drv_path(), outputs, paths(), raw(), raw(), vec(raw(), 0..3), btree_map(raw(), raw(), 0..4)).prop_map(
        |(drv_path, outputs, input_srcs, platform, builder, args, env)| {
            let name = drv_path.name().strip_suffix(".drv").unwrap().to_owned();
            (drv_path, BasicDerivation { name, outputs, input_srcs, platform, builder, args, env })
        },
    )
}

fn drv_output() -> impl Strategy<Value = DrvOutput> {
    prop_oneof![
        (any::<[u8; 32]>(), output_name()).prop_map(|(hash, output)| DrvOutput::Modulo { hash, output }),
        (drv_path(), output_name()).prop_map(|(drv, output)| DrvOutput::Path { drv, output }),
    ]
}

fn realisation() -> impl Strategy<Value = Realisation> {
    (drv_output(), store_path(), signatures(), btree_map(drv_output(), store_path(), 0..3))
        .prop_map(|(id, out_path, signatures, dependencies)| Realisation { id, out_path, signatures, dependencies })
}

fn verbosity() -> impl Strategy<Value = Verbosity> {
    select(Verbosity::ALL)
}

fn options() -> impl Strategy<Value = ClientOptions> {
    (any::<[bool; 4]>(), verbosity(), verbosity(), any::<[u32; 3]>(), btree_map("[a-z-]{1,9}", "\\PC{0,9}", 0..4))
        .prop_map(|(switches, verbosity, build_verbosity, numbers, overrides)| ClientOptions {
            keep_failed: switches[0],
            keep_going: switches[1],
            try_fallback: switches[2],
            verbosity,
            max_build_jobs: numbers[0],
            max_silent_time: numbers[1],
            build_verbosity,
            build_cores: numbers[2],
            use_substitutes: switches[3],
            overrides,
        })
}

fn collect_garbage() -> impl Strategy<Value = CollectGarbage> {
    let some =
        (paths(), any::<bool>()).prop_map(|(paths, delete_referrers)| GcTargets::Paths { paths, delete_referrers });
    let targets = prop_oneof![Just(GcTargets::WholeStore), some];
    (select(GcAction::ALL), targets, any::<bool>(), any::<u64>()).prop_map(
        |(action, targets, ignore_liveness, max_freed)| CollectGarbage { action, targets, ignore_liveness, max_freed },
    )
}

/// Any request for `operation`. The match makes a new operation a compile error here too.
pub(crate) fn request(operation: Operation) -> BoxedStrategy<Request> {
    let name = || "[a-z.]{1,9}";
    let flags = any::<(bool, bool)>();
    match operation {
        Operation::IsValidPath => store_path().prop_map(Request::IsValidPath).boxed(),
        Operation::HasSubstitutes => store_path().prop_map(Request::HasSubstitutes).boxed(),
        Operation::QueryPathHash => store_path().prop_map(Request::QueryPathHash).boxed(),
        Operation::QueryReferences => store_path().prop_map(Request::QueryReferences).boxed(),
        Operation::QueryReferrers => store_path().prop_map(Request::QueryReferrers).boxed(),
        Operation::AddToStore => (name(), method(), algorithm(), paths(), any::<bool>())
            .prop_map(|(name, method, algorithm, references, repair)| {
                Request::AddToStore(AddToStore { name, method: MethodText::new(method, algorithm), references, repair })
            })
            .boxed(),
        Operation::AddTextToStore => (name(), raw(), paths())
            .prop_map(|(name, text, references)| Request::AddTextToStore { name, text, references })
            .boxed(),
        Operation::BuildPaths => {
            (derived_paths(), build_mode()).prop_map(|(paths, mode)| Request::BuildPaths { paths, mode }).boxed()
        }
        Operation::EnsurePath => store_path().prop_map(Request::EnsurePath).boxed(),
        Operation::AddTempRoot => store_path().prop_map(Request::AddTempRoot).boxed(),
        Operation::AddIndirectRoot => raw().prop_map(Request::AddIndirectRoot).boxed(),
        Operation::SyncWithGc => Just(Request::SyncWithGc).boxed(),
        Operation::FindRoots => Just(Request::FindRoots).boxed(),
        Operation::ExportPath => store_path().prop_map(Request::ExportPath).boxed(),
        Operation::QueryDeriver => store_path().prop_map(Request::QueryDeriver).boxed(),
        Operation::SetOptions => options().prop_map(Request::SetOptions).boxed(),
        Operation::CollectGarbage => collect_garbage().prop_map(Request::CollectGarbage).boxed(),
        Operation::QuerySubstitutablePathInfo => store_path().prop_map(Request::QuerySubstitutablePathInfo).boxed(),
        Operation::QueryDerivationOutputs => store_path().prop_map(Request::QueryDerivationOutputs).boxed(),
        Operation::QueryAllValidPaths => Just(Request::QueryAllValidPaths).boxed(),
        Operation::QueryPathInfo => store_path().prop_map(Request::QueryPathInfo).boxed(),
        Operation::ImportPaths => Just(Request::ImportPaths).boxed(),
        Operation::QueryDerivationOutputNames => store_path().prop_map(Request::QueryDerivationOutputNames).boxed(),
        Operation::QueryPathFromHashPart => "[a-z0-9]{32}".prop_map(Request::QueryPathFromHashPart).boxed(),
        Operation::QuerySubstitutablePathInfos => {
            btree_map(store_path(), proptest::option::of(content_address()), 0..4)
                .prop_map(Request::QuerySubstitutablePathInfos)
                .boxed()
        }
        Operation::QueryValidPaths => (paths(), any::<bool>())
            .prop_map(|(paths, substitute)| Request::QueryValidPaths { paths, substitute })
            .boxed(),
        Operation::QuerySubstitutablePaths => paths().prop_map(Request::QuerySubstitutablePaths).boxed(),
        Operation::QueryValidDerivers => store_path().prop_map(Request::QueryValidDerivers).boxed(),
        Operation::OptimiseStore => Just(Request::OptimiseStore).boxed(),
        Operation::VerifyStore => {
            flags.prop_map(|(check_contents, repair)| Request::VerifyStore { check_contents, repair }).boxed()
        }
        Operation::BuildDerivation => (derivation(), build_mode())
            .prop_map(|((drv_path, derivation), mode)| Request::BuildDerivation { drv_path, derivation, mode })
            .boxed(),
        Operation::AddSignatures => (store_path(), signatures())
            .prop_map(|(path, signatures)| Request::AddSignatures { path, signatures })
            .boxed(),
        Operation::NarFromPath => store_path().prop_map(Request::NarFromPath).boxed(),
        Operation::AddToStoreNar => (path_info(), flags)
            .prop_map(|(info, (repair, dont_check_sigs))| {
                Request::AddToStoreNar(AddToStoreNar { info, repair, dont_check_sigs })
            })
            .boxed(),
        Operation::QueryMissing => derived_paths().prop_map(Request::QueryMissing).boxed(),
        Operation::QueryDerivationOutputMap => store_path().prop_map(Request::QueryDerivationOutputMap).boxed(),
        Operation::RegisterDrvOutput => realisation().prop_map(Request::RegisterDrvOutput).boxed(),
        Operation::QueryRealisation => drv_output().prop_map(Request::QueryRealisation).boxed(),
        Operation::AddMultipleToStore => {
            flags.prop_map(|(repair, dont_check_sigs)| Request::AddMultipleToStore { repair, dont_check_sigs }).boxed()
        }
        Operation::AddBuildLog => drv_path().prop_map(Request::AddBuildLog).boxed(),
        Operation::BuildPathsWithResults => (derived_paths(), build_mode())
            .prop_map(|(paths, mode)| Request::BuildPathsWithResults { paths, mode })
            .boxed(),
        Operation::AddPermRoot => {
            (store_path(), raw()).prop_map(|(path, link)| Request::AddPermRoot { path, link }).boxed()
        }
    }
}

fn built_outputs() -> impl Strategy<Value = BTreeMap<OutputName, BuiltOutput>> {
    let built = (any::<[u8; 32]>(), store_path()).prop_map(|(drv_hash, path)| BuiltOutput { drv_hash, path });
    btree_map(output_name(), built, 0..3)
}

fn build_result() -> impl Strategy<Value = BuildResult> {
    let cpu = || proptest::option::of(time());
    (select(BuildStatus::ALL), "\\PC{0,20}", any::<(u64, bool)>(), time(), time(), cpu(), cpu(), built_outputs())
        .prop_map(
            |(
                status,
                error,
                (times_built, is_non_deterministic),
                start_time,
                stop_time,
                cpu_user,
                cpu_system,
                built_outputs,
            )| {
                BuildResult {
                    status,
                    error,
                    times_built,
                    is_non_deterministic,
                    start_time,
                    stop_time,
                    cpu_user,
                    cpu_system,
                    built_outputs,
                }
            },
        )
}

fn substitutable_info() -> impl Strategy<Value = SubstitutableInfo> {
    (proptest::option::of(drv_path()), paths(), any::<u64>(), any::<u64>()).prop_map(
        |(deriver, references, download_size, nar_size)| SubstitutableInfo {
            deriver,
            references,
            download_size,
            nar_size,
        },
    )
}

/// Any answer to `request`. The match makes a new request a compile error here too.
pub(crate) fn response(request: &Request) -> BoxedStrategy<Response> {
    match request {
        Request::SetOptions(_)
        | Request::NarFromPath(_)
        | Request::AddToStoreNar(_)
        | Request::RegisterDrvOutput(_)
        | Request::AddMultipleToStore { .. } => Just(Response::Nothing).boxed(),
        Request::BuildPaths { .. }
        | Request::EnsurePath(_)
        | Request::AddTempRoot(_)
        | Request::AddIndirectRoot(_)
        | Request::SyncWithGc
        | Request::ExportPath(_)
        | Request::OptimiseStore
        | Request::AddSignatures { .. }
        | Request::AddBuildLog(_) => Just(Response::One).boxed(),
        Request::IsValidPath(_) | Request::HasSubstitutes(_) | Request::VerifyStore { .. } => {
            any::<bool>().prop_map(Response::Bool).boxed()
        }
        Request::AddToStoreOld { .. }
        | Request::AddTextToStore { .. }
        | Request::QueryDeriver(_)
        | Request::QueryPathFromHashPart(_) => proptest::option::of(store_path()).prop_map(Response::Path).boxed(),
        Request::QueryReferences(_)
        | Request::QueryReferrers(_)
        | Request::QueryDerivationOutputs(_)
        | Request::QueryAllValidPaths
        | Request::QueryValidPaths { .. }
        | Request::QuerySubstitutablePaths(_)
        | Request::QueryValidDerivers(_) => paths().prop_map(Response::Paths).boxed(),
        Request::ImportPaths => vec(store_path(), 0..4).prop_map(Response::PathList).boxed(),
        Request::QueryPathHash(_) => any::<[u8; 32]>().prop_map(|hash| Response::NarHash(hash.into())).boxed(),
        Request::AddPermRoot { .. } => raw().prop_map(Response::Bytes).boxed(),
        Request::QueryDerivationOutputNames(_) => vec(output_name(), 0..4).prop_map(Response::Strings).boxed(),
        Request::QueryPathInfo(path) => {
            let path = path.clone();
            let known = proptest::option::of(path_info());
            known.prop_map(move |info| Response::PathInfo(info.map(|i| PathInfo { path: path.clone(), ..i }))).boxed()
        }
        Request::AddToStore(_) => path_info().prop_map(Response::AddedPath).boxed(),
        Request::QueryMissing(_) => (paths(), paths(), paths(), any::<u64>(), any::<u64>())
            .prop_map(|(will_build, will_substitute, unknown, download_size, nar_size)| {
                Response::Missing(Missing { will_build, will_substitute, unknown, download_size, nar_size })
            })
            .boxed(),
        Request::FindRoots => vec((raw(), store_path()), 0..4).prop_map(Response::Roots).boxed(),
        Request::CollectGarbage(_) => (btree_set(raw(), 0..4), any::<u64>())
            .prop_map(|(paths, bytes_freed)| Response::Collected { paths, bytes_freed })
            .boxed(),
        Request::BuildDerivation { .. } => build_result().prop_map(Response::BuildResult).boxed(),
        Request::BuildPathsWithResults { .. } => {
            vec((derived_path(), build_result()), 0..3).prop_map(Response::KeyedBuildResults).boxed()
        }
        Request::QueryDerivationOutputMap(_) => {
            btree_map(output_name(), proptest::option::of(store_path()), 0..4).prop_map(Response::OutputMap).boxed()
        }
        Request::QuerySubstitutablePathInfo(_) => {
            proptest::option::of(substitutable_info()).prop_map(Response::SubstitutableInfo).boxed()
        }
        Request::QuerySubstitutablePathInfos(_) => {
            btree_map(store_path(), substitutable_info(), 0..3).prop_map(Response::SubstitutableInfos).boxed()
        }
        Request::QueryRealisation(id) => {
            let id = id.clone();
            let known = proptest::option::of(realisation());
            known
                .prop_map(move |found| {
                    Response::Realisation(found.map(|found| Realisation { id: id.clone(), ..found }))
                })
                .boxed()
        }
    }
}

/// Any message of the side channel.
pub(crate) fn message() -> impl Strategy<Value = Message> {
    let fields = || {
        let field = prop_oneof![any::<u64>().prop_map(Field::Int), raw().prop_map(Field::Text)];
        vec(field, 0..4)
    };
    let error = (verbosity(), raw(), 1..200_u64, vec(raw(), 0..3))
        .prop_map(|(level, message, status, traces)| ErrorMessage { level, message, status, traces });
    prop_oneof![
        raw().prop_map(Message::Next),
        any::<u64>().prop_map(Message::Read),
        raw().prop_map(Message::Write),
        Just(Message::Last),
        error.prop_map(Message::Error),
        (any::<u64>(), verbosity(), select(ActivityKind::ALL), raw(), fields(), any::<u64>()).prop_map(
            |(id, level, kind, text, fields, parent)| Message::StartActivity { id, level, kind, text, fields, parent }
        ),
        any::<u64>().prop_map(Message::StopActivity),
        (any::<u64>(), select(ResultKind::ALL), fields()).prop_map(|(id, kind, fields)| Message::Result {
            id,
            kind,
            fields
        }),
    ]
}
