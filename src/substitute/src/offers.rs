//! Who has a path: all of a client's sources are asked at once, the first in their order that has it counts.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures::StreamExt;
use futures::stream::FuturesOrdered;
use nix_compat::narinfo::NarInfo;
use nix_compat::path_info::PathInfo;
use nix_compat::realisation::{DrvOutput, Realisation};
use nix_compat::store_path::{StorePath, content_address_path};
use nix_compat::worker::stderr::Verbosity;
use parking_lot::Mutex;
use store::SignaturePolicy;
use tokio::sync::OnceCell;

use crate::error::Error;
use crate::opened::Opened;
use crate::source::Source;
use crate::substituters::Substituters;
use crate::{Client, Wanted};

/// A client's sources, once they were needed.
#[derive(Default)]
pub(crate) struct ClientSources {
    pub(crate) sources: OnceCell<Opened>,
    /// What it has been told already.
    told: Mutex<BTreeSet<String>>,
    /// Sources of which it has been told that they do not answer.
    silent: Mutex<BTreeSet<String>>,
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

impl Offer {
    /// Whether its contents may come later. Derivations are read at once, and what is believed for its contents alone has to
    /// show them.
    pub(crate) fn may_be_lazy(&self) -> bool {
        self.source.location.lazy && self.info.ca.is_none() && !self.info.path.is_derivation()
    }
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
