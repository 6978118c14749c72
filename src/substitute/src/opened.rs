//! A client's sources: which of them can be used. Those that answer do not wait for those that have not answered yet.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, Shared, join_all};
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};

use crate::Client;
use crate::error::Error;
use crate::location::Place;
use crate::source::Source;
use crate::substituters::Substituters;

/// Substituters that a client may name.
const MAX_SOURCES: usize = 100;

/// How long those that answer wait for those that have not answered yet.
const GRACE: Duration = Duration::from_millis(300);

/// A client's sources that can be used.
#[derive(Default)]
pub(crate) struct Opened {
    /// Those that answer, in their order.
    pub(crate) ready: Vec<Arc<Source>>,
    /// Those that have not answered yet. They are waited for by who finds nothing elsewhere.
    pub(crate) late: Vec<Late>,
}

/// A source on its way: whether it can be used.
pub(crate) type Late = Shared<BoxFuture<'static, (Arc<Source>, Arc<Result<(), Error>>)>>;

impl Opened {
    /// Whether there is none at all.
    pub(crate) fn is_empty(&self) -> bool {
        self.ready.is_empty() && self.late.is_empty()
    }

    /// Those that were late and can be used now, in their order. Those that cannot be have been complained of.
    pub(crate) async fn late(&self, client: &Client) -> Vec<Arc<Source>> {
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
                Ok(source) => {
                    if source.location.lazy && !matches!(source.location.place, Place::Castore(_)) {
                        let uri = source.uri();
                        client.warn_once(format!(
                            "'{uri}' cannot be lazy, since it is no castore (grpc+…): paths come whole"
                        ));
                    }
                    opening.push(open(source, client));
                }
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
