//! What several tests of downloads need.

use std::io;
use std::sync::Arc;

use fetch::{Client, Download, DownloadOptions, Retry, Sink};
use nix_compat::conf::Settings;
use url::Url;

/// Keeps what comes.
struct Memory(Vec<u8>);

impl Sink for Memory {
    fn begin(&mut self, offset: u64, _expected: u64) -> io::Result<()> {
        self.0.truncate(usize::try_from(offset).unwrap());
        Ok(())
    }

    fn take(&mut self, piece: &[u8]) -> io::Result<()> {
        self.0.extend_from_slice(piece);
        Ok(())
    }

    fn can_restart(&self) -> bool {
        true
    }
}

/// Downloads with this environment.
pub(crate) fn fetch(url: &str, variables: &[(&str, &str)]) -> Result<Vec<u8>, String> {
    let variable = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned());
    let mut settings = Settings::default();
    assert!(settings.set("download-attempts", "1").unwrap());
    let client = Client::new(Arc::new(Download::gather(&DownloadOptions::new(&settings), &variable)));
    let mut memory = Memory(Vec::new());
    client.fetch(&Url::parse(url).unwrap(), &mut memory, Retry::Always).map_err(|error| error.to_string())?;
    Ok(memory.0)
}
