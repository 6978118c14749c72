//! What a store takes on disk, as whoever is in its room sees it.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use compat_tests::Result;
use compat_tests::error::Context;

/// How the names of castored's reserves begin.
const RESERVE: &str = "/nix/var/nix/castored/reserve";
/// Between two looks.
const EVERY: Duration = Duration::from_millis(50);

/// What is in use.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Used {
    /// Bytes of blocks, without what castored keeps free.
    pub(crate) bytes: u64,
    /// Bytes of the files that castored gives up when the disk is full: room, not contents.
    pub(crate) reserve: u64,
    /// Files, directories and links.
    pub(crate) inodes: u64,
}

/// What the state directory takes and, where that has plain files, the store directory.
pub(crate) fn used() -> Result<Used> {
    let mut used = Used { bytes: 0, reserve: 0, inodes: 0 };
    let mut todo = vec![Path::new("/nix/var").to_owned()];
    if fs::metadata("/nix/store").doing("looking at", "/nix/store")?.dev()
        == fs::metadata("/nix").doing("looking at", "/nix")?.dev()
    {
        todo.push(Path::new("/nix/store").to_owned());
    }
    let mut linked = HashSet::new();
    while let Some(dir) = todo.pop() {
        // What goes away meanwhile takes nothing.
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            if meta.is_dir() {
                todo.push(entry.path());
            } else if meta.nlink() > 1 && !linked.insert(meta.ino()) {
                continue;
            }
            let bytes = meta.blocks() * 512;
            if entry.path().to_string_lossy().starts_with(RESERVE) {
                used.reserve += bytes
            } else {
                used.bytes += bytes
            }
            used.inodes += 1;
        }
    }
    Ok(used)
}

/// Waits until for so long no space has come back; what is in use then, and when the last of it came back.
pub(crate) fn settled(quiet: Duration) -> Result<(Used, Instant)> {
    let (mut least, mut since) = (used()?, Instant::now());
    while since.elapsed() < quiet {
        thread::sleep(EVERY);
        let now = used()?;
        if now.bytes < least.bytes {
            (least, since) = (now, Instant::now());
        }
    }
    Ok((least, since))
}
