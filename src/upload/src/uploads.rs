//! The destinations of a daemon.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use fetch::DownloadOptions;
use store::{Signer, Store, UploadTarget};

use crate::destination::{self, Error};
use crate::sender::{Sender, Shared};

/// Destinations at once: each has a thread.
const MAX_DESTINATIONS: usize = 16;

/// Sends what is built, until it is dropped; what has not been sent then is sent when there is one again.
pub struct Uploads {
    store: Arc<Store>,
    destinations: Vec<Arc<Shared>>,
}

/// What is to be told of a destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Its URL, without a password.
    pub url: String,
    /// Built paths that wait for it.
    pub waiting: usize,
    /// Paths that were sent to it since the daemon started.
    pub sent: u64,
    /// Why the last attempt failed, if it did.
    pub failure: Option<String>,
    /// Seconds until it is tried again, after a failure.
    pub again_in: Option<u64>,
}

impl Uploads {
    /// Has what is built from here on sent to the stores at `urls`, signed by `signer`; and what is queued for them already.
    /// What is queued for others is forgotten.
    ///
    /// # Errors
    /// [`Error::Uri`], [`Error::Unknown`] and those of a cache's parameters for a URL that nothing can be sent to; when the
    /// index cannot be read; when no thread can be started.
    pub fn start(
        store: &Arc<Store>,
        urls: &[String],
        signer: &Signer,
        downloads: &DownloadOptions,
    ) -> Result<Self, Error> {
        let urls: BTreeSet<&String> = urls.iter().collect();
        if urls.len() > MAX_DESTINATIONS {
            return Err(Error::TooMany(MAX_DESTINATIONS));
        }
        urls.iter().try_for_each(|url| destination::check(url))?;
        let destinations: Vec<Arc<Shared>> = urls.iter().map(|url| Shared::new(url)).collect();
        let targets: Vec<UploadTarget> = destinations.iter().map(|shared| shared.target).collect();
        let forgotten = store.set_upload_targets(&targets)?;
        if forgotten > 0 {
            tracing::warn!(
                paths = forgotten,
                "not uploading what waited for destinations that are not wanted any more"
            );
        }
        // Dropped on failure, it ends those that run.
        let mut uploads = Self { store: store.clone(), destinations: Vec::new() };
        for shared in destinations {
            let sender = Sender::new(shared.clone(), store.clone(), signer.clone(), downloads.clone());
            let thread = thread::Builder::new().name("upload".to_owned()).spawn(move || sender.run());
            thread.map_err(Error::Thread)?;
            uploads.destinations.push(shared);
        }
        Ok(uploads)
    }

    /// How it goes with each destination.
    pub fn waiting(&self) -> Vec<Waiting> {
        let tell = |shared: &Arc<Shared>| {
            let waiting = self.store.upload_count(shared.target);
            let state = shared.state();
            let again_in = state.again.map(|again| again.saturating_duration_since(Instant::now()).as_secs());
            let (sent, failure) = (state.sent, state.failure.clone());
            Waiting { url: fetch::without_password(&shared.url), waiting, sent, failure, again_in }
        };
        self.destinations.iter().map(tell).collect()
    }
}

impl Drop for Uploads {
    fn drop(&mut self) {
        self.destinations.iter().for_each(|shared| shared.stop());
        self.store.wake_uploads();
    }
}
