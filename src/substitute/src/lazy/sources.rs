//! The castores that lazy paths are from.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use castore::engine::Promise;
use fetch::DownloadOptions;
use parking_lot::Mutex;
use rpc_client::Channel;
use store::Store;
use tokio::runtime::Handle;

use crate::error::Error;
use crate::grpc::Castore;
use crate::substituters::channel;

/// Sources that are asked for one blob, and known at a time.
const MAX_SOURCES: usize = 16;
/// How often a call is made that the connection breaks under. A reader waits meanwhile.
const ATTEMPTS: u64 = 2;
/// Bytes of one thread that were asked for and not used yet.
const UNDERWAY: u64 = 2 << 20;
/// For how long the list of all sources is good.
const LIST_AGE: Duration = Duration::from_secs(5);

/// A source of lazy paths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LazySource {
    /// Its URL.
    pub url: String,
    /// Lazy paths that are from it.
    pub paths: u64,
    /// Why the last attempt to fetch from it failed, if it did.
    pub failure: Option<String>,
}

pub(super) struct Sources {
    options: DownloadOptions,
    connect_timeout: u64,
    runtime: Handle,
    /// By URL. Only the connections are kept: a [`Castore`] has the engine, which has who fetches for it.
    opened: Mutex<HashMap<String, Channel>>,
    failures: Mutex<HashMap<String, String>>,
    all: Mutex<Option<(Instant, Vec<String>)>>,
}

impl Sources {
    pub(super) fn new(options: DownloadOptions, connect_timeout: u64, runtime: Handle) -> Sources {
        let (opened, failures, all) = (Mutex::default(), Mutex::default(), Mutex::default());
        Sources { options, connect_timeout, runtime, opened, failures, all }
    }

    /// Where to ask for a blob, in this order.
    pub(super) fn urls(&self, store: &Store, promise: &Promise) -> Result<Vec<String>, Error> {
        let own = match <[u8; 20]>::try_from(&promise.note[..]) {
            Ok(path) => store.lazy_source(&path)?,
            Err(_) => None,
        };
        let mut urls: Vec<String> = own.into_iter().collect();
        for url in self.all(store)? {
            if !urls.contains(&url) && urls.len() < MAX_SOURCES {
                urls.push(url);
            }
        }
        Ok(urls)
    }

    fn all(&self, store: &Store) -> Result<Vec<String>, Error> {
        let mut all = self.all.lock();
        if let Some((since, urls)) = &*all
            && since.elapsed() < LIST_AGE
        {
            return Ok(urls.clone());
        }
        let urls: Vec<String> = count(store)?.into_keys().take(MAX_SOURCES).collect();
        *all = Some((Instant::now(), urls.clone()));
        Ok(urls)
    }

    /// A source for one thread: what one has asked for is not in another's way.
    pub(super) fn open(&self, url: &str, store: &Store) -> Result<Castore, Error> {
        let channel = self.channel(url)?;
        let here = store.engine().clone();
        Ok(Castore::new(url.to_owned(), here, channel, self.runtime.clone(), ATTEMPTS).within(UNDERWAY))
    }

    fn channel(&self, url: &str) -> Result<Channel, Error> {
        let mut opened = self.opened.lock();
        if let Some(channel) = opened.get(url) {
            return Ok(channel.clone());
        }
        let _runtime = self.runtime.enter();
        let channel = channel(url, &self.options, self.connect_timeout)?;
        if opened.len() >= MAX_SOURCES {
            opened.clear();
        }
        opened.insert(url.to_owned(), channel.clone());
        Ok(channel)
    }

    /// Notes how it went.
    pub(super) fn note(&self, url: &str, failure: Option<&Error>) {
        let mut failures = self.failures.lock();
        match failure {
            None => drop(failures.remove(url)),
            Some(error) => {
                if failures.len() >= MAX_SOURCES {
                    failures.clear();
                }
                failures.insert(url.to_owned(), store::causes(error));
            }
        }
    }

    pub(super) fn told(&self, store: &Store) -> Result<Vec<LazySource>, Error> {
        let failures = self.failures.lock();
        let counted = count(store)?.into_iter();
        Ok(counted.map(|(url, paths)| LazySource { failure: failures.get(&url).cloned(), url, paths }).collect())
    }
}

/// The lazy paths of each source.
fn count(store: &Store) -> Result<BTreeMap<String, u64>, Error> {
    let mut sources = BTreeMap::new();
    for path in store.lazy_paths()? {
        *sources.entry(path.source).or_default() += 1;
    }
    Ok(sources)
}
