//! Builds: what the client wants of them, and how they end.

use super::Protocol;
use crate::wire::{Invalid, MAX_STRING, ReadError, Reader, Writer};
use crate::worker::{BuildResult, BuildStatus, read_outputs_by_hash, write_outputs_by_hash};

/// What the client wants of a build.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BuildOptions {
    /// Longest silence, in seconds; 0 for no limit.
    pub max_silent_time: u64,
    /// Longest time, in seconds; 0 for no limit.
    pub timeout: u64,
    /// Most bytes of log; 0 for no limit. Not told before 2.2.
    pub max_log_size: u64,
    /// How often to build it again and compare; unused since Nix 2.12. Not told before 2.3.
    pub repeats: u64,
    /// Whether differences between these are errors. Not told before 2.3.
    pub enforce_determinism: bool,
    /// Whether to keep the directory of a failed build. Not told before 2.7.
    pub keep_failed: bool,
}

impl BuildOptions {
    pub(super) fn read(reader: &mut Reader<'_>, protocol: &Protocol) -> Result<Self, ReadError> {
        let mut options = Self { max_silent_time: reader.u64()?, timeout: reader.u64()?, ..Self::default() };
        if protocol.since(2) {
            options.max_log_size = reader.u64()?;
        }
        if protocol.since(3) {
            options.repeats = reader.u64()?;
            options.enforce_determinism = reader.bool()?;
        }
        if protocol.since(7) {
            options.keep_failed = reader.bool()?;
        }
        Ok(options)
    }

    pub(super) fn write(&self, protocol: &Protocol, writer: &mut Writer) {
        writer.u64(self.max_silent_time);
        writer.u64(self.timeout);
        if protocol.since(2) {
            writer.u64(self.max_log_size);
        }
        if protocol.since(3) {
            writer.u64(self.repeats);
            writer.bool(self.enforce_determinism);
        }
        if protocol.since(7) {
            writer.bool(self.keep_failed);
        }
    }
}

/// Reads how a build ended.
pub fn read_build_result(reader: &mut Reader<'_>, protocol: &Protocol) -> Result<BuildResult, ReadError> {
    let mut result = BuildResult::new(read_status(reader)?, reader.lossy_text(MAX_STRING)?);
    if protocol.since(3) {
        result.times_built = reader.u64()?;
        result.is_non_deterministic = reader.bool()?;
        result.start_time = reader.u63()?;
        result.stop_time = reader.u63()?;
    }
    if protocol.since(6) {
        result.built_outputs = read_outputs_by_hash(reader, &protocol.values())?;
    }
    Ok(result)
}

/// The way back from [`read_build_result`].
pub fn write_build_result(result: &BuildResult, protocol: &Protocol, writer: &mut Writer) {
    writer.u64(result.status.code());
    writer.bytes(&result.error);
    if protocol.since(3) {
        writer.u64(result.times_built);
        writer.bool(result.is_non_deterministic);
        writer.u64(result.start_time);
        writer.u64(result.stop_time);
    }
    if protocol.since(6) {
        write_outputs_by_hash(&result.built_outputs, &protocol.values(), writer);
    }
}

pub(super) fn read_status(reader: &mut Reader<'_>) -> Result<BuildStatus, ReadError> {
    let value = reader.u64()?;
    BuildStatus::from_code(value).ok_or_else(|| Invalid::UnknownTag { what: "build status", value }.into())
}
