//! Requests: an operation and its arguments.

use std::collections::{BTreeMap, BTreeSet};

use super::derivation::{read_derivation, write_derivation};
use super::values::{Value, read, read_base_name};
use super::{
    BuildMode, ClientOptions, CollectGarbage, DerivedPath, DrvOutput, Operation, Payload, Protocol, Realisation,
    read_path_info, write_path_info,
};
use crate::content_address::{self, ContentAddress, Method};
use crate::derivation::BasicDerivation;
use crate::hash::Algorithm;
use crate::path_info::PathInfo;
use crate::signature::Signature;
use crate::store_path::StorePath;
use crate::wire::{Invalid, MAX_STRING, ReadError, Reader, Writer};

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
    /// The payload is a count and so many times a path info ([`read_path_info`]) with its NAR. Answered by
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

/// A content-address method as a client wrote it. Kept as text because it stands in front of a payload: an error in it
/// must not cost the connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MethodText(String);

impl MethodText {
    /// What AddToStore below 1.25 writes as a single number.
    const RECURSIVE_SHA256: &'static str = "fixed:r:sha256";

    /// The text for a method and algorithm.
    pub fn new(method: Method, algorithm: Algorithm) -> Self {
        Self(content_address::method_to_string(method, algorithm))
    }

    /// The method and algorithm, if it names any.
    pub fn resolve(&self) -> Result<(Method, Algorithm), content_address::Error> {
        content_address::parse_method(&self.0)
    }

    /// Reads the fields of AddToStore below 1.25.
    fn read_old(reader: &mut Reader<'_>) -> Result<Self, ReadError> {
        let fixed = reader.bool()?;
        let recursive = match reader.u8()? {
            0 => "",
            1 => "r:",
            tag => return Err(Invalid::UnknownTag { what: "ingestion method", value: tag.into() }.into()),
        };
        let algorithm = reader.lossy_text(MAX_STRING)?;
        Ok(Self(if fixed { format!("fixed:{recursive}{algorithm}") } else { Self::RECURSIVE_SHA256.to_owned() }))
    }

    /// Writes the fields of AddToStore below 1.25, which cannot express text hashing.
    fn write_old(&self, writer: &mut Writer) {
        let text = self.0.strip_prefix("fixed:").unwrap_or(&self.0);
        let (recursive, algorithm) = match text.strip_prefix("r:") {
            Some(algorithm) => (true, algorithm),
            None => (false, text),
        };
        writer.bool(self.0 != Self::RECURSIVE_SHA256);
        writer.bool(recursive);
        writer.bytes(algorithm);
    }
}

impl Request {
    /// Takes a request. On [`ReadError::Incomplete`] decode again from the start when more has arrived; on
    /// [`ReadError::Invalid`] the connection is out of step and can only be closed after the error is told.
    pub fn decode(reader: &mut Reader<'_>, protocol: &Protocol) -> Result<Self, ReadError> {
        let code = reader.u32()?.into();
        let operation = Operation::from_code(code).ok_or(Invalid::Operation(code))?;
        Self::decode_arguments(operation, reader, protocol)
    }

    #[rustfmt::skip] // one line for each operation that has one argument
    fn decode_arguments(operation: Operation, r: &mut Reader<'_>, p: &Protocol) -> Result<Self, ReadError> {
        Ok(match operation {
            Operation::IsValidPath => Self::IsValidPath(read(r, p)?),
            Operation::HasSubstitutes => Self::HasSubstitutes(read(r, p)?),
            Operation::QueryPathHash => Self::QueryPathHash(read(r, p)?),
            Operation::QueryReferences => Self::QueryReferences(read(r, p)?),
            Operation::QueryReferrers => Self::QueryReferrers(read(r, p)?),
            Operation::AddToStore if p.since(25) => Self::AddToStore(AddToStore {
                name: r.lossy_text(MAX_STRING)?,
                method: MethodText(r.lossy_text(MAX_STRING)?),
                references: read(r, p)?,
                repair: r.bool()?,
            }),
            Operation::AddToStore => Self::AddToStoreOld {
                name: r.lossy_text(MAX_STRING)?,
                method: MethodText::read_old(r)?,
            },
            Operation::AddTextToStore => Self::AddTextToStore {
                name: r.lossy_text(MAX_STRING)?,
                text: r.bytes(MAX_STRING)?.to_vec(),
                references: read(r, p)?,
            },
            Operation::BuildPaths => Self::BuildPaths { paths: read(r, p)?, mode: read(r, p)? },
            Operation::EnsurePath => Self::EnsurePath(read(r, p)?),
            Operation::AddTempRoot => Self::AddTempRoot(read(r, p)?),
            Operation::AddIndirectRoot => Self::AddIndirectRoot(r.bytes(MAX_STRING)?.to_vec()),
            Operation::SyncWithGc => Self::SyncWithGc,
            Operation::FindRoots => Self::FindRoots,
            Operation::ExportPath => {
                let path = read(r, p)?;
                let _sign = r.u64()?;
                Self::ExportPath(path)
            }
            Operation::QueryDeriver => Self::QueryDeriver(read(r, p)?),
            Operation::SetOptions => Self::SetOptions(ClientOptions::decode(r, p)?),
            Operation::CollectGarbage => Self::CollectGarbage(CollectGarbage::decode(r, p)?),
            Operation::QuerySubstitutablePathInfo => Self::QuerySubstitutablePathInfo(read(r, p)?),
            Operation::QueryDerivationOutputs => Self::QueryDerivationOutputs(read(r, p)?),
            Operation::QueryAllValidPaths => Self::QueryAllValidPaths,
            Operation::QueryPathInfo => Self::QueryPathInfo(read(r, p)?),
            Operation::ImportPaths => Self::ImportPaths,
            Operation::QueryDerivationOutputNames => Self::QueryDerivationOutputNames(read(r, p)?),
            Operation::QueryPathFromHashPart => Self::QueryPathFromHashPart(r.lossy_text(MAX_STRING)?),
            Operation::QuerySubstitutablePathInfos if p.since(22) => Self::QuerySubstitutablePathInfos(read(r, p)?),
            Operation::QuerySubstitutablePathInfos => {
                let paths: BTreeSet<StorePath> = read(r, p)?;
                Self::QuerySubstitutablePathInfos(paths.into_iter().map(|path| (path, None)).collect())
            }
            Operation::QueryValidPaths => Self::QueryValidPaths {
                paths: read(r, p)?,
                substitute: p.since(27) && r.bool()?,
            },
            Operation::QuerySubstitutablePaths => Self::QuerySubstitutablePaths(read(r, p)?),
            Operation::QueryValidDerivers => Self::QueryValidDerivers(read(r, p)?),
            Operation::OptimiseStore => Self::OptimiseStore,
            Operation::VerifyStore => Self::VerifyStore { check_contents: r.bool()?, repair: r.bool()? },
            Operation::BuildDerivation => {
                let drv_path = read(r, p)?;
                let derivation = read_derivation(r, p, &drv_path)?;
                Self::BuildDerivation { drv_path, derivation, mode: read(r, p)? }
            }
            Operation::AddSignatures => Self::AddSignatures { path: read(r, p)?, signatures: read(r, p)? },
            Operation::NarFromPath => Self::NarFromPath(read(r, p)?),
            Operation::AddToStoreNar => Self::AddToStoreNar(AddToStoreNar {
                info: read_path_info(r, p)?,
                repair: r.bool()?,
                dont_check_sigs: r.bool()?,
            }),
            Operation::QueryMissing => Self::QueryMissing(read(r, p)?),
            Operation::QueryDerivationOutputMap => Self::QueryDerivationOutputMap(read(r, p)?),
            Operation::RegisterDrvOutput => Self::RegisterDrvOutput(Realisation::decode(r, p)?),
            Operation::QueryRealisation => Self::QueryRealisation(read(r, p)?),
            Operation::AddMultipleToStore => Self::AddMultipleToStore { repair: r.bool()?, dont_check_sigs: r.bool()? },
            Operation::AddBuildLog => Self::AddBuildLog(read_base_name(r)?),
            Operation::BuildPathsWithResults => Self::BuildPathsWithResults { paths: read(r, p)?, mode: read(r, p)? },
            Operation::AddPermRoot => Self::AddPermRoot { path: read(r, p)?, link: r.bytes(MAX_STRING)?.to_vec() },
        })
    }

    /// Appends the request. [`Self::AddToStore`] needs 1.25, [`Self::AddToStoreOld`] less.
    pub fn encode(&self, protocol: &Protocol, writer: &mut Writer) {
        let (p, w) = (protocol, writer);
        w.u64(self.operation().code());
        match self {
            Self::IsValidPath(path)
            | Self::HasSubstitutes(path)
            | Self::QueryPathHash(path)
            | Self::QueryReferences(path)
            | Self::QueryReferrers(path)
            | Self::EnsurePath(path)
            | Self::AddTempRoot(path)
            | Self::QueryDeriver(path)
            | Self::QuerySubstitutablePathInfo(path)
            | Self::QueryDerivationOutputs(path)
            | Self::QueryPathInfo(path)
            | Self::QueryDerivationOutputNames(path)
            | Self::QueryValidDerivers(path)
            | Self::NarFromPath(path)
            | Self::QueryDerivationOutputMap(path) => path.write(p, w),
            Self::SyncWithGc | Self::FindRoots | Self::QueryAllValidPaths | Self::ImportPaths | Self::OptimiseStore => {
            }
            Self::AddToStore(AddToStore { name, method, references, repair }) => {
                w.bytes(name);
                w.bytes(&method.0);
                references.write(p, w);
                w.bool(*repair);
            }
            Self::AddToStoreOld { name, method } => {
                w.bytes(name);
                method.write_old(w);
            }
            Self::AddTextToStore { name, text, references } => {
                w.bytes(name);
                w.bytes(text);
                references.write(p, w);
            }
            Self::BuildPaths { paths, mode } | Self::BuildPathsWithResults { paths, mode } => {
                paths.write(p, w);
                mode.write(p, w);
            }
            Self::AddIndirectRoot(link) => w.bytes(link),
            Self::ExportPath(path) => {
                path.write(p, w);
                w.bool(false);
            }
            Self::SetOptions(options) => options.encode(p, w),
            Self::CollectGarbage(collect) => collect.encode(p, w),
            Self::QueryPathFromHashPart(hash_part) => w.bytes(hash_part),
            Self::QuerySubstitutablePathInfos(paths) if p.since(22) => paths.write(p, w),
            Self::QuerySubstitutablePathInfos(paths) => w.list(paths.keys(), |w, path| path.write(p, w)),
            Self::QueryValidPaths { paths, substitute } => {
                paths.write(p, w);
                if p.since(27) {
                    w.bool(*substitute);
                }
            }
            Self::QuerySubstitutablePaths(paths) => paths.write(p, w),
            Self::VerifyStore { check_contents, repair } => {
                w.bool(*check_contents);
                w.bool(*repair);
            }
            Self::BuildDerivation { drv_path, derivation, mode } => {
                drv_path.write(p, w);
                write_derivation(derivation, p, w);
                mode.write(p, w);
            }
            Self::AddSignatures { path, signatures } => {
                path.write(p, w);
                signatures.write(p, w);
            }
            Self::AddToStoreNar(AddToStoreNar { info, repair, dont_check_sigs }) => {
                write_path_info(info, p, w);
                w.bool(*repair);
                w.bool(*dont_check_sigs);
            }
            Self::QueryMissing(paths) => paths.write(p, w),
            Self::RegisterDrvOutput(realisation) => realisation.encode(p, w),
            Self::QueryRealisation(id) => id.write(p, w),
            Self::AddMultipleToStore { repair, dont_check_sigs } => {
                w.bool(*repair);
                w.bool(*dont_check_sigs);
            }
            Self::AddBuildLog(drv_path) => w.bytes(drv_path.base_name()),
            Self::AddPermRoot { path, link } => {
                path.write(p, w);
                w.bytes(link);
            }
        }
    }

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
        match self {
            Self::AddToStore(_) | Self::AddMultipleToStore { .. } | Self::AddBuildLog(_) => Payload::Framed,
            Self::AddToStoreOld { .. } => Payload::InlineNar,
            Self::AddToStoreNar(_) if protocol.since(23) => Payload::Framed,
            Self::AddToStoreNar(_) if protocol.since(21) => Payload::StderrRead,
            Self::AddToStoreNar(_) => Payload::InlineNar,
            Self::ImportPaths => Payload::StderrRead,
            _ => Payload::None,
        }
    }
}
