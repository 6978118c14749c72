//! A store that speaks a protocol of Nix's, as a source: over ssh, or at a daemon's socket.
//!
//! Connections are made when they are needed and used again. Everything here blocks.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::io::{self, Read};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};
use fetch::{DownloadError, Sink, Trouble};
use nix_compat::narinfo::{Compression, NarInfo};
use nix_compat::realisation::{DrvOutput, Realisation};
use nix_compat::store_path::{StoreDir, StorePath};
use nix_compat::store_uri::StoreUri;
use remote::{ClientError, RemoteStore, Stopper};

use crate::error::Error;
use crate::origin::{Origin, SourceInfo};

/// How long a store may take to answer at first, unless the setting `connect-timeout` says otherwise.
const CONNECTING: Duration = Duration::from_secs(60);
/// Bytes read at once.
const PIECE: usize = 64 * 1024;
/// Stock's for stores that are no binary caches: they are asked before those.
const PRIORITY: u64 = 0;

/// Another store.
pub(crate) struct Peer {
    /// Without parameters.
    name: String,
    uri: StoreUri,
    store_dir: StoreDir,
    patience: Duration,
    /// One for each connection that may be; empty where there is none now.
    places: (Sender<Option<RemoteStore>>, Receiver<Option<RemoteStore>>),
}

impl Peer {
    /// A store that may have so many connections. `connect_timeout` is in seconds; with 0 a usual one is taken.
    pub(crate) fn new(name: String, uri: StoreUri, dir: StoreDir, connections: usize, connect_timeout: u64) -> Self {
        let places = crossbeam_channel::bounded(connections);
        for _ in 0..connections {
            // There is room for all of them.
            let _ = places.0.try_send(None);
        }
        let patience = if connect_timeout == 0 { CONNECTING } else { Duration::from_secs(connect_timeout) };
        Self { name, uri, store_dir: dir, patience, places }
    }

    /// Talks over a connection that nobody uses. One that was closed since it was used last is replaced, unless
    /// something has `begun` by then.
    fn talk<T>(
        &self,
        action: &'static str,
        begun: &Cell<bool>,
        say: &mut dyn FnMut(&mut RemoteStore) -> Result<T, ClientError>,
    ) -> Result<T, Error> {
        let mut place = Place { peer: self, store: self.places.1.recv().map_err(|_| Error::Cancelled)? };
        let failed = |source| Error::Peer { action, uri: self.name.clone(), source };
        if let Some(store) = &mut place.store {
            match say(store) {
                Err(error) if error.is_broken() && !begun.get() => place.store = None,
                result => return place.after(result).map_err(failed),
            }
        }
        let mut store =
            RemoteStore::open(&self.uri, &self.store_dir, self.patience, &Stopper::default()).map_err(failed)?;
        let result = say(&mut store);
        place.store = Some(store);
        place.after(result).map_err(failed)
    }
}

/// A connection's place, while somebody has it.
struct Place<'a> {
    peer: &'a Peer,
    store: Option<RemoteStore>,
}

impl Place<'_> {
    /// Keeps the connection if it can be used after this.
    fn after<T>(&mut self, result: Result<T, ClientError>) -> Result<T, ClientError> {
        if !matches!(result, Ok(_) | Err(ClientError::Refused(_))) {
            self.store = None;
        }
        result
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let _ = self.peer.places.0.try_send(self.store.take());
    }
}

impl Origin for Peer {
    fn is_local(&self) -> bool {
        false
    }

    fn info(&self, _: &StoreDir) -> Result<SourceInfo, Error> {
        // That it is for the same store directory shows in the paths it names.
        self.talk("open", &Cell::new(false), &mut |_| Ok(()))?;
        Ok(SourceInfo { priority: PRIORITY, want_mass_query: false })
    }

    fn narinfo(&self, _: &StoreDir, path: &StorePath) -> Result<Option<NarInfo>, Error> {
        let wanted = BTreeSet::from([path.clone()]);
        let found = self.talk("ask", &Cell::new(false), &mut |store| store.path_infos(&wanted))?;
        let Some(mut info) = found.into_iter().find(|info| info.path == *path) else { return Ok(None) };
        let corrupt = |source| Error::NarInfo { file: self.file(&path.to_string()), source };
        if info.nar_size == 0 {
            return Err(corrupt(nix_compat::narinfo::Error::EmptyNar));
        }
        // Those are the other store's own affairs.
        (info.registration_time, info.ultimate) = (0, false);
        NarInfo::new(info, path.to_string(), Compression::None).map(Some).map_err(corrupt)
    }

    fn realisation(&self, id: &DrvOutput) -> Result<Option<Realisation>, Error> {
        let found = self.talk("ask", &Cell::new(false), &mut |store| store.realisation(id))?;
        match found {
            Some(found) if found.id != *id => {
                let (wanted, got) = (id.to_string(), found.id.to_string());
                Err(Error::OtherRealisation { uri: self.name.clone(), wanted, got })
            }
            found => Ok(found),
        }
    }

    fn copy(&self, narinfo: &NarInfo, sink: &mut dyn Sink) -> Result<(), Error> {
        let (path, size) = (&narinfo.info.path, narinfo.info.nar_size);
        let url = self.file(narinfo.url());
        let stopped = |error| Error::Download(DownloadError { url: url.clone(), cause: Trouble::Disk(error) });
        sink.begin(0, size).map_err(stopped)?;
        let begun = Cell::new(false);
        let copied = self.talk("copy from", &begun, &mut |store| {
            let passed = store.nar(path, |nar| {
                begun.set(true);
                pass(&mut nar.take(size), sink)
            })?;
            passed.map_err(ClientError::Payload)
        });
        match copied {
            Err(Error::Peer { source: ClientError::Payload(error), .. }) => Err(stopped(error)),
            copied => copied,
        }
    }

    fn file(&self, name: &str) -> String {
        format!("{}/{name}", self.name)
    }
}

/// Passes on all of it. What the sink says is the error; of a connection that breaks its store knows.
fn pass(nar: &mut dyn Read, sink: &mut dyn Sink) -> io::Result<()> {
    let mut buffer = vec![0; PIECE];
    loop {
        match nar.read(&mut buffer) {
            Ok(0) | Err(_) => return Ok(()),
            Ok(length) => sink.take(&buffer[..length])?,
        }
    }
}
