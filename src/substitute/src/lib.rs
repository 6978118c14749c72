//! Other stores as sources of paths.
//!
//! So far this is the door alone: what a builder asks of whoever can make a path valid without building it. The
//! sources themselves (binary caches over HTTP and in directories, other castores) will stand behind it.

use std::future::Future;
use std::pin::Pin;

use nix_compat::store_path::StorePath;

/// The answer of a [`Substituter`], when it comes.
pub type Substitution<'a> = Pin<Box<dyn Future<Output = bool> + Send + 'a>>;

/// Other places a path can come from than being built.
pub trait Substituter: Send + Sync {
    /// Makes the path valid if it can, and says whether it did.
    fn substitute<'a>(&'a self, path: &'a StorePath) -> Substitution<'a>;
}

/// The substituter of a daemon that has no sources.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoSubstituter;

impl Substituter for NoSubstituter {
    fn substitute<'a>(&'a self, _: &'a StorePath) -> Substitution<'a> {
        Box::pin(std::future::ready(false))
    }
}
