//! What can be asked of a destination, whatever it is. Everything here blocks.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use fetch::{Download, DownloadOptions};
use nix_compat::path_info::PathInfo;
use nix_compat::realisation::{DrvOutput, Realisation};
use nix_compat::store_path::StorePath;
use nix_compat::store_uri::{self, StoreUri};
use parking_lot::Mutex;
use remote::{ClientError, OutputNames, RemoteStore, Stopper, references_first};
use store::Store;
use substitute::CacheWriter;

/// Questions to a binary cache at the same time, each on a thread.
const LOOKUPS: usize = 8;
/// How long a store may take to answer at first.
const CONNECTING: Duration = Duration::from_secs(60);

/// Why something was not sent.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not a store's URL.
    #[error("'{url}' is no URL of a store: {source}")]
    Uri {
        /// What was given.
        url: String,
        /// What is wrong with it.
        source: store_uri::Error,
    },
    /// A store of a kind that is not written to.
    #[error(
        "cannot upload to '{0}': castored knows http(s)://, file://, ssh-ng://, ssh:// and unix:// with a socket's path"
    )]
    Unknown(String),
    /// More than there are threads for.
    #[error("cannot upload to more than {0} stores")]
    TooMany(usize),
    /// A binary cache.
    #[error(transparent)]
    Cache(Box<substitute::Error>),
    /// A store that speaks a protocol.
    #[error("cannot upload to '{uri}': {source}")]
    Remote {
        /// The store.
        uri: String,
        /// Why.
        source: ClientError,
    },
    /// Our own store.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// No thread can be started.
    #[error("cannot start a thread that uploads: {0}")]
    Thread(io::Error),
}

impl From<substitute::Error> for Error {
    fn from(error: substitute::Error) -> Self {
        Self::Cache(Box::new(error))
    }
}

impl Error {
    /// Whether the destination would take no other path either.
    pub(crate) fn is_outage(&self) -> bool {
        match self {
            Self::Cache(error) => error.is_outage(),
            Self::Remote { source: ClientError::Refused(_) | ClientError::Payload(_), .. } => false,
            _ => true,
        }
    }
}

/// A store that paths are sent to.
pub(crate) enum Destination {
    Cache(Box<CacheWriter>),
    Store { uri: String, remote: Box<RemoteStore> },
}

/// Whether anything can be sent to stores with such a URL; without looking at the store.
pub(crate) fn check(url: &str) -> Result<(), Error> {
    match kind(url)? {
        Kind::Cache => {
            let settings = DownloadOptions::new(&nix_compat::conf::Settings::default());
            let client = fetch::Client::new(Arc::new(Download::gather(&settings, &|_| None)));
            Ok(CacheWriter::new(url, client, Path::new("/")).map(drop)?)
        }
        Kind::Store(_) => Ok(()),
    }
}

enum Kind {
    Cache,
    Store(StoreUri),
}

fn kind(url: &str) -> Result<Kind, Error> {
    let uri = StoreUri::parse(url).map_err(|source| Error::Uri { url: fetch::without_password(url), source })?;
    match uri.scheme.as_str() {
        "http" | "https" | "file" => Ok(Kind::Cache),
        "ssh" | "ssh-ng" => Ok(Kind::Store(uri)),
        "unix" if uri.authority.starts_with('/') => Ok(Kind::Store(uri)),
        // Among them `daemon`, which is this very store.
        _ => Err(Error::Unknown(fetch::without_password(url))),
    }
}

impl Destination {
    /// Connects. Passwords and certificates are read anew, since they may be why it failed the last time.
    pub(crate) fn open(
        url: &str,
        store: &Store,
        downloads: &DownloadOptions,
        stopper: &Stopper,
    ) -> Result<Self, Error> {
        match kind(url)? {
            Kind::Cache => {
                let download = Download::gather(downloads, &|name| std::env::var(name).ok());
                let scratch = store.state_dir().join("castored").join("upload");
                let writer = CacheWriter::new(url, fetch::Client::new(Arc::new(download)), &scratch)?;
                writer.open(store.store_dir())?;
                Ok(Self::Cache(Box::new(writer)))
            }
            Kind::Store(uri) => {
                let opened = RemoteStore::open(&uri, store.store_dir(), CONNECTING, stopper);
                let uri = uri.to_string();
                match opened {
                    Ok(remote) => Ok(Self::Store { uri, remote: Box::new(remote) }),
                    Err(source) => Err(Error::Remote { uri, source }),
                }
            }
        }
    }

    /// Those of the paths that it lacks.
    pub(crate) fn missing(&mut self, store: &Store, paths: BTreeSet<StorePath>) -> Result<BTreeSet<StorePath>, Error> {
        match self {
            Self::Cache(writer) => missing_in_cache(writer, store, paths),
            Self::Store { uri, remote } => {
                let there = remote.valid_paths(paths.clone(), false);
                let there = there.map_err(|source| Error::Remote { uri: uri.clone(), source })?;
                Ok(paths.into_iter().filter(|path| !there.contains(path)).collect())
            }
        }
    }

    /// Sends paths, each after those it refers to. `write` gives the NAR of one.
    pub(crate) fn send(
        &mut self,
        store: &Store,
        infos: BTreeMap<StorePath, PathInfo>,
        write: &dyn Fn(&PathInfo, &mut dyn Write) -> io::Result<()>,
    ) -> Result<(), Error> {
        let infos = references_first(infos);
        match self {
            Self::Cache(writer) => {
                for info in infos {
                    writer.add(store.store_dir(), info.clone(), |out| write(&info, out))?;
                }
                Ok(())
            }
            Self::Store { uri, remote } => remote
                .add(&infos, &mut |info, out| write(info, out))
                .map_err(|source| Error::Remote { uri: uri.clone(), source }),
        }
    }
}

/// Realisations.
impl Destination {
    /// By which names it knows outputs; `None` if it knows none.
    pub(crate) fn output_names(&self) -> Option<OutputNames> {
        match self {
            Self::Cache(_) => Some(OutputNames::ByHash),
            Self::Store { remote, .. } => remote.output_names(),
        }
    }

    /// What it believes an output to be.
    pub(crate) fn realisation(&mut self, id: &DrvOutput) -> Result<Option<Realisation>, Error> {
        match self {
            Self::Cache(writer) => Ok(writer.realisation(id)?),
            Self::Store { uri, remote } => {
                remote.realisation(id).map_err(|source| Error::Remote { uri: uri.clone(), source })
            }
        }
    }

    /// Tells it what an output turned out to be.
    pub(crate) fn put_realisation(&mut self, realisation: &Realisation) -> Result<(), Error> {
        match self {
            Self::Cache(writer) => Ok(writer.put_realisation(realisation)?),
            Self::Store { uri, remote } => match remote.register(realisation) {
                // Stock's daemon takes none unless its own settings say so; its paths are of use without.
                Err(ClientError::Refused(why)) => {
                    tracing::warn!(output = %realisation.id, to = %uri, why, "an upload's realisation was refused");
                    Ok(())
                }
                done => done.map_err(|source| Error::Remote { uri: uri.clone(), source }),
            },
        }
    }
}

/// Asks for some at a time: each answer takes a round trip.
fn missing_in_cache(
    writer: &CacheWriter,
    store: &Store,
    paths: BTreeSet<StorePath>,
) -> Result<BTreeSet<StorePath>, Error> {
    let paths: Vec<StorePath> = paths.into_iter().collect();
    let (next, missing) = (AtomicUsize::new(0), Mutex::new(BTreeSet::new()));
    let ask = || -> Result<(), Error> {
        while let Some(path) = paths.get(next.fetch_add(1, Ordering::Relaxed)) {
            let has =
                writer.has(store.store_dir(), path).inspect_err(|_| next.store(paths.len(), Ordering::Relaxed))?;
            if !has {
                missing.lock().insert(path.clone());
            }
        }
        Ok(())
    };
    let asked: Result<(), Error> = thread::scope(|scope| {
        let start = |_| thread::Builder::new().name("upload-ask".to_owned()).spawn_scoped(scope, ask);
        let others = (1..LOOKUPS.min(paths.len())).map(start).collect::<Result<Vec<_>, _>>().map_err(Error::Thread)?;
        let mine = ask();
        // A panic is told by the thread itself.
        let panicked = |_| Err(Error::Thread(io::Error::other("one has panicked")));
        others.into_iter().map(|other| other.join().unwrap_or_else(panicked)).fold(mine, Result::and)
    });
    asked.map(|()| missing.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_can_be_uploaded_to() {
        for right in [
            "http://host/path",
            "https://me:secret@host?compression=zstd&compression-level=7",
            "file:///dir?compression=none",
            "ssh-ng://host?ssh-key=/key",
            "ssh://me@host",
            "unix:///run/socket",
        ] {
            check(right).unwrap();
        }
        for wrong in [
            "",
            "daemon",
            "auto",
            "/dir",
            "s3://bucket",
            "unix://",
            "https://h?compression=lzop",
            "file://x?compression=xz",
        ] {
            assert!(check(wrong).is_err(), "{wrong}");
        }
        assert!(!check("s3://me:secret@bucket").unwrap_err().to_string().contains("secret"));
    }
}
