//! Holding outputs to what the derivation demands of their sizes and references.

use std::collections::{BTreeMap, BTreeSet};

use nix_compat::derivation::OutputName;
use nix_compat::store_path::StorePath;
use nix_compat::worker::BuildStatus;
use store::NewPath;

use super::Finished;
use crate::failure::Failure;

impl Finished<'_> {
    /// Holds an output to what the derivation says of its size and references.
    pub(super) fn check_output(
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
            let named = self.resolve_references(words, new)?;
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
                None => self.job.store.path_info(path)?.map(|info| info.nar_size),
            };
            size = size.saturating_add(known.unwrap_or(0));
        }
        Ok(size)
    }

    /// References are named by store path, or by the name of an output of this derivation.
    fn resolve_references(
        &self,
        words: &[String],
        new: &BTreeMap<OutputName, NewPath>,
    ) -> Result<BTreeSet<StorePath>, Failure> {
        let resolve = |word: &String| {
            let known = || self.job.outputs.get(word.as_str()).and_then(|output| output.path.as_ref());
            if let Some(path) = new.get(word.as_str()).map(|new| &new.info.path).or_else(known) {
                return Ok(path.clone());
            }
            self.job.store.store_dir().to_store_path(word).map(|(path, _)| path).map_err(|_| {
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
                None => closure.extend(self.job.store.closure([&path])?),
            }
            closure.insert(path);
        }
        Ok(closure)
    }
}
