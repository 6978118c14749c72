//! From what a builder left behind to valid store paths.
//!
//! Called when every process of the build is dead. Outputs are read through the directory descriptor that was opened
//! before the build began, hashed while they are read, and what is registered is the copy that was hashed: whoever
//! still has a descriptor of the original can change nothing any more.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use castore::Node;
use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{SFlag, fstatat};
use nix_compat::content_address::{ContentAddress, Method};
use nix_compat::derivation::{BasicDerivation, Output, OutputName};
use nix_compat::hash::Hash;
use nix_compat::path_info::PathInfo;
use nix_compat::store_path::StorePath;
use nix_compat::worker::{BuildMode, BuildStatus};
use store::{Ingested, NewPath, Store};

use crate::attributes::Attributes;
use crate::dump::dump_own_tree;
use crate::failure::Failure;
use crate::room::Room;

/// A build whose processes are gone.
pub(crate) struct Finished<'a> {
    pub(crate) store: &'a Store,
    pub(crate) drv_path: &'a StorePath,
    pub(crate) drv: &'a BasicDerivation,
    pub(crate) attributes: &'a Attributes<'a>,
    pub(crate) outputs: &'a BTreeMap<OutputName, StorePath>,
    /// What the builder could read: all it can refer to beside its own outputs.
    pub(crate) inputs: &'a BTreeSet<StorePath>,
    pub(crate) room: &'a Room,
    pub(crate) cancelled: &'a AtomicBool,
}

impl Finished<'_> {
    /// Makes the outputs valid and durable; in check mode compares them with the valid ones instead.
    pub(crate) fn take_outputs(&self, mode: BuildMode) -> Result<(), Failure> {
        let mut new = BTreeMap::new();
        for (name, path) in self.outputs {
            if mode == BuildMode::Normal && self.store.is_valid(path)? {
                // Another output of the derivation was missing; this one is as good as its copy.
                continue;
            }
            new.insert(name.clone(), self.take(name, path)?);
        }
        for (name, path) in &new {
            self.check_output(name, path, &new)?;
        }
        if mode == BuildMode::Check {
            return new.values().try_for_each(|path| self.compare(path));
        }
        self.store.register(new.into_values().collect())?;
        self.store.sync()?;
        Ok(())
    }

    fn drv_name(&self) -> String {
        self.store.store_dir().display(self.drv_path)
    }

    fn display(&self, path: &StorePath) -> String {
        self.store.store_dir().display(path)
    }

    /// Brings one output into the castore.
    fn take(&self, name: &OutputName, path: &StorePath) -> Result<NewPath, Failure> {
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
        let ca = match self.drv.outputs.get(name) {
            Some(Output::Fixed { ca, .. }) => Some(ca),
            _ => None,
        };
        let discards = self.attributes.discards_references(name.as_str());
        let candidates: BTreeSet<StorePath> = if discards.map_err(|e| Failure::attributes(&self.drv_name(), &e))? {
            BTreeSet::new()
        } else {
            self.inputs.iter().chain(self.outputs.values()).cloned().collect()
        };
        let ingested = self.store.ingest_dump(
            |out| {
                let mut out = UntilCancelled { out, cancelled: self.cancelled };
                dump_own_tree(self.room.scratch.as_fd(), base_name, &mut out)
            },
            ca.filter(|ca| ca.method == Method::Nar).map(|ca| ca.hash.algorithm()),
            Some(&candidates),
        );
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(Failure::cancelled());
        }
        let ingested = ingested.map_err(|e| Failure::new(BuildStatus::OutputRejected, e.to_string()))?;
        if let Some(ca) = ca {
            self.check_hash(path, ca, &ingested)?;
        }
        Ok(NewPath {
            info: PathInfo {
                path: path.clone(),
                deriver: Some(self.drv_path.clone()),
                nar_hash: ingested.nar.nar_hash,
                references: ingested.nar.references,
                registration_time: 0,
                nar_size: ingested.nar.nar_size,
                ultimate: true,
                signatures: BTreeSet::new(),
                ca: ca.cloned(),
            },
            node: ingested.node,
            pin: Some(ingested.pin),
        })
    }

    /// Checks what was promised of a fixed output.
    fn check_hash(&self, path: &StorePath, ca: &ContentAddress, ingested: &Ingested) -> Result<(), Failure> {
        let got = match ca.method {
            Method::Nar => match &ingested.nar.other {
                Some(hash) => *hash,
                None => Hash::Sha256(*ingested.nar.nar_hash.as_bytes()),
            },
            Method::Flat | Method::Text => {
                if !matches!(ingested.node, Node::File { executable: false, .. }) {
                    let text = format!(
                        "output path '{}' should be a non-executable regular file since recursive hashing is not \
                         enabled (one of outputHashMode={{flat,text}} is true)",
                        self.display(path)
                    );
                    return Err(Failure::new(BuildStatus::OutputRejected, text));
                }
                self.store.flat_hash(&ingested.node, ca.hash.algorithm(), &self.display(path))?
            }
        };
        if got != ca.hash {
            return Err(Failure::hash_mismatch(&self.drv_name(), &ca.hash.to_sri(), &got.to_sri()));
        }
        // The store path follows from the hash alone, so there is no room in it for references.
        if !ingested.nar.references.is_empty() {
            let text = format!("illegal path references in fixed-output derivation '{}'", self.drv_name());
            return Err(Failure::new(BuildStatus::OutputRejected, text));
        }
        Ok(())
    }

    fn compare(&self, rebuilt: &NewPath) -> Result<(), Failure> {
        let path = &rebuilt.info.path;
        let valid = self.store.path_info(path)?;
        if valid.is_some_and(|info| info.nar_hash == rebuilt.info.nar_hash) {
            return Ok(());
        }
        let text = format!(
            "derivation '{}' may not be deterministic: output \"{}\" differs",
            self.drv_name(),
            self.display(path)
        );
        Err(Failure::new(BuildStatus::NotDeterministic, text).differs(path.clone()))
    }

    /// Holds an output to what the derivation says of its size and references.
    fn check_output(
        &self,
        output: &OutputName,
        path: &NewPath,
        new: &BTreeMap<OutputName, NewPath>,
    ) -> Result<(), Failure> {
        let name = self.display(&path.info.path);
        let checks = self.attributes.output_checks(output.as_str());
        let checks = checks.map_err(|e| Failure::attributes(&self.drv_name(), &e))?;
        let too_large = |what: &str, size: u64, limit: u64| {
            let text = format!("{what} '{name}' is too large at {size} bytes; limit is {limit} bytes");
            Err(Failure::new(BuildStatus::OutputRejected, text))
        };
        if let Some(limit) = checks.max_size.filter(|limit| path.info.nar_size > *limit) {
            return too_large("path", path.info.nar_size, limit);
        }
        if let Some(limit) = checks.max_closure_size {
            let size = self.size_of(&self.closure(path, new)?, new)?;
            if size > limit {
                return too_large("closure of path", size, limit);
            }
        }
        for (words, allowed, whole_closure) in [
            (&checks.allowed_references, true, false),
            (&checks.allowed_requisites, true, true),
            (&checks.disallowed_references, false, false),
            (&checks.disallowed_requisites, false, true),
        ] {
            let Some(words) = words else { continue };
            let named = self.resolve_references(words)?;
            let mut found = if whole_closure { self.closure(path, new)? } else { path.info.references.clone() };
            if whole_closure && checks.ignore_itself {
                found.remove(&path.info.path);
            }
            let illegal: Vec<String> = found
                .iter()
                .filter(|reference| named.contains(*reference) != allowed)
                .map(|reference| format!("\n  {}", self.display(reference)))
                .collect();
            if !illegal.is_empty() {
                let text =
                    format!("output '{name}' is not allowed to refer to the following paths:{}", illegal.concat());
                return Err(Failure::new(BuildStatus::OutputRejected, text));
            }
        }
        Ok(())
    }

    /// The sum of NAR sizes, in bytes.
    fn size_of(&self, paths: &BTreeSet<StorePath>, new: &BTreeMap<OutputName, NewPath>) -> Result<u64, Failure> {
        let mut size = 0u64;
        for path in paths {
            let fellow = new.values().find(|new| new.info.path == *path).map(|new| new.info.nar_size);
            let known = match fellow {
                Some(size) => Some(size),
                None => self.store.path_info(path)?.map(|info| info.nar_size),
            };
            size = size.saturating_add(known.unwrap_or(0));
        }
        Ok(size)
    }

    /// References are named by store path, or by the name of an output of this derivation.
    fn resolve_references(&self, words: &[String]) -> Result<BTreeSet<StorePath>, Failure> {
        let resolve = |word: &String| {
            if let Some(path) = self.outputs.get(word.as_str()) {
                return Ok(path.clone());
            }
            self.store.store_dir().to_store_path(word).map(|(path, _)| path).map_err(|_| {
                let text = format!("derivation '{}' contains an illegal reference specifier '{word}'", self.drv_name());
                Failure::new(BuildStatus::OutputRejected, text)
            })
        };
        words.iter().map(resolve).collect()
    }

    /// What the output refers to, directly or not. Of its fellow outputs not registered yet too.
    fn closure(&self, path: &NewPath, new: &BTreeMap<OutputName, NewPath>) -> Result<BTreeSet<StorePath>, Failure> {
        let fellow = |path: &StorePath| new.values().find(|new| new.info.path == *path);
        let mut closure = BTreeSet::new();
        let mut todo = vec![path.info.path.clone()];
        while let Some(path) = todo.pop() {
            if closure.contains(&path) {
                continue;
            }
            match fellow(&path) {
                Some(new) => todo.extend(new.info.references.iter().cloned()),
                None => closure.extend(self.store.closure([&path])?),
            }
            closure.insert(path);
        }
        Ok(closure)
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
