//! The filesystem that holds the state directory: what is free there, and what is done when it gets short.
//!
//! Two things keep the store going: garbage is collected without being asked for when free space falls below a low water
//! mark ([`auto`]), and a [reserve](reserve) is given up when even a collection could not write any more.

pub(crate) mod auto;
pub(crate) mod reserve;

use std::path::Path;

use nix::sys::statvfs::statvfs;
use nix::unistd::geteuid;

use crate::error::{Error, Result};
use crate::store::Store;

/// With less than this free, in bytes, a disk counts as full: the index opens again with no less.
const FULL: u64 = 1 << 20;

/// Blocks that ext4 keeps for itself, at most, and yet counts as free: so many, or a part of all.
const KEPT_BLOCKS: u64 = 4096;
const KEPT_PART: u64 = 50;

/// Space on a filesystem, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// All there is.
    pub total: u64,
    /// What unprivileged processes can still use, as stock counts it.
    pub available: u64,
    /// What this process can: root has some more.
    pub usable: u64,
}

impl Space {
    /// That of the filesystem of `path`.
    pub(crate) fn of(path: &Path) -> Result<Self> {
        let stat = statvfs(path).map_err(|errno| Error::file("look at the filesystem of", path, errno))?;
        // The types differ between platforms.
        let fragment = stat.fragment_size() as u64;
        let bytes = |fragments| fragment.saturating_mul(fragments);
        let available = bytes(stat.blocks_available() as u64);
        let kept = KEPT_BLOCKS.min(stat.blocks() as u64 / KEPT_PART);
        let of_root = bytes((stat.blocks_free() as u64).saturating_sub(kept)).max(available);
        let usable = if geteuid().is_root() { of_root } else { available };
        Ok(Self { total: bytes(stat.blocks() as u64), available, usable })
    }
}

impl Store {
    /// Space on the filesystem of the state directory.
    ///
    /// # Errors
    /// When the system does not tell.
    pub fn space(&self) -> Result<Space> {
        Space::of(&self.config.state_dir)
    }

    /// The message of a failure for lack of space, with what can be done about that. Once is enough.
    #[must_use]
    pub fn advise(&self, message: String) -> String {
        let full = format!("The filesystem of '{}' is full", self.config.state_dir.display());
        if message.contains(&full) {
            return message;
        }
        let free = match self.space() {
            Ok(Space { total, usable, .. }) => format!(" ({} of {} MiB are free)", usable >> 20, total >> 20),
            Err(_) => String::new(),
        };
        format!(
            "{message}\n\n{full}{free}. The store is intact. Collect garbage (nix-collect-garbage, or nix-store --gc), or \
             free space by other means; the daemon then goes on by itself.",
        )
    }

    /// The same for a failure of any kind while the disk is full, which is then the likely reason.
    #[must_use]
    pub fn advise_if_full(&self, message: String) -> String {
        if self.is_full() { self.advise(message) } else { message }
    }

    pub(crate) fn is_full(&self) -> bool {
        self.space().is_ok_and(|space| space.usable < FULL)
    }

    /// An error when there is not even the little space that a collection needs before it gives any back.
    pub(crate) fn check_room_to_collect(&self) -> Result<()> {
        // The other reserve is for the next opening, which after a collection that succeeds has room without it.
        if self.is_full() && self.for_opening.give_up() {
            // Writing may have failed while the disk was full; this is to find out that it does not any more.
            let _ = self.sync();
        }
        let space = self.space()?;
        if space.usable >= FULL {
            return Ok(());
        }
        let dir = self.config.state_dir.clone();
        Err(Error::NoRoomToCollect { dir, free: space.usable, needed: FULL })
    }
}
