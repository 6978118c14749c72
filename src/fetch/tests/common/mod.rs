//! What several tests of downloads need.

#![allow(dead_code, reason = "each test needs some of it")]

use std::io;
use std::sync::Arc;

use fetch::{Client, Download, DownloadOptions, Retry, Sink};
use nix_compat::conf::Settings;
use url::Url;

/// Keeps what comes.
#[derive(Default)]
pub(crate) struct Memory(pub(crate) Vec<u8>);

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

/// A client with settings beside the defaults, and this environment.
pub(crate) fn client(more: &[(&str, &str)], variables: &[(&str, &str)]) -> Client {
    let variable = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned());
    let mut settings = Settings::default();
    for (name, value) in [("download-attempts", "1")].iter().chain(more) {
        assert!(settings.set(name, value).unwrap());
    }
    Client::new(Arc::new(Download::gather(&DownloadOptions::new(&settings), &variable)))
}

/// Downloads with this environment.
pub(crate) fn fetch(url: &str, variables: &[(&str, &str)]) -> Result<Vec<u8>, String> {
    get(&client(&[], variables), url)
}

/// What is at a URL.
pub(crate) fn get(client: &Client, url: &str) -> Result<Vec<u8>, String> {
    let mut memory = Memory::default();
    client.fetch(&Url::parse(url).unwrap(), &mut memory, Retry::Always).map_err(|error| error.to_string())?;
    Ok(memory.0)
}
