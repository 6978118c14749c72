//! How much a store holds, and what that takes on disk.

use std::ops::ControlFlow;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use indicatif::{HumanBytes, HumanDuration};
use serde::{Deserialize, Serialize};
use store::Store;

use crate::failure::Failure;

/// Sizes of a store.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Stats {
    /// Valid store paths.
    pub(crate) paths: u64,
    /// The sum of their NAR sizes.
    pub(crate) nar_bytes: u64,
    /// Distinct objects: chunks, chunk lists and directories.
    pub(crate) objects: u64,
    /// Their bytes before compression.
    pub(crate) unique_bytes: u64,
    /// Bytes of all packs.
    pub(crate) stored_bytes: u64,
    /// Pack files.
    pub(crate) packs: u64,
    /// Bytes before compression of all that is in them, dead objects included.
    #[serde(default)]
    pub(crate) held_bytes: u64,
    /// What the last sweep gave back.
    #[serde(default)]
    pub(crate) last_sweep: Option<Sweep>,
}

/// A sweep of the castore.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Sweep {
    /// When it ended, in seconds since 1970.
    pub(crate) at: u64,
    /// Objects it removed.
    pub(crate) removed_objects: u64,
    /// Packs it deleted.
    pub(crate) deleted_packs: u64,
    /// Their bytes.
    pub(crate) freed_bytes: u64,
    /// Bytes of what was alive in them and was written to others.
    pub(crate) rewritten_bytes: u64,
}

impl Stats {
    pub(crate) fn of(store: &Store) -> Result<Self, Failure> {
        let mut stats = Self::default();
        store.for_each(&mut |entry| {
            stats.paths += 1;
            stats.nar_bytes += entry.info.nar_size;
            ControlFlow::Continue(())
        })?;
        let engine = store.engine().stats();
        stats.objects = engine.objects;
        stats.unique_bytes = engine.raw_bytes;
        stats.stored_bytes = engine.stored_bytes;
        stats.packs = engine.packs;
        stats.held_bytes = engine.held_bytes;
        stats.last_sweep = store.last_sweep()?.map(|sweep| Sweep {
            at: sweep.at,
            removed_objects: sweep.removed_objects,
            deleted_packs: sweep.deleted_packs,
            freed_bytes: sweep.freed_bytes,
            rewritten_bytes: sweep.rewritten_bytes,
        });
        Ok(stats)
    }

    pub(crate) fn print(&self) {
        println!("store paths    {:>12}", self.paths);
        println!("NAR size       {:>12}", HumanBytes(self.nar_bytes).to_string());
        println!("deduplicated   {:>12}  {}", HumanBytes(self.unique_bytes).to_string(), self.ratio(self.unique_bytes));
        println!("on disk        {:>12}  {}", HumanBytes(self.stored_bytes).to_string(), self.ratio(self.stored_bytes));
        let share = self.unique_bytes as f64 / self.held_bytes.max(1) as f64 * 100.0;
        println!("objects        {:>12}  in {} packs, of which {share:.1} % is alive", self.objects, self.packs);
        if let Some(sweep) = &self.last_sweep {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
            println!(
                "last sweep     {:>12}  {} ago, gave back {} in {} packs",
                format!("{} gone", sweep.removed_objects),
                HumanDuration(Duration::from_secs(now.saturating_sub(sweep.at))),
                HumanBytes(sweep.freed_bytes.saturating_sub(sweep.rewritten_bytes)),
                sweep.deleted_packs,
            );
        }
    }

    fn ratio(&self, bytes: u64) -> String {
        if self.nar_bytes == 0 {
            return String::new();
        }
        format!("{:.3} of the NAR size", bytes as f64 / self.nar_bytes as f64)
    }
}
