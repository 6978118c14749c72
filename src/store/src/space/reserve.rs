//! A file that only takes space: given up when the disk is full, so that a collection can write what it has to.
//!
//! A collection writes before it frees: the index is told what is gone, and what is alive in a pack is copied before the
//! pack goes. On a disk that is full to the last byte neither can be. So it gives up the reserve first, and makes it again
//! when there is space. Packs are no larger than twice the reserve: of one that is less than half alive, the rest fits.
//!
//! Opening the index takes a little space as well. There is a smaller reserve for that, so that a store that was opened on
//! a full disk can still be collected.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use castore::pack::SEAL_AT;
use nix::fcntl::posix_fallocate;

use super::Space;

/// The part of the filesystem that is reserved: a 128th, within these bounds.
const PART: u64 = 128;
/// Half of the largest pack, in bytes.
const LARGEST: u64 = SEAL_AT / 2;
/// On filesystems where a 128th is less than this, in bytes, there is no reserve: it would be missed, and help nobody.
const SMALLEST: u64 = 2 << 20;
/// Packs on small filesystems are sealed at no less than this, in bytes.
const SMALLEST_PACK: u64 = 1 << 20;
/// The reserve is made (again) while this many times its size is free, and given up when less than its size is.
const ROOM: u64 = 4;

/// The size at which packs are sealed on such a filesystem, in bytes.
pub(crate) fn pack_size(space: Space) -> u64 {
    (space.total / PART * 2).clamp(SMALLEST_PACK, SEAL_AT)
}

/// The part of a collection's reserve that opening the store has for itself.
const OPENING: u64 = 4;

/// A reserve of one store.
#[derive(Debug)]
pub(crate) struct Reserve {
    path: PathBuf,
    /// It is so much smaller than that of a collection.
    part: u64,
}

impl Reserve {
    /// That of collections of the store in `dir`.
    pub(crate) fn for_collections(dir: &Path) -> Self {
        Self { path: dir.join("reserve"), part: 1 }
    }

    /// That of opening it.
    pub(crate) fn for_opening(dir: &Path) -> Self {
        Self { path: dir.join("reserve-for-opening"), part: OPENING }
    }

    /// How large it should be; none on a small filesystem.
    fn size(space: Space) -> Option<u64> {
        Some((space.total / PART).min(LARGEST)).filter(|size| *size >= SMALLEST)
    }

    /// How large it is.
    fn held(&self) -> u64 {
        fs::metadata(&self.path).map_or(0, |metadata| metadata.len())
    }

    /// Gives the reserve up if the disk is nearly full; whether it did.
    pub(crate) fn give_up_if_short(&self) -> bool {
        let held = self.held();
        self.space().is_some_and(|space| space.usable < held) && self.give_up()
    }

    /// Gives the reserve up; whether there was one.
    pub(crate) fn give_up(&self) -> bool {
        let held = self.held();
        if held == 0 {
            return false;
        }
        match fs::remove_file(&self.path) {
            Ok(()) => {
                tracing::warn!(bytes = held, path = %self.path.display(), "the disk is full: gave up the reserve");
                true
            }
            Err(error) => {
                tracing::error!(%error, path = %self.path.display(), "cannot give up the reserve of a full disk");
                false
            }
        }
    }

    /// Makes the reserve if it is not there and there is space enough.
    pub(crate) fn make_if_missing(&self) {
        let Some(space) = self.space() else { return };
        let Some(size) = Self::size(space).map(|size| size / self.part) else { return };
        if self.held() > 0 || space.available < size.saturating_mul(ROOM) {
            return;
        }
        if let Err(error) = self.make(size) {
            tracing::warn!(%error, path = %self.path.display(), "cannot make a reserve for a full disk");
            let _ = fs::remove_file(&self.path);
        }
    }

    fn make(&self, size: u64) -> io::Result<()> {
        let file = File::create(&self.path)?;
        let size = i64::try_from(size).map_err(io::Error::other)?;
        Ok(posix_fallocate(&file, 0, size)?)
    }

    fn space(&self) -> Option<Space> {
        let dir = self.path.parent()?;
        Space::of(dir).inspect_err(|error| tracing::warn!(%error, "cannot tell how full the disk is")).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_size_follows_the_filesystem() {
        let space = |total: u64| Space { total, available: 0, usable: 0 };
        let size = |total: u64| Reserve::size(space(total));
        assert_eq!(size(100 << 20), None);
        assert_eq!(size(256 << 20), Some(2 << 20));
        assert_eq!(size(4 << 30), Some(32 << 20));
        assert_eq!(size(1 << 40), Some(128 << 20));
        assert_eq!(pack_size(space(1 << 40)), SEAL_AT);
        assert_eq!(pack_size(space(4 << 30)), 64 << 20);
        assert_eq!(pack_size(space(1 << 20)), SMALLEST_PACK);
    }
}
