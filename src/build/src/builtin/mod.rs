//! The builders that are part of Nix itself: `builtin:buildenv` and the like.
//!
//! They run where every other builder runs: in the sandbox helper's forked child, after it has become the build user and
//! has given up every right. So what they read is trusted no more than what a builder reads, and everything here is
//! blocking, on one thread. What they need of the daemon comes along as plain data in a [`Task`]. What they say is the
//! build's log; the text of a failure is stock Nix's wherever it has one.

mod attributes;
mod buildenv;
mod error;

use std::collections::BTreeMap;
use std::path::PathBuf;

use nix_compat::derivation::OutputName;
use nix_compat::store_path::{StoreDir, StorePath};
use serde::{Deserialize, Serialize};

pub use attributes::Attributes;
use error::Error;

use crate::environment::Environment;
use crate::failure::render;
use crate::sandbox::Raw;

/// A builtin builder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Builtin {
    /// `builtin:buildenv`: packages linked together, for a profile.
    Buildenv,
}

impl Builtin {
    /// The one that a derivation's builder names, if there is such.
    pub fn named(builder: &[u8]) -> Option<Self> {
        match builder {
            b"builtin:buildenv" => Some(Self::Buildenv),
            _ => None,
        }
    }
}

/// What a builtin builder has to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Task {
    /// Which it is.
    pub builtin: Builtin,
    /// What the derivation says.
    pub attributes: Attributes,
    /// Where its outputs go, as the builder sees it.
    pub outputs: BTreeMap<String, Raw>,
}

impl Task {
    pub(crate) fn new(
        builtin: Builtin,
        environment: Environment,
        store_dir: &StoreDir,
        outputs: &BTreeMap<OutputName, StorePath>,
    ) -> Self {
        let output = |(name, path): (&OutputName, &StorePath)| (name.to_string(), store_dir.display(path).into());
        Self { builtin, attributes: environment.into(), outputs: outputs.iter().map(output).collect() }
    }

    /// Does it. Returns the exit code; why it failed is said on the standard error.
    pub(crate) fn run(&self) -> i32 {
        let result = match self.builtin {
            Builtin::Buildenv => buildenv::build(self),
        };
        match result {
            Ok(()) => 0,
            Err(error) => {
                eprintln!("{}", render(&error.to_string()));
                1
            }
        }
    }

    fn output(&self, name: &'static str) -> Result<PathBuf, Error> {
        self.outputs.get(name).map(|path| path.as_path().to_owned()).ok_or(Error::NoOutput(name))
    }
}
