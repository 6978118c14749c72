//! The real substituter: all sources of all clients, and what is on its way from them.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use fetch::{Download, DownloadOptions};
use nix_compat::conf::Settings;
use nix_compat::realisation::{DrvOutput, Realisation};
use nix_compat::worker::SubstitutableInfo;
use parking_lot::Mutex;
use rpc_client::Channel;
use store::Store;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use crate::binary_cache::BinaryCache;
use crate::closure::Landings;
use crate::error::Error;
use crate::grpc::Castore;
use crate::location::{Location, Place};
use crate::offers::{Excluded, Offer};
use crate::origin::Origin;
use crate::peer::Peer;
use crate::remembered::Remembered;
use crate::source::Source;
use crate::{Answer, Client, Contents, Outcome, Substituter, Wanted};

/// Sources kept at once, for all clients.
const MAX_SOURCES: usize = 256;
/// Transfers at once, for all clients: each has a thread for its download and one for its import.
pub(crate) const MAX_TRANSFERS: usize = 64;

/// Questions to one castore at once: as many as one of its connections has room for.
const MAX_QUESTIONS: u64 = 64;

/// What makes two clients' sources the same: the URL and how to download from it. Nobody's passwords or certificates
/// serve another.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct SourceKey {
    url: String,
    downloads: DownloadOptions,
    connections: u64,
}

impl SourceKey {
    /// The name under which its answers are kept: whoever has other passwords or certificates may be answered otherwise.
    fn name_on_disk(&self) -> String {
        let (netrc, certificates) = self.downloads.secrets();
        format!("{}\n{}\n{}", self.url, netrc.display(), certificates.display())
    }
}

/// Binary caches and other stores as sources of paths.
pub struct Substituters {
    pub(crate) store: Arc<Store>,
    sources: Mutex<HashMap<SourceKey, Arc<Source>>>,
    remembered: OnceLock<Arc<Remembered>>,
    pub(crate) landings: Landings,
    pub(crate) transfers: Arc<Semaphore>,
}

impl Substituters {
    /// For this store.
    pub fn new(store: Arc<Store>) -> Self {
        let transfers = Arc::new(Semaphore::new(MAX_TRANSFERS));
        Self { store, sources: Mutex::default(), remembered: OnceLock::new(), landings: Landings::default(), transfers }
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
        let (origin, connections) = self.origin(&location, &key, settings).await?;
        let disk = match &location.place {
            Place::Server(_) | Place::Bucket(_) => Some((self.remembered().await?, key.name_on_disk())),
            Place::Directory(_) | Place::Peer(..) | Place::Castore(_) => None,
        };
        let source = Arc::new(Source::new(location, origin, self.store.store_dir(), connections, disk));
        let mut sources = self.sources.lock();
        if sources.len() >= MAX_SOURCES {
            sources.retain(|_, source| Arc::strong_count(source) > 1);
        }
        if sources.len() >= MAX_SOURCES {
            return Ok(source);
        }
        Ok(sources.entry(key).or_insert(source).clone())
    }

    /// What is on disk of the answers of all sources; opened when it is first needed.
    async fn remembered(&self) -> Result<Arc<Remembered>, Error> {
        let dir = self.store.state_dir().join("castored");
        if let Some(remembered) = self.remembered.get() {
            return Ok(remembered.clone());
        }
        let opened = tokio::task::spawn_blocking(move || Arc::new(Remembered::open(&dir))).await;
        let opened = opened.map_err(|e| Error::Thread(e.to_string()))?;
        Ok(self.remembered.get_or_init(|| opened).clone())
    }

    /// Who is asked there, and how many questions may be asked at once.
    async fn origin(
        &self,
        location: &Location,
        key: &SourceKey,
        settings: &Settings,
    ) -> Result<(Box<dyn Origin>, u64), Error> {
        if let Place::Peer(uri, connections) = &location.place {
            let dir = location.store_dir.as_ref().unwrap_or(self.store.store_dir()).clone();
            let peer = Peer::new(location.uri.clone(), uri.clone(), dir, *connections, settings.connect_timeout);
            return Ok((Box::new(peer), *connections as u64));
        }
        if let Place::Castore(url) = &location.place {
            return Ok((Box::new(self.castore(location, url, key, settings).await?), MAX_QUESTIONS));
        }
        let (options, place) = (key.downloads.clone(), location.place.clone());
        // Files of passwords, keys and certificates are read here.
        let gather = move || {
            let variable = |name: &str| std::env::var(name).ok();
            let client = fetch::Client::new(Arc::new(Download::gather(&options, &variable)));
            match place {
                Place::Bucket(bucket) => {
                    (client.signing(bucket.with_key(&variable)), Place::Server(bucket.base().clone()))
                }
                place => (client, place),
            }
        };
        let (client, place) = tokio::task::spawn_blocking(gather).await.map_err(|e| Error::Thread(e.to_string()))?;
        let cache = BinaryCache::new(location.uri.clone(), place, client);
        Ok((Box::new(cache), settings.http_connections))
    }
}

impl Substituters {
    async fn castore(
        &self,
        location: &Location,
        url: &str,
        key: &SourceKey,
        settings: &Settings,
    ) -> Result<Castore, Error> {
        let (wanted, options, patience) = (url.to_owned(), key.downloads.clone(), settings.connect_timeout);
        let open = move || channel(&wanted, &options, patience);
        let channel = tokio::task::spawn_blocking(open).await.map_err(|e| Error::Thread(e.to_string()))??;
        let (here, attempts) = (self.store.engine().clone(), settings.download_attempts);
        Ok(Castore::new(location.uri.clone(), here, channel, Handle::current(), attempts))
    }
}

/// A channel to a castore; connecting may take so many seconds, 0 for as many as is usual. Reads files of certificates, and
/// must be called in a runtime.
pub(crate) fn channel(url: &str, options: &DownloadOptions, connect_timeout: u64) -> Result<Channel, Error> {
    let mut authorities = String::new();
    if url.starts_with("grpc+https:") {
        authorities = Download::gather(options, &|name| std::env::var(name).ok()).certificates;
    }
    Ok(match connect_timeout {
        0 => rpc_client::open(url, authorities.as_bytes())?,
        seconds => rpc_client::open_within(url, authorities.as_bytes(), Duration::from_secs(seconds))?,
    })
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
