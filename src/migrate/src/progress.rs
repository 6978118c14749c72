//! What is told while something long goes on.

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Contents are read from the stock store into castored's.
    Adopting,
    /// What was adopted is read back from castored's store.
    Verifying,
    /// Contents are written to a stock store.
    Exporting,
    /// Old files are removed.
    Removing,
}

/// Hears how far something is. Called from many threads at once.
pub trait Progress: Sync {
    /// A stage begins: so many paths with so many bytes of contents (NAR sizes; 0 where that is not known).
    fn begin(&self, stage: Stage, paths: u64, bytes: u64);
    /// So many bytes more are done.
    fn bytes(&self, count: u64);
    /// One path more is done.
    fn path(&self);
    /// Something worth a line for whoever watches.
    fn note(&self, text: &str);
}

/// Nobody listens.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _: Stage, _: u64, _: u64) {}
    fn bytes(&self, _: u64) {}
    fn path(&self) {}
    fn note(&self, _: &str) {}
}
