//! The real substituter: all sources of all clients, and what is on its way from them.

use std::collections::HashMap;
use std::sync::Arc;

use fetch::{Download, DownloadOptions};
use nix_compat::conf::Settings;
use nix_compat::realisation::{DrvOutput, Realisation};
use nix_compat::worker::SubstitutableInfo;
use parking_lot::Mutex;
use store::Store;
use tokio::sync::Semaphore;

use crate::closure::Landings;
use crate::error::Error;
use crate::location::Location;
use crate::offers::{Excluded, Offer};
use crate::source::Source;
use crate::{Answer, Client, Contents, Outcome, Substituter, Wanted};

/// Sources kept at once, for all clients.
const MAX_SOURCES: usize = 256;
/// Transfers at once, for all clients: each has a thread for its download and one for its import.
const MAX_TRANSFERS: usize = 64;

/// What makes two clients' sources the same: the URL and how to download from it. Nobody's passwords or certificates
/// serve another.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct SourceKey {
    url: String,
    downloads: DownloadOptions,
    connections: u64,
}

/// Binary caches as sources of paths.
pub struct Substituters {
    pub(crate) store: Arc<Store>,
    sources: Mutex<HashMap<SourceKey, Arc<Source>>>,
    pub(crate) landings: Landings,
    pub(crate) transfers: Arc<Semaphore>,
}

impl Substituters {
    /// For this store.
    pub fn new(store: Arc<Store>) -> Self {
        let transfers = Arc::new(Semaphore::new(MAX_TRANSFERS));
        Self { store, sources: Mutex::default(), landings: Landings::default(), transfers }
    }

    /// The source at a URL, for a client with these settings.
    pub(crate) async fn source(&self, url: &str, settings: &Settings) -> Result<Arc<Source>, Error> {
        let key = SourceKey {
            url: url.to_owned(),
            downloads: DownloadOptions::new(settings),
            connections: settings.http_connections,
        };
        if let Some(source) = self.sources.lock().get(&key) {
            return Ok(source.clone());
        }
        let location = Location::parse(url)?;
        let options = key.downloads.clone();
        // Files of passwords and certificates are read here.
        let gather = move || Download::gather(&options, &|name| std::env::var(name).ok());
        let download = tokio::task::spawn_blocking(gather).await.map_err(|e| Error::Thread(e.to_string()))?;
        let client = fetch::Client::new(Arc::new(download));
        let source = Arc::new(Source::new(location, client, self.store.store_dir(), settings.http_connections));
        let mut sources = self.sources.lock();
        if sources.len() >= MAX_SOURCES {
            sources.retain(|_, source| Arc::strong_count(source) > 1);
        }
        if sources.len() >= MAX_SOURCES {
            return Ok(source);
        }
        Ok(sources.entry(key).or_insert(source).clone())
    }
}

impl Substituter for Substituters {
    fn substitute<'a>(&'a self, client: &'a Client, wanted: Wanted) -> Answer<'a, Outcome> {
        Box::pin(self.fetch(client, wanted))
    }

    fn realise<'a>(&'a self, client: &'a Client, id: DrvOutput) -> Answer<'a, Outcome> {
        Box::pin(self.fetch_realisation(client, id))
    }

    fn contents<'a>(&'a self, client: &'a Client, wanted: Wanted) -> Answer<'a, Contents> {
        Box::pin(self.fetch_contents(client, wanted))
    }

    fn info<'a>(&'a self, client: &'a Client, wanted: Wanted) -> Answer<'a, Option<SubstitutableInfo>> {
        Box::pin(async move { self.offer(client, &wanted, &Excluded::new(), false, false).await.map(info) })
    }

    fn mass_info<'a>(&'a self, client: &'a Client, wanted: Wanted) -> Answer<'a, Option<SubstitutableInfo>> {
        Box::pin(async move { self.offer(client, &wanted, &Excluded::new(), false, true).await.map(info) })
    }

    fn realisation<'a>(&'a self, client: &'a Client, id: DrvOutput) -> Answer<'a, Option<Realisation>> {
        Box::pin(async move { self.foreign_realisation(client, &id).await.map(|(_, realisation)| realisation) })
    }
}

fn info(offer: Offer) -> SubstitutableInfo {
    SubstitutableInfo {
        deriver: offer.info.deriver,
        references: offer.info.references,
        download_size: offer.narinfo.file_size.unwrap_or(0),
        nar_size: offer.info.nar_size,
    }
}
