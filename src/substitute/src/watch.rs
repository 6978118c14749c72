//! What a client is told of copying.

use std::sync::atomic::{AtomicU64, Ordering};

use nix_compat::worker::stderr::Verbosity;

/// A path on its way.
#[derive(Clone, Debug)]
pub struct Copying {
    /// Its number, unlike any other's.
    pub number: u64,
    /// The path, whole.
    pub path: String,
    /// The URL of the source, without parameters.
    pub source: String,
    /// The URL of the file with the NAR.
    pub file: String,
    /// Bytes of the NAR.
    pub nar_size: u64,
}

impl Copying {
    pub(crate) fn next_number() -> u64 {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        NEXT.fetch_add(1, Ordering::Relaxed)
    }
}

/// Who follows the copying. None of these blocks.
pub trait Watch: Send + Sync {
    /// A line for the client's log.
    fn log(&self, level: Verbosity, text: String);
    /// So many paths more will be fetched: bytes to download, and bytes of NAR.
    fn expect(&self, paths: u64, download: u64, nar: u64);
    /// A source begins to send one of them.
    fn began(&self, copying: &Copying);
    /// So many bytes of its file are here, of so many, or of 0 if nobody knows; and so many of its NAR.
    fn progress(&self, copying: &Copying, file: u64, of_file: u64, nar: u64);
    /// It is over.
    fn ended(&self, copying: &Copying);
    /// A path that was expected is valid now, or will not be.
    fn done(&self, success: bool, download: u64, nar: u64);
}

/// Tells nobody.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoWatch;

impl Watch for NoWatch {
    fn log(&self, _: Verbosity, text: String) {
        tracing::debug!("{text}");
    }
    fn expect(&self, _: u64, _: u64, _: u64) {}
    fn began(&self, _: &Copying) {}
    fn progress(&self, _: &Copying, _: u64, _: u64, _: u64) {}
    fn ended(&self, _: &Copying) {}
    fn done(&self, _: bool, _: u64, _: u64) {}
}
