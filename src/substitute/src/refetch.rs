//! The contents of a path that is there already: to repair it.

use store::NewPath;
use tokio::sync::Semaphore;

use crate::closure::Landing;
use crate::error::Error;
use crate::offers::{Excluded, Offer};
use crate::substituters::Substituters;
use crate::{Client, Contents, Wanted};

/// Sources that are tried one after the other.
const MAX_ATTEMPTS: usize = 10;

impl Substituters {
    /// Fetches the contents of a path, from one source after the other.
    ///
    /// Contents of the hash that is registered need nobody's signature: they are what was trusted before.
    pub(crate) async fn fetch_contents(&self, client: &Client, wanted: Wanted) -> Contents {
        client.roots.add(&wanted.path);
        let mut excluded = Excluded::new();
        for _ in 0..MAX_ATTEMPTS {
            let Some(offer) = self.offer_to_repair(client, &wanted, &excluded).await else { break };
            match self.fetch_offer(client, &offer).await {
                Ok(new) => return Contents::Found(Box::new(new)),
                Err(error) => {
                    let what =
                        format!("'{}' from '{}'", self.store.store_dir().display(&wanted.path), offer.source.uri());
                    client.tell_error(&what, &error);
                    offer.source.forget(&offer.there).await;
                    excluded.insert((offer.source.uri().to_owned(), wanted.path.clone()));
                }
            }
        }
        if excluded.is_empty() { Contents::Unavailable } else { Contents::Failed }
    }

    async fn offer_to_repair(&self, client: &Client, wanted: &Wanted, excluded: &Excluded) -> Option<Offer> {
        let registered = self.store.path_info(&wanted.path).ok().flatten().map(|info| info.nar_hash);
        let any = self.offer(client, wanted, excluded, false, false).await?;
        if Some(any.info.nar_hash) == registered {
            return Some(any);
        }
        self.offer(client, wanted, excluded, true, false).await
    }

    async fn fetch_offer(&self, client: &Client, offer: &Offer) -> Result<NewPath, Error> {
        client.watch.expect(1, offer.narinfo.file_size.unwrap_or(0), offer.info.nar_size);
        // One of its own: what has landed for others may have left out objects that were not known to be damaged yet.
        let landing = Landing::default();
        let landed = self.land(client, offer, &landing, &Semaphore::new(1), false).await;
        client.watch.done(landed.is_ok(), offer.narinfo.file_size.unwrap_or(0), offer.info.nar_size);
        landed
    }
}
