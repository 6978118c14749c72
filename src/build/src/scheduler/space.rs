//! Keeping the disk from filling up while things are built and fetched.
//!
//! As with stock, a collection that has become necessary runs beside them: nobody waits for it.

use std::pin::pin;
use std::time::Duration;

use nix_compat::conf::Settings;
use store::AutoGc;
use tokio::time::timeout;

use super::Scheduler;

/// While a build runs, the free space is looked at no more often than this.
const SHORTEST_LOOK: Duration = Duration::from_millis(100);

impl Scheduler {
    /// Looks whether space is short, if that has not been done lately.
    pub(super) async fn keep_room(&self, settings: &Settings) {
        let options = AutoGc::from(settings);
        if self.store.may_lack_room(&options) {
            let store = self.store.clone();
            // A failure of that thread says nothing about the build.
            let _ = tokio::task::spawn_blocking(move || store.keep_room(&options)).await;
        }
    }

    /// Awaits `work`, and looks now and then whether space is short.
    pub(super) async fn keeping_room<T>(&self, settings: &Settings, work: impl Future<Output = T>) -> T {
        let interval = AutoGc::from(settings).check_interval().max(SHORTEST_LOOK);
        let mut work = pin!(work);
        loop {
            match timeout(interval, &mut work).await {
                Ok(done) => return done,
                Err(_) => self.keep_room(settings).await,
            }
        }
    }
}
