//! The encodings of requests.

use std::collections::BTreeSet;

use super::derivation::{read_derivation, write_derivation};
use super::values::{Value, read, read_base_name};
use super::{
    AddToStore, AddToStoreNar, ClientOptions, CollectGarbage, MethodText, Operation, Protocol, Request, read_path_info,
    write_path_info,
};
use crate::store_path::StorePath;
use crate::wire::{Invalid, MAX_STRING, ReadError, Reader, Writer};

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
                method: MethodText::read(r)?,
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
            Operation::RegisterDrvOutput => Self::RegisterDrvOutput(read(r, p)?),
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
                method.write(w);
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
            Self::RegisterDrvOutput(realisation) => realisation.write(p, w),
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
}
