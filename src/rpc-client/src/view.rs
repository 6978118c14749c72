//! A peer's store as a [`StoreView`]: what a mount of it reads.
//!
//! Everything is asked for when it is needed. A path gets its number here, in the order in which paths become known,
//! so numbers last as long as this process. A peer does not tell of changes: a name is looked up anew each time the
//! kernel asks, and a listing that was given out is called outdated some time later. Paths that are missing in the next
//! one are told to have been removed.

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use castore::{BlobService, Digest, Directory, DirectoryService, Node};
use nix_compat::store_path::{StoreDir, StorePath};
use parking_lot::{Mutex, RwLock};
use store::view::{FIRST_ROOT_NUMBER, Root, Space, StoreEvent, StoreView, Subscriber, ViewError};
use tokio::runtime::Handle;
use tonic::transport::Channel;

use crate::{ClientError, RemoteBlobs, RemoteDirectories, RemotePaths};

/// Paths that are kept track of; each takes some 200 bytes.
const MAX_PATHS: usize = 1 << 20;
/// How old a listing may grow before programs that list again see a new one.
const LISTING_AGE: Duration = Duration::from_secs(10);
/// Listings that begin within this time share one answer of the peer.
const LISTING_SHARED: Duration = Duration::from_millis(500);

/// A peer's store, read-only.
pub struct RemoteView {
    store_dir: StoreDir,
    paths: RemotePaths,
    blobs: RemoteBlobs,
    directories: RemoteDirectories,
    known: RwLock<Known>,
    /// When the peer last told all its paths. Held while it is asked.
    listed: Mutex<Option<Instant>>,
    news: SyncSender<()>,
    /// Paths that were missing in the last listing, to be told by the thread that tells.
    removed: Mutex<Vec<StoreEvent>>,
    subscribers: Mutex<Vec<Subscriber>>,
}

impl std::fmt::Debug for RemoteView {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RemoteView").field("paths", &self.paths).finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Known {
    /// The path with number [`FIRST_ROOT_NUMBER`] first.
    paths: Vec<KnownPath>,
    by_digest: HashMap<[u8; 20], u32>,
    /// How many times the peer has told all its paths.
    listings: u64,
}

struct KnownPath {
    path: StorePath,
    node: Node,
    /// The listing in which it was seen last.
    seen: u64,
}

impl Known {
    fn get(&self, number: u32) -> Option<&KnownPath> {
        self.paths.get(usize::try_from(number.checked_sub(FIRST_ROOT_NUMBER)?).ok()?)
    }

    /// The number of a path with these contents: the one it has, or a new one.
    fn number(&mut self, path: StorePath, node: Node, seen: u64) -> Result<u32, ClientError> {
        let digest = path.digest();
        if let Some(&number) = self.by_digest.get(&digest)
            && let Some(known) = self.paths.get_mut((number - FIRST_ROOT_NUMBER) as usize)
            && known.path == path
            && known.node == node
        {
            known.seen = known.seen.max(seen);
            return Ok(number);
        }
        if self.paths.len() >= MAX_PATHS {
            return Err(ClientError::TooManyPaths(MAX_PATHS));
        }
        // Cannot overflow: there are at most MAX_PATHS.
        let number = FIRST_ROOT_NUMBER + self.paths.len() as u32;
        self.paths.push(KnownPath { path, node, seen });
        self.by_digest.insert(digest, number);
        Ok(number)
    }
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> ViewError {
    ViewError::Storage(Box::new(error))
}

impl RemoteView {
    /// The store at the other end of `channel`, with `runtime` doing the talking.
    ///
    /// # Errors
    /// When the thread that tells of changes cannot be started.
    pub fn new(channel: Channel, runtime: Handle, store_dir: StoreDir) -> std::io::Result<Arc<RemoteView>> {
        // One word of news is as good as many.
        let (news, heard) = sync_channel(1);
        let view = Arc::new(RemoteView {
            store_dir,
            paths: RemotePaths::new(channel.clone(), runtime.clone()),
            blobs: RemoteBlobs::new(channel.clone(), runtime.clone()),
            directories: RemoteDirectories::new(channel, runtime),
            known: RwLock::default(),
            listed: Mutex::default(),
            news,
            removed: Mutex::default(),
            subscribers: Mutex::default(),
        });
        let weak = Arc::downgrade(&view);
        std::thread::Builder::new().name("remote-news".into()).spawn(move || tell(&weak, &heard))?;
        Ok(view)
    }

    /// Asks the peer for something, to see whether it is there.
    ///
    /// # Errors
    /// When it is not, or is no store.
    pub fn probe(&self) -> Result<(), ClientError> {
        self.paths.get(&[0; 20]).map(drop)
    }

    /// Has the peer tell all its paths, unless it did just now.
    fn refresh(&self) -> Result<(), ClientError> {
        let mut listed = self.listed.lock();
        if listed.is_some_and(|at| at.elapsed() < LISTING_SHARED) {
            return Ok(());
        }
        let listing = self.known.read().listings + 1;
        self.paths.list(&mut |path, node| self.known.write().number(path, node, listing).map(drop))?;
        let mut known = self.known.write();
        let before = std::mem::replace(&mut known.listings, listing);
        let gone = (FIRST_ROOT_NUMBER..).zip(&known.paths).filter(|(_, path)| path.seen == before);
        let gone = gone.map(|(number, known)| StoreEvent::Removed { name: known.path.base_name().to_owned(), number });
        self.removed.lock().extend(gone);
        drop(known);
        *listed = Some(Instant::now());
        // Full means that it will look anyway.
        let _ = self.news.try_send(());
        Ok(())
    }

    fn publish(&self, events: &[StoreEvent]) {
        let subscribers = self.subscribers.lock().clone();
        subscribers.iter().for_each(|subscriber| subscriber(events));
    }
}

/// Tells subscribers what listings brought to light, and when they have grown old. Never on a thread that answers the
/// kernel: subscribers wait for the kernel.
fn tell(view: &Weak<RemoteView>, news: &Receiver<()>) {
    while news.recv().is_ok() {
        let until = Instant::now() + LISTING_AGE;
        loop {
            let Some(view) = view.upgrade() else { return };
            let removed = std::mem::take(&mut *view.removed.lock());
            if !removed.is_empty() {
                view.publish(&removed);
            }
            drop(view);
            match news.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(()) => {}
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
        if let Some(view) = view.upgrade() {
            view.publish(&[StoreEvent::Outdated]);
        }
    }
}

impl StoreView for RemoteView {
    fn store_dir(&self) -> &StoreDir {
        &self.store_dir
    }

    fn lookup(&self, base_name: &str) -> Result<Option<Root>, ViewError> {
        let Ok(wanted) = StorePath::from_base_name(base_name) else { return Ok(None) };
        let Some((path, node)) = self.paths.get(&wanted.digest()).map_err(failed)? else { return Ok(None) };
        if path != wanted {
            return Ok(None);
        }
        let mut known = self.known.write();
        let listings = known.listings;
        let number = known.number(path.clone(), node.clone(), listings).map_err(failed)?;
        Ok(Some(Root { number, path, node }))
    }

    fn by_number(&self, number: u32) -> Result<Option<Root>, ViewError> {
        let known = self.known.read();
        Ok(known.get(number).map(|known| Root { number, path: known.path.clone(), node: known.node.clone() }))
    }

    fn list(&self, after: u32, limit: usize) -> Result<Vec<Root>, ViewError> {
        if after < FIRST_ROOT_NUMBER {
            self.refresh().map_err(failed)?;
        }
        let known = self.known.read();
        let first = after.saturating_add(1).max(FIRST_ROOT_NUMBER);
        let paths = (first..).zip(known.paths.iter().skip((first - FIRST_ROOT_NUMBER) as usize));
        let there = paths.filter(|(_, known_path)| known_path.seen >= known.listings).take(limit);
        Ok(there.map(|(number, path)| Root { number, path: path.path.clone(), node: path.node.clone() }).collect())
    }

    fn directory(&self, digest: &Digest) -> Result<Arc<Directory>, ViewError> {
        self.directories.get(digest).map_err(failed)?.ok_or(ViewError::Missing(*digest))
    }

    fn read(&self, digest: &Digest, offset: u64, len: usize) -> Result<Bytes, ViewError> {
        self.blobs.read_at(digest, offset, len).map_err(failed)
    }

    fn subscribe(&self, subscriber: Subscriber) {
        self.subscribers.lock().push(subscriber);
    }

    /// The peer does not tell.
    fn space(&self) -> Result<Space, ViewError> {
        Ok(Space { block_size: 4096, ..Space::default() })
    }
}
