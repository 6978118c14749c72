//! What paths cost on disk, and what all of them come to before they are cut into chunks.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

use castore::Node;
use castore::engine::{Cost, CostError, MAX_SETS};
use nix_compat::store_path::StorePath;

use crate::error::{Error, Result};
use crate::store::Store;

/// How many paths can be asked about at once: each is a set of its own, and so is its closure.
pub const MAX_COSTS: usize = MAX_SETS / 2;

/// What a path costs, alone and with all it needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathCost {
    /// The path.
    pub path: StorePath,
    /// Its NAR size, in bytes.
    pub nar_size: u64,
    /// What of the packs only it uses, and what it shares with any other valid path.
    pub cost: Cost,
    /// The paths of its closure, itself included.
    pub closure_paths: u64,
    /// The sum of their NAR sizes, in bytes.
    pub closure_nar_size: u64,
    /// What of the packs only they use, and what they share with valid paths outside.
    pub closure_cost: Cost,
}

impl From<CostError> for Error {
    fn from(error: CostError) -> Self {
        match error {
            CostError::TooMany => Self::TooManyObjects,
            CostError::Castore(error) => Self::Castore(error),
        }
    }
}

impl Store {
    /// What each of these paths costs, [`MAX_COSTS`] at most. Looks at the trees of all valid paths: what they share is
    /// known to nobody beforehand. What is registered or deleted meanwhile may or may not count.
    ///
    /// Memory: what [`castore::engine::Costs`] needs, at most 220 MB; one node (about 60 bytes) for each valid path; the
    /// names in the closures.
    ///
    /// # Errors
    /// [`Error::NotValid`], [`Error::TooManyCosts`], [`Error::TooManyObjects`], and when the
    /// store cannot be read.
    pub fn costs(&self, paths: &[StorePath]) -> Result<Vec<PathCost>> {
        if paths.len() > MAX_COSTS {
            return Err(Error::TooManyCosts { count: paths.len() });
        }
        let mut sets: BTreeMap<StorePath, u64> = BTreeMap::new();
        let mut closures: Vec<BTreeSet<StorePath>> = Vec::new();
        for (number, path) in paths.iter().enumerate() {
            self.valid_entry(path)?;
            let closure = self.closure([path])?;
            for member in &closure {
                let own = u64::from(member == path);
                *sets.entry(member.clone()).or_default() |= (own | 2) << (2 * number);
            }
            closures.push(closure);
        }
        let mut costs = self.engine().costs();
        let mut sizes: BTreeMap<&StorePath, u64> = BTreeMap::new();
        for (path, of) in &sets {
            // One that was deleted this moment costs nothing.
            let Some(entry) = self.shared_entry(path)? else { continue };
            sizes.insert(path, entry.info.nar_size);
            costs.add(&entry.node, *of)?;
        }
        for node in &self.roots_without(&sets)? {
            costs.set_against(node)?;
        }
        let size = |path: &StorePath| sizes.get(path).copied().unwrap_or(0);
        Ok((paths.iter().zip(&closures).enumerate())
            .map(|(number, (path, closure))| PathCost {
                path: path.clone(),
                nar_size: size(path),
                cost: costs.of(2 * number),
                closure_paths: closure.len() as u64,
                closure_nar_size: closure.iter().map(size).sum(),
                closure_cost: costs.of(2 * number + 1),
            })
            .collect())
    }

    /// The roots of all valid paths but these. Collected, so that no scan of the index is open while trees are read.
    fn roots_without(&self, paths: &BTreeMap<StorePath, u64>) -> Result<Vec<Node>> {
        let mut roots = Vec::new();
        self.for_each(&mut |entry| {
            if !paths.contains_key(&entry.info.path) {
                roots.push(entry.node);
            }
            ControlFlow::Continue(())
        })?;
        Ok(roots)
    }

    /// What all valid paths come to, in bytes, when equal files and equal directories count once: before files are cut into
    /// chunks, and before compression. Goes through all trees, but reads no files.
    ///
    /// Memory: 17 to 39 bytes for each distinct file and directory, one node (about 60 bytes) for each valid path.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn distinct_bytes(&self) -> Result<u64> {
        let mut distinct = self.engine().distinct();
        for root in &self.roots_without(&BTreeMap::new())? {
            distinct.add(root)?;
        }
        Ok(distinct.bytes())
    }
}
