//! The store itself: opening it, and the questions asked of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use castore::engine::{Engine, Options};
use castore::index::{Batch, Index, Table};
use nix_compat::path_info::PathInfo;
use nix_compat::store_path::{StoreDir, StorePath};
use parking_lot::{Mutex, RwLock};

use crate::damage::DamageListener;
use crate::derivations::DerivationCache;
use crate::entries::{self, EntryCache};
use crate::error::{Error, Result};
use crate::lock::StateLock;
use crate::quarantine::Quarantine;
use crate::record::{self, Entry};
use crate::roots::Recognise;
use crate::space::Space;
use crate::space::auto::Watch;
use crate::space::reserve::{Reserve, pack_size};
use crate::sweep::Sweeper;
use crate::temp_roots::{Registry, TEMP_ROOTS, TempRoots};
use crate::view::{StoreEvent, Subscriber};

/// Version of the store's own tables, in the meta table. A newer one is refused.
const SCHEMA: &str = "1";

/// Where a store lives.
#[derive(Clone, Debug)]
pub struct Config {
    /// What the paths begin with, e.g. `/nix/store`.
    pub store_dir: StoreDir,
    /// The state directory, e.g. `/nix/var/nix`; ours is the directory `castored` in it.
    pub state_dir: PathBuf,
    /// How the castore shares out memory, and how long its packs get.
    pub engine: Options,
    /// Bytes of decoded records of paths in memory.
    pub entry_bytes: u64,
    /// When a registration is durable.
    pub durability: Durability,
}

impl Config {
    /// A store with the defaults.
    pub fn new(store_dir: StoreDir, state_dir: impl Into<PathBuf>) -> Self {
        let (engine, durability) = (Options::default(), Durability::default());
        Self { store_dir, state_dir: state_dir.into(), engine, entry_bytes: entries::USUAL_BYTES, durability }
    }
}

/// When what is registered is durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// Within 100 ms, together with what others register, and at every durable point ([`Store::sync`]).
    #[default]
    Grouped,
    /// Before the registration is answered. Those that come at the same time share the disk's sync.
    Immediate,
}

/// The store's tables in the index.
#[derive(Debug)]
pub(crate) struct Tables {
    /// 20-byte digest of the hash part → [`Entry`].
    pub(crate) paths: Table,
    /// Digest of a path + digest of one that refers to it → nothing.
    pub(crate) referrers: Table,
    /// Digest of an output + digest of a valid derivation that has it → output name.
    pub(crate) derivers: Table,
    /// Path number, big-endian → digest.
    pub(crate) numbers: Table,
    /// Output of a derivation → realisation, see [`crate::realisations`].
    pub(crate) realisations: Table,
    /// Digest of a path + key of one of its realisations → nothing.
    pub(crate) realised: Table,
    /// Digest of a path that is damaged and could not be repaired → what is wrong, see [`crate::quarantine`].
    pub(crate) quarantine: Table,
    /// Digest of a path of which contents may be elsewhere → URL of its source, see [`crate::lazy`].
    pub(crate) lazy: Table,
    /// Destination + digest of a path that is to be sent there → base name, see [`crate::uploads`].
    pub(crate) uploads: Table,
    /// Names → values, see the keys below.
    pub(crate) meta: Table,
}

impl Tables {
    fn open(index: &Index) -> Result<Self> {
        Ok(Self {
            paths: index.table("paths")?,
            referrers: index.table("referrers")?,
            derivers: index.table("derivers")?,
            numbers: index.table("numbers")?,
            realisations: index.table("realisations")?,
            realised: index.table("realised")?,
            quarantine: index.table("quarantine")?,
            lazy: index.table("lazy")?,
            uploads: index.table("uploads")?,
            meta: index.table("meta")?,
        })
    }
}

pub(crate) const META_SCHEMA: &[u8] = b"schema";
pub(crate) const META_STORE_DIR: &[u8] = b"store-dir";
/// Numbers below this one may be in use.
pub(crate) const META_NEXT_NUMBER: &[u8] = b"next-number";
/// There once every path and realisation has a record in the packs, see [`crate::records`].
pub(crate) const META_RECORDS: &[u8] = b"records";
/// Digest of the record that says which paths there are.
pub(crate) const META_CHECKPOINT: &[u8] = b"checkpoint";
/// There while paths were deleted and their objects perhaps not yet, see [`crate::sweep`].
pub(crate) const META_SWEEP: &[u8] = b"sweep";
/// What the last sweep did, see [`crate::sweep::LastSweep`].
pub(crate) const META_LAST_SWEEP: &[u8] = b"last-sweep";

/// Makes the names in `dir` durable.
pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(|e| Error::file("sync", dir, e))
}

/// A Nix store over a castore.
pub struct Store {
    pub(crate) config: Config,
    pub(crate) engine: Arc<Engine>,
    pub(crate) tables: Tables,
    /// Held while the set of valid paths changes: registrations and deletions see each other whole.
    pub(crate) changing: Mutex<crate::register::Numbers>,
    pub(crate) temp_roots: Arc<Registry>,
    /// Held by a collection: what one has found out must not be changed by another.
    pub(crate) collecting: Mutex<()>,
    pub(crate) derivations: DerivationCache,
    entries: EntryCache,
    pub(crate) sweeper: Sweeper,
    pub(crate) reserve: Reserve,
    pub(crate) for_opening: Reserve,
    /// The water marks' business.
    pub(crate) watch: Watch,
    pub(crate) quarantine: Quarantine,
    pub(crate) uploads: crate::uploads::Queue,
    subscribers: RwLock<Vec<Subscriber>>,
    pub(crate) damage_listener: RwLock<Option<DamageListener>>,
    /// How files are recognised that processes see through the mount.
    pub(crate) recognise: RwLock<Option<Recognise>>,
    /// Last, so that it is released when everything above is closed.
    _lock: StateLock,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Store {
    /// Opens the store in the state directory, creating what is missing.
    ///
    /// # Errors
    /// [`Error::InUse`] when another process has it open, [`Error::WrongStoreDir`] when it was made for
    /// another store directory, and whatever the castore says.
    pub fn open(config: Config) -> Result<Arc<Self>> {
        let store = Self::open_unswept(config)?;
        if store.index().get(&store.tables.meta, castore::rebuild::UNFINISHED)?.is_some() {
            return Err(Error::RebuildUnfinished);
        }
        store.drop_stray_lazy_rows()?;
        Sweeper::start(&store)?;
        Ok(store)
    }

    /// The same, but nothing is swept, and it may be a store whose index is being made anew.
    pub(crate) fn open_unswept(config: Config) -> Result<Arc<Self>> {
        let dir = config.state_dir.join("castored");
        std::fs::create_dir_all(&dir).map_err(|e| Error::file("create", &dir, e))?;
        let lock = StateLock::acquire(&dir)?;
        // Names made above are durable like what is in them. (That of the state directory is its maker's business.)
        sync_dir(&config.state_dir)?;
        Self::open_locked(config, lock)
    }

    pub(crate) fn open_locked(config: Config, lock: StateLock) -> Result<Arc<Self>> {
        let dir = config.state_dir.join("castored");
        let (reserve, for_opening) = (Reserve::for_collections(&dir), Reserve::for_opening(&dir));
        let seal_at = config.engine.seal_at.min(pack_size(Space::of(&dir)?));
        let options = Options { seal_at, ..config.engine.clone() };
        let open = || Engine::open(&dir, options.clone());
        let engine = match open() {
            // To open the index may take space as well.
            Err(error) if castore::is_disk_full(&error) && for_opening.give_up() => open()?,
            opened => opened?,
        };
        let index = engine.index();
        let tables = Tables::open(index)?;
        let next = Self::check_meta(index, &tables, &config.store_dir)?;
        let temp_roots = Arc::new(Registry::new(config.state_dir.join(TEMP_ROOTS)));
        let quarantine = Quarantine::read(index, &tables)?;
        let store = Arc::new(Self {
            entries: EntryCache::new(config.entry_bytes),
            config,
            tables,
            changing: Mutex::new(crate::register::Numbers::starting_at(next)),
            temp_roots,
            collecting: Mutex::default(),
            derivations: DerivationCache::default(),
            sweeper: Sweeper::default(),
            reserve,
            for_opening,
            watch: Watch::default(),
            quarantine,
            uploads: crate::uploads::Queue::default(),
            subscribers: RwLock::default(),
            damage_listener: RwLock::default(),
            recognise: RwLock::default(),
            engine,
            _lock: lock,
        });
        store.make_reserves();
        Ok(store)
    }

    /// Checks the meta table or, in a new store, writes it; gives the first free path number.
    fn check_meta(index: &Index, tables: &Tables, store_dir: &StoreDir) -> Result<u32> {
        let get = |key: &[u8]| -> Result<Option<String>> {
            Ok(index.get(&tables.meta, key)?.map(|v| String::from_utf8_lossy(&v).into_owned()))
        };
        if let Some(found) = get(META_STORE_DIR)? {
            if found != store_dir.as_str() {
                return Err(Error::WrongStoreDir { found, wanted: store_dir.as_str().to_owned() });
            }
            let schema = get(META_SCHEMA)?.unwrap_or_default();
            if schema != SCHEMA {
                return Err(Error::Record {
                    key: "schema".into(),
                    reason: format!("version {schema} is not one this castored knows (it knows {SCHEMA})"),
                });
            }
        } else {
            let mut batch = Batch::default();
            batch.put(tables.meta, META_STORE_DIR, store_dir.as_str().to_owned());
            batch.put(tables.meta, META_SCHEMA, SCHEMA);
            batch.put(tables.meta, META_RECORDS, "1");
            index.commit(batch)?;
        }
        let next = get(META_NEXT_NUMBER)?.and_then(|n| n.parse().ok());
        Ok(next.unwrap_or(crate::view::FIRST_ROOT_NUMBER))
    }

    /// What the paths of this store begin with.
    pub fn store_dir(&self) -> &StoreDir {
        &self.config.store_dir
    }

    /// The state directory, as configured.
    pub fn state_dir(&self) -> &Path {
        &self.config.state_dir
    }

    /// The castore below.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    pub(crate) fn index(&self) -> &Index {
        self.engine.index()
    }

    /// Makes everything that is visible now durable.
    ///
    /// # Errors
    /// When the disk refuses; then nothing before the call may be taken as durable.
    pub fn sync(&self) -> Result<()> {
        Ok(self.engine.sync()?)
    }

    /// What ends every registration: makes it durable if that is what is configured.
    pub(crate) fn registered(&self) -> Result<()> {
        match self.config.durability {
            Durability::Grouped => Ok(()),
            Durability::Immediate => self.sync(),
        }
    }

    /// A new set of temporary roots, for a connection or a build.
    pub fn new_temp_roots(&self) -> TempRoots {
        TempRoots::new(self.temp_roots.clone(), self.config.store_dir.clone())
    }

    /// What is known of a valid path; `None` when it is not valid.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn entry(&self, path: &StorePath) -> Result<Option<Entry>> {
        Ok(self.shared_entry(path)?.map(|entry| (*entry).clone()))
    }

    /// As [`Store::entry`], without a copy.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn shared_entry(&self, path: &StorePath) -> Result<Option<Arc<Entry>>> {
        Ok(self.entry_by_digest(&path.digest())?.filter(|entry| entry.info.path == *path))
    }

    pub(crate) fn entry_by_digest(&self, digest: &[u8; 20]) -> Result<Option<Arc<Entry>>> {
        self.entries.get(digest, || {
            self.index().get(&self.tables.paths, digest)?.map(|bytes| Entry::decode(digest, &bytes)).transpose()
        })
    }

    /// Commits a change. Every change of path records goes through here, or through [`Store::commit_by`].
    pub(crate) fn commit(&self, batch: Batch) -> Result<()> {
        self.commit_by(batch, |batch| Ok(self.index().commit(batch)?))
    }

    /// Commits a change in the way that `commit` says.
    pub(crate) fn commit_by(&self, batch: Batch, commit: impl FnOnce(Batch) -> Result<()>) -> Result<()> {
        let changed: Vec<[u8; 20]> = batch.keys(self.tables.paths).filter_map(|key| key.try_into().ok()).collect();
        commit(batch)?;
        changed.iter().for_each(|digest| self.entries.forget(digest));
        Ok(())
    }

    /// As [`Store::entry`], but an invalid path is an error.
    ///
    /// # Errors
    /// [`Error::NotValid`].
    pub fn valid_entry(&self, path: &StorePath) -> Result<Entry> {
        self.entry(path)?.ok_or_else(|| Error::path(self.store_dir(), path))
    }

    /// The path info of a valid path.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn path_info(&self, path: &StorePath) -> Result<Option<PathInfo>> {
        Ok(self.shared_entry(path)?.map(|entry| entry.info.clone()))
    }

    /// Whether the path is valid.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn is_valid(&self, path: &StorePath) -> Result<bool> {
        let digest = path.digest();
        // Not kept when it is not here: of many paths that are asked for in this way nothing else is wanted.
        if let Some(entry) = self.entries.peek(&digest) {
            return Ok(entry.info.path == *path);
        }
        match self.index().get(&self.tables.paths, &digest)? {
            None => Ok(false),
            Some(record) => Ok(record::base_name(&digest, &record)? == path.base_name()),
        }
    }

    /// The valid path with this hash part.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn path_from_hash_part(&self, digest: &[u8; 20]) -> Result<Option<StorePath>> {
        Ok(self.entry_by_digest(digest)?.map(|entry| entry.info.path.clone()))
    }

    /// The valid path that has this number in the mount.
    pub(crate) fn path_of_number(&self, number: u32) -> Result<Option<StorePath>> {
        let digest = self.index().get(&self.tables.numbers, &number.to_be_bytes())?;
        let Some(digest) = digest.and_then(|digest| <[u8; 20]>::try_from(&digest[..]).ok()) else { return Ok(None) };
        Ok(self.entry_by_digest(&digest)?.filter(|entry| entry.number == number).map(|entry| entry.info.path.clone()))
    }

    /// Calls `each` for every valid path until it breaks.
    ///
    /// # Errors
    /// When the index cannot be read or a record is damaged.
    pub fn for_each(&self, each: &mut dyn FnMut(Entry) -> ControlFlow<()>) -> Result<()> {
        let mut failure = None;
        self.index().scan_prefix(&self.tables.paths, &[], &mut |key, value| match Entry::decode(key, value) {
            Ok(entry) => each(entry),
            Err(error) => {
                failure = Some(error);
                ControlFlow::Break(())
            }
        })?;
        failure.map_or(Ok(()), Err)
    }

    /// Bytes of decoded records of paths in memory now, about; [`Config::entry_bytes`] at most.
    pub fn entries_in_memory(&self) -> u64 {
        self.entries.bytes()
    }

    /// All valid paths.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn all_valid_paths(&self) -> Result<BTreeSet<StorePath>> {
        let mut paths = BTreeSet::new();
        self.for_each(&mut |entry| {
            paths.insert(entry.info.path);
            ControlFlow::Continue(())
        })?;
        Ok(paths)
    }

    /// The valid paths that refer to `path`, itself included when it refers to itself.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn referrers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>> {
        Ok(self.pairs(&self.tables.referrers, path)?.into_keys().collect())
    }

    /// The valid derivations that have `path` as an output, with that output's name.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn valid_derivers(&self, path: &StorePath) -> Result<BTreeMap<StorePath, String>> {
        self.pairs(&self.tables.derivers, path)
    }

    /// Reads a table of pairs (digest of `path` + digest of another → text).
    fn pairs(&self, table: &Table, path: &StorePath) -> Result<BTreeMap<StorePath, String>> {
        let mut digests = Vec::new();
        self.index().scan_prefix(table, &path.digest(), &mut |key, value| {
            if let Ok(digest) = <[u8; 20]>::try_from(&key[20.min(key.len())..]) {
                digests.push((digest, String::from_utf8_lossy(value).into_owned()));
            }
            ControlFlow::Continue(())
        })?;
        let mut pairs = BTreeMap::new();
        for (digest, text) in digests {
            if let Some(path) = self.path_from_hash_part(&digest)? {
                pairs.insert(path, text);
            }
        }
        Ok(pairs)
    }

    /// The paths and everything they refer to, directly or not. Invalid paths are left out.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn closure<'a>(&self, paths: impl IntoIterator<Item = &'a StorePath>) -> Result<BTreeSet<StorePath>> {
        let mut closure = BTreeSet::new();
        let mut todo: Vec<StorePath> = paths.into_iter().cloned().collect();
        while let Some(path) = todo.pop() {
            if closure.contains(&path) {
                continue;
            }
            if let Some(entry) = self.shared_entry(&path)? {
                todo.extend(entry.info.references.iter().filter(|r| !closure.contains(*r)).cloned());
                closure.insert(path);
            }
        }
        Ok(closure)
    }

    pub(crate) fn add_subscriber(&self, subscriber: Subscriber) {
        self.subscribers.write().push(subscriber);
    }

    /// Says which paths the next commit is about.
    pub(crate) fn forewarn(&self, names: impl Iterator<Item = String>) {
        // Most stores have nobody to warn.
        if !self.subscribers.read().is_empty() {
            self.publish(&names.map(|name| StoreEvent::Changing { name }).collect::<Vec<_>>());
        }
    }

    pub(crate) fn publish(&self, events: &[StoreEvent]) {
        if !events.is_empty() {
            self.subscribers.read().iter().for_each(|subscriber| subscriber(events));
        }
    }
}
