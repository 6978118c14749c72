//! Downloads into a file on disk.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;

use fetch::{Client, Download, DownloadError, Retry, Sink, Trouble, copy_file, without_password};
use url::Url;

use super::error::{Error, On};
use super::progress::Progress;

/// Downloads files as the settings say.
pub(super) struct Files(Client);

impl Files {
    pub(super) fn new(settings: &Download) -> Self {
        Self(Client::new(Arc::new(settings.clone())))
    }

    /// Downloads what is at `url` to `path`, a new file. Tries again what may go better another time.
    pub(super) fn fetch(&self, url: &str, path: &Path) -> Result<(), Error> {
        let failed = |e| DownloadError { url: without_password(url), cause: Trouble::Url(e) };
        let parsed = Url::parse(url).map_err(failed)?;
        let file = File::create_new(path).on("create", path)?;
        if parsed.scheme() == "file" {
            return Ok(copy_file(&parsed, &mut FileSink { file, progress: None, length: 0, expected: 0 })?);
        }
        let progress = Some(Progress::start(&without_password(url)));
        Ok(self.0.fetch(&parsed, &mut FileSink { file, progress, length: 0, expected: 0 }, Retry::Always)?)
    }
}

struct FileSink {
    file: File,
    progress: Option<Progress>,
    length: u64,
    expected: u64,
}

impl Sink for FileSink {
    fn begin(&mut self, offset: u64, expected: u64) -> io::Result<()> {
        (self.length, self.expected) = (offset, expected);
        self.file.set_len(offset)?;
        self.file.seek(SeekFrom::Start(offset)).map(drop)
    }

    fn take(&mut self, piece: &[u8]) -> io::Result<()> {
        self.file.write_all(piece)?;
        self.length += piece.len() as u64;
        if let Some(progress) = &mut self.progress {
            progress.at(self.length, self.expected);
        }
        Ok(())
    }

    fn can_restart(&self) -> bool {
        true
    }

    fn retrying(&mut self, why: &str) {
        eprintln!("warning: {why}");
    }
}
