//! A store in memory: the simplest thing that keeps the contract. Tests use it, and compare the engine with it.

use std::collections::HashMap;
use std::io::Read;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::RwLock;

use super::{BlobService, BlobStat, DirectoryService, check_children};
use crate::{Digest, Directory, Error};

/// Blobs and directories in two maps. Nothing bounds it and nothing is ever removed.
#[derive(Debug, Default)]
pub struct MemoryStore {
    blobs: RwLock<HashMap<Digest, Bytes>>,
    directories: RwLock<HashMap<Digest, Arc<Directory>>>,
}

impl MemoryStore {
    /// A store with nothing in it.
    pub fn new() -> MemoryStore {
        MemoryStore::default()
    }

    fn blob(&self, digest: &Digest) -> Option<Bytes> {
        if *digest == Digest::EMPTY { Some(Bytes::new()) } else { self.blobs.read().get(digest).cloned() }
    }
}

impl BlobService for MemoryStore {
    fn stat(&self, digest: &Digest) -> Result<Option<BlobStat>, Error> {
        Ok(self.blob(digest).map(|blob| {
            let size = blob.len() as u64;
            let chunks = if size == 0 { Vec::new() } else { vec![(*digest, size)] };
            BlobStat { size, chunks }
        }))
    }

    fn read_at(&self, digest: &Digest, offset: u64, len: usize) -> Result<Bytes, Error> {
        let blob = self.blob(digest).ok_or(Error::BlobNotFound(*digest))?;
        let start = usize::try_from(offset).map_or(blob.len(), |offset| offset.min(blob.len()));
        let end = start.saturating_add(len).min(blob.len());
        Ok(blob.slice(start..end))
    }

    fn put(&self, from: &mut dyn Read) -> Result<(Digest, u64), Error> {
        let mut blob = Vec::new();
        from.read_to_end(&mut blob).map_err(Error::Input)?;
        let (digest, size) = (Digest::of(&blob), blob.len() as u64);
        self.blobs.write().insert(digest, blob.into());
        Ok((digest, size))
    }
}

impl DirectoryService for MemoryStore {
    fn get(&self, digest: &Digest) -> Result<Option<Arc<Directory>>, Error> {
        if *digest == Digest::EMPTY {
            return Ok(Some(Arc::default()));
        }
        Ok(self.directories.read().get(digest).cloned())
    }

    fn put(&self, directories: &[Directory]) -> Result<Digest, Error> {
        let mut last = None;
        for directory in directories {
            check_children(directory, |child| Ok(self.get(child)?.map(|child| child.size())))?;
            let digest = directory.digest();
            self.directories.write().insert(digest, Arc::new(directory.clone()));
            last = Some(digest);
        }
        last.ok_or(Error::NoDirectory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract;

    #[test]
    fn keeps_the_contract() {
        contract::blobs(&MemoryStore::new());
        contract::directories(&MemoryStore::new());
    }
}
