//! Who has a path: all of a client's sources are asked at once, the first in their order that has it counts.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, Shared, join_all};
use futures::stream::{FuturesOrdered, FuturesUnordered};
use futures::{FutureExt, StreamExt};
use nix_compat::narinfo::NarInfo;
use nix_compat::path_info::PathInfo;
use nix_compat::realisation::{DrvOutput, Realisation};
use nix_compat::store_path::{StorePath, content_address_path};
use nix_compat::worker::stderr::Verbosity;
use parking_lot::Mutex;
use store::SignaturePolicy;
use tokio::sync::OnceCell;

use crate::error::Error;
use crate::source::Source;
use crate::substituters::Substituters;
use crate::{Client, Wanted};

/// Substituters that a client may name.
const MAX_SOURCES: usize = 100;

/// How long those that answer wait for those that have not answered yet.
const GRACE: Duration = Duration::from_millis(300);

/// A client's sources, once they were needed.
#[derive(Default)]
pub(crate) struct ClientSources {
    sources: OnceCell<Opened>,
    /// What it has been told already.
    told: Mutex<BTreeSet<String>>,
    /// Sources of which it has been told that they do not answer.
    silent: Mutex<BTreeSet<String>>,
}

/// A client's sources that can be used.
#[derive(Default)]
pub(crate) struct Opened {
    /// Those that answer, in their order.
    ready: Vec<Arc<Source>>,
    /// Those that have not answered yet. They are waited for by who finds nothing elsewhere.
    late: Vec<Late>,
}

/// A source on its way: whether it can be used.
type Late = Shared<BoxFuture<'static, (Arc<Source>, Arc<Result<(), Error>>)>>;

impl Opened {
    /// Whether there is none at all.
    pub(crate) fn is_empty(&self) -> bool {
        self.ready.is_empty() && self.late.is_empty()
    }

    /// Those that were late and can be used now, in their order. Those that cannot be have been complained of.
    async fn late(&self, client: &Client) -> Vec<Arc<Source>> {
        let mut usable = Vec::new();
        for (source, opened) in join_all(self.late.iter().cloned()).await {
            match &*opened {
                Ok(()) => usable.push(source),
                Err(error) => client.warn_of(&source, error),
            }
        }
        usable.sort_by_key(|source| source.priority());
        usable
    }
}

/// A source that has a path.
#[derive(Clone)]
pub(crate) struct Offer {
    pub(crate) source: Arc<Source>,
    /// Its path there; another one only in another store directory.
    pub(crate) there: StorePath,
    pub(crate) narinfo: Arc<NarInfo>,
    /// What will be registered.
    pub(crate) info: PathInfo,
}

/// Sources from which a path could not be fetched.
pub(crate) type Excluded = BTreeSet<(String, StorePath)>;

impl Client {
    /// Says something to this client, once.
    pub(crate) fn warn_once(&self, text: String) {
        if self.sources.told.lock().insert(text.clone()) {
            self.watch.log(Verbosity::Warn, format!("warning: {text}"));
        }
    }

    /// Says what is wrong with a source. That it does not answer is said once, whatever it was asked for.
    pub(crate) fn warn_of(&self, source: &Source, error: &Error) {
        if !error.means_silence() {
            self.warn_once(error.to_string());
        } else if self.sources.silent.lock().insert(source.uri().to_owned()) {
            self.watch.log(Verbosity::Warn, format!("warning: {error}"));
        }
    }

    pub(crate) fn policy(&self, source: &Source) -> SignaturePolicy<'_> {
        let unchecked = source.location.trusted || !self.settings.require_sigs;
        if unchecked { SignaturePolicy::DontCheck } else { SignaturePolicy::Require(&self.keys) }
    }
}

impl Substituters {
    /// The client's sources. Those that cannot be used have been complained of.
    pub(crate) async fn sources<'a>(&self, client: &'a Client) -> &'a Opened {
        client.sources.sources.get_or_init(|| self.open_sources(client)).await
    }

    async fn open_sources(&self, client: &Client) -> Opened {
        let mut opened = Opened::default();
        if !client.settings.substitute {
            return opened;
        }
        let mut seen = BTreeSet::new();
        let mut opening = FuturesUnordered::new();
        for url in client.settings.substituters.iter().take(MAX_SOURCES) {
            if !seen.insert(url.trim_end_matches('/')) {
                continue;
            }
            match self.source(url, &client.settings).await {
                Ok(source) => opening.push(open(source, client)),
                Err(error) => client.warn_once(error.to_string()),
            }
        }
        loop {
            let next = opening.next();
            let next = match opened.ready.is_empty() {
                true => Ok(next.await),
                false => tokio::time::timeout(GRACE, next).await,
            };
            match next {
                Ok(Some((source, result))) => match &*result {
                    Ok(()) => opened.ready.push(source),
                    Err(error) => client.warn_of(&source, error),
                },
                Ok(None) => break,
                Err(_) => {
                    opened.late = opening.into_iter().collect();
                    break;
                }
            }
        }
        opened.ready.sort_by_key(|source| source.priority());
        opened
    }

    /// The first source that has a path. With `check` one without the right signatures has not.
    pub(crate) async fn offer(
        &self,
        client: &Client,
        wanted: &Wanted,
        excluded: &Excluded,
        check: bool,
        only_mass: bool,
    ) -> Option<Offer> {
        let opened = self.sources(client).await;
        let asks = Asks { client, wanted, excluded, check, only_mass };
        match self.offer_among(&asks, &opened.ready).await {
            None if !opened.late.is_empty() => self.offer_among(&asks, &opened.late(client).await).await,
            found => found,
        }
    }

    async fn offer_among(&self, asks: &Asks<'_>, sources: &[Arc<Source>]) -> Option<Offer> {
        let Asks { client, wanted, excluded, check, only_mass } = *asks;
        let sources = sources.iter().filter(|source| {
            (!only_mass || source.wants_mass_query())
                && (excluded.is_empty() || !excluded.contains(&(source.uri().to_owned(), wanted.path.clone())))
        });
        let mut asked: FuturesOrdered<_> = sources
            .map(|source| async move { (self.offer_of(client, source.clone(), wanted, check).await, source) })
            .collect();
        while let Some((answer, source)) = asked.next().await {
            match answer {
                Ok(Some(offer)) => return Some(offer),
                Ok(None) => {}
                Err(error) => client.warn_of(source, &error),
            }
        }
        None
    }

    async fn offer_of(
        &self,
        client: &Client,
        source: Arc<Source>,
        wanted: &Wanted,
        check: bool,
    ) -> Result<Option<Offer>, Error> {
        let dir = self.store.store_dir();
        let elsewhere = source.store_dir != *dir;
        let there = match (&wanted.ca, elsewhere) {
            (_, false) => wanted.path.clone(),
            (None, true) => return Ok(None),
            (Some(ca), true) => {
                let none = BTreeSet::new();
                match content_address_path(&source.store_dir, wanted.path.name(), ca, &none, false) {
                    Ok(there) => there,
                    Err(_) => return Ok(None),
                }
            }
        };
        let Some(narinfo) = source.narinfo(&there, &client.settings, wanted.explicit).await? else { return Ok(None) };
        let renamed = elsewhere || narinfo.info.path != wanted.path;
        let by_contents = narinfo.info.references.is_empty() && narinfo.info.is_content_addressed(&source.store_dir);
        if (elsewhere && narinfo.info.path != there) || (renamed && !by_contents) {
            client.watch.log(
                Verbosity::Error,
                format!(
                    "asked '{}' for '{}' but got '{}'",
                    source.uri(),
                    source.store_dir.display(&there),
                    source.store_dir.display(&narinfo.info.path)
                ),
            );
            return Ok(None);
        }
        let mut info = PathInfo { path: wanted.path.clone(), registration_time: 0, ..narinfo.info.clone() };
        if renamed {
            // Signatures were for the other path.
            info.signatures.clear();
            info.deriver = None;
        }
        if check && !self.is_trusted(client, &source, &info).await? {
            client.warn_once(format!(
                "ignoring substitute for '{}' from '{}', as it's not signed by any of the keys in \
                 'trusted-public-keys'",
                dir.display(&wanted.path),
                source.uri()
            ));
            return Ok(None);
        }
        Ok(Some(Offer { source, there, narinfo, info }))
    }

    /// Whether a client may have this from there. Signatures take a while: they are for a worker thread.
    async fn is_trusted(&self, client: &Client, source: &Source, info: &PathInfo) -> Result<bool, Error> {
        if matches!(client.policy(source), SignaturePolicy::DontCheck) {
            return Ok(true);
        }
        let (store, keys, info) = (self.store.clone(), client.keys.clone(), info.clone());
        let check = move || store.check_signatures(&info, SignaturePolicy::Require(&keys)).is_ok();
        tokio::task::spawn_blocking(check).await.map_err(|e| Error::Thread(e.to_string()))
    }

    /// What an output turned out to be, by the first source that knows and may say so.
    pub(crate) async fn foreign_realisation(
        &self,
        client: &Client,
        id: &DrvOutput,
    ) -> Option<(Arc<Source>, Realisation)> {
        let opened = self.sources(client).await;
        match self.realisation_among(client, id, &opened.ready).await {
            None if !opened.late.is_empty() => self.realisation_among(client, id, &opened.late(client).await).await,
            found => found,
        }
    }

    async fn realisation_among(
        &self,
        client: &Client,
        id: &DrvOutput,
        sources: &[Arc<Source>],
    ) -> Option<(Arc<Source>, Realisation)> {
        let ask = |source: Arc<Source>| async move { (source.realisation(id).await, source) };
        // A realisation says nothing of a path in another store directory.
        let same = sources.iter().filter(|source| source.store_dir == *self.store.store_dir());
        let mut asked: FuturesOrdered<_> = same.cloned().map(ask).collect();
        while let Some((answer, source)) = asked.next().await {
            match answer {
                Ok(Some(realisation)) => {
                    let trusted = match client.policy(&source) {
                        SignaturePolicy::DontCheck => true,
                        SignaturePolicy::Require(keys) => realisation.is_signed_by(keys),
                    };
                    if trusted {
                        return Some((source, realisation));
                    }
                    client.warn_once(format!(
                        "ignoring realisation of '{id}' from '{}', as it's not signed by any of the keys in \
                         'trusted-public-keys'",
                        source.uri()
                    ));
                }
                Ok(None) => {}
                Err(error) => client.warn_of(&source, &error),
            }
        }
        None
    }
}

/// What is asked of sources.
struct Asks<'a> {
    client: &'a Client,
    wanted: &'a Wanted,
    excluded: &'a Excluded,
    check: bool,
    only_mass: bool,
}

/// Finds out whether a source can be used, also when nobody waits for it any more.
fn open(source: Arc<Source>, client: &Client) -> Late {
    let settings = client.settings.clone();
    let asked = source.clone();
    let opening = tokio::spawn(async move { asked.open(&settings).await });
    let opened = async move {
        let result = opening.await.unwrap_or_else(|e| Err(Error::Thread(e.to_string())));
        (source, Arc::new(result))
    };
    opened.boxed().shared()
}
