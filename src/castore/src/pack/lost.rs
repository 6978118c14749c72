//! Files that somebody else deleted or cut short while the store has them open.
//!
//! A file that was deleted lives on as long as a descriptor has it: what is appended is put back in its place before the
//! index names it ([`Packs::put_back`]), and a repair does the same for the others. Where no descriptor is left, and for the end
//! that was cut off, a repair puts zeros ([`Packs::restore_file`]): no block is there, as if every bit of it were damaged, and
//! the store opens again. What stood there is known as lost until the store is closed.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::{Appender, Pack, PackError, Packs, Place, at, header};

/// Ends the name of a file that is about to take the place of a deleted one.
pub(super) const COPY: &str = "copy";

/// Up to where the files of packs have what was written.
#[derive(Default)]
pub(super) struct LostParts {
    /// Spares the lock when nothing is lost.
    any: AtomicBool,
    ends: Mutex<HashMap<u32, u64>>,
}

impl LostParts {
    fn note(&self, pack: u32, end: u64) {
        let mut ends = self.ends.lock();
        let known = ends.entry(pack).or_insert(end);
        *known = end.min(*known);
        self.any.store(true, Ordering::Release);
    }

    pub(super) fn forget(&self, pack: u32) {
        if self.any.load(Ordering::Acquire) {
            self.ends.lock().remove(&pack);
        }
    }
}

/// Whether `file` is the one that is found under `path`. When that cannot be found out it is taken for granted.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(ours), Ok(theirs)) => (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()),
        (_, Err(error)) => error.kind() != io::ErrorKind::NotFound,
        (Err(_), _) => true,
    }
}

impl Packs {
    /// Whether the block at `place` is known to be in no file any more.
    pub(crate) fn is_lost(&self, place: Place) -> bool {
        let end = place.offset + u64::from(place.length);
        self.lost.any.load(Ordering::Acquire) && self.lost.ends.lock().get(&place.pack).is_some_and(|&lost| lost < end)
    }

    /// From `end` on the file of pack `number` is lost. Nothing is appended to it any more.
    pub(super) fn note_lost(&self, number: u32, end: u64) {
        self.open.lock().open.retain(|_, open| open.pack.number != number);
        self.lost.note(number, end);
    }

    /// Whether the file of pack `number` is where it belongs and as long as it was written.
    ///
    /// # Errors
    /// [`PackError::Deleted`], [`PackError::Cut`], [`PackError::Gone`], and when the file cannot be looked at.
    pub(crate) fn check_file(&self, number: u32) -> Result<(), PackError> {
        let pack = self.packs.read().get(&number).cloned().ok_or(PackError::Gone(number))?;
        let written = pack.written.load(Ordering::Acquire);
        let deleted = || match self.packs.read().contains_key(&number) {
            true => PackError::Deleted(pack.path.clone()),
            false => PackError::Gone(number),
        };
        let found = match std::fs::metadata(&pack.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(deleted()),
            found => found.map_err(at("looking at", &pack.path))?,
        };
        if self.appended(number).is_some_and(|ours| !is_at(&ours, &pack.path)) {
            return Err(deleted());
        }
        if found.len() < written {
            return Err(PackError::Cut { path: pack.path.clone(), actual: found.len(), written });
        }
        // Somebody put it back: from now on it is that file which is read.
        if self.files.get(&number).is_some_and(|ours| !is_at(&ours, &pack.path)) {
            self.files.remove(&number);
        }
        Ok(())
    }

    /// The file of pack `number` as those who append have it.
    pub(super) fn appended(&self, number: u32) -> Option<Arc<File>> {
        self.open.lock().file_of(number)
    }

    /// Sees to it that the file of pack `number` is there, as long as it was. Whether all of its contents are there as well.
    /// Durable on return.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn restore_file(&self, number: u32) -> Result<bool, PackError> {
        match self.check_file(number) {
            Err(PackError::Deleted(path)) => {
                let pack = self.packs.read().get(&number).cloned().ok_or(PackError::Gone(number))?;
                if self.put_back(&mut self.open.lock(), &pack)? {
                    self.lost.forget(number);
                    return self.sync_directory().map(|()| true);
                }
                self.note_lost(number, 0);
                let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path);
                let file = file.map_err(at("creating", &path))?;
                file.write_all_at(&header(number), 0).map_err(at("writing the header of", &path))?;
                Self::lengthen(&file, &pack)?;
                self.files.remove(&number);
                self.sync_directory().map(|()| false)
            }
            Err(PackError::Cut { path, actual, .. }) => {
                let pack = self.packs.read().get(&number).cloned().ok_or(PackError::Gone(number))?;
                self.note_lost(number, actual);
                Self::lengthen(&OpenOptions::new().write(true).open(&path).map_err(at("opening", &path))?, &pack)?;
                Ok(false)
            }
            other => other.map(|()| true),
        }
    }

    /// Fills up with zeros, which take no space on the disk. Nothing is appended meanwhile.
    fn lengthen(file: &File, pack: &Pack) -> Result<(), PackError> {
        let written = pack.written.load(Ordering::Acquire);
        let length = file.metadata().map_err(at("looking at", &pack.path))?.len();
        if length < written {
            file.set_len(written).map_err(at("lengthening", &pack.path))?;
        }
        file.sync_all().map_err(at("syncing", &pack.path))
    }

    fn sync_directory(&self) -> Result<(), PackError> {
        self.directory.sync_all().map_err(at("syncing", &self.dir))
    }

    /// Writes the file of a pack anew from a descriptor, if there is one. The new file is durable on return, but for its name.
    pub(super) fn put_back(&self, appender: &mut Appender, pack: &Pack) -> Result<bool, PackError> {
        let Some(old) = appender.file_of(pack.number).or_else(|| self.files.get(&pack.number)) else {
            return Ok(false);
        };
        let written = pack.written.load(Ordering::Acquire);
        if old.metadata().map_err(at("looking at", &pack.path))?.len() < written {
            // It was cut short as well.
            return Ok(false);
        }
        let copy = pack.path.with_extension(format!("pack.{COPY}"));
        let copied = || -> io::Result<File> {
            let mut new = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&copy)?;
            // Nobody uses the descriptor's position.
            (&*old).seek(SeekFrom::Start(0))?;
            io::copy(&mut (&*old).take(written), &mut new)?;
            new.sync_all()?;
            std::fs::rename(&copy, &pack.path)?;
            Ok(new)
        };
        let new = Arc::new(
            copied()
                .inspect_err(|_| drop(std::fs::remove_file(&copy)))
                .map_err(at("writing the deleted file anew:", &pack.path))?,
        );
        let opens = appender.open.values_mut().chain(appender.unsynced.values_mut());
        opens.filter(|open| open.pack.number == pack.number).for_each(|open| open.file = Arc::clone(&new));
        self.files.remove(&pack.number);
        self.created.store(true, Ordering::Release);
        tracing::error!(pack = %pack.path.display(), "a pack was deleted by somebody else; it was open, and is put back");
        Ok(true)
    }

    /// Puts back what is appended to and was deleted, before the index says that it is there.
    pub(super) fn put_back_unsynced(&self, appender: &mut Appender) -> Result<(), PackError> {
        let gone = |open: &&super::OpenPack| !is_at(&open.file, &open.pack.path);
        let deleted: Vec<Arc<Pack>> =
            appender.unsynced.values().filter(gone).map(|open| Arc::clone(&open.pack)).collect();
        deleted.iter().try_for_each(|pack| match self.put_back(appender, pack)? {
            true => Ok(()),
            false => Err(PackError::Deleted(pack.path.clone())),
        })
    }
}
