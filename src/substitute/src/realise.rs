//! Outputs of content-addressed derivations: what they turned out to be elsewhere, and then these paths.

use std::collections::BTreeMap;

use futures::{StreamExt, stream};
use nix_compat::realisation::{DrvOutput, Realisation};

use crate::error::Error;
use crate::substituters::Substituters;
use crate::{Client, Outcome, Wanted};

/// Realisations that one may bring along.
const MAX_REALISATIONS: usize = 10_000;
/// Their paths that are looked for at once.
const PATHS_AT_ONCE: usize = 16;

impl Substituters {
    /// Makes an output valid whose path a source knows, and notes both.
    pub(crate) async fn fetch_realisation(&self, client: &Client, id: DrvOutput) -> Outcome {
        let Some(found) = self.realisations(client, id.clone()).await else { return Outcome::Unavailable };
        let paths: Vec<Wanted> = found.values().map(|realisation| realisation.out_path.clone().into()).collect();
        let fetches = paths.into_iter().map(|wanted| self.fetch(client, wanted));
        let outcomes: Vec<Outcome> = stream::iter(fetches).buffer_unordered(PATHS_AT_ONCE).collect().await;
        if outcomes.contains(&Outcome::Failed) {
            return Outcome::Failed;
        }
        if !outcomes.iter().all(Outcome::is_valid) {
            return Outcome::Unavailable;
        }
        // Who may say so was looked at when they were found.
        match self.register_realisations(found.into_values().collect()).await {
            Ok(()) => Outcome::Substituted,
            Err(error) => {
                client.tell_error("a realisation", &error);
                Outcome::Failed
            }
        }
    }

    /// The realisation of an output, and those it depends on that are not known here.
    async fn realisations(&self, client: &Client, id: DrvOutput) -> Option<BTreeMap<DrvOutput, Realisation>> {
        let mut found = BTreeMap::new();
        let mut todo = vec![id];
        while let Some(id) = todo.pop() {
            if found.contains_key(&id) {
                continue;
            }
            let (source, realisation) = self.foreign_realisation(client, &id).await?;
            for (dependency, theirs) in &realisation.dependencies {
                let known = self.store.realisation(dependency).ok().flatten();
                match known {
                    Some(known) if known.out_path != *theirs => {
                        let dir = self.store.store_dir();
                        client.warn_once(format!(
                            "substituter '{}' has an incompatible realisation for '{dependency}', ignoring.\nLocal:  \
                             {}\nRemote: {}\n",
                            source.uri(),
                            dir.display(&known.out_path),
                            dir.display(theirs)
                        ));
                        return None;
                    }
                    Some(_) => {}
                    None => todo.push(dependency.clone()),
                }
            }
            found.insert(id, realisation);
            if found.len() > MAX_REALISATIONS {
                return None;
            }
        }
        Some(found)
    }

    async fn register_realisations(&self, realisations: Vec<Realisation>) -> Result<(), Error> {
        let store = self.store.clone();
        let register = move || {
            realisations.iter().try_for_each(|realisation| {
                Ok(store.register_realisation(realisation, store::SignaturePolicy::DontCheck)?)
            })
        };
        tokio::task::spawn_blocking(register).await.map_err(|e| Error::Thread(e.to_string()))?
    }
}
