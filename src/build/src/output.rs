//! From what a builder left behind to valid store paths.
//!
//! Called when every process of the build is dead. Outputs are read through the directory descriptor that was opened
//! before the build began, hashed while they are read, and what is registered is the copy that was hashed: whoever
//! still has a descriptor of the original can change nothing any more.
//!
//! An output whose path follows from its contents was built under a provisional one. It gets its own here: what the
//! outputs say of themselves and of each other is replaced in the copy.

mod address;
mod checks;
mod order;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{SFlag, fstatat};
use nix_compat::derivation::{Output, OutputName};
use nix_compat::realisation::{DrvOutput, Realisation};
use nix_compat::store_path::StorePath;
use nix_compat::worker::{BuildMode, BuildStatus};
use store::{Ingested, NewPath, SignaturePolicy, Signer, TempRoots};

use crate::attributes::Attributes;
use crate::dump::{consume_own_tree, dump_own_tree};
use crate::failure::Failure;
use crate::room::Room;
use crate::run::Job;

/// A build whose processes are gone.
pub(crate) struct Finished<'a> {
    pub(crate) job: &'a Job,
    pub(crate) attributes: &'a Attributes<'a>,
    /// Where the builder put its outputs.
    pub(crate) scratch: &'a BTreeMap<OutputName, StorePath>,
    /// What the builder could read: all it can refer to beside its own outputs.
    pub(crate) inputs: &'a BTreeSet<StorePath>,
    pub(crate) room: &'a Room,
    /// Keeps what is about to become valid.
    pub(crate) roots: &'a TempRoots,
    pub(crate) cancelled: &'a AtomicBool,
}

impl Finished<'_> {
    /// Makes the outputs valid and durable; in check mode compares them with the valid ones instead. Gives their paths.
    pub(crate) fn take_outputs(&self) -> Result<BTreeMap<OutputName, StorePath>, Failure> {
        let mut taken = BTreeMap::new();
        let mut paths = BTreeMap::new();
        for (name, scratch) in self.scratch {
            if self.job.mode == BuildMode::Normal && self.is_valid_already(name, scratch)? {
                // Another output of the derivation was missing; this one is as good as its copy.
                paths.insert(name.clone(), scratch.clone());
                continue;
            }
            taken.insert(name.clone(), self.take(name, scratch)?);
        }
        let mut new = BTreeMap::new();
        let mut mismatch = None;
        for name in order::fellows_first(&taken, self.scratch, &self.drv_name())? {
            let Some(ingested) = taken.remove(&name) else { continue };
            let output = self.address(&name, ingested, &paths, &mut mismatch)?;
            paths.insert(name.clone(), output.info.path.clone());
            new.insert(name, output);
        }
        if mismatch.is_none() {
            for (name, path) in &new {
                self.check_output(name, path, &new)?;
            }
        }
        if self.job.mode == BuildMode::Check && !self.job.drv.is_impure() {
            mismatch.map_or(Ok(()), Err)?;
            new.iter().try_for_each(|(name, rebuilt)| self.compare(name, rebuilt))?;
            return Ok(paths);
        }
        self.register(new)?;
        mismatch.map_or(Ok(paths), Err)
    }

    /// Whether an output that was built need not be taken.
    fn is_valid_already(&self, name: &OutputName, scratch: &StorePath) -> Result<bool, Failure> {
        let is_final = self.job.drv.outputs.get(name).is_some_and(|output| output.path().is_some());
        Ok(is_final && self.job.store.is_valid(scratch)?)
    }

    fn register(&self, new: BTreeMap<OutputName, NewPath>) -> Result<(), Failure> {
        let store = &self.job.store;
        let signer = Signer::new(&self.job.options.secret_key_files)?;
        let mut realisations = Vec::new();
        let mut outputs = Vec::new();
        for (name, mut output) in new {
            self.roots.add(&output.info.path);
            signer.sign(store.store_dir(), &mut output.info);
            realisations.extend(self.realisation(name, &output, &signer));
            outputs.push(output);
        }
        // Before they are registered; and they are sent when that is durable.
        let _coming = store.queue_uploads(outputs.iter().map(|output| &output.info.path))?;
        match self.job.mode {
            // What is valid is what is to be replaced.
            BuildMode::Repair => outputs.into_iter().try_for_each(|output| store.replace_contents(output))?,
            BuildMode::Normal | BuildMode::Check => store.register(outputs)?,
        }
        for realisation in realisations {
            store.register_realisation(&realisation, SignaturePolicy::DontCheck)?;
        }
        store.sync()?;
        Ok(())
    }

    /// What is noted of an output beside its path: always where the derivation does not tell the path, else as stock does
    /// with content-addressed derivations enabled. What one impure build made says nothing of the next.
    fn realisation(&self, name: OutputName, output: &NewPath, signer: &Signer) -> Option<Realisation> {
        let floating = self.job.drv.outputs.get(&name).is_some_and(|o| matches!(o, Output::Floating { .. }));
        let wanted = floating || self.job.options.has_feature("ca-derivations");
        if !wanted || self.job.drv.is_impure() {
            return None;
        }
        let id = DrvOutput::Modulo { hash: self.job.outputs.get(&name)?.drv_hash, output: name };
        let mut realisation = Realisation::new(id, output.info.path.clone());
        signer.sign_realisation(&mut realisation);
        Some(realisation)
    }

    fn drv_name(&self) -> String {
        self.job.name()
    }

    fn display(&self, path: &StorePath) -> String {
        self.job.store.store_dir().display(path)
    }

    /// Brings one output into the castore, as it is.
    fn take(&self, name: &OutputName, path: &StorePath) -> Result<Ingested, Failure> {
        let base_name = Path::new(path.base_name());
        let stat = match fstatat(&self.room.scratch, base_name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            // What an overlay hides from the builder; see `place`.
            Ok(stat) if stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFCHR.bits() && stat.st_rdev == 0 => {
                Err(Errno::ENOENT)
            }
            other => other.map(|_| ()),
        };
        match stat {
            Err(Errno::ENOENT) => {
                let text = format!(
                    "builder for '{}' failed to produce output path for output '{name}' at \"{}\"",
                    self.drv_name(),
                    self.display(path)
                );
                return Err(Failure::new(BuildStatus::OutputRejected, text));
            }
            Err(errno) => return Err(Failure::misc(format!("cannot stat output '{}': {errno}", self.display(path)))),
            Ok(()) => {}
        }
        let discards = self.attributes.discards_references(name.as_str());
        let candidates: BTreeSet<StorePath> = if discards.map_err(|e| Failure::attributes(&self.drv_name(), &e))? {
            BTreeSet::new()
        } else {
            self.inputs.iter().chain(self.scratch.values()).cloned().collect()
        };
        let ingested = self.job.store.ingest_dump(
            |out| {
                let mut out = UntilCancelled { out, cancelled: self.cancelled };
                // What a check finds to differ is kept.
                let dump = if self.job.mode == BuildMode::Check { dump_own_tree } else { consume_own_tree };
                dump(self.room.scratch.as_fd(), base_name, &mut out)
            },
            self.nar_algorithm(name),
            Some(&candidates),
        );
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(Failure::cancelled());
        }
        ingested.map_err(|e| Failure::new(BuildStatus::OutputRejected, e.to_string()))
    }

    fn compare(&self, name: &OutputName, rebuilt: &NewPath) -> Result<(), Failure> {
        // The path of one that is addressed by its contents differs when these do.
        let known = self.job.outputs.get(name).and_then(|output| output.path.as_ref());
        let path = known.unwrap_or(&rebuilt.info.path);
        let valid = self.job.store.path_info(path)?;
        if valid.is_some_and(|info| info.nar_hash == rebuilt.info.nar_hash) {
            return Ok(());
        }
        let text = format!(
            "derivation '{}' may not be deterministic: output \"{}\" differs",
            self.drv_name(),
            self.display(path)
        );
        Err(Failure::new(BuildStatus::NotDeterministic, text)
            .differs(path.clone(), self.scratch.get(name).unwrap_or(path).clone()))
    }
}

/// Stops a long dump when nobody wants the build any more.
struct UntilCancelled<'a> {
    out: &'a mut dyn std::io::Write,
    cancelled: &'a AtomicBool,
}

impl std::io::Write for UntilCancelled<'_> {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(std::io::ErrorKind::ConnectionAborted.into());
        }
        self.out.write(buf)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}
