//! How much a store holds, and what that takes on disk.

use std::ops::ControlFlow;

use indicatif::HumanBytes;
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
        Ok(stats)
    }

    pub(crate) fn print(&self) {
        println!("store paths    {:>12}", self.paths);
        println!("NAR size       {:>12}", HumanBytes(self.nar_bytes).to_string());
        println!("deduplicated   {:>12}  {}", HumanBytes(self.unique_bytes).to_string(), self.ratio(self.unique_bytes));
        println!("on disk        {:>12}  {}", HumanBytes(self.stored_bytes).to_string(), self.ratio(self.stored_bytes));
        println!("objects        {:>12}  in {} packs", self.objects, self.packs);
    }

    fn ratio(&self, bytes: u64) -> String {
        if self.nar_bytes == 0 {
            return String::new();
        }
        format!("{:.3} of the NAR size", bytes as f64 / self.nar_bytes as f64)
    }
}
