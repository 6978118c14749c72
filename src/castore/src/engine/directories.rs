//! Directories out of the object store, decoded once and kept.

use std::sync::Arc;

use quick_cache::Weighter;
use quick_cache::sync::Cache;

use crate::blob::directory as directory_key;
use crate::objects::ObjectStore;
use crate::{Digest, Directory, Error};

/// A decoded directory of this many bytes is a typical one; it sizes the tables of the cache.
const TYPICAL_DIRECTORY: u64 = 2048;

#[derive(Clone)]
struct ByMemory;

impl Weighter<Digest, Arc<Directory>> for ByMemory {
    fn weight(&self, _: &Digest, directory: &Arc<Directory>) -> u64 {
        directory.memory() as u64
    }
}

/// Reads directories, with those used lately decoded in memory.
pub(super) struct Directories {
    objects: Arc<ObjectStore>,
    decoded: Cache<Digest, Arc<Directory>, ByMemory>,
}

impl Directories {
    /// Reads from `objects`, with at most `cache_bytes` of decoded directories in memory.
    pub(super) fn new(objects: Arc<ObjectStore>, cache_bytes: u64) -> Directories {
        let items = (cache_bytes / TYPICAL_DIRECTORY).max(16) as usize;
        Directories { objects, decoded: Cache::with_weighter(items, cache_bytes, ByMemory) }
    }

    pub(super) fn get(&self, digest: &Digest) -> Result<Option<Arc<Directory>>, Error> {
        if *digest == Digest::EMPTY {
            return Ok(Some(Arc::default()));
        }
        if let Some(directory) = self.decoded.get(digest) {
            return Ok(Some(directory));
        }
        let directory = self.read(digest)?;
        if let Some(directory) = &directory {
            self.decoded.insert(*digest, Arc::clone(directory));
        }
        Ok(directory)
    }

    /// As [`Directories::get`], but leaves the cache to those who come back: for walks over everything.
    pub(super) fn read(&self, digest: &Digest) -> Result<Option<Arc<Directory>>, Error> {
        if *digest == Digest::EMPTY {
            return Ok(Some(Arc::default()));
        }
        let Some(encoded) = self.objects.get(&directory_key(digest))? else { return Ok(None) };
        match Directory::decode(&encoded) {
            Ok(directory) => Ok(Some(Arc::new(directory))),
            Err(error) => Err(Error::DamagedDirectory { digest: *digest, error }),
        }
    }

    /// Bytes of the decoded directories in memory.
    pub(super) fn cached_bytes(&self) -> u64 {
        self.decoded.weight()
    }

    /// Empties the cache.
    pub(super) fn forget(&self) {
        self.decoded.clear();
    }
}
