//! The local engine: blobs and directories over the object store, with what is used often decoded in memory.
//!
//! Reading goes through the [`BlobService`] and [`DirectoryService`] the engine is. An import goes through a
//! [`Session`], which groups and compresses what it puts; the services' `put` is a session for one call.

mod costs;
mod directories;
mod garbage;
mod hold;
mod promises;
mod walk;

use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

use crate::blob::Blobs;
use crate::index::{Index, IndexOptions};
use crate::objects::{self, ObjectStore};
use crate::services::check_children;
use crate::{BlobService, BlobStat, Digest, Directory, DirectoryService, Error};
use directories::Directories;

pub use crate::objects::Stats;
pub use crate::session::{Hold, Session};
pub use costs::{Cost, CostError, Costs, Distinct, MAX_OBJECTS, MAX_SETS};
pub use garbage::Garbage;
pub use promises::{Elsewhere, Filler, MAX_NOTE, Promise, Then};

/// What can be chosen when an engine is opened: how memory is shared out.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes of decoded blocks of packs kept in memory.
    pub cache_bytes: u64,
    /// Bytes of decoded directories kept in memory.
    pub directory_cache_bytes: u64,
    /// Bytes of decoded chunk lists kept in memory.
    pub chunk_list_cache_bytes: u64,
    /// The index's share of memory.
    pub index: IndexOptions,
    /// A pack is sealed before it grows beyond this many bytes.
    pub seal_at: u64,
}

impl Default for Options {
    fn default() -> Options {
        let objects = objects::Options::default();
        Options {
            cache_bytes: objects.cache_bytes,
            directory_cache_bytes: 32 << 20,
            chunk_list_cache_bytes: 16 << 20,
            index: objects.index,
            seal_at: objects.seal_at,
        }
    }
}

/// What an engine has in memory, in bytes. What the database under the index caches it does not tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Decoded blocks: [`Options::cache_bytes`] at most.
    pub blocks: u64,
    /// Decoded directories: [`Options::directory_cache_bytes`] at most.
    pub directories: u64,
    /// Decoded chunk lists: [`Options::chunk_list_cache_bytes`] at most.
    pub chunk_lists: u64,
    /// What was committed and is not in the database yet: three times [`IndexOptions::overlay_bytes`] at most.
    pub commits: u64,
}

/// Everything a castore keeps in one directory. One process owns it at a time; its threads share it freely.
pub struct Engine {
    objects: Arc<ObjectStore>,
    blobs: Blobs,
    directories: Directories,
    /// Who gets what was promised and is not here, see [`promises`].
    fillers: Arc<promises::Fillers>,
}

impl Engine {
    /// Opens the engine in `dir`, empty when nothing is there.
    ///
    /// # Errors
    /// When another process has it open, or when what is there cannot be read.
    pub fn open(dir: &Path, options: Options) -> Result<Arc<Engine>, Error> {
        let Options { cache_bytes, directory_cache_bytes, chunk_list_cache_bytes, index, seal_at } = options;
        let objects = ObjectStore::open(dir, objects::Options { cache_bytes, index, seal_at })?;
        Ok(Arc::new(Engine {
            blobs: Blobs::new(Arc::clone(&objects), chunk_list_cache_bytes),
            directories: Directories::new(Arc::clone(&objects), directory_cache_bytes),
            fillers: Arc::default(),
            objects,
        }))
    }

    /// Begins an import.
    pub fn session(&self) -> Session {
        Session::new(self.objects.writer())
    }

    /// Makes everything durable that was visible before the call: contents flushed and commits to the index.
    pub fn sync(&self) -> Result<(), Error> {
        Ok(self.objects.sync()?)
    }

    /// The index, in which others keep tables of their own: what they commit is durable together with the contents.
    pub fn index(&self) -> &Arc<Index> {
        self.objects.index()
    }

    /// The objects below the engine.
    pub fn objects(&self) -> &Arc<ObjectStore> {
        &self.objects
    }

    /// What is in memory now. Cheap.
    pub fn memory(&self) -> Memory {
        Memory {
            blocks: self.objects.cached_bytes(),
            directories: self.directories.cached_bytes(),
            chunk_lists: self.blobs.cached_bytes(),
            commits: self.index().pending_bytes(),
        }
    }

    /// What is stored and how the block cache fares. Cheap.
    pub fn stats(&self) -> Stats {
        self.objects.stats()
    }
}

impl BlobService for Engine {
    fn stat(&self, digest: &Digest) -> Result<Option<BlobStat>, Error> {
        self.blobs.stat(digest)
    }

    /// Waits for what was promised; [`Engine::read_here`] does not.
    fn read_at(&self, digest: &Digest, offset: u64, len: usize) -> Result<Bytes, Error> {
        match self.read_here(digest, offset, len) {
            Err(Error::Elsewhere(_)) => {
                self.wait_for(digest)?;
                self.read_here(digest, offset, len)
            }
            read => read,
        }
    }

    fn put(&self, from: &mut dyn Read) -> Result<(Digest, u64), Error> {
        let mut session = self.session();
        let put = session.put_blob(from)?;
        session.flush()?;
        Ok(put)
    }
}

impl DirectoryService for Engine {
    fn get(&self, digest: &Digest) -> Result<Option<Arc<Directory>>, Error> {
        self.directories.get(digest)
    }

    fn put(&self, directories: &[Directory]) -> Result<Digest, Error> {
        let mut session = self.session();
        let mut sizes = std::collections::HashMap::new();
        let mut last = None;
        for directory in directories {
            check_children(directory, |child| match sizes.get(child) {
                Some(size) => Ok(Some(*size)),
                None => Ok(self.get(child)?.map(|child| child.size())),
            })?;
            let digest = session.put_directory(directory)?;
            sizes.insert(digest, directory.size());
            last = Some(digest);
        }
        session.flush()?;
        last.ok_or(Error::NoDirectory)
    }
}

#[cfg(test)]
mod tests;
