//! How much a store holds, and what that takes on disk.

pub(crate) mod serve;

use std::ops::ControlFlow;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use indicatif::{HumanBytes, HumanDuration};
use serde::{Deserialize, Serialize};
use store::{PathCost, Store};

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
    /// What the paths come to when equal files and directories count once, in bytes; only where it was asked for, since it
    /// takes a look at all of them.
    #[serde(default)]
    pub(crate) distinct_bytes: Option<u64>,
    /// The objects' bytes before compression: files cut into chunks, equal ones counted once.
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

/// What a path costs.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PathSizes {
    /// The full path.
    pub(crate) path: String,
    /// Its NAR size, in bytes.
    pub(crate) nar_bytes: u64,
    /// Bytes on disk that only it uses.
    pub(crate) unique_bytes: u64,
    /// Bytes on disk that other valid paths use as well.
    pub(crate) shared_bytes: u64,
    /// The same for it and all it needs, together.
    pub(crate) closure: ClosureSizes,
}

/// What a path costs together with all it needs.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ClosureSizes {
    /// How many paths that are.
    pub(crate) paths: u64,
    /// The sum of their NAR sizes, in bytes.
    pub(crate) nar_bytes: u64,
    /// Bytes on disk that only they use.
    pub(crate) unique_bytes: u64,
    /// Bytes on disk that valid paths outside use as well.
    pub(crate) shared_bytes: u64,
}

fn packs(count: u64) -> String {
    format!("{count} {}", if count == 1 { "pack" } else { "packs" })
}

impl PathSizes {
    fn of(store: &Store, cost: &PathCost) -> Self {
        Self {
            path: store.store_dir().display(&cost.path),
            nar_bytes: cost.nar_size,
            unique_bytes: cost.cost.unique,
            shared_bytes: cost.cost.shared,
            closure: ClosureSizes {
                paths: cost.closure_paths,
                nar_bytes: cost.closure_nar_size,
                unique_bytes: cost.closure_cost.unique,
                shared_bytes: cost.closure_cost.shared,
            },
        }
    }
}

impl Stats {
    /// All that is known without a look at every tree.
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
        let line = |what: &str, bytes: u64| {
            println!("{what:<14} {:>12}  {}", HumanBytes(bytes).to_string(), self.ratio(bytes));
        };
        if let Some(distinct) = self.distinct_bytes {
            line("files once", distinct);
        }
        line("chunks once", self.unique_bytes);
        line("on disk", self.stored_bytes);
        let share = self.unique_bytes as f64 / self.held_bytes.max(1) as f64 * 100.0;
        let count = packs(self.packs);
        println!("objects        {:>12}  in {count}, of which {share:.1} % is alive", self.objects);
        if let Some(sweep) = &self.last_sweep {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
            println!(
                "last sweep     {:>12}  {} ago, gave back {} in {}",
                format!("{} gone", sweep.removed_objects),
                HumanDuration(Duration::from_secs(now.saturating_sub(sweep.at))),
                HumanBytes(sweep.freed_bytes.saturating_sub(sweep.rewritten_bytes)),
                packs(sweep.deleted_packs),
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
