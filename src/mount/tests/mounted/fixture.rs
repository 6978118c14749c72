//! A store in memory and a place to mount it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use castore::{BlobService, Digest, Directory, DirectoryService, MemoryStore, Node, NodeName, SymlinkTarget};
use mount::{Mount, MountError, Options};
use nix_compat::store_path::{StoreDir, StorePath};
use parking_lot::{Mutex, RwLock};
use store::view::{FIRST_ROOT_NUMBER, Root, Space, StoreEvent, StoreView, Subscriber, Then, ViewError};
use tempfile::TempDir;

/// What [`StoreView::space`] of the fixture tells.
pub(crate) const SPACE: Space = Space {
    block_size: 4096,
    blocks: 1_000_000,
    blocks_free: 600_000,
    blocks_available: 500_000,
    files: 70_000,
    files_free: 60_000,
};

/// A store in memory.
#[derive(Default)]
pub(crate) struct MemoryView {
    store_dir: StoreDir,
    objects: MemoryStore,
    paths: RwLock<Paths>,
    subscribers: Mutex<Vec<Subscriber>>,
    damaged: Mutex<HashSet<Digest>>,
    /// Files too large to be held: every eight bytes of them are their own offset.
    counting: Mutex<HashSet<Digest>>,
    /// Blobs that are not here yet, with those who wait for them.
    elsewhere: Mutex<HashMap<Digest, Vec<Then>>>,
    lookups: AtomicU64,
}

#[derive(Default)]
struct Paths {
    by_number: BTreeMap<u32, Root>,
    by_name: BTreeMap<String, u32>,
    last: Option<u32>,
}

impl MemoryView {
    pub(crate) fn file(&self, contents: impl AsRef<[u8]>) -> Node {
        let (digest, size) = BlobService::put(&self.objects, &mut contents.as_ref()).unwrap();
        Node::File { digest, size, executable: false }
    }

    pub(crate) fn executable(&self, contents: impl AsRef<[u8]>) -> Node {
        let (digest, size) = BlobService::put(&self.objects, &mut contents.as_ref()).unwrap();
        Node::File { digest, size, executable: true }
    }

    /// A file of any size whose bytes are those of [`counting`].
    pub(crate) fn counting_file(&self, size: u64) -> Node {
        let digest = Digest::of(format!("counting to {size}").as_bytes());
        self.counting.lock().insert(digest);
        Node::File { digest, size, executable: false }
    }

    pub(crate) fn symlink(&self, target: impl AsRef<[u8]>) -> Node {
        Node::Symlink { target: SymlinkTarget::try_from(target.as_ref()).unwrap() }
    }

    pub(crate) fn directory<N: AsRef<[u8]>>(&self, entries: impl IntoIterator<Item = (N, Node)>) -> Node {
        let named = entries.into_iter().map(|(name, node)| (NodeName::try_from(name.as_ref()).unwrap(), node));
        let directory = Directory::new(named).unwrap();
        let node = directory.to_node();
        DirectoryService::put(&self.objects, &[directory]).unwrap();
        node
    }

    /// Makes `name` (without the hash part) a valid path and returns its base name.
    pub(crate) fn add(&self, name: &str, node: Node) -> String {
        let mut paths = self.paths.write();
        let number = paths.last.map_or(FIRST_ROOT_NUMBER, |last| last + 1);
        paths.last = Some(number);
        let base_name = base_name(name);
        let root = Root { number, path: StorePath::from_base_name(&base_name).unwrap(), node };
        paths.by_number.insert(number, root);
        assert_eq!(paths.by_name.insert(base_name.clone(), number), None, "{base_name} is there already");
        drop(paths);
        self.tell(&StoreEvent::Added { name: base_name.clone(), number });
        base_name
    }

    pub(crate) fn remove(&self, base_name: &str) {
        let mut paths = self.paths.write();
        let number = paths.by_name.remove(base_name).unwrap();
        paths.by_number.remove(&number).unwrap();
        drop(paths);
        self.tell(&StoreEvent::Removed { name: base_name.to_owned(), number });
    }

    /// From now on the blob cannot be read.
    pub(crate) fn damage(&self, blob: Digest) {
        self.damaged.lock().insert(blob);
    }

    pub(crate) fn repair(&self, blob: Digest) {
        self.damaged.lock().remove(&blob);
    }

    /// From now on the blob is elsewhere.
    pub(crate) fn send_away(&self, blob: Digest) {
        self.elsewhere.lock().insert(blob, Vec::new());
    }

    /// How many wait for it.
    pub(crate) fn waiting(&self, blob: &Digest) -> usize {
        self.elsewhere.lock().get(blob).map_or(0, Vec::len)
    }

    /// It has come.
    pub(crate) fn arrive(&self, blob: &Digest) {
        let waiting = self.elsewhere.lock().remove(blob).unwrap();
        waiting.into_iter().for_each(|then| then(Ok(())));
    }

    /// It cannot be had now.
    pub(crate) fn fail(&self, blob: &Digest) {
        let waiting = std::mem::take(self.elsewhere.lock().get_mut(blob).unwrap());
        waiting.into_iter().for_each(|then| then(Err(ViewError::Elsewhere(*blob))));
    }

    /// How often a path was looked up by name.
    pub(crate) fn lookups(&self) -> u64 {
        self.lookups.load(Ordering::SeqCst)
    }

    fn tell(&self, event: &StoreEvent) {
        let subscribers = self.subscribers.lock().clone();
        for subscriber in subscribers {
            subscriber(std::slice::from_ref(event));
        }
    }
}

/// A base name with a hash part of its own for every name.
fn base_name(name: &str) -> String {
    let hash: String = Digest::of(name.as_bytes()).as_bytes()[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    // The store's base 32 has no "e".
    format!("{}-{name}", hash.replace('e', "z"))
}

impl StoreView for MemoryView {
    fn store_dir(&self) -> &StoreDir {
        &self.store_dir
    }

    fn lookup(&self, base_name: &str) -> Result<Option<Root>, ViewError> {
        self.lookups.fetch_add(1, Ordering::SeqCst);
        let paths = self.paths.read();
        Ok(paths.by_name.get(base_name).and_then(|number| paths.by_number.get(number)).cloned())
    }

    fn by_number(&self, number: u32) -> Result<Option<Root>, ViewError> {
        Ok(self.paths.read().by_number.get(&number).cloned())
    }

    fn list(&self, after: u32, limit: usize) -> Result<Vec<Root>, ViewError> {
        Ok(self.paths.read().by_number.range(after + 1..).take(limit).map(|(_, root)| root.clone()).collect())
    }

    fn directory(&self, digest: &Digest) -> Result<Arc<Directory>, ViewError> {
        self.objects.get(digest).map_err(storage)?.ok_or(ViewError::Missing(*digest))
    }

    fn read(&self, digest: &Digest, offset: u64, len: usize) -> Result<Bytes, ViewError> {
        if self.damaged.lock().contains(digest) {
            return Err(storage(std::io::Error::other("checksum of the block is wrong")));
        }
        if self.elsewhere.lock().contains_key(digest) {
            return Err(ViewError::Elsewhere(*digest));
        }
        if self.counting.lock().contains(digest) {
            return Ok(counting(offset, len).into());
        }
        self.objects.read_at(digest, offset, len).map_err(storage)
    }

    fn bring(&self, digest: &Digest, then: Then) {
        let mut elsewhere = self.elsewhere.lock();
        if let Some(waiting) = elsewhere.get_mut(digest) {
            return waiting.push(then);
        }
        // It came in between, and is read by this.
        drop(elsewhere);
        then(Ok(()));
    }

    fn subscribe(&self, subscriber: Subscriber) {
        self.subscribers.lock().push(subscriber);
    }

    fn space(&self) -> Result<Space, ViewError> {
        Ok(SPACE)
    }
}

/// Bytes of a file of which every eight are their own offset, little end first.
pub(crate) fn counting(offset: u64, len: usize) -> Vec<u8> {
    let skip = (offset % 8) as usize;
    let words = (offset / 8..).flat_map(|word| (word * 8).to_le_bytes());
    words.skip(skip).take(len).collect()
}

fn storage(error: impl std::error::Error + Send + Sync + 'static) -> ViewError {
    ViewError::Storage(Box::new(error))
}

/// A mounted store. The mount goes before the directory it is on.
pub(crate) struct Mounted {
    pub(crate) view: Arc<MemoryView>,
    pub(crate) mount: Mount,
    _dir: TempDir,
}

impl Mounted {
    /// Where a store path is.
    pub(crate) fn path(&self, base_name: impl AsRef<Path>) -> PathBuf {
        self.mount.mountpoint().join(base_name)
    }

    pub(crate) fn root(&self) -> &Path {
        self.mount.mountpoint()
    }
}

/// Mounts a new, empty store, or says why this test is skipped.
pub(crate) fn mounted() -> Option<Mounted> {
    let dir = tempfile::tempdir().unwrap();
    // Other users have to come through it.
    std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
    let view = Arc::new(MemoryView::default());
    let mount = mount_or_skip(Arc::clone(&view), &dir.path().join("store"))?;
    Some(Mounted { view, mount, _dir: dir })
}

/// Mounts a store somewhere, or says why this test is skipped.
pub(crate) fn mount_or_skip(view: Arc<MemoryView>, at: &Path) -> Option<Mount> {
    match Mount::new(view, at, Options::default()) {
        Ok(mount) => Some(mount),
        Err(
            error @ (MountError::NoDevice
            | MountError::Device(_)
            | MountError::NoHelper
            | MountError::Helper { .. }
            | MountError::Mount { .. }),
        ) => {
            println!("SKIPPED: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// The names in a directory, sorted.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Bytes that do not repeat: what a test reads back in pieces.
pub(crate) fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
