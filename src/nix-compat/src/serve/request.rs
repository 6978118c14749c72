//! What a client asks for.

use std::collections::BTreeSet;

use super::{BuildOptions, Protocol};
use crate::derivation::BasicDerivation;
use crate::path_info::PathInfo;
use crate::store_path::StorePath;
use crate::wire::{Invalid, ReadError, Reader, Writer};
use crate::worker::{self, DerivedPath, Value};

const QUERY_VALID_PATHS: u64 = 1;
const QUERY_PATH_INFOS: u64 = 2;
const DUMP_STORE_PATH: u64 = 3;
const IMPORT_PATHS: u64 = 4;
const BUILD_PATHS: u64 = 6;
const QUERY_CLOSURE: u64 = 7;
const BUILD_DERIVATION: u64 = 8;
const ADD_TO_STORE_NAR: u64 = 9;

/// A request. Those that write need a server called with `--write`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Which of these paths are valid?
    QueryValidPaths {
        /// Whether to keep them from being collected while the connection lives.
        lock: bool,
        /// Whether to get from substituters those that are not.
        substitute: bool,
        /// The paths.
        paths: BTreeSet<StorePath>,
    },
    /// What is known of those of these paths that are valid?
    QueryPathInfos(BTreeSet<StorePath>),
    /// The NAR of a path; it follows as it is.
    DumpStorePath(StorePath),
    /// An [export stream](crate::export) follows. Writes.
    ImportPaths,
    /// Have these made. Writes.
    BuildPaths {
        /// What to make.
        paths: Vec<DerivedPath>,
        /// How.
        options: BuildOptions,
    },
    /// What do these paths refer to, directly or not?
    QueryClosure {
        /// Whether what a derivation made belongs to it.
        include_outputs: bool,
        /// The paths.
        paths: BTreeSet<StorePath>,
    },
    /// Build a derivation that is sent along. Writes.
    BuildDerivation {
        /// Its path; it need not be valid.
        drv_path: StorePath,
        /// The derivation.
        derivation: BasicDerivation,
        /// How to build it.
        options: BuildOptions,
    },
    /// A path, whose NAR follows. Since 2.5. Writes.
    AddToStoreNar(PathInfo),
}

impl Request {
    /// Takes a request. On [`ReadError::Incomplete`] decode again from the start when more has arrived.
    pub fn decode(r: &mut Reader<'_>, protocol: &Protocol) -> Result<Self, ReadError> {
        let p = &protocol.values();
        Ok(match r.u64()? {
            QUERY_VALID_PATHS => {
                Self::QueryValidPaths { lock: r.bool()?, substitute: r.bool()?, paths: Value::read(r, p)? }
            }
            QUERY_PATH_INFOS => Self::QueryPathInfos(Value::read(r, p)?),
            DUMP_STORE_PATH => Self::DumpStorePath(Value::read(r, p)?),
            IMPORT_PATHS => Self::ImportPaths,
            BUILD_PATHS => Self::BuildPaths { paths: Value::read(r, p)?, options: BuildOptions::read(r, protocol)? },
            QUERY_CLOSURE => Self::QueryClosure { include_outputs: r.bool()?, paths: Value::read(r, p)? },
            BUILD_DERIVATION => {
                let drv_path = Value::read(r, p)?;
                let derivation = worker::read_derivation(r, p, &drv_path)?;
                Self::BuildDerivation { drv_path, derivation, options: BuildOptions::read(r, protocol)? }
            }
            ADD_TO_STORE_NAR => Self::AddToStoreNar(worker::read_path_info(r, p)?),
            other => return Err(Invalid::Operation(other).into()),
        })
    }

    /// Appends the request.
    pub fn encode(&self, protocol: &Protocol, w: &mut Writer) {
        let p = &protocol.values();
        match self {
            Self::QueryValidPaths { lock, substitute, paths } => {
                w.u64(QUERY_VALID_PATHS);
                w.bool(*lock);
                w.bool(*substitute);
                paths.write(p, w);
            }
            Self::QueryPathInfos(paths) => {
                w.u64(QUERY_PATH_INFOS);
                paths.write(p, w);
            }
            Self::DumpStorePath(path) => {
                w.u64(DUMP_STORE_PATH);
                path.write(p, w);
            }
            Self::ImportPaths => w.u64(IMPORT_PATHS),
            Self::BuildPaths { paths, options } => {
                w.u64(BUILD_PATHS);
                paths.write(p, w);
                options.write(protocol, w);
            }
            Self::QueryClosure { include_outputs, paths } => {
                w.u64(QUERY_CLOSURE);
                w.bool(*include_outputs);
                paths.write(p, w);
            }
            Self::BuildDerivation { drv_path, derivation, options } => {
                w.u64(BUILD_DERIVATION);
                drv_path.write(p, w);
                worker::write_derivation(derivation, p, w);
                options.write(protocol, w);
            }
            Self::AddToStoreNar(info) => {
                w.u64(ADD_TO_STORE_NAR);
                worker::write_path_info(info, p, w);
            }
        }
    }
}
