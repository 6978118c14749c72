//! What the daemon may hold in memory, and who of it how much.
//!
//! Everybody who holds memory for long, or for many clients, has a bound that is set once, at start. Without the setting
//! `memory-budget` the bounds are the usual ones, and the budget is their sum. With it, half is for what clients send and
//! are sent, and the rest for caches, among which it is divided as it usually is.
//!
//! Not part of it, since it does not grow with what clients do: the program, its threads, the tables that the database
//! gathers before it writes them, blocks on their way into packs, the hashes of derivations. Builders have memory of their own.

use ::daemon::{Daemon, MAX_STREAMS, STREAM_BYTES};
use indicatif::HumanBytes;
use nix_compat::store_path::StoreDir;
use serde::{Deserialize, Serialize};
use store::{Config, Store};

use crate::failure::Failure;

/// The least that works, in bytes: ten payloads at once, and a block cache in which what is decoded ahead for sequential
/// readers lasts until they come to it.
pub(crate) const LEAST: u64 = 64 << 20;
/// Commits of the index that are in memory at once, each as long as `overlay_bytes` says.
const COMMITS: u64 = 3;

/// What caches may hold, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Caches {
    /// Decoded blocks of packs, those decoded ahead among them.
    blocks: u64,
    directories: u64,
    chunk_lists: u64,
    /// Blocks of the database.
    index: u64,
    /// What is committed and not in the database yet.
    commits: u64,
    /// Decoded records of paths.
    entries: u64,
    /// Decoded directories of the mount.
    listings: u64,
}

impl Caches {
    fn usual() -> Self {
        let Config { engine, entry_bytes, .. } = Config::new(StoreDir::default(), "");
        Self {
            blocks: engine.cache_bytes,
            directories: engine.directory_cache_bytes,
            chunk_lists: engine.chunk_list_cache_bytes,
            index: engine.index.cache_bytes,
            commits: COMMITS * engine.index.overlay_bytes as u64,
            entries: entry_bytes,
            listings: mount::Options::default().directory_cache_bytes,
        }
    }

    fn sum(&self) -> u64 {
        let Self { blocks, directories, chunk_lists, index, commits, entries, listings } = self;
        blocks + directories + chunk_lists + index + commits + entries + listings
    }

    /// The same parts of another whole.
    fn of(&self, whole: u64) -> Self {
        let sum = u128::from(self.sum().max(1));
        let part = |usual: u64| u64::try_from(u128::from(usual) * u128::from(whole) / sum).unwrap_or(u64::MAX);
        Self {
            blocks: part(self.blocks),
            directories: part(self.directories),
            chunk_lists: part(self.chunk_lists),
            index: part(self.index),
            commits: part(self.commits),
            entries: part(self.entries),
            listings: part(self.listings),
        }
    }
}

/// How the memory is shared out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Budget {
    /// All of it, in bytes.
    total: u64,
    caches: Caches,
    /// Payloads and archives that may be under way at once.
    streams: usize,
}

impl Budget {
    /// Shares out so many bytes, or as usual.
    ///
    /// # Errors
    /// [`Failure::Budget`] when they are fewer than [`LEAST`].
    pub(crate) fn new(bytes: Option<u64>) -> Result<Self, Failure> {
        let usual = Caches::usual();
        let Some(total) = bytes else {
            let streams = MAX_STREAMS as u64 * STREAM_BYTES;
            return Ok(Self { total: usual.sum() + streams, caches: usual, streams: MAX_STREAMS });
        };
        if total < LEAST {
            return Err(Failure::Budget { bytes: total, least: LEAST });
        }
        let streams = usize::try_from(total / 2 / STREAM_BYTES).unwrap_or(MAX_STREAMS).min(MAX_STREAMS);
        Ok(Self { total, caches: usual.of(total - streams as u64 * STREAM_BYTES), streams })
    }

    /// Gives a store its part.
    pub(crate) fn configure(&self, config: &mut Config) {
        let Caches { blocks, directories, chunk_lists, index, commits, entries, listings: _ } = self.caches;
        config.engine.cache_bytes = blocks;
        config.engine.directory_cache_bytes = directories;
        config.engine.chunk_list_cache_bytes = chunk_lists;
        config.engine.index.cache_bytes = index;
        config.engine.index.overlay_bytes = usize::try_from(commits / COMMITS).unwrap_or(usize::MAX);
        config.entry_bytes = entries;
    }

    /// Bytes of decoded directories that the mount may hold.
    pub(crate) fn listings(&self) -> u64 {
        self.caches.listings
    }

    /// How many payloads and archives may be under way at once.
    pub(crate) fn streams(&self) -> usize {
        self.streams
    }

    /// Who has how much and uses how much of it; `listings` is what the mount uses.
    pub(crate) fn used(&self, store: &Store, daemon: &Daemon, listings: u64) -> Memory {
        let Self { total, caches, streams } = self;
        let engine = store.engine().memory();
        let holder = |name: &str, has, uses| Holder { name: name.to_owned(), has, uses };
        Memory {
            budget: *total,
            holders: vec![
                holder("decoded blocks", caches.blocks, Some(engine.blocks)),
                holder("directories", caches.directories, Some(engine.directories)),
                holder("chunk lists", caches.chunk_lists, Some(engine.chunk_lists)),
                holder("index", caches.index, None),
                holder("commits", caches.commits, Some(engine.commits)),
                holder("path infos", caches.entries, Some(store.entries_in_memory())),
                holder("mount", caches.listings, Some(listings)),
                holder("payloads", *streams as u64 * STREAM_BYTES, Some(daemon.streams() as u64 * STREAM_BYTES)),
            ],
        }
    }
}

/// The budget and who has what of it, as `castored status` tells.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Memory {
    /// All of it, in bytes.
    pub(crate) budget: u64,
    pub(crate) holders: Vec<Holder>,
}

/// Somebody who holds memory.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Holder {
    pub(crate) name: String,
    /// Bytes at most.
    pub(crate) has: u64,
    /// Bytes now; none for what the database holds, which does not tell.
    pub(crate) uses: Option<u64>,
}

impl Memory {
    pub(crate) fn print(&self) {
        println!("memory budget {}", HumanBytes(self.budget));
        for holder in &self.holders {
            let uses = holder.uses.map_or_else(|| "?".to_owned(), |bytes| HumanBytes(bytes).to_string());
            println!("  {:<14} {uses:>12} of {}", holder.name, HumanBytes(holder.has));
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

    use super::*;

    #[test]
    fn without_the_setting_everything_is_as_usual() {
        let budget = Budget::new(None).unwrap();
        let usual = Config::new(StoreDir::default(), "");
        let mut config = usual.clone();
        budget.configure(&mut config);
        assert_eq!(format!("{config:?}"), format!("{usual:?}"));
        assert_eq!((budget.listings(), budget.streams()), (32 << 20, 512));
        assert_eq!(budget.total, budget.caches.sum() + 512 * STREAM_BYTES);
    }

    #[test]
    fn the_parts_are_never_more_than_the_whole_and_next_to_all_of_it() {
        for total in [LEAST, LEAST + 1, 256 << 20, 1 << 30, 4 << 30, 1 << 50, u64::MAX] {
            let budget = Budget::new(Some(total)).unwrap();
            let shared = budget.caches.sum() + budget.streams as u64 * STREAM_BYTES;
            assert!(shared <= total && total - shared < 10, "{total}: {budget:?}");
            assert!(budget.streams >= 10 && budget.caches.blocks >= 8 << 20, "{budget:?}");
        }
    }

    #[test]
    fn too_little_is_refused_with_the_least() {
        let refused = Budget::new(Some(LEAST - 1)).unwrap_err().to_string();
        assert!(refused.contains("67108864") && refused.contains("64.00 MiB"), "{refused}");
    }
}
