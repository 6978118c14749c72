//! Other castores that damaged contents are had from, over gRPC: the setting `castores`.

use nix_compat::conf::Settings;
use nix_compat::store_path::StorePath;
use rpc_client::{RemoteBlobs, RemoteDirectories};
use store::Store;
use store::fsck::{Elsewhere, Mended};
use tokio::runtime::Handle;

use crate::peer;

/// The setting: URLs as `castored mount --grpc` takes them, with spaces between them.
const SETTING: &str = "castores";

/// Those that are configured, in their order.
pub(super) struct Castores(Vec<Castore>);

struct Castore {
    url: String,
    blobs: RemoteBlobs,
    directories: RemoteDirectories,
}

impl Castores {
    /// Connections are made when they are needed. A URL that is none is warned of.
    pub(super) fn new(settings: &Settings, runtime: &Handle) -> Self {
        let _entered = runtime.enter();
        let urls = settings.other.get(SETTING).map(String::as_str).unwrap_or_default();
        let open = |url: &str| match peer::open(url, || Ok(settings.clone())) {
            Ok(channel) => Some(Castore {
                url: url.to_owned(),
                blobs: RemoteBlobs::new(channel.clone(), runtime.clone()),
                directories: RemoteDirectories::new(channel, runtime.clone()),
            }),
            Err(error) => {
                tracing::warn!(url, %error, "ignoring a castore in the setting '{SETTING}'");
                None
            }
        };
        Self(urls.split_ascii_whitespace().filter_map(open).collect())
    }

    /// Has what of a path is damaged from the first castore that has it, else from `others`. Blocks.
    pub(super) fn mend(&self, store: &Store, path: &StorePath, others: &mut dyn FnMut(&StorePath) -> Mended) -> Mended {
        let mut failures = String::new();
        for castore in &self.0 {
            let elsewhere = Elsewhere { blobs: &castore.blobs, directories: &castore.directories };
            match store.heal_from(path, elsewhere) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(error) => failures.push_str(&format!("; the castore '{}': {error}", castore.url)),
            }
        }
        others(path).map_err(|why| why + &failures)
    }
}
