//! What a server answers.

use std::collections::BTreeSet;

use super::build::read_status;
use super::{Protocol, Request, read_build_result, write_build_result};
use crate::hash::NarHash;
use crate::path_info::PathInfo;
use crate::store_path::StorePath;
use crate::wire::{MAX_STRING, ReadError, Reader, Writer};
use crate::worker::{BuildResult, BuildStatus, Value};

/// The answer to a [`Request`], which says which kind it gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Response {
    /// The NAR follows as it is.
    Nar,
    /// Whether what was sent is there now.
    Done(bool),
    /// Paths.
    Paths(BTreeSet<StorePath>),
    /// What is known of those paths that are valid. Below 2.4 there are no hashes in it: these are zeros then.
    PathInfos(Vec<PathInfo>),
    /// How BuildPaths ended; the text is empty when it went well.
    Built(BuildStatus, String),
    /// How BuildDerivation ended.
    BuildResult(BuildResult),
}

impl Response {
    /// Takes the answer to `request`.
    pub fn decode(request: &Request, r: &mut Reader<'_>, protocol: &Protocol) -> Result<Self, ReadError> {
        let p = &protocol.values();
        Ok(match request {
            Request::DumpStorePath(_) => Self::Nar,
            Request::ImportPaths | Request::AddToStoreNar(_) => Self::Done(r.u64()? == 1),
            Request::QueryValidPaths { .. } | Request::QueryClosure { .. } => Self::Paths(Value::read(r, p)?),
            Request::QueryPathInfos(_) => {
                let mut infos = Vec::new();
                while let Some(path) = <Option<StorePath> as Value>::read(r, p)? {
                    infos.push(read_path_info(r, protocol, path)?);
                }
                Self::PathInfos(infos)
            }
            Request::BuildPaths { .. } => {
                let status = read_status(r)?;
                let error = if status.is_success() { String::new() } else { r.lossy_text(MAX_STRING)? };
                Self::Built(status, error)
            }
            Request::BuildDerivation { .. } => Self::BuildResult(read_build_result(r, protocol)?),
        })
    }

    /// Appends the response.
    pub fn encode(&self, protocol: &Protocol, w: &mut Writer) {
        let p = &protocol.values();
        match self {
            Self::Nar => {}
            Self::Done(done) => w.bool(*done),
            Self::Paths(paths) => paths.write(p, w),
            Self::PathInfos(infos) => {
                for info in infos {
                    info.path.write(p, w);
                    write_path_info(info, protocol, w);
                }
                w.bytes("");
            }
            Self::Built(status, error) => {
                w.u64(status.code());
                if !status.is_success() {
                    w.bytes(error);
                }
            }
            Self::BuildResult(result) => write_build_result(result, protocol, w),
        }
    }
}

/// Reads what is known of `path` (UnkeyedValidPathInfo). Time and trust are not told.
pub fn read_path_info(r: &mut Reader<'_>, protocol: &Protocol, path: StorePath) -> Result<PathInfo, ReadError> {
    let p = &protocol.values();
    let deriver = Value::read(r, p)?;
    let references = Value::read(r, p)?;
    let _download_size = r.u64()?;
    let mut info = PathInfo {
        path,
        deriver,
        nar_hash: NarHash::from([0; 32]),
        references,
        registration_time: 0,
        nar_size: r.u64()?,
        ultimate: false,
        signatures: BTreeSet::new(),
        ca: None,
    };
    if protocol.since(4) {
        // A server that does not know the hash says "".
        info.nar_hash = <Option<NarHash> as Value>::read(r, p)?.unwrap_or_else(|| NarHash::from([0; 32]));
        info.ca = Value::read(r, p)?;
        info.signatures = Value::read(r, p)?;
    }
    Ok(info)
}

/// The way back from [`read_path_info`]: everything but the path.
pub fn write_path_info(info: &PathInfo, protocol: &Protocol, w: &mut Writer) {
    let p = &protocol.values();
    info.deriver.write(p, w);
    info.references.write(p, w);
    // What would have to be downloaded: the NAR as it is.
    w.u64(info.nar_size);
    w.u64(info.nar_size);
    if protocol.since(4) {
        w.bytes(info.nar_hash.to_prefixed_nix32());
        info.ca.write(p, w);
        info.signatures.write(p, w);
    }
}
