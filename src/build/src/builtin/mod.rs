//! The builders that are part of Nix itself: `builtin:buildenv` and the like.
//!
//! They run where every other builder runs: in the sandbox helper's forked child, after it has become the build user and
//! has given up every right. So what they read is trusted no more than what a builder reads, and everything here is
//! blocking, without a runtime. What they need of the daemon comes along as plain data in a [`Task`]. What they say is the
//! build's log; the text of a failure is stock Nix's wherever it has one.

mod attributes;
mod buildenv;
mod decompress;
mod error;
mod fetchurl;
mod http;
mod progress;
mod tarball;
mod unnar;
mod unpack_channel;

use std::collections::BTreeMap;
use std::path::PathBuf;

use nix_compat::content_address::Method;
use nix_compat::derivation::{BasicDerivation, Output, OutputName};
use nix_compat::store_path::StorePath;
use serde::{Deserialize, Serialize};

pub use attributes::Attributes;
use error::Error;
use fetch::Download;

use crate::environment::Environment;
use crate::failure::render;
use crate::run::Job;
use crate::sandbox::Raw;

/// A builtin builder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Builtin {
    /// `builtin:buildenv`: packages linked together, for a profile.
    Buildenv,
    /// `builtin:fetchurl`: a file from the network.
    Fetchurl,
    /// `builtin:unpack-channel`: a channel's tarball, unpacked.
    UnpackChannel,
}

impl Builtin {
    /// The one that a derivation's builder names, if there is such.
    pub fn named(builder: &[u8]) -> Option<Self> {
        match builder {
            b"builtin:buildenv" => Some(Self::Buildenv),
            b"builtin:fetchurl" => Some(Self::Fetchurl),
            b"builtin:unpack-channel" => Some(Self::UnpackChannel),
            _ => None,
        }
    }
}

/// What is known of an output before it is made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fixity {
    /// Nothing: it must follow from the inputs.
    None,
    /// It may be anything.
    Impure,
    /// The hash of a tree.
    Tree,
    /// The hash of a file's bytes.
    Flat {
        /// Its name.
        algorithm: String,
        /// In base 16.
        digest: String,
    },
}

impl Fixity {
    fn of(drv: &BasicDerivation) -> Self {
        match drv.fixed_output() {
            Some((_, ca)) if ca.method == Method::Flat => {
                Self::Flat { algorithm: ca.hash.algorithm().to_string(), digest: ca.hash.to_base16() }
            }
            Some(_) => Self::Tree,
            None if drv.outputs.values().any(|output| matches!(output, Output::Impure { .. })) => Self::Impure,
            None => Self::None,
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
    /// What its output must be.
    pub fixity: Fixity,
    /// How to download, for those who do.
    pub download: Option<Download>,
}

impl Task {
    /// Blocks: the daemon's files are read here.
    pub(crate) fn new(
        builtin: Builtin,
        job: &Job,
        outputs: &BTreeMap<OutputName, StorePath>,
        environment: Environment,
    ) -> Self {
        let store_dir = job.store.store_dir();
        let outputs = outputs.iter().map(|(name, path)| (name.to_string(), store_dir.display(path).into()));
        let variable = |name: &str| std::env::var(name).ok();
        let download = || Download::gather(&job.options.downloads, &variable);
        Self {
            builtin,
            attributes: environment.into(),
            outputs: outputs.collect(),
            fixity: Fixity::of(&job.drv),
            download: (builtin == Builtin::Fetchurl).then(download),
        }
    }

    /// Does it. Returns the exit code; why it failed is said on the standard error.
    pub(crate) fn run(&self) -> i32 {
        let result = match self.builtin {
            Builtin::Buildenv => buildenv::build(self),
            Builtin::Fetchurl => fetchurl::build(self),
            Builtin::UnpackChannel => unpack_channel::build(self),
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
