//! Giving outputs their paths, where these follow from contents.

use std::collections::{BTreeMap, BTreeSet};

use castore::Node;
use nix_compat::content_address::{ContentAddress, Method};
use nix_compat::derivation::{Output, OutputName};
use nix_compat::hash::{Algorithm, Hash};
use nix_compat::path_info::PathInfo;
use nix_compat::store_path::{StorePath, content_address_path};
use nix_compat::worker::BuildStatus;
use store::{Ingested, NewPath};

use super::Finished;
use crate::failure::Failure;

impl Finished<'_> {
    /// The algorithm with which an output's NAR is hashed for its address.
    pub(super) fn nar_algorithm(&self, name: &OutputName) -> Option<Algorithm> {
        match self.job.drv.outputs.get(name)? {
            Output::Fixed { ca, .. } if ca.method == Method::Nar => Some(ca.hash.algorithm()),
            Output::Floating { method: Method::Nar, algo } | Output::Impure { method: Method::Nar, algo } => {
                Some(*algo)
            }
            _ => None,
        }
    }

    /// Gives an output its path. `paths` are those of the fellow outputs that it may refer to.
    ///
    /// What was promised of a fixed output and does not hold is put into `mismatch`. What was built instead is kept all
    /// the same, under the path that it has by right: whoever corrects the hash need not build it again.
    pub(super) fn address(
        &self,
        name: &OutputName,
        ingested: Ingested,
        paths: &BTreeMap<OutputName, StorePath>,
        mismatch: &mut Option<Failure>,
    ) -> Result<NewPath, Failure> {
        let rejected = |text: String| Failure::new(BuildStatus::OutputRejected, text);
        let Some(scratch) = self.scratch.get(name) else {
            return Err(Failure::misc(format!("there is no output '{name}' in '{}'", self.drv_name())));
        };
        let mut references = ingested.nar.references.clone();
        let (method, algorithm, promised) = match self.job.drv.outputs.get(name) {
            Some(Output::Fixed { ca, .. }) => (ca.method, ca.hash.algorithm(), Some(ca.hash)),
            Some(Output::Floating { method, algo } | Output::Impure { method, algo }) => (*method, *algo, None),
            _ => return Ok(self.new_path(scratch.clone(), references, None, ingested)),
        };
        let moved: Vec<(StorePath, StorePath)> = self
            .scratch
            .iter()
            .filter_map(|(fellow, scratch)| Some((scratch.clone(), paths.get(fellow)?.clone())))
            .filter(|(scratch, path)| scratch != path && references.contains(scratch))
            .collect();
        let ingested = self.replace(ingested, &moved, self.nar_algorithm(name))?;
        for (from, to) in &moved {
            references.remove(from);
            references.insert(to.clone());
        }
        let itself = references.remove(scratch);
        let hash = self.hash(scratch, method, algorithm, itself, &ingested)?;
        if let Some(promised) = promised {
            // The store path follows from the hash alone, so there is no room in it for references.
            if let Some(reference) = references.first().or(itself.then_some(scratch)) {
                let text = format!(
                    "fixed output derivation '{}' is not allowed to refer to other store paths: it refers to {}, e.g. \
                     '{}'",
                    self.drv_name(),
                    references.len() + usize::from(itself),
                    self.display(reference)
                );
                return Err(rejected(text));
            }
            if hash != promised {
                *mismatch = Some(Failure::hash_mismatch(&self.drv_name(), &promised.to_sri(), &hash.to_sri()));
            }
        }
        let ca = ContentAddress { method, hash };
        let path_name = name.path_name(&self.job.drv.name);
        let path = content_address_path(self.job.store.store_dir(), &path_name, &ca, &references, itself)
            .map_err(|e| rejected(format!("output '{name}' of '{}': {e}", self.drv_name())))?;
        let mut ingested = ingested;
        if itself {
            ingested = self.replace(ingested, &[(scratch.clone(), path.clone())], None)?;
            references.insert(path.clone());
        }
        Ok(self.new_path(path, references, Some(ca), ingested))
    }

    fn new_path(
        &self,
        path: StorePath,
        references: BTreeSet<StorePath>,
        ca: Option<ContentAddress>,
        ingested: Ingested,
    ) -> NewPath {
        NewPath {
            info: PathInfo {
                path,
                deriver: Some(self.job.drv_path.clone()),
                nar_hash: ingested.nar.nar_hash,
                references,
                registration_time: 0,
                nar_size: ingested.nar.nar_size,
                ultimate: true,
                signatures: BTreeSet::new(),
                ca,
            },
            node: ingested.node,
            pin: Some(ingested.pin),
        }
    }

    /// The contents with paths replaced.
    fn replace(
        &self,
        ingested: Ingested,
        moved: &[(StorePath, StorePath)],
        other: Option<Algorithm>,
    ) -> Result<Ingested, Failure> {
        if moved.is_empty() { Ok(ingested) } else { Ok(self.job.store.rewrite(&ingested.node, moved, other)?) }
    }

    /// The hash that is part of a content address.
    fn hash(
        &self,
        path: &StorePath,
        method: Method,
        algorithm: Algorithm,
        itself: bool,
        ingested: &Ingested,
    ) -> Result<Hash, Failure> {
        match method {
            Method::Nar if itself => Ok(self.job.store.hash_modulo_itself(&ingested.node, path, algorithm)?),
            Method::Nar => Ok(match &ingested.nar.other {
                Some(hash) => *hash,
                None => Hash::Sha256(*ingested.nar.nar_hash.as_bytes()),
            }),
            Method::Git => Ok(self.job.store.git_hash(&ingested.node, algorithm)?),
            Method::Flat | Method::Text => {
                if !matches!(ingested.node, Node::File { executable: false, .. }) {
                    let text = format!(
                        "output path '{}' should be a non-executable regular file since recursive hashing is not \
                         enabled (one of outputHashMode={{flat,text}} is true)",
                        self.display(path)
                    );
                    return Err(Failure::new(BuildStatus::OutputRejected, text));
                }
                Ok(self.job.store.flat_hash(&ingested.node, algorithm, &self.display(path))?)
            }
        }
    }
}
