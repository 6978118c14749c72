//! SetOptions: the client's settings.

use std::collections::BTreeMap;

use super::Protocol;
use super::stderr::Verbosity;
use crate::wire::{MAX_STRING, ReadError, Reader, Writer};

/// What a client wants to be in force for its connection. Which of it is granted is the daemon's decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientOptions {
    /// Keep the temporary directories of failed builds.
    pub keep_failed: bool,
    /// Go on building what does not depend on a failed build.
    pub keep_going: bool,
    /// Build what cannot be substituted although a substituter has it.
    pub try_fallback: bool,
    /// What messages the client shows.
    pub verbosity: Verbosity,
    /// Builds at the same time.
    pub max_build_jobs: u32,
    /// Longest silence of a build, in seconds; 0 for no limit.
    pub max_silent_time: u32,
    /// At which verbosity build logs are shown: [`Verbosity::Error`] shows them always.
    pub build_verbosity: Verbosity,
    /// Cores for each build; 0 for all.
    pub build_cores: u32,
    /// Whether to substitute.
    pub use_substitutes: bool,
    /// Every setting that differs from its default, by its name in nix.conf. Bytes that are not UTF-8 are replaced.
    pub overrides: BTreeMap<String, String>,
}

impl ClientOptions {
    pub(super) fn decode(reader: &mut Reader<'_>, protocol: &Protocol) -> Result<Self, ReadError> {
        let keep_failed = reader.u32()? != 0;
        let keep_going = reader.u32()? != 0;
        let try_fallback = reader.u32()? != 0;
        let verbosity = Verbosity::from_wire(reader.u32()?, protocol);
        let max_build_jobs = reader.u32()?;
        let max_silent_time = reader.u32()?;
        let _use_build_hook = reader.u32()?;
        let build_verbosity = Verbosity::from_wire(reader.u32()?, protocol);
        let _log_type = reader.u32()?;
        let _print_build_trace = reader.u32()?;
        let build_cores = reader.u32()?;
        let use_substitutes = reader.u32()? != 0;
        let mut overrides = BTreeMap::new();
        reader.each_of_strings(2, |reader| {
            let name = reader.lossy_text(MAX_STRING)?;
            overrides.insert(name, reader.lossy_text(MAX_STRING)?);
            Ok(())
        })?;
        Ok(Self {
            keep_failed,
            keep_going,
            try_fallback,
            verbosity,
            max_build_jobs,
            max_silent_time,
            build_verbosity,
            build_cores,
            use_substitutes,
            overrides,
        })
    }

    pub(super) fn encode(&self, protocol: &Protocol, writer: &mut Writer) {
        const USE_BUILD_HOOK: u64 = 1;
        const LOG_TYPE: u64 = 0;
        const PRINT_BUILD_TRACE: u64 = 0;
        writer.bool(self.keep_failed);
        writer.bool(self.keep_going);
        writer.bool(self.try_fallback);
        writer.u64(self.verbosity.to_wire(protocol));
        writer.u64(self.max_build_jobs.into());
        writer.u64(self.max_silent_time.into());
        writer.u64(USE_BUILD_HOOK);
        writer.u64(self.build_verbosity.to_wire(protocol));
        writer.u64(LOG_TYPE);
        writer.u64(PRINT_BUILD_TRACE);
        writer.u64(self.build_cores.into());
        writer.bool(self.use_substitutes);
        writer.list(&self.overrides, |writer, (name, value)| {
            writer.bytes(name);
            writer.bytes(value);
        });
    }
}

impl Default for ClientOptions {
    /// What a stock client sends that has no configuration.
    fn default() -> Self {
        Self {
            keep_failed: false,
            keep_going: false,
            try_fallback: false,
            verbosity: Verbosity::Info,
            max_build_jobs: 1,
            max_silent_time: 0,
            build_verbosity: Verbosity::Error,
            build_cores: 0,
            use_substitutes: true,
            overrides: BTreeMap::new(),
        }
    }
}
