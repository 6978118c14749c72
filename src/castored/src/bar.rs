//! Progress of a move on standard error, if that is a terminal: paths, bytes, rate, and the time that is left.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use migrate::{Progress, Stage};
use parking_lot::Mutex;

/// How often the bar is drawn at least, so that the rate falls when nothing goes on.
const TICK: Duration = Duration::from_millis(500);

/// One bar for one stage after the other.
#[derive(Default)]
pub(crate) struct Bar {
    bar: Mutex<Option<ProgressBar>>,
    paths: AtomicU64,
    done: AtomicU64,
    by_bytes: AtomicBool,
}

impl Bar {
    /// Takes the bar away.
    pub(crate) fn end(&self) {
        if let Some(bar) = self.bar.lock().take() {
            bar.finish_and_clear();
        }
    }
}

impl Progress for Bar {
    fn begin(&self, stage: Stage, paths: u64, bytes: u64) {
        self.end();
        let (what, by_bytes) = match stage {
            Stage::Adopting => ("adopting", true),
            Stage::Verifying => ("reading back", true),
            Stage::Exporting => ("exporting", true),
            Stage::Removing => ("removing old files", false),
        };
        let template = if by_bytes {
            "{prefix} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta} left, {msg}"
        } else {
            "{prefix} {wide_bar} {pos}/{len} {per_sec} {eta} left"
        };
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::new(if by_bytes { bytes } else { paths }).with_style(style).with_prefix(what);
        bar.enable_steady_tick(TICK);
        self.paths.store(paths, Ordering::Relaxed);
        self.done.store(0, Ordering::Relaxed);
        self.by_bytes.store(by_bytes, Ordering::Relaxed);
        *self.bar.lock() = Some(bar);
    }

    fn bytes(&self, count: u64) {
        if let Some(bar) = &*self.bar.lock() {
            bar.inc(count);
        }
    }

    fn path(&self) {
        let done = self.done.fetch_add(1, Ordering::Relaxed) + 1;
        let paths = self.paths.load(Ordering::Relaxed);
        if let Some(bar) = &*self.bar.lock() {
            if !self.by_bytes.load(Ordering::Relaxed) {
                bar.inc(1);
            }
            bar.set_message(format!("{done} of {paths} paths"));
        }
    }

    fn note(&self, text: &str) {
        match &*self.bar.lock() {
            Some(bar) if !bar.is_hidden() => bar.println(text),
            _ => eprintln!("{text}"),
        }
    }
}
