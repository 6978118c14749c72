//! What a running build may see of the store.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use nix_compat::conf::Settings;
use nix_compat::hash::NarHash;
use nix_compat::store_path::StorePath;
use parking_lot::{Mutex, RwLock};
use store::{Store, TempRoots};
use tokio::sync::Semaphore;

use crate::helper::Window;

/// The part of the store that a running build may see: the closure of its inputs, and what it has added.
///
/// It only grows. **A path passes when its contents are no secret to the build:** it has sent them itself, or had them
/// built from what it may see. Each then is kept from being collected, shown to the builder at the store directory, and
/// something its outputs may refer to.
pub struct Gate {
    store: Arc<Store>,
    settings: Arc<Settings>,
    client_uid: Option<u32>,
    roots: Arc<TempRoots>,
    /// Where the build itself puts things: nothing may be shown in their place.
    outputs: BTreeSet<StorePath>,
    /// The derivations that are being built around it, its own included: it cannot have them built.
    enclosing: Vec<StorePath>,
    /// The place of the build among those of its machine, lent to what it has built: it waits for that.
    slot: Arc<Semaphore>,
    seen: RwLock<BTreeSet<StorePath>>,
    /// What the builder sees; none when the gate is closed. Locked while paths are admitted, so that one that is seen is
    /// visible.
    window: Mutex<Option<Window>>,
}

/// Why a path does not pass the gate.
#[derive(Debug, thiserror::Error)]
pub enum GateError {
    /// It, or one that it refers to, is not valid as far as the build may know.
    #[error("path '{0}' is not valid")]
    NotValid(String),
    /// It is valid, with other contents than those the build has.
    #[error("path '{0}' is valid already, and its contents are not those that were sent")]
    OtherContents(String),
    /// The build is about to make it.
    #[error("path '{0}' is an output of the build that uses the store")]
    OwnOutput(String),
    /// The builder cannot be shown it.
    #[error("cannot show '{path}' to the build that uses the store: {source}")]
    Show {
        /// The first of the paths that were to be shown (full path).
        path: String,
        /// Why not.
        source: io::Error,
    },
    /// The build is over.
    #[error("the build that uses the store is over")]
    Closed,
    /// The store cannot be read.
    #[error(transparent)]
    Store(#[from] store::Error),
}

/// What a gate is made of.
pub(crate) struct Opening {
    pub(crate) store: Arc<Store>,
    /// The settings of the client that wants the build.
    pub(crate) settings: Arc<Settings>,
    pub(crate) client_uid: Option<u32>,
    /// Those of the build.
    pub(crate) roots: Arc<TempRoots>,
    pub(crate) outputs: BTreeSet<StorePath>,
    pub(crate) enclosing: Vec<StorePath>,
    /// What the builder sees already.
    pub(crate) inputs: BTreeSet<StorePath>,
    pub(crate) window: Window,
}

impl Gate {
    pub(crate) fn open(opening: Opening) -> Self {
        let Opening { store, settings, client_uid, roots, outputs, enclosing, inputs, window } = opening;
        Self {
            store,
            settings,
            client_uid,
            roots,
            outputs,
            enclosing,
            slot: Arc::new(Semaphore::new(1)),
            seen: RwLock::new(inputs),
            window: Mutex::new(Some(window)),
        }
    }

    /// Lets nothing through any more; gives what was.
    pub(crate) fn close(&self) -> BTreeSet<StorePath> {
        *self.window.lock() = None;
        self.seen.read().clone()
    }

    /// Whether the build may know of a path.
    pub fn allows(&self, path: &StorePath) -> bool {
        self.seen.read().contains(path)
    }

    /// Every path that the build may know of.
    pub fn paths(&self) -> BTreeSet<StorePath> {
        self.seen.read().clone()
    }

    /// The settings of the client that wants the build: they are in force for what it has built.
    pub fn settings(&self) -> &Arc<Settings> {
        &self.settings
    }

    /// The user of the client that wants the build, if known.
    pub fn client_uid(&self) -> Option<u32> {
        self.client_uid
    }

    /// The place that is lent to what the build waits for.
    pub(crate) fn slot(&self) -> &Arc<Semaphore> {
        &self.slot
    }

    /// The derivations around what is asked for here, and of the innermost the last.
    pub(crate) fn enclosing(&self) -> &[StorePath] {
        &self.enclosing
    }

    /// Admits a valid path whose contents the build has sent: by these it is named, or their NAR has this hash. Blocks.
    ///
    /// # Errors
    /// When the hash is another, or the path refers to one that the build may not see.
    pub fn admit_sent(&self, path: &StorePath, nar_hash: Option<&NarHash>) -> Result<(), GateError> {
        if self.allows(path) {
            return Ok(());
        }
        let display = |path: &StorePath| self.store.store_dir().display(path);
        // Kept first, then looked at: what is valid then stays so.
        self.roots.add(path);
        let info = self.store.path_info(path)?.ok_or_else(|| GateError::NotValid(display(path)))?;
        if nar_hash.is_some_and(|sent| *sent != info.nar_hash) {
            return Err(GateError::OtherContents(display(path)));
        }
        if let Some(hidden) = info.references.iter().find(|other| *other != path && !self.allows(other)) {
            return Err(GateError::NotValid(display(hidden)));
        }
        self.show([path.clone()].into())
    }

    /// Admits the closure of valid paths that were built from what the build may see. Blocks.
    ///
    /// # Errors
    /// When one of them is not valid, or cannot be shown.
    pub fn admit_built(&self, paths: &BTreeSet<StorePath>) -> Result<(), GateError> {
        paths.iter().for_each(|path| self.roots.add(path));
        let closure = self.store.closure(paths)?;
        if let Some(missing) = paths.iter().find(|path| !closure.contains(*path)) {
            return Err(GateError::NotValid(self.store.store_dir().display(missing)));
        }
        self.show(closure)
    }

    /// Refuses derivations that name what the build may not see, though they need not say so in their references: having
    /// them built would bring it to light.
    fn check_derivations(&self, new: &BTreeSet<StorePath>) -> Result<(), GateError> {
        for path in new.iter().filter(|path| path.is_derivation()) {
            // What is no derivation cannot be built.
            let Ok(derivation) = self.store.derivation(path) else { continue };
            let mut named = derivation.references().into_iter();
            if let Some(hidden) = named.find(|named| !self.allows(named) && !new.contains(named)) {
                return Err(GateError::NotValid(self.store.store_dir().display(&hidden)));
            }
        }
        Ok(())
    }

    fn show(&self, mut paths: BTreeSet<StorePath>) -> Result<(), GateError> {
        let mut window = self.window.lock();
        let window = window.as_mut().ok_or(GateError::Closed)?;
        paths.retain(|path| !self.allows(path));
        let Some(first) = paths.first() else { return Ok(()) };
        let display = |path: &StorePath| self.store.store_dir().display(path);
        if let Some(own) = paths.iter().find(|path| self.outputs.contains(*path)) {
            return Err(GateError::OwnOutput(display(own)));
        }
        paths.iter().for_each(|path| self.roots.add(path));
        self.check_derivations(&paths)?;
        let names: Vec<&str> = paths.iter().map(StorePath::base_name).collect();
        window.show(&names).map_err(|source| GateError::Show { path: display(first), source })?;
        self.seen.write().extend(paths);
        Ok(())
    }
}
