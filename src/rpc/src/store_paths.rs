//! [`Store`] as what PathInfoService serves.

use castore::Node;
use nix_compat::store_path::StoreDir;
use store::nar_digest::NarFacts;
use store::view::StoreView;
use store::{Entry, Error, NewPath, Store};

use crate::paths::{PathInfos, PathsError};

impl PathInfos for Store {
    fn store_dir(&self) -> &StoreDir {
        Store::store_dir(self)
    }

    fn get(&self, digest: &[u8; 20]) -> Result<Option<Entry>, PathsError> {
        let Some(path) = self.path_from_hash_part(digest)? else { return Ok(None) };
        Ok(self.entry(&path)?)
    }

    fn list(&self, mut after: u32, limit: usize) -> Result<Vec<Entry>, PathsError> {
        loop {
            let roots = StoreView::list(self, after, limit)?;
            let Some(last) = roots.last() else { return Ok(Vec::new()) };
            after = last.number;
            let mut entries = Vec::with_capacity(roots.len());
            for root in roots {
                entries.extend(self.entry(&root.path)?);
            }
            // A page of which every path was deleted meanwhile is not the end.
            if !entries.is_empty() {
                return Ok(entries);
            }
        }
    }

    fn put(&self, mut path: NewPath) -> Result<(), PathsError> {
        let whole = self.engine().hold(&path.node).map_err(Error::from)?;
        path.pin = Some(whole.into());
        self.check_contents(&path)?;
        Ok(self.register(vec![path])?)
    }

    fn calculate_nar(&self, node: &Node) -> Result<NarFacts, PathsError> {
        let _whole = self.engine().hold(node).map_err(Error::from)?;
        Ok(self.nar_facts(node, None)?)
    }
}
