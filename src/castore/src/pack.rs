//! Pack files: append-only segments of compressed blocks. `FORMAT.md` has the layout of every byte.
//!
//! A pack is known by its number and named after it. Blocks are appended to one open pack at a time for each
//! [form](Form); when the next block would make it longer than the sealing size, it is sealed and another one begun. What the index records of a pack is
//! its *committed length*: everything below it was on disk before the index said so, everything above it after a crash
//! is cut off.

mod block;
mod error;
mod floor;
mod form;
mod lost;
mod scan;
mod walk;

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use xxhash_rust::xxh3::xxh3_64;

use crate::index::{DataFiles, DataRow, Table};
pub use block::BlockError;
pub(crate) use block::{BlockBuilder, EncodedBlock, Head, MAX_RAW, Row};
pub use error::PackError;
use error::at;
pub(crate) use form::Form;
use lost::LostParts;
pub(crate) use scan::{Scanned, list, scan};

/// The version of the pack format this code reads and writes.
pub const PACK_VERSION: u32 = 1;
/// A pack is sealed before it grows beyond this.
pub const SEAL_AT: u64 = 256 << 20;

const MAGIC: [u8; 8] = *b"castpack";
/// Ends the name of a pack that the index has forgotten.
const UNKNOWN: &str = "unknown";
/// Length of a pack's header: its first block begins here.
pub(crate) const FILE_HEADER: usize = 32;
/// What imports leave free on the filesystem: this part of it, within these bounds in bytes. That is enough to sweep away
/// what one has written that did not fit.
const ROOM_PART: u64 = 32;
const ROOM_LEAST: u64 = 1 << 20;
const ROOM_MOST: u64 = 32 << 20;
/// Files of sealed packs that are kept open.
const OPEN_FILES: usize = 128;

/// Where a block stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Place {
    pub(crate) pack: u32,
    pub(crate) offset: u64,
    /// The length of the whole block.
    pub(crate) length: u32,
}

impl Place {
    fn damaged(self, source: BlockError) -> PackError {
        PackError::Block { pack: self.pack, offset: self.offset, source }
    }
}

/// One pack.
struct Pack {
    number: u32,
    form: Form,
    path: PathBuf,
    /// Everything below has been written.
    written: AtomicU64,
    /// Blocks whose index entries are not committed yet: while there are any, no index entry is no proof of no use.
    landing: AtomicU64,
}

/// The pack that blocks are appended to.
struct OpenPack {
    pack: Arc<Pack>,
    file: Arc<File>,
}

/// A block that was appended and keeps its pack from being dropped until its entries are committed.
pub(crate) struct Landing {
    pub(crate) place: Place,
    pack: Arc<Pack>,
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.pack.landing.fetch_sub(1, Ordering::AcqRel);
    }
}

/// All packs of one directory.
pub(crate) struct Packs {
    dir: PathBuf,
    /// Open all the time: to run out of descriptors must not look like a disk that cannot sync.
    directory: File,
    seal_at: u64,
    lengths: Table,
    packs: RwLock<HashMap<u32, Arc<Pack>>>,
    open: Mutex<Appender>,
    files: quick_cache::sync::Cache<u32, Arc<File>>,
    /// A file was created since the directory was last synced.
    created: AtomicBool,
    /// Locked while the note beside the packs is written.
    noted: Mutex<Noted>,
    lost: LostParts,
}

/// What the note beside the packs may say.
#[derive(Default)]
struct Noted {
    /// What the index has durably.
    recorded: BTreeMap<u32, u64>,
    /// What it is about to have.
    pending: BTreeMap<u32, u64>,
    /// A pack was begun, which the note has not got yet.
    begun: bool,
}

struct Appender {
    open: HashMap<Form, OpenPack>,
    /// Packs with appended bytes that are not yet durable, with their files.
    unsynced: HashMap<u32, OpenPack>,
    next: u32,
}

impl Appender {
    fn file_of(&self, number: u32) -> Option<Arc<File>> {
        let mut all = self.open.values().chain(self.unsynced.values());
        all.find(|open| open.pack.number == number).map(|open| Arc::clone(&open.file))
    }
}

/// What [`Packs::open`] did to bring the files in line with the index.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Recovery {
    pub(crate) truncated: usize,
    pub(crate) deleted: usize,
}

impl Packs {
    /// Opens the packs in `dir`, whose committed lengths are `committed`: cuts off what lies beyond, deletes packs the
    /// index does not know. Those that are not of the quick form are in `forms`.
    pub(crate) fn open(
        dir: PathBuf,
        seal_at: u64,
        lengths: Table,
        committed: &HashMap<u32, u64>,
        forms: &HashMap<u32, Form>,
    ) -> Result<(Self, Recovery), PackError> {
        std::fs::create_dir_all(&dir).map_err(at("creating", &dir))?;
        if let Some(parent) = dir.parent() {
            File::open(parent).and_then(|parent| parent.sync_all()).map_err(at("syncing", parent))?;
        }
        let floor = floor::read(&dir);
        let mut recovery = Recovery::default();
        let mut newest = None;
        for entry in std::fs::read_dir(&dir).map_err(at("listing", &dir))? {
            let path = entry.map_err(at("listing", &dir))?.path();
            if path.extension().is_some_and(|extension| extension == lost::COPY) {
                std::fs::remove_file(&path).map_err(at("deleting", &path))?;
            }
            let Some(number) = number_of(&path) else { continue };
            newest = newest.max(Some(number));
            if !committed.contains_key(&number) && floor.contains_key(&number) {
                // Collected by a castored that was killed just then, or forgotten by a damaged index.
                let aside = path.with_extension(format!("pack.{UNKNOWN}"));
                std::fs::rename(&path, &aside).map_err(at("moving aside", &path))?;
                tracing::warn!(pack = %path.display(), aside = %aside.display(), "the index does not know a pack it knew");
                recovery.deleted += 1;
            } else if !committed.contains_key(&number) {
                std::fs::remove_file(&path).map_err(at("deleting", &path))?;
                recovery.deleted += 1;
            }
        }
        let mut packs = HashMap::with_capacity(committed.len());
        for (&number, &committed) in committed {
            newest = newest.max(Some(number));
            let path = path_of(&dir, number);
            let actual = match std::fs::metadata(&path) {
                Ok(metadata) => metadata.len(),
                Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
                Err(error) => return Err(at("looking at", &path)(error)),
            };
            let floor = floor.get(&number).copied().unwrap_or(0);
            if committed < floor {
                return Err(PackError::Forgotten { path, committed, floor });
            }
            if actual < committed {
                return Err(PackError::Short { path, actual, committed });
            }
            if actual > committed {
                let file = OpenOptions::new().write(true).open(&path).map_err(at("opening", &path))?;
                file.set_len(committed).and_then(|()| file.sync_all()).map_err(at("truncating", &path))?;
                recovery.truncated += 1;
            }
            let written = AtomicU64::new(committed);
            let form = forms.get(&number).copied().unwrap_or(Form::Quick);
            packs.insert(number, Arc::new(Pack { number, form, path, written, landing: AtomicU64::new(0) }));
        }
        // The last pack goes on where it ended, lest every restart leave a short one behind.
        let mut open = HashMap::new();
        for form in Form::WRITTEN {
            let newest = packs.values().filter(|pack| pack.form == form).max_by_key(|pack| pack.number);
            let Some(pack) = newest.filter(|pack| pack.written.load(Ordering::Acquire) < seal_at) else { continue };
            let path = &pack.path;
            let file = OpenOptions::new().read(true).write(true).open(path).map_err(at("opening", path))?;
            match check_header(&file, pack.number, path) {
                Ok(()) => drop(open.insert(form, OpenPack { pack: Arc::clone(pack), file: Arc::new(file) })),
                // Nothing is added to it. What is in it is for a check to repair, which needs the store open.
                Err(error @ PackError::Header(_)) => {
                    tracing::error!(%error, "a pack is damaged; `castored fsck --repair` can restore it");
                }
                Err(error) => return Err(error),
            }
        }
        let next = newest.map_or(Some(0), |newest| newest.checked_add(1)).ok_or(PackError::Exhausted)?;
        let directory = File::open(&dir).map_err(at("opening", &dir))?;
        let packs = Self {
            dir,
            directory,
            seal_at,
            lengths,
            packs: RwLock::new(packs),
            open: Mutex::new(Appender { open, unsynced: HashMap::new(), next }),
            files: quick_cache::sync::Cache::new(OPEN_FILES),
            created: AtomicBool::new(recovery.deleted > 0),
            noted: Mutex::new(Noted {
                recorded: committed.iter().map(|(n, l)| (*n, *l)).collect(),
                ..Noted::default()
            }),
            lost: LostParts::default(),
        };
        Ok((packs, recovery))
    }

    /// Appends `block`. It is durable after the next [`make_durable`](DataFiles::make_durable).
    pub(crate) fn append(&self, mut block: EncodedBlock) -> Result<Landing, PackError> {
        let mut appender = self.open.lock();
        let full = |open: &OpenPack| {
            let written = open.pack.written.load(Ordering::Acquire);
            written > FILE_HEADER as u64 && written + block.length() as u64 > self.seal_at
        };
        let form = block.form();
        let open = match appender.open.remove(&form) {
            Some(open) if !full(&open) => open,
            _ => self.begin(&mut appender, form)?,
        };
        let offset = open.pack.written.load(Ordering::Acquire);
        // After an error the next block overwrites what this one left: nothing above `written` counts.
        let written = open.file.write_all_at(block.at(offset), offset).map_err(at("appending to", &open.pack.path));
        if written.is_ok() {
            open.pack.landing.fetch_add(1, Ordering::AcqRel);
            open.pack.written.store(offset + block.length() as u64, Ordering::Release);
            let unsynced = OpenPack { pack: Arc::clone(&open.pack), file: Arc::clone(&open.file) };
            appender.unsynced.insert(open.pack.number, unsynced);
        }
        let pack = Arc::clone(&open.pack);
        appender.open.insert(form, open);
        written?;
        Ok(Landing { place: Place { pack: pack.number, offset, length: block.length() as u32 }, pack })
    }

    fn begin(&self, appender: &mut Appender, form: Form) -> Result<OpenPack, PackError> {
        let number = appender.next;
        let next = number.checked_add(1).ok_or(PackError::Exhausted)?;
        let path = path_of(&self.dir, number);
        // A file that a failed attempt left behind is overwritten.
        let mut options = OpenOptions::new();
        let file =
            options.read(true).write(true).create(true).truncate(true).open(&path).map_err(at("creating", &path))?;
        file.write_all_at(&header(number), 0).map_err(at("writing the header of", &path))?;
        appender.next = next;
        self.created.store(true, Ordering::Release);
        let written = AtomicU64::new(FILE_HEADER as u64);
        let pack = Arc::new(Pack { number, form, path, written, landing: AtomicU64::new(0) });
        self.packs.write().insert(number, Arc::clone(&pack));
        Ok(OpenPack { pack, file: Arc::new(file) })
    }

    /// The raw payload of the block at `place`, read from disk and verified.
    pub(crate) fn read(&self, place: Place) -> Result<Bytes, PackError> {
        let bytes = self.read_stored(place)?;
        block::decode(bytes, place.offset).map_err(|source| place.damaged(source))
    }

    /// The first `wanted` bytes of the block at `place`, **of which nothing is verified**, if they can be had for less
    /// than the whole.
    pub(crate) fn read_start(&self, place: Place, wanted: usize) -> Option<Bytes> {
        let length = block::likely_enough(wanted).min(place.length as usize);
        let begun = self.read_stored(Place { length: length as u32, ..place }).ok()?;
        block::decode_start(&begun, wanted)
    }

    /// The objects of the block at `place` and their contents one after the other, verified.
    pub(crate) fn read_with_table(&self, place: Place) -> Result<(Vec<Row>, Bytes), PackError> {
        let bytes = self.read_stored(place)?;
        let rows = block::rows(&bytes);
        let raw = block::decode(bytes, place.offset).map_err(|source| place.damaged(source))?;
        Ok((rows.map_err(|source| place.damaged(source))?, raw))
    }

    /// What may be the raw payload of the block at `place`, of which nothing was verified.
    pub(crate) fn read_unverified(&self, place: Place) -> Result<Bytes, PackError> {
        let bytes = self.read_stored(place)?;
        block::salvage(&bytes).map_err(|source| place.damaged(source))
    }

    /// The bytes of the block at `place` as they are on disk.
    fn read_stored(&self, place: Place) -> Result<Vec<u8>, PackError> {
        let damaged = |source| place.damaged(source);
        if place.length as usize > block::MAX_BLOCK {
            return Err(damaged(BlockError::Contradiction("length above the limit")));
        }
        let pack = self.packs.read().get(&place.pack).cloned().ok_or(PackError::Gone(place.pack))?;
        if place.offset + u64::from(place.length) > pack.written.load(Ordering::Acquire) {
            return Err(damaged(BlockError::Short));
        }
        let file = self.file(&pack)?;
        let mut bytes = vec![0; place.length as usize];
        file.read_exact_at(&mut bytes, place.offset).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                if let Ok(metadata) = file.metadata() {
                    self.note_lost(pack.number, metadata.len());
                }
                damaged(BlockError::Short)
            }
            _ => at("reading", &pack.path)(error),
        })?;
        Ok(bytes)
    }

    /// Whether the header of pack `number` is as it was written.
    pub(crate) fn check_header(&self, number: u32) -> Result<(), PackError> {
        let pack = self.packs.read().get(&number).cloned().ok_or(PackError::Gone(number))?;
        let file = File::open(&pack.path).map_err(at("opening", &pack.path))?;
        check_header(&file, number, &pack.path)
    }

    /// Writes the header of pack `number` anew: all of it follows from the number. Durable on return.
    pub(crate) fn restore_header(&self, number: u32) -> Result<(), PackError> {
        let pack = self.packs.read().get(&number).cloned().ok_or(PackError::Gone(number))?;
        Self::ensure_header(number, &pack.path).map(drop)
    }

    /// Sees to it that the file begins with the header of pack `number`; whether it had to be written.
    pub(crate) fn ensure_header(number: u32, path: &Path) -> Result<bool, PackError> {
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(at("opening", path))?;
        match check_header(&file, number, path) {
            Err(PackError::Header(_)) => {
                let written = file.write_all_at(&header(number), 0).and_then(|()| file.sync_data());
                written.map_err(at("restoring the header of", path))?;
                Ok(true)
            }
            other => other.map(|()| false),
        }
    }

    /// Whether there was ever anything durable in the packs in `dir`, by what was noted.
    pub(crate) fn were_durable(dir: &Path) -> bool {
        !floor::read(dir).is_empty()
    }

    /// Sees to it that the next opening does not expect these packs, whose rows are about to be removed from the index.
    pub(crate) fn forget(&self, dead: &[u32]) -> Result<(), PackError> {
        let mut state = self.noted.lock();
        for number in dead {
            state.recorded.remove(number);
            state.pending.remove(number);
        }
        let mut noted = floor::read(&self.dir);
        let before = noted.len();
        noted.retain(|number, _| !dead.contains(number));
        if noted.len() == before {
            return Ok(());
        }
        // On a full disk there must be a way to get space back: no note is as good.
        floor::write(&self.dir, &noted).or_else(|_| floor::remove(&self.dir))
    }

    /// Removes what was noted of the packs in `dir`: a new index knows better.
    pub(crate) fn forget_all(dir: &Path) -> Result<(), PackError> {
        floor::remove(dir)
    }

    /// What was noted of the packs in `dir`, and of those that were missing when this was last asked and not
    /// [forgotten](Self::note_missing): the lengths they had at least.
    pub(crate) fn noted(dir: &Path) -> BTreeMap<u32, u64> {
        let mut noted = floor::read_missing(dir);
        for (number, length) in floor::read(dir) {
            let known = noted.entry(number).or_default();
            *known = length.max(*known);
        }
        noted
    }

    /// Remembers which packs are missing or too short, until that has had its consequences.
    pub(crate) fn note_missing(dir: &Path, lengths: &BTreeMap<u32, u64>) -> Result<(), PackError> {
        if lengths.is_empty() { floor::remove_missing(dir) } else { floor::write_missing(dir, lengths) }
    }

    /// Packs that the index did not know any more at an opening, though it had known them.
    pub(crate) fn unknown(dir: &Path) -> Result<Vec<PathBuf>, PackError> {
        let mut unknown = Vec::new();
        for entry in std::fs::read_dir(dir).map_err(at("listing", dir))? {
            let path = entry.map_err(at("listing", dir))?.path();
            if path.extension().is_some_and(|extension| extension == UNKNOWN) {
                unknown.push(path);
            }
        }
        Ok(unknown)
    }

    /// Gives such packs their names back, for an index that is made anew.
    pub(crate) fn readmit(dir: &Path) -> Result<(), PackError> {
        for path in Self::unknown(dir)? {
            let place = path.with_extension("");
            if number_of(&place).is_some() && !place.exists() {
                std::fs::rename(&path, &place).map_err(at("renaming", &path))?;
            }
        }
        Ok(())
    }

    /// The directory they are in.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// How long each pack is by what has been written, durable or not.
    pub(crate) fn written(&self) -> BTreeMap<u32, u64> {
        self.packs.read().values().map(|pack| (pack.number, pack.written.load(Ordering::Acquire))).collect()
    }

    /// Writes down how much of each pack is durable and known to the index, for the next opening to hold the index
    /// against.
    pub(crate) fn note_durable(&self, lengths: &BTreeMap<u32, u64>) -> Result<(), PackError> {
        let _writing = self.noted.lock();
        floor::write(&self.dir, lengths)
    }

    /// Whether there is a pack in `dir`.
    pub(crate) fn any(dir: &Path) -> Result<bool, PackError> {
        match std::fs::read_dir(dir) {
            Ok(mut entries) => Ok(entries.any(|entry| entry.is_ok_and(|entry| number_of(&entry.path()).is_some()))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(at("listing", dir)(error)),
        }
    }

    /// An error, that of a full disk, when less is free than should be left for the index.
    pub(crate) fn check_room(&self) -> Result<(), PackError> {
        let failed = |errno: nix::errno::Errno| at("looking at the filesystem of", &self.dir)(errno.into());
        let stat = nix::sys::statvfs::fstatvfs(&self.directory).map_err(failed)?;
        let free = if nix::unistd::geteuid().is_root() { stat.blocks_free() } else { stat.blocks_available() };
        let bytes = |blocks: u64| blocks.saturating_mul(stat.fragment_size() as u64);
        if bytes(free as u64) < (bytes(stat.blocks() as u64) / ROOM_PART).clamp(ROOM_LEAST, ROOM_MOST) {
            let doing = "leaving the last free space to the index, not adding to";
            return Err(at(doing, &self.dir)(nix::errno::Errno::ENOSPC.into()));
        }
        Ok(())
    }

    fn file(&self, pack: &Pack) -> Result<Arc<File>, PackError> {
        let file = self.files.get_or_insert_with(&pack.number, || {
            let file = match File::open(&pack.path) {
                Ok(file) => Arc::new(file),
                Err(error) if error.kind() == io::ErrorKind::NotFound => self.unlinked(pack)?,
                Err(error) => return Err(at("opening", &pack.path)(error)),
            };
            check_header(&file, pack.number, &pack.path)?;
            Ok(file)
        })?;
        // Deleted since it was looked up: kept here, the file would keep its space.
        if !self.packs.read().contains_key(&pack.number) {
            self.files.remove(&pack.number);
        }
        Ok(file)
    }

    /// The file of a pack that has no name any more, if it is open somewhere.
    fn unlinked(&self, pack: &Pack) -> Result<Arc<File>, PackError> {
        if !self.packs.read().contains_key(&pack.number) {
            return Err(PackError::Gone(pack.number));
        }
        if let Some(file) = self.appended(pack.number) {
            return Ok(file);
        }
        self.note_lost(pack.number, 0);
        Err(PackError::Deleted(pack.path.clone()))
    }

    /// How many packs there are, and the bytes in them.
    pub(crate) fn size(&self) -> (usize, u64) {
        let packs = self.packs.read();
        (packs.len(), packs.values().map(|pack| pack.written.load(Ordering::Acquire)).sum())
    }

    /// The numbers of all packs.
    pub(crate) fn numbers(&self) -> Vec<u32> {
        let mut numbers: Vec<u32> = self.packs.read().keys().copied().collect();
        numbers.sort_unstable();
        numbers
    }

    /// Sees to it that pack `number` gets no more blocks; false when entries for some of its blocks are still to come.
    pub(crate) fn seal(&self, number: u32) -> bool {
        let mut appender = self.open.lock();
        let Some(pack) = self.packs.read().get(&number).cloned() else { return false };
        if pack.landing.load(Ordering::Acquire) > 0 {
            return false;
        }
        appender.open.retain(|_, open| open.pack.number != number);
        true
    }

    /// Whether blocks are still appended to pack `number`.
    pub(crate) fn is_open(&self, number: u32) -> bool {
        self.open.lock().open.values().any(|open| open.pack.number == number)
    }

    /// The size beyond which packs are not filled.
    pub(crate) fn seal_at(&self) -> u64 {
        self.seal_at
    }

    /// Changes what is known of a sealed pack.
    pub(crate) fn note_form(&self, number: u32, form: Form) {
        if let Some(pack) = self.packs.write().get_mut(&number) {
            let (path, written) = (pack.path.clone(), AtomicU64::new(pack.written.load(Ordering::Acquire)));
            *pack = Arc::new(Pack { number, form, path, written, landing: AtomicU64::new(0) });
        }
    }

    /// How long pack `number` is, and its form; None when it is gone.
    pub(crate) fn facts(&self, number: u32) -> Option<(u64, Form)> {
        self.packs.read().get(&number).map(|pack| (pack.written.load(Ordering::Acquire), pack.form))
    }

    /// Deletes pack `number`, which the index must no longer know. Readers that have it open finish. Returns the
    /// length of the file; None when it is gone already.
    pub(crate) fn unlink(&self, number: u32) -> Result<Option<u64>, PackError> {
        let Some(pack) = self.packs.write().remove(&number) else { return Ok(None) };
        self.files.remove(&number);
        self.lost.forget(number);
        self.open.lock().unsynced.remove(&number);
        let deleted = std::fs::metadata(&pack.path).and_then(|metadata| {
            std::fs::remove_file(&pack.path)?;
            Ok(metadata.len())
        });
        match deleted {
            // Somebody else was faster.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Some(0)),
            other => other.map(Some).map_err(at("deleting", &pack.path)),
        }
    }

    /// The table of committed lengths.
    pub(crate) fn lengths(&self) -> Table {
        self.lengths
    }

    /// The key of pack `number` in the tables about packs.
    pub(crate) fn key(number: u32) -> [u8; 4] {
        number.to_be_bytes()
    }
}

impl DataFiles for Packs {
    fn make_durable(&self) -> io::Result<Vec<DataRow>> {
        // Lengths are taken before the sync: what is appended during it belongs to the next one.
        let unsynced: Vec<(OpenPack, u64)> = {
            let mut appender = self.open.lock();
            self.put_back_unsynced(&mut appender).map_err(io::Error::other)?;
            let unsynced = std::mem::take(&mut appender.unsynced);
            let with_length = |open: OpenPack| {
                let written = open.pack.written.load(Ordering::Acquire);
                (open, written)
            };
            unsynced.into_values().map(with_length).collect()
        };
        let mut rows = Vec::with_capacity(unsynced.len());
        for (open, written) in &unsynced {
            open.file.sync_data()?;
            rows.push(DataRow {
                table: self.lengths,
                key: Bytes::copy_from_slice(&Self::key(open.pack.number)),
                value: Bytes::copy_from_slice(&written.to_le_bytes()),
            });
        }
        let begun = self.created.swap(false, Ordering::AcqRel);
        if begun {
            self.directory.sync_all()?;
        }
        let mut noted = self.noted.lock();
        noted.begun |= begun;
        noted.pending.extend(unsynced.iter().map(|(open, written)| (open.pack.number, *written)));
        Ok(rows)
    }

    fn recorded(&self) {
        let mut noted = self.noted.lock();
        let mut pending = std::mem::take(&mut noted.pending);
        noted.recorded.append(&mut pending);
        if std::mem::take(&mut noted.begun)
            && let Err(error) = floor::write(&self.dir, &noted.recorded)
        {
            tracing::warn!(error = &error as &dyn std::error::Error, "no note of a new pack was left");
        }
    }
}

fn path_of(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("{number:08x}.pack"))
}

fn number_of(path: &Path) -> Option<u32> {
    let stem = path.file_name()?.to_str()?.strip_suffix(".pack")?;
    let number = u32::from_str_radix(stem, 16).ok()?;
    (format!("{number:08x}") == stem).then_some(number)
}

fn header(number: u32) -> [u8; FILE_HEADER] {
    let mut header = [0; FILE_HEADER];
    header[0..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&PACK_VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&number.to_le_bytes());
    let checksum = xxh3_64(&header[..24]);
    header[24..32].copy_from_slice(&checksum.to_le_bytes());
    header
}

fn check_header(file: &File, number: u32, path: &Path) -> Result<(), PackError> {
    let mut found = [0; FILE_HEADER];
    match file.read_exact_at(&mut found, 0) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(PackError::Header(path.to_owned())),
        read => read.map_err(at("reading the header of", path))?,
    }
    if found == header(number) {
        return Ok(());
    }
    let mut checksum = [0; 8];
    checksum.copy_from_slice(&found[24..32]);
    let version = u32::from_le_bytes([found[8], found[9], found[10], found[11]]);
    if found[0..8] == MAGIC && xxh3_64(&found[..24]).to_le_bytes() == checksum && version != PACK_VERSION {
        return Err(PackError::Version { path: path.to_owned(), version });
    }
    Err(PackError::Header(path.to_owned()))
}

#[cfg(test)]
mod tests;
