//! Other stores as sources of paths.
//!
//! A [`Substituter`] is what the scheduler asks before it builds. [`Substituters`] is the real one: it asks the sources
//! (binary caches, castores, other stores) that a client's settings name, all of them for each path at once (`offers`), walks closures, downloads
//! what is missing in parallel and registers it, references first.
//!
//! [`Lazy`] gets what castores that are lazy have promised, when it is read.
//!
//! A [`CacheWriter`] is the other direction: it puts paths into a binary cache.
//!
//! Sources (`source`) are shared by all clients whose settings make them the same; what a client may use and
//! whom it trusts is its own, in its [`Client`].

mod ahead;
mod binary_cache;
mod closure;
mod compression;
mod crew;
mod error;
mod grpc;
mod health;
mod lazy;
mod location;
mod offers;
mod opened;
mod origin;
mod parallel_xz;
mod peer;
mod pipe;
mod realise;
mod refetch;
mod remembered;
mod source;
mod substituters;
mod transfer;
mod watch;
mod writing;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use nix_compat::conf::Settings;
use nix_compat::content_address::ContentAddress;
use nix_compat::realisation::{DrvOutput, Realisation};
use nix_compat::signature::PublicKey;
use nix_compat::store_path::StorePath;
use nix_compat::worker::SubstitutableInfo;
use store::TempRoots;

pub use compression::decompressed;
pub use error::Error;
pub use lazy::{Lazy, LazySource, OnProgress};
pub use substituters::Substituters;
pub use watch::{Copying, NoWatch, Watch};
pub use writing::CacheWriter;

use offers::ClientSources;

/// The answer of a [`Substituter`], when it comes.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A path that somebody wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The path.
    pub path: StorePath,
    /// What its contents must be, where that is known beforehand. Stores with other store directories may have them too.
    pub ca: Option<ContentAddress>,
    /// Somebody asks for this very path, and not for something that needs it: a source that did not have it a while ago
    /// is asked again.
    pub explicit: bool,
}

impl Wanted {
    /// A path that is asked for itself.
    pub fn explicitly(path: StorePath) -> Self {
        Self { path, ca: None, explicit: true }
    }
}

impl From<StorePath> for Wanted {
    fn from(path: StorePath) -> Self {
        Self { path, ca: None, explicit: false }
    }
}

/// How it went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The path was there before.
    AlreadyValid,
    /// It is valid now.
    Substituted,
    /// No source has it, or not all that it refers to.
    Unavailable,
    /// A source has it, but it could not be fetched. The client has been told why.
    Failed,
}

impl Outcome {
    /// Whether the path is valid.
    pub fn is_valid(&self) -> bool {
        matches!(self, Self::AlreadyValid | Self::Substituted)
    }
}

/// Who asks: which sources it may use, and what it is to be told.
pub struct Client {
    settings: Arc<Settings>,
    keys: Arc<[PublicKey]>,
    roots: Arc<TempRoots>,
    watch: Arc<dyn Watch>,
    sources: ClientSources,
}

impl Client {
    /// What is made valid is added to `roots` before.
    pub fn new(settings: Arc<Settings>, roots: Arc<TempRoots>, watch: Arc<dyn Watch>) -> Self {
        // The daemon has warned of keys that are none; without them nothing is trusted.
        let keys = settings.public_keys().unwrap_or_default().into();
        Self { settings, keys, roots, watch, sources: ClientSources::default() }
    }

    /// Whether anything is to be substituted.
    pub fn substitutes(&self) -> bool {
        self.settings.substitute
    }
}

/// The contents of a path that is to be repaired.
#[derive(Debug)]
pub enum Contents {
    /// They are in the castore now, and are what their source claims of them. Nothing was registered.
    Found(Box<store::NewPath>),
    /// No source has the path.
    Unavailable,
    /// A source has it, but it could not be fetched. The client has been told why.
    Failed,
}

/// Other places a path can come from than being built.
pub trait Substituter: Send + Sync {
    /// Makes the path valid if it can, and all that it refers to.
    fn substitute<'a>(&'a self, client: &'a Client, wanted: Wanted) -> Answer<'a, Outcome>;

    /// Finds out what an output turned out to be elsewhere, makes that valid and registers both.
    fn realise<'a>(&'a self, client: &'a Client, id: DrvOutput) -> Answer<'a, Outcome>;

    /// Fetches the contents of a path, whether it is valid or not.
    fn contents<'a>(&'a self, client: &'a Client, wanted: Wanted) -> Answer<'a, Contents>;

    /// What would be fetched, if a source has it.
    fn info<'a>(&'a self, client: &'a Client, wanted: Wanted) -> Answer<'a, Option<SubstitutableInfo>>;

    /// The same for sources that want to be asked for many paths.
    fn mass_info<'a>(&'a self, client: &'a Client, wanted: Wanted) -> Answer<'a, Option<SubstitutableInfo>>;

    /// What an output turned out to be elsewhere.
    fn realisation<'a>(&'a self, client: &'a Client, id: DrvOutput) -> Answer<'a, Option<Realisation>>;
}

/// The substituter of a daemon that has no sources.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoSubstituter;

fn ready<'a, T: Send + 'a>(value: T) -> Answer<'a, T> {
    Box::pin(std::future::ready(value))
}

impl Substituter for NoSubstituter {
    fn substitute<'a>(&'a self, _: &'a Client, _: Wanted) -> Answer<'a, Outcome> {
        ready(Outcome::Unavailable)
    }

    fn realise<'a>(&'a self, _: &'a Client, _: DrvOutput) -> Answer<'a, Outcome> {
        ready(Outcome::Unavailable)
    }

    fn contents<'a>(&'a self, _: &'a Client, _: Wanted) -> Answer<'a, Contents> {
        ready(Contents::Unavailable)
    }

    fn info<'a>(&'a self, _: &'a Client, _: Wanted) -> Answer<'a, Option<SubstitutableInfo>> {
        ready(None)
    }

    fn mass_info<'a>(&'a self, _: &'a Client, _: Wanted) -> Answer<'a, Option<SubstitutableInfo>> {
        ready(None)
    }

    fn realisation<'a>(&'a self, _: &'a Client, _: DrvOutput) -> Answer<'a, Option<Realisation>> {
        ready(None)
    }
}
