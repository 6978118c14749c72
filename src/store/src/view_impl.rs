//! [`Store`] as a [`StoreView`].

use std::ops::ControlFlow;
use std::sync::Arc;

use bytes::Bytes;
use castore::{BlobService, Digest, Directory, DirectoryService};
use nix::sys::statvfs::statvfs;
use nix_compat::store_path::{StoreDir, StorePath};

use crate::error::Error;
use crate::record::Entry;
use crate::store::Store;
use crate::view::{Root, Space, StoreView, Subscriber, ViewError};

fn storage(error: impl Into<Error>) -> ViewError {
    ViewError::Storage(Box::new(error.into()))
}

fn root(entry: Entry) -> Root {
    Root { number: entry.number, path: entry.info.path, node: entry.node }
}

impl StoreView for Store {
    fn store_dir(&self) -> &StoreDir {
        Store::store_dir(self)
    }

    fn lookup(&self, base_name: &str) -> Result<Option<Root>, ViewError> {
        let Ok(path) = StorePath::from_base_name(base_name) else { return Ok(None) };
        Ok(self.entry(&path).map_err(storage)?.map(root))
    }

    fn by_number(&self, number: u32) -> Result<Option<Root>, ViewError> {
        let digest =
            self.index().get(&self.tables.numbers, &number.to_be_bytes()).map_err(|e| storage(Error::from(e)))?;
        let Some(digest) = digest.and_then(|d| <[u8; 20]>::try_from(&d[..]).ok()) else { return Ok(None) };
        Ok(self.entry_by_digest(&digest).map_err(storage)?.filter(|entry| entry.number == number).map(root))
    }

    fn list(&self, after: u32, limit: usize) -> Result<Vec<Root>, ViewError> {
        let Some(first) = after.checked_add(1) else { return Ok(Vec::new()) };
        let mut digests = Vec::new();
        if limit > 0 {
            self.index()
                .scan_from(&self.tables.numbers, &first.to_be_bytes(), &mut |_, digest| {
                    digests.extend(<[u8; 20]>::try_from(digest).ok());
                    if digests.len() < limit { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
                })
                .map_err(|e| storage(Error::from(e)))?;
        }
        let mut roots = Vec::with_capacity(digests.len());
        for digest in digests {
            roots.extend(self.entry_by_digest(&digest).map_err(storage)?.map(root));
        }
        Ok(roots)
    }

    fn directory(&self, digest: &Digest) -> Result<Arc<Directory>, ViewError> {
        self.engine.get(digest).map_err(storage)?.ok_or(ViewError::Missing(*digest))
    }

    fn read(&self, digest: &Digest, offset: u64, len: usize) -> Result<Bytes, ViewError> {
        self.engine.read_at(digest, offset, len).map_err(storage)
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
}
