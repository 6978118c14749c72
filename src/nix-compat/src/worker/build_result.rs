//! How a build ended.

use std::collections::{BTreeMap, BTreeSet};

use super::values::{Value, read};
use super::{Features, Protocol};
use crate::derivation::OutputName;
use crate::realisation::{DrvOutput, Realisation};
use crate::signature::Signature;
use crate::store_path::StorePath;
use crate::wire::{Invalid, MAX_STRING, ReadError, Reader, Writer, wire_enum};

wire_enum! {
    /// How to treat what is there already.
    pub enum BuildMode {
        /// Build what is missing.
        Normal = 0,
        /// Build again what is damaged.
        Repair = 1,
        /// Build again and compare.
        Check = 2,
    }
}

impl Value for BuildMode {
    fn read(reader: &mut Reader<'_>, _: &Protocol) -> Result<Self, ReadError> {
        let value = reader.u64()?;
        Self::from_code(value).ok_or_else(|| Invalid::UnknownTag { what: "build mode", value }.into())
    }

    fn write(&self, _: &Protocol, writer: &mut Writer) {
        writer.u64(self.code());
    }
}

wire_enum! {
    /// The outcome of a build.
    pub enum BuildStatus {
        /// The outputs were built.
        Built = 0,
        /// The outputs were substituted.
        Substituted = 1,
        /// The outputs were there.
        AlreadyValid = 2,
        /// The builder failed.
        PermanentFailure = 3,
        /// The derivation cannot be built as it is.
        InputRejected = 4,
        /// The builder succeeded but its output is not allowed to be what it is.
        OutputRejected = 5,
        /// The builder failed and may succeed another time.
        TransientFailure = 6,
        /// An earlier failure was remembered; unused today.
        CachedFailure = 7,
        /// It took too long, or was silent for too long.
        TimedOut = 8,
        /// Anything else.
        MiscFailure = 9,
        /// Something it needs failed.
        DependencyFailed = 10,
        /// It wrote too much log.
        LogLimitExceeded = 11,
        /// Building again gave another result.
        NotDeterministic = 12,
        /// With its inputs resolved it is a derivation whose outputs are there; since Nix 2.4.
        ResolvesToAlreadyValid = 13,
        /// The path cannot be built and no substituter has it; since Nix 2.8.
        NoSubstituters = 14,
    }
}

impl BuildStatus {
    /// Whether the outputs are valid now.
    pub fn is_success(self) -> bool {
        matches!(self, Self::Built | Self::Substituted | Self::AlreadyValid | Self::ResolvesToAlreadyValid)
    }
}

/// What a client learns about one build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuildResult {
    /// The outcome.
    pub status: BuildStatus,
    /// Why it failed; empty on success.
    pub error: String,
    /// How often it was built.
    pub times_built: u64,
    /// Whether several builds differed.
    pub is_non_deterministic: bool,
    /// When it began, in seconds since 1970; 0 if nothing was built.
    pub start_time: u64,
    /// When it ended, in seconds since 1970.
    pub stop_time: u64,
    /// Processor time in user mode, in microseconds.
    pub cpu_user: Option<u64>,
    /// Processor time in the kernel, in microseconds.
    pub cpu_system: Option<u64>,
    /// The outputs that were asked for; empty on failure. `nix build` prints and links nothing else.
    pub built_outputs: BTreeMap<OutputName, BuiltOutput>,
}

/// An output of a finished build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuiltOutput {
    /// The derivation's hash modulo, by which clients up to Nix 2.34 name the output. Not transmitted with
    /// [`Features::REALISATION_WITH_PATH`]: then decoded as zeros, which is also what stock sends when it has none.
    pub drv_hash: [u8; 32],
    /// Where it is.
    pub path: StorePath,
}

impl BuildResult {
    /// A result of which nothing but the outcome is known.
    pub fn new(status: BuildStatus, error: impl Into<String>) -> Self {
        Self {
            status,
            error: error.into(),
            times_built: 0,
            is_non_deterministic: false,
            start_time: 0,
            stop_time: 0,
            cpu_user: None,
            cpu_system: None,
            built_outputs: BTreeMap::new(),
        }
    }
}

impl Value for BuildResult {
    fn read(reader: &mut Reader<'_>, protocol: &Protocol) -> Result<Self, ReadError> {
        let status = u64::from(reader.u8()?);
        let status =
            BuildStatus::from_code(status).ok_or(Invalid::UnknownTag { what: "build status", value: status })?;
        let mut result = Self::new(status, reader.lossy_text(MAX_STRING)?);
        if protocol.since(29) {
            result.times_built = reader.u64()?;
            result.is_non_deterministic = reader.bool()?;
            result.start_time = reader.u63()?;
            result.stop_time = reader.u63()?;
        }
        if protocol.since(37) {
            result.cpu_user = read_optional_microseconds(reader)?;
            result.cpu_system = read_optional_microseconds(reader)?;
        }
        if protocol.has(Features::REALISATION_WITH_PATH) {
            reader.each(3, |reader| {
                let output = read(reader, protocol)?;
                let path = read(reader, protocol)?;
                let _signatures: BTreeSet<Signature> = read(reader, protocol)?;
                result.built_outputs.insert(output, BuiltOutput { drv_hash: [0; 32], path });
                Ok(())
            })?;
        } else if protocol.since(28) {
            result.built_outputs = read_outputs_by_hash(reader, protocol)?;
        }
        Ok(result)
    }

    fn write(&self, protocol: &Protocol, writer: &mut Writer) {
        writer.u64(self.status.code());
        writer.bytes(&self.error);
        if protocol.since(29) {
            writer.u64(self.times_built);
            writer.bool(self.is_non_deterministic);
            writer.u64(self.start_time);
            writer.u64(self.stop_time);
        }
        if protocol.since(37) {
            write_optional_microseconds(self.cpu_user, writer);
            write_optional_microseconds(self.cpu_system, writer);
        }
        if protocol.has(Features::REALISATION_WITH_PATH) {
            writer.list(&self.built_outputs, |writer, (output, built)| {
                output.write(protocol, writer);
                built.path.write(protocol, writer);
                writer.count(0); // signatures
            });
        } else if protocol.since(28) {
            write_outputs_by_hash(&self.built_outputs, protocol, writer);
        }
    }
}

/// Reads outputs as realisations named by hash; the serve protocol has them in the same form.
pub(crate) fn read_outputs_by_hash(
    reader: &mut Reader<'_>,
    protocol: &Protocol,
) -> Result<BTreeMap<OutputName, BuiltOutput>, ReadError> {
    let mut outputs = BTreeMap::new();
    reader.each_of_strings(2, |reader| {
        let id: DrvOutput = read(reader, protocol)?;
        let realisation = Realisation::from_json(reader.text(MAX_STRING)?).map_err(Invalid::Realisation)?;
        if let DrvOutput::Modulo { hash, output } = id {
            outputs.insert(output, BuiltOutput { drv_hash: hash, path: realisation.out_path });
        }
        Ok(())
    })?;
    Ok(outputs)
}

/// Writes what [`read_outputs_by_hash`] reads.
pub(crate) fn write_outputs_by_hash(
    outputs: &BTreeMap<OutputName, BuiltOutput>,
    protocol: &Protocol,
    writer: &mut Writer,
) {
    writer.list(outputs, |writer, (output, built)| {
        let id = DrvOutput::Modulo { hash: built.drv_hash, output: output.clone() };
        id.write(protocol, writer);
        writer.bytes(Realisation::new(id, built.path.clone()).to_json());
    });
}

fn read_optional_microseconds(reader: &mut Reader<'_>) -> Result<Option<u64>, ReadError> {
    match reader.u8()? {
        0 => Ok(None),
        1 => Ok(Some(reader.u63()?)),
        tag => Err(Invalid::UnknownTag { what: "optional value", value: tag.into() }.into()),
    }
}

fn write_optional_microseconds(value: Option<u64>, writer: &mut Writer) {
    writer.bool(value.is_some());
    if let Some(value) = value {
        writer.u64(value);
    }
}
