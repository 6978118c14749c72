//! [`Store`] as a [`StoreView`].

use std::ops::ControlFlow;
use std::sync::Arc;

use bytes::Bytes;
use castore::{Digest, Directory, DirectoryService};
use nix::sys::statvfs::statvfs;
use nix_compat::store_path::{StoreDir, StorePath};

use crate::error::Error;
use crate::record::Entry;
use crate::store::Store;
use crate::view::{Root, Space, StoreView, Subscriber, Then, ViewError};

fn storage(error: impl Into<Error>) -> ViewError {
    ViewError::Storage(Box::new(error.into()))
}

fn root(entry: Arc<Entry>) -> Root {
    Root { number: entry.number, path: entry.info.path.clone(), node: entry.node.clone() }
}

impl StoreView for Store {
    fn store_dir(&self) -> &StoreDir {
        Store::store_dir(self)
    }

    fn lookup(&self, base_name: &str) -> Result<Option<Root>, ViewError> {
        let Ok(path) = StorePath::from_base_name(base_name) else { return Ok(None) };
        let Some(entry) = self.shared_entry(&path).map_err(storage)? else { return Ok(None) };
        self.check_readable(&path).map_err(storage)?;
        Ok(Some(root(entry)))
    }

    fn by_number(&self, number: u32) -> Result<Option<Root>, ViewError> {
        let digest =
            self.index().get(&self.tables.numbers, &number.to_be_bytes()).map_err(|e| storage(Error::from(e)))?;
        let Some(digest) = digest.and_then(|d| <[u8; 20]>::try_from(&d[..]).ok()) else { return Ok(None) };
        let entry = self.entry_by_digest(&digest).map_err(storage)?.filter(|entry| entry.number == number);
        if let Some(entry) = &entry {
            self.check_readable(&entry.info.path).map_err(storage)?;
        }
        Ok(entry.map(root))
    }

    fn list(&self, mut after: u32, limit: usize) -> Result<Vec<Root>, ViewError> {
        let mut roots = Vec::new();
        // A page of which everything was deleted since it was scanned is not the end.
        while let Some(first) = after.checked_add(1).filter(|_| limit > 0 && roots.is_empty()) {
            let mut digests = Vec::new();
            self.index()
                .scan_from(&self.tables.numbers, &first.to_be_bytes(), &mut |number, digest| {
                    after = <[u8; 4]>::try_from(number).map_or(after, u32::from_be_bytes);
                    digests.extend(<[u8; 20]>::try_from(digest).ok());
                    if digests.len() < limit { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
                })
                .map_err(|e| storage(Error::from(e)))?;
            for digest in &digests {
                roots.extend(self.entry_by_digest(digest).map_err(storage)?.map(root));
            }
            if digests.len() < limit {
                break;
            }
        }
        Ok(roots)
    }

    fn directory(&self, digest: &Digest) -> Result<Arc<Directory>, ViewError> {
        self.engine.get(digest).map_err(storage)?.ok_or(ViewError::Missing(*digest))
    }

    fn read(&self, digest: &Digest, offset: u64, len: usize) -> Result<Bytes, ViewError> {
        self.engine.read_here(digest, offset, len).map_err(|error| match error {
            castore::Error::Elsewhere(digest) => ViewError::Elsewhere(digest),
            error => storage(error),
        })
    }

    fn bring(&self, digest: &Digest, then: Then) {
        self.engine.bring(digest, Box::new(move |brought| then(brought.map_err(storage))));
    }

    fn subscribe(&self, subscriber: Subscriber) {
        self.add_subscriber(subscriber);
    }

    fn space(&self) -> Result<Space, ViewError> {
        let found = statvfs(self.state_dir()).map_err(|e| storage(Error::file("examine", self.state_dir(), e)))?;
        Ok(Space {
            block_size: u32::try_from(found.fragment_size()).unwrap_or(4096),
            blocks: found.blocks(),
            blocks_free: found.blocks_free(),
            blocks_available: found.blocks_available(),
            files: found.files(),
            files_free: found.files_free(),
        })
    }

    fn report_damage(&self, path: &StorePath) {
        self.tell_damage(path);
    }
}

#[cfg(test)]
mod tests {
    use castore::index::Batch;

    use super::*;
    use crate::store::Config;

    #[test]
    fn pages_of_which_everything_is_gone_are_not_the_end_of_the_list() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(Config::new(StoreDir::default(), dir.path())).unwrap();
        let add = |name: &str| {
            let options = crate::AddOptions {
                name: name.into(),
                method: nix_compat::content_address::Method::Text,
                algorithm: nix_compat::hash::Algorithm::Sha256,
                references: std::collections::BTreeSet::new(),
            };
            let path = store.add(&options, &mut &b"contents"[..]).unwrap().path;
            store.valid_entry(&path).unwrap()
        };
        // As a scan sees it that comes before a deletion, when the look at the records comes after it.
        let mut batch = Batch::default();
        for n in 0..7 {
            batch.delete(store.tables.paths, &add(&format!("gone-{n}")).info.path.digest());
        }
        let number = add("here").number;
        store.commit(batch).unwrap();
        let listed = store.list(0, 3).unwrap();
        assert_eq!(listed.iter().map(|root| root.number).collect::<Vec<_>>(), [number]);
        assert!(store.list(number, 3).unwrap().is_empty());
    }
}
