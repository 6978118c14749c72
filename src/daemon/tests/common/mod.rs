//! A daemon in this process, for the tests of whole sessions.

// Each test binary uses its own part of this.
#![allow(dead_code, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use build::{BuildConfig, Scheduler};
use daemon::{Daemon, Door, Extras, Locations};
use nix_compat::conf::Settings;
use nix_compat::store_path::StoreDir;
use remote::Connection;
use store::{Config, Store};
use substitute::NoSubstituter;

/// A daemon without a mount, for everything but builds.
pub(crate) struct Rig {
    dir: tempfile::TempDir,
    runtime: Option<tokio::runtime::Runtime>,
    pub(crate) store: Arc<Store>,
    pub(crate) daemon: Arc<Daemon>,
    pub(crate) socket: PathBuf,
}

impl Rig {
    /// A daemon that trusts everybody, or nobody.
    pub(crate) fn new(trusted: bool) -> Self {
        Self::with_extras(trusted, |_| Extras::default())
    }

    /// A daemon of this store directory and these settings.
    pub(crate) fn with(store_dir: StoreDir, settings: Settings) -> Self {
        Self::with_substituter(store_dir, settings, Box::new(NoSubstituter))
    }

    /// The same, and this is where paths come from.
    pub(crate) fn with_substituter(
        store_dir: StoreDir,
        settings: Settings,
        substituter: Box<dyn substitute::Substituter>,
    ) -> Self {
        Self::start(store_dir, settings, substituter, |_| Extras::default())
    }

    /// A daemon that trusts everybody, or nobody, and does what only some do; `extras` gets its directory.
    pub(crate) fn with_extras(trusted: bool, extras: impl FnOnce(&Path) -> Extras) -> Self {
        let trusted_users = if trusted { vec!["*".to_owned()] } else { Vec::new() };
        let settings = Settings { trusted_users, ..Settings::default() };
        Self::start(StoreDir::default(), settings, Box::new(NoSubstituter), extras)
    }

    fn start(
        store_dir: StoreDir,
        settings: Settings,
        substituter: Box<dyn substitute::Substituter>,
        extras: impl FnOnce(&Path) -> Extras,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let locations = Locations { store_dir: store_dir.clone(), ..Locations::below(dir.path()).unwrap() };
        let socket = locations.socket.clone();
        std::fs::create_dir_all(&locations.state_dir).unwrap();
        let store = Store::open(Config::new(store_dir, &locations.state_dir)).unwrap();
        let settings = Settings { build_users_group: None, ..settings };
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let daemon = {
            let _inside = runtime.enter();
            let nowhere = dir.path().join("nowhere");
            let config = BuildConfig::new(&locations.state_dir, locations.log_dir.clone(), nowhere.clone(), nowhere, 1);
            let scheduler = Scheduler::new(store.clone(), config, substituter);
            let daemon = Daemon::new(store.clone(), scheduler, settings, locations, extras(dir.path())).unwrap();
            let listener = daemon::bind(&socket).unwrap();
            let running = daemon.clone();
            runtime.spawn(async move { running.run(listener, Door::Main, std::future::pending()).await });
            daemon
        };
        Self { dir, runtime: Some(runtime), store, daemon, socket }
    }

    /// A directory of this daemon's own.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A client of castored's own.
    pub(crate) fn connect(&self, minor: u16) -> Connection {
        Connection::open_as(&self.socket, self.store.store_dir(), minor).unwrap()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.runtime.take().unwrap().shutdown_timeout(Duration::from_secs(5));
    }
}
