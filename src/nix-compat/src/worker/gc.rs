//! CollectGarbage: what to look at and what to delete.

use std::collections::BTreeSet;

use super::values::{Value, read};
use super::{Features, Protocol};
use crate::store_path::StorePath;
use crate::wire::{Invalid, ReadError, Reader, Writer, wire_enum};

/// The value of [`CollectGarbage::max_freed`] that sets no limit.
pub const UNLIMITED: u64 = u64::MAX;

wire_enum! {
    /// What a collection does.
    pub enum GcAction {
        /// Lists what is alive.
        ReturnLive = 0,
        /// Lists what is dead.
        ReturnDead = 1,
        /// Deletes what is dead.
        DeleteDead = 2,
        /// Deletes the given paths, and fails if one is alive.
        DeleteSpecific = 3,
    }
}

/// A request to collect garbage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CollectGarbage {
    /// What to do.
    pub action: GcAction,
    /// What to do it with.
    pub targets: GcTargets,
    /// Delete even what is alive; no daemon allows it.
    pub ignore_liveness: bool,
    /// Stop after freeing so many bytes; [`UNLIMITED`] for no limit.
    pub max_freed: u64,
}

/// The scope of a collection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GcTargets {
    /// Everything.
    WholeStore,
    /// Some paths.
    Paths {
        /// These.
        paths: BTreeSet<StorePath>,
        /// Whether dead paths that refer to them are deleted too. Always false without the feature.
        delete_referrers: bool,
    },
}

impl CollectGarbage {
    pub(super) fn decode(reader: &mut Reader<'_>, protocol: &Protocol) -> Result<Self, ReadError> {
        let action = reader.u64()?;
        let action = GcAction::from_code(action).ok_or(Invalid::UnknownTag { what: "GC action", value: action })?;
        let targets = if protocol.has(Features::DELETE_REFERRERS) {
            match reader.u8()? {
                0 => GcTargets::Paths { paths: read(reader, protocol)?, delete_referrers: reader.bool()? },
                1 => GcTargets::WholeStore,
                tag => return Err(Invalid::UnknownTag { what: "GC scope", value: tag.into() }.into()),
            }
        } else {
            let paths: BTreeSet<StorePath> = read(reader, protocol)?;
            if paths.is_empty() && action != GcAction::DeleteSpecific {
                GcTargets::WholeStore
            } else {
                GcTargets::Paths { paths, delete_referrers: false }
            }
        };
        let ignore_liveness = reader.bool()?;
        let max_freed = reader.u64()?;
        for _obsolete in 0..3 {
            reader.u64()?;
        }
        Ok(Self { action, targets, ignore_liveness, max_freed })
    }

    pub(super) fn encode(&self, protocol: &Protocol, writer: &mut Writer) {
        writer.u64(self.action.code());
        let feature = protocol.has(Features::DELETE_REFERRERS);
        match &self.targets {
            GcTargets::WholeStore if feature => writer.u64(1),
            GcTargets::WholeStore => writer.count(0),
            GcTargets::Paths { paths, delete_referrers } => {
                if feature {
                    writer.u64(0);
                }
                paths.write(protocol, writer);
                if feature {
                    writer.bool(*delete_referrers);
                }
            }
        }
        writer.bool(self.ignore_liveness);
        writer.u64(self.max_freed);
        for _obsolete in 0..3 {
            writer.u64(0);
        }
    }
}
