//! Responses: what follows [`Message::Last`](super::stderr::Message::Last).

use std::collections::{BTreeMap, BTreeSet};

use super::values::{Value, read, read_unkeyed_path_info, write_unkeyed_path_info};
use super::{BuildResult, DerivedPath, Protocol, Request, read_path_info, write_path_info};
use crate::derivation::OutputName;
use crate::hash::NarHash;
use crate::path_info::PathInfo;
use crate::realisation::Realisation;
use crate::store_path::StorePath;
use crate::wire::{Invalid, MAX_STRING, ReadError, Reader, Writer};

/// The answer to a [`Request`], which says which kind it gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Response {
    /// No bytes at all.
    Nothing,
    /// A word that means nothing but must be there.
    One,
    /// Yes or no.
    Bool(bool),
    /// A path, or none.
    Path(Option<StorePath>),
    /// A set of paths.
    Paths(BTreeSet<StorePath>),
    /// Paths in the order of their import.
    PathList(Vec<StorePath>),
    /// A path's NAR hash.
    NarHash(NarHash),
    /// A string, not necessarily UTF-8.
    Bytes(Vec<u8>),
    /// Output names.
    Strings(Vec<OutputName>),
    /// What is known of a path, or that it is not valid.
    PathInfo(Option<PathInfo>),
    /// What is known of a path that was added.
    AddedPath(PathInfo),
    /// What building would take.
    Missing(Missing),
    /// The collector's roots: where each is found, and what it keeps.
    Roots(Vec<(Vec<u8>, StorePath)>),
    /// What a collection listed or deleted.
    Collected {
        /// Full paths, also of things in the store directory that are no store objects.
        paths: BTreeSet<Vec<u8>>,
        /// How much was freed.
        bytes_freed: u64,
    },
    /// How a build ended.
    BuildResult(BuildResult),
    /// How several builds ended, in the order of the request.
    KeyedBuildResults(Vec<(DerivedPath, BuildResult)>),
    /// The outputs of a derivation with their paths as far as they are known.
    OutputMap(BTreeMap<OutputName, Option<StorePath>>),
    /// What a substituter knows about a path, or none.
    SubstitutableInfo(Option<SubstitutableInfo>),
    /// What substituters know about paths; unknown ones are left out.
    SubstitutableInfos(BTreeMap<StorePath, SubstitutableInfo>),
    /// What an output turned out to be, if known.
    Realisation(Option<Realisation>),
}

/// The answer to QueryMissing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    /// Derivations that would be built.
    pub will_build: BTreeSet<StorePath>,
    /// Paths that would be substituted.
    pub will_substitute: BTreeSet<StorePath>,
    /// Paths that nobody knows how to get.
    pub unknown: BTreeSet<StorePath>,
    /// Bytes to download.
    pub download_size: u64,
    /// The same unpacked, in bytes of NAR.
    pub nar_size: u64,
}

/// What a substituter knows about a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubstitutableInfo {
    /// The derivation that made it.
    pub deriver: Option<StorePath>,
    /// What it refers to.
    pub references: BTreeSet<StorePath>,
    /// Bytes to download; 0 if not known.
    pub download_size: u64,
    /// Bytes of NAR; 0 if not known.
    pub nar_size: u64,
}

impl Response {
    /// Appends the response.
    pub fn encode(&self, protocol: &Protocol, writer: &mut Writer) {
        let (p, w) = (protocol, writer);
        match self {
            Self::Nothing => {}
            Self::One => w.u64(1),
            Self::Bool(value) => w.bool(*value),
            Self::Path(path) => path.write(p, w),
            Self::Paths(paths) => paths.write(p, w),
            Self::PathList(paths) => paths.write(p, w),
            Self::NarHash(hash) => hash.write(p, w),
            Self::Bytes(bytes) => w.bytes(bytes),
            Self::Strings(names) => names.write(p, w),
            Self::PathInfo(info) => {
                w.bool(info.is_some());
                if let Some(info) = info {
                    write_unkeyed_path_info(info, p, w);
                }
            }
            Self::AddedPath(info) => write_path_info(info, p, w),
            Self::Missing(missing) => {
                missing.will_build.write(p, w);
                missing.will_substitute.write(p, w);
                missing.unknown.write(p, w);
                w.u64(missing.download_size);
                w.u64(missing.nar_size);
            }
            Self::Roots(roots) => w.list(roots, |w, (link, path)| {
                w.bytes(link);
                path.write(p, w);
            }),
            Self::Collected { paths, bytes_freed } => {
                w.list(paths, |w, path| w.bytes(path));
                w.u64(*bytes_freed);
                w.u64(0); // obsolete
            }
            Self::BuildResult(result) => result.write(p, w),
            Self::KeyedBuildResults(results) => w.list(results, |w, (path, result)| {
                path.write(p, w);
                result.write(p, w);
            }),
            Self::OutputMap(outputs) => outputs.write(p, w),
            Self::SubstitutableInfo(info) => {
                w.bool(info.is_some());
                if let Some(info) = info {
                    info.write(p, w);
                }
            }
            Self::SubstitutableInfos(infos) => w.list(infos, |w, (path, info)| {
                path.write(p, w);
                info.write(p, w);
            }),
            Self::Realisation(realisation) => Realisation::encode_answer(realisation.as_ref(), p, w),
        }
    }

    /// Takes the answer to `request`.
    pub fn decode(request: &Request, reader: &mut Reader<'_>, protocol: &Protocol) -> Result<Self, ReadError> {
        let (r, p) = (reader, protocol);
        Ok(match request {
            Request::SetOptions(_)
            | Request::NarFromPath(_)
            | Request::AddToStoreNar(_)
            | Request::RegisterDrvOutput(_)
            | Request::AddMultipleToStore { .. } => Self::Nothing,
            Request::BuildPaths { .. }
            | Request::EnsurePath(_)
            | Request::AddTempRoot(_)
            | Request::AddIndirectRoot(_)
            | Request::SyncWithGc
            | Request::ExportPath(_)
            | Request::OptimiseStore
            | Request::AddSignatures { .. }
            | Request::AddBuildLog(_) => {
                r.u64()?;
                Self::One
            }
            Request::IsValidPath(_) | Request::HasSubstitutes(_) | Request::VerifyStore { .. } => Self::Bool(r.bool()?),
            Request::AddToStoreOld { .. }
            | Request::AddTextToStore { .. }
            | Request::QueryDeriver(_)
            | Request::QueryPathFromHashPart(_) => Self::Path(read(r, p)?),
            Request::QueryReferences(_)
            | Request::QueryReferrers(_)
            | Request::QueryDerivationOutputs(_)
            | Request::QueryAllValidPaths
            | Request::QueryValidPaths { .. }
            | Request::QuerySubstitutablePaths(_)
            | Request::QueryValidDerivers(_) => Self::Paths(read(r, p)?),
            Request::ImportPaths => Self::PathList(read(r, p)?),
            Request::QueryPathHash(_) => Self::NarHash(read(r, p)?),
            Request::AddPermRoot { .. } => Self::Bytes(r.bytes(MAX_STRING)?.to_vec()),
            Request::QueryDerivationOutputNames(_) => Self::Strings(read(r, p)?),
            Request::QueryPathInfo(path) => Self::PathInfo(match r.bool()? {
                true => Some(read_unkeyed_path_info(r, p, path.clone())?),
                false => None,
            }),
            Request::AddToStore(_) => Self::AddedPath(read_path_info(r, p)?),
            Request::QueryMissing(_) => Self::Missing(Missing {
                will_build: read(r, p)?,
                will_substitute: read(r, p)?,
                unknown: read(r, p)?,
                download_size: r.u64()?,
                nar_size: r.u64()?,
            }),
            Request::FindRoots => Self::Roots(r.list(2, |r| Ok((r.bytes(MAX_STRING)?.to_vec(), read(r, p)?)))?),
            Request::CollectGarbage(_) => {
                let mut paths = BTreeSet::new();
                r.each_of_strings(1, |r| {
                    paths.insert(r.bytes(MAX_STRING)?.to_vec());
                    Ok(())
                })?;
                let bytes_freed = r.u64()?;
                r.u64()?;
                Self::Collected { paths, bytes_freed }
            }
            Request::BuildDerivation { .. } => Self::BuildResult(read(r, p)?),
            Request::BuildPathsWithResults { .. } => {
                Self::KeyedBuildResults(r.list(3, |r| Ok((read(r, p)?, read(r, p)?)))?)
            }
            Request::QueryDerivationOutputMap(_) => Self::OutputMap(read(r, p)?),
            Request::QuerySubstitutablePathInfo(_) => Self::SubstitutableInfo(match r.u64()? {
                0 => None,
                1 => Some(read(r, p)?),
                value => return Err(Invalid::UnknownTag { what: "optional value", value }.into()),
            }),
            Request::QuerySubstitutablePathInfos(_) => {
                let mut infos = BTreeMap::new();
                r.each(5, |r| {
                    infos.insert(read(r, p)?, read(r, p)?);
                    Ok(())
                })?;
                Self::SubstitutableInfos(infos)
            }
            Request::QueryRealisation(id) => Self::Realisation(Realisation::decode_answer(r, p, id)?),
        })
    }
}

impl Value for SubstitutableInfo {
    fn read(reader: &mut Reader<'_>, protocol: &Protocol) -> Result<Self, ReadError> {
        Ok(Self {
            deriver: read(reader, protocol)?,
            references: read(reader, protocol)?,
            download_size: reader.u64()?,
            nar_size: reader.u64()?,
        })
    }

    fn write(&self, protocol: &Protocol, writer: &mut Writer) {
        self.deriver.write(protocol, writer);
        self.references.write(protocol, writer);
        writer.u64(self.download_size);
        writer.u64(self.nar_size);
    }
}
