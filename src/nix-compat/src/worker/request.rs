//! Requests: an operation and its arguments.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    BuildMode, ClientOptions, CollectGarbage, DerivedPath, DrvOutput, MethodText, Operation, Payload, Protocol,
    Realisation,
};
use crate::content_address::ContentAddress;
use crate::derivation::BasicDerivation;
use crate::path_info::PathInfo;
use crate::signature::Signature;
use crate::store_path::StorePath;
use crate::wire::MAX_STRING;

/// Largest request without its payload, in bytes. Who receives requests refuses what needs more.
pub const MAX_REQUEST: usize = MAX_STRING;

/// A request without its payload (see [`Request::payload`]).
///
/// An argument that does not parse makes the whole request an error, after which the connection is out of step. The
/// exception are arguments whose errors stock answers while a payload is on its way: they are kept as they came, so that
/// the error can be answered and the payload drained.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Answered by [`Response::Bool`](super::Response::Bool).
    IsValidPath(StorePath),
    /// Answered by [`Response::Bool`](super::Response::Bool).
    HasSubstitutes(StorePath),
    /// Answered by [`Response::NarHash`](super::Response::NarHash).
    QueryPathHash(StorePath),
    /// Answered by [`Response::Paths`](super::Response::Paths).
    QueryReferences(StorePath),
    /// Answered by [`Response::Paths`](super::Response::Paths).
    QueryReferrers(StorePath),
    /// Since 1.25. Answered by [`Response::AddedPath`](super::Response::AddedPath).
    AddToStore(AddToStore),
    /// Below 1.25. The payload is a NAR even for flat hashing: then of a single file. Answered by
    /// [`Response::Path`](super::Response::Path).
    AddToStoreOld {
        /// The store path's name, unchecked.
        name: String,
        /// How to hash, unchecked.
        method: MethodText,
    },
    /// Answered by [`Response::Path`](super::Response::Path).
    AddTextToStore {
        /// The store path's name, unchecked.
        name: String,
        /// The contents.
        text: Vec<u8>,
        /// What the contents refer to.
        references: BTreeSet<StorePath>,
    },
    /// Answered by [`Response::One`](super::Response::One).
    BuildPaths {
        /// What to build.
        paths: Vec<DerivedPath>,
        /// How.
        mode: BuildMode,
    },
    /// Answered by [`Response::One`](super::Response::One).
    EnsurePath(StorePath),
    /// Answered by [`Response::One`](super::Response::One).
    AddTempRoot(StorePath),
    /// The symlink, a path in the file system. Answered by [`Response::One`](super::Response::One).
    AddIndirectRoot(Vec<u8>),
    /// Answered by [`Response::One`](super::Response::One).
    SyncWithGc,
    /// Answered by [`Response::Roots`](super::Response::Roots).
    FindRoots,
    /// Answered by messages with the export record, then [`Response::One`](super::Response::One).
    ExportPath(StorePath),
    /// Answered by [`Response::Path`](super::Response::Path).
    QueryDeriver(StorePath),
    /// Answered by [`Response::Nothing`](super::Response::Nothing).
    SetOptions(ClientOptions),
    /// Answered by [`Response::Collected`](super::Response::Collected).
    CollectGarbage(CollectGarbage),
    /// Answered by [`Response::SubstitutableInfo`](super::Response::SubstitutableInfo).
    QuerySubstitutablePathInfo(StorePath),
    /// Answered by [`Response::Paths`](super::Response::Paths).
    QueryDerivationOutputs(StorePath),
    /// Answered by [`Response::Paths`](super::Response::Paths).
    QueryAllValidPaths,
    /// Answered by [`Response::PathInfo`](super::Response::PathInfo).
    QueryPathInfo(StorePath),
    /// Answered by [`Response::PathList`](super::Response::PathList).
    ImportPaths,
    /// Answered by [`Response::Strings`](super::Response::Strings).
    QueryDerivationOutputNames(StorePath),
    /// The hash part as text, unchecked. Answered by [`Response::Path`](super::Response::Path).
    QueryPathFromHashPart(String),
    /// Paths with their content addresses, which are sent since 1.22. Answered by
    /// [`Response::SubstitutableInfos`](super::Response::SubstitutableInfos).
    QuerySubstitutablePathInfos(BTreeMap<StorePath, Option<ContentAddress>>),
    /// Answered by [`Response::Paths`](super::Response::Paths).
    QueryValidPaths {
        /// The candidates.
        paths: BTreeSet<StorePath>,
        /// Whether to substitute those that are missing. Since 1.27.
        substitute: bool,
    },
    /// Answered by [`Response::Paths`](super::Response::Paths).
    QuerySubstitutablePaths(BTreeSet<StorePath>),
    /// Answered by [`Response::Paths`](super::Response::Paths).
    QueryValidDerivers(StorePath),
    /// Answered by [`Response::One`](super::Response::One).
    OptimiseStore,
    /// Answered by [`Response::Bool`](super::Response::Bool): whether errors are left.
    VerifyStore {
        /// Whether to hash the contents.
        check_contents: bool,
        /// Whether to mend what is damaged.
        repair: bool,
    },
    /// Answered by [`Response::BuildResult`](super::Response::BuildResult).
    BuildDerivation {
        /// Where the derivation would be stored.
        drv_path: StorePath,
        /// What to build.
        derivation: BasicDerivation,
        /// How.
        mode: BuildMode,
    },
    /// Answered by [`Response::One`](super::Response::One).
    AddSignatures {
        /// What is signed.
        path: StorePath,
        /// The additional signatures.
        signatures: BTreeSet<Signature>,
    },
    /// Answered by [`Response::Nothing`](super::Response::Nothing), directly followed by the NAR.
    NarFromPath(StorePath),
    /// Answered by [`Response::Nothing`](super::Response::Nothing).
    AddToStoreNar(AddToStoreNar),
    /// Answered by [`Response::Missing`](super::Response::Missing).
    QueryMissing(Vec<DerivedPath>),
    /// Answered by [`Response::OutputMap`](super::Response::OutputMap).
    QueryDerivationOutputMap(StorePath),
    /// Answered by [`Response::Nothing`](super::Response::Nothing).
    RegisterDrvOutput(Realisation),
    /// Answered by [`Response::Realisation`](super::Response::Realisation).
    QueryRealisation(DrvOutput),
    /// The payload is a count and so many times a path info ([`read_path_info`](super::read_path_info)) with its NAR. Answered by
    /// [`Response::Nothing`](super::Response::Nothing).
    AddMultipleToStore {
        /// Whether to replace what is damaged.
        repair: bool,
        /// Whether to accept paths without trusted signatures.
        dont_check_sigs: bool,
    },
    /// The payload is the log. Answered by [`Response::One`](super::Response::One).
    AddBuildLog(StorePath),
    /// Answered by [`Response::KeyedBuildResults`](super::Response::KeyedBuildResults).
    BuildPathsWithResults {
        /// What to build.
        paths: Vec<DerivedPath>,
        /// How.
        mode: BuildMode,
    },
    /// Answered by [`Response::Bytes`](super::Response::Bytes): the symlink.
    AddPermRoot {
        /// What to keep.
        path: StorePath,
        /// The symlink to make, a path in the file system.
        link: Vec<u8>,
    },
}

/// The arguments of AddToStore since 1.25.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddToStore {
    /// The store path's name, unchecked.
    pub name: String,
    /// How to hash, unchecked. It also says what the payload is: a NAR for recursive hashing, otherwise the contents.
    pub method: MethodText,
    /// What the object refers to.
    pub references: BTreeSet<StorePath>,
    /// Whether to replace what is damaged.
    pub repair: bool,
}

/// The arguments of AddToStoreNar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddToStoreNar {
    /// What the NAR is said to be.
    pub info: PathInfo,
    /// Whether to replace what is damaged.
    pub repair: bool,
    /// Whether to accept the path without a trusted signature.
    pub dont_check_sigs: bool,
}

impl Request {
    /// The operation asked for.
    pub fn operation(&self) -> Operation {
        match self {
            Self::IsValidPath(_) => Operation::IsValidPath,
            Self::HasSubstitutes(_) => Operation::HasSubstitutes,
            Self::QueryPathHash(_) => Operation::QueryPathHash,
            Self::QueryReferences(_) => Operation::QueryReferences,
            Self::QueryReferrers(_) => Operation::QueryReferrers,
            Self::AddToStore(_) | Self::AddToStoreOld { .. } => Operation::AddToStore,
            Self::AddTextToStore { .. } => Operation::AddTextToStore,
            Self::BuildPaths { .. } => Operation::BuildPaths,
            Self::EnsurePath(_) => Operation::EnsurePath,
            Self::AddTempRoot(_) => Operation::AddTempRoot,
            Self::AddIndirectRoot(_) => Operation::AddIndirectRoot,
            Self::SyncWithGc => Operation::SyncWithGc,
            Self::FindRoots => Operation::FindRoots,
            Self::ExportPath(_) => Operation::ExportPath,
            Self::QueryDeriver(_) => Operation::QueryDeriver,
            Self::SetOptions(_) => Operation::SetOptions,
            Self::CollectGarbage(_) => Operation::CollectGarbage,
            Self::QuerySubstitutablePathInfo(_) => Operation::QuerySubstitutablePathInfo,
            Self::QueryDerivationOutputs(_) => Operation::QueryDerivationOutputs,
            Self::QueryAllValidPaths => Operation::QueryAllValidPaths,
            Self::QueryPathInfo(_) => Operation::QueryPathInfo,
            Self::ImportPaths => Operation::ImportPaths,
            Self::QueryDerivationOutputNames(_) => Operation::QueryDerivationOutputNames,
            Self::QueryPathFromHashPart(_) => Operation::QueryPathFromHashPart,
            Self::QuerySubstitutablePathInfos(_) => Operation::QuerySubstitutablePathInfos,
            Self::QueryValidPaths { .. } => Operation::QueryValidPaths,
            Self::QuerySubstitutablePaths(_) => Operation::QuerySubstitutablePaths,
            Self::QueryValidDerivers(_) => Operation::QueryValidDerivers,
            Self::OptimiseStore => Operation::OptimiseStore,
            Self::VerifyStore { .. } => Operation::VerifyStore,
            Self::BuildDerivation { .. } => Operation::BuildDerivation,
            Self::AddSignatures { .. } => Operation::AddSignatures,
            Self::NarFromPath(_) => Operation::NarFromPath,
            Self::AddToStoreNar(_) => Operation::AddToStoreNar,
            Self::QueryMissing(_) => Operation::QueryMissing,
            Self::QueryDerivationOutputMap(_) => Operation::QueryDerivationOutputMap,
            Self::RegisterDrvOutput(_) => Operation::RegisterDrvOutput,
            Self::QueryRealisation(_) => Operation::QueryRealisation,
            Self::AddMultipleToStore { .. } => Operation::AddMultipleToStore,
            Self::AddBuildLog(_) => Operation::AddBuildLog,
            Self::BuildPathsWithResults { .. } => Operation::BuildPathsWithResults,
            Self::AddPermRoot { .. } => Operation::AddPermRoot,
        }
    }

    /// How the data that belongs to the request is transported.
    pub fn payload(&self, protocol: &Protocol) -> Payload {
        match self.operation() {
            Operation::AddToStore if protocol.since(25) => Payload::Framed,
            Operation::AddToStore => Payload::InlineNar,
            Operation::AddToStoreNar if protocol.since(23) => Payload::Framed,
            Operation::AddToStoreNar if protocol.since(21) => Payload::StderrRead,
            Operation::AddToStoreNar => Payload::InlineNar,
            Operation::ImportPaths => Payload::StderrRead,
            Operation::AddMultipleToStore | Operation::AddBuildLog => Payload::Framed,
            Operation::IsValidPath
            | Operation::HasSubstitutes
            | Operation::QueryPathHash
            | Operation::QueryReferences
            | Operation::QueryReferrers
            | Operation::AddTextToStore
            | Operation::BuildPaths
            | Operation::EnsurePath
            | Operation::AddTempRoot
            | Operation::AddIndirectRoot
            | Operation::SyncWithGc
            | Operation::FindRoots
            | Operation::ExportPath
            | Operation::QueryDeriver
            | Operation::SetOptions
            | Operation::CollectGarbage
            | Operation::QuerySubstitutablePathInfo
            | Operation::QueryDerivationOutputs
            | Operation::QueryAllValidPaths
            | Operation::QueryPathInfo
            | Operation::QueryDerivationOutputNames
            | Operation::QueryPathFromHashPart
            | Operation::QuerySubstitutablePathInfos
            | Operation::QueryValidPaths
            | Operation::QuerySubstitutablePaths
            | Operation::QueryValidDerivers
            | Operation::OptimiseStore
            | Operation::VerifyStore
            | Operation::BuildDerivation
            | Operation::AddSignatures
            | Operation::NarFromPath
            | Operation::QueryMissing
            | Operation::QueryDerivationOutputMap
            | Operation::RegisterDrvOutput
            | Operation::QueryRealisation
            | Operation::BuildPathsWithResults
            | Operation::AddPermRoot => Payload::None,
        }
    }
}
