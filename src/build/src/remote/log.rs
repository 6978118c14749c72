//! The log of a build that runs on another machine: for those who watch, and for the file.

use std::sync::Arc;

use remote::{BuildLog, Download, Stopper};

use crate::log::{LineSplitter, LogFile};
use crate::scheduler::graph::Goal;

/// Passes on what a remote build says.
pub(super) struct RemoteLog {
    pub(super) goal: Arc<Goal>,
    pub(super) splitter: LineSplitter,
    pub(super) file: Option<LogFile>,
    /// Bytes that may still come; no limit without.
    pub(super) left: Option<u64>,
    /// Ends the build when more come.
    pub(super) stopper: Stopper,
    pub(super) too_long: bool,
}

impl BuildLog for RemoteLog {
    fn output(&mut self, bytes: &[u8]) {
        if self.too_long {
            return;
        }
        if let Some(left) = &mut self.left {
            match left.checked_sub(bytes.len() as u64) {
                Some(rest) => *left = rest,
                None => {
                    self.too_long = true;
                    self.stopper.stop();
                    return;
                }
            }
        }
        if let Some(file) = &mut self.file
            && let Err(error) = file.write(bytes)
        {
            tracing::warn!("cannot write the log of {}: {error}", self.goal.key.drv);
            self.file = None;
        }
        let feed = &self.goal.feed;
        self.splitter.feed(bytes, &mut |line| {
            feed.builder_line(line);
        });
    }

    fn phase(&mut self, phase: &str) {
        self.goal.feed.phase(phase.to_owned());
    }

    fn note(&mut self, text: &str) {
        self.goal.feed.note(text);
    }

    fn download(&mut self, news: Download) {
        self.goal.feed.download(news);
    }
}

impl RemoteLog {
    /// The end of the log.
    pub(super) fn finish(&mut self) {
        let feed = &self.goal.feed;
        std::mem::take(&mut self.splitter).finish(&mut |line| feed.line(line));
        if let Some(Err(error)) = self.file.take().map(LogFile::finish) {
            tracing::warn!("cannot write the log of {}: {error}", self.goal.key.drv);
        }
    }
}
