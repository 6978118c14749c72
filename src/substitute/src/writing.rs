//! Writing to a binary cache, in a directory or on a server, as stock does: the NAR's file first, under the hash of what is
//! in it, then the narinfo that names it. Everything here blocks.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fetch::Upload;
use nix_compat::hash::{Algorithm, Hasher};
use nix_compat::narinfo::{Compression, NarInfo};
use nix_compat::path_info::PathInfo;
use nix_compat::realisation::{DrvOutput, Realisation};
use nix_compat::store_path::{StoreDir, StorePath};
use tempfile::NamedTempFile;

use crate::binary_cache::{BinaryCache, CACHE_INFO, REALISATIONS, realisation_file};
use crate::error::Error;
use crate::location::{Location, Place};
use crate::origin::Origin;

/// xz, where the URL says nothing: the encoder takes 32 MiB, while that of xz's own default takes 94.
const XZ_LEVEL: u32 = 3;
/// xz's strongest.
const MAX_XZ_LEVEL: u32 = 9;
/// Types by which servers tell files to others.
const NAR_TYPE: &str = "application/x-nix-nar";
const NARINFO_TYPE: &str = "text/x-nix-narinfo";
const CACHE_INFO_TYPE: &str = "text/x-nix-cache-info";
const REALISATION_TYPE: &str = "application/json";
/// Of what is written into a directory.
const FILE_MODE: u32 = 0o644;
/// How the names of files begin that are no part of a directory yet.
const DRAFT: &str = ".castored-";
/// A draft that nobody has locked for this long was left by a process that died.
const ABANDONED_AFTER: Duration = Duration::from_secs(60);

/// A binary cache that is written to.
pub struct CacheWriter {
    cache: BinaryCache,
    compression: Compression,
    level: Option<i32>,
    /// Where a NAR is compressed before its length and hash are known.
    scratch: PathBuf,
}

/// A file that is no part of a cache yet.
enum Draft {
    /// For a server: without a name, so that nothing is left of it whenever the process dies.
    Unnamed(File),
    /// For a directory: in it, so that it can be renamed.
    Named(NamedTempFile),
}

/// What is written is hashed and counted.
struct Measured<'a> {
    file: &'a File,
    hasher: Hasher,
    length: u64,
}

impl Write for Measured<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        self.length += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl CacheWriter {
    /// The cache at a URL such as `https://host/path?compression=zstd&compression-level=9`; compressed by xz unless it says
    /// otherwise. What goes to a server lies in `scratch` before, a file at a time.
    ///
    /// # Errors
    /// For a URL of another kind, or with a compression that is not written.
    pub fn new(url: &str, client: fetch::Client, scratch: &Path) -> Result<Self, Error> {
        let location = Location::parse(url)?;
        if !matches!(location.place, Place::Directory(_) | Place::Server(_)) {
            return Err(Error::UnknownStore(url.to_owned()));
        }
        let (mut compression, mut level) = (Compression::Xz, None);
        let query = url.split_once('?').map_or("", |(_, query)| query);
        for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
            let wrong =
                || Error::Parameter { url: location.uri.clone(), name: name.to_string(), value: value.to_string() };
            match &*name {
                "compression" => {
                    let written = [Compression::None, Compression::Xz, Compression::Zstd];
                    compression = value.parse().ok().filter(|c| written.contains(c)).ok_or_else(wrong)?;
                }
                "compression-level" => level = Some(value.parse().map_err(|_| wrong())?),
                _ => {}
            }
        }
        let cache = BinaryCache::new(location.uri, location.place, client);
        Ok(Self { cache, compression, level, scratch: scratch.to_owned() })
    }

    /// Makes sure that it is a cache for this store directory; one that says nothing of itself becomes one.
    ///
    /// # Errors
    /// [`Error::StoreDir`] when it is for another, and failures to read or write it.
    pub fn open(&self, dir: &StoreDir) -> Result<(), Error> {
        if let Place::Directory(directory) = self.cache.place() {
            for directory in [directory.clone(), directory.join("nar"), directory.join(REALISATIONS)] {
                remove_abandoned(&directory);
            }
        }
        match self.cache.info_if_there(dir)? {
            Some(_) => Ok(()),
            None => self.put_text(CACHE_INFO, &format!("StoreDir: {}\n", dir.as_str()), CACHE_INFO_TYPE),
        }
    }

    /// Whether it has a path.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub fn has(&self, dir: &StoreDir, path: &StorePath) -> Result<bool, Error> {
        Ok(self.cache.narinfo(dir, path)?.is_some())
    }

    /// Adds a path, whose NAR `nar` writes. What it refers to should be there.
    ///
    /// # Errors
    /// Failures of `nar`, of the disk, of the server.
    pub fn add(
        &self,
        dir: &StoreDir,
        info: PathInfo,
        nar: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<(), Error> {
        let compressing = |source| Error::Compress { path: dir.display(&info.path), source };
        let draft = self.draft()?;
        let mut out = Measured { file: draft.file(), hasher: Hasher::new(Algorithm::Sha256), length: 0 };
        self.compress(&mut out, nar).map_err(compressing)?;
        let (hash, length) = (out.hasher.finalize(), out.length);
        let name = format!("nar/{}.nar{}", hash.to_nix32(), self.compression.file_ending());
        self.place(draft, &name)?;
        let path = info.path.clone();
        // Digits and what stands between them are a URL.
        let mut narinfo = NarInfo::new(info, &*name, self.compression)
            .map_err(|source| Error::NarInfo { file: self.cache.file(&name), source })?;
        narinfo.file_hash = Some(hash);
        narinfo.file_size = Some(length);
        self.put_text(&format!("{}.narinfo", path.hash_part()), &narinfo.to_text(dir), NARINFO_TYPE)
    }

    /// What it says an output turned out to be.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub fn realisation(&self, id: &DrvOutput) -> Result<Option<Realisation>, Error> {
        Origin::realisation(&self.cache, id)
    }

    /// Says what an output turned out to be, in the place of what was said before. The path should be there.
    ///
    /// # Errors
    /// Failures of the disk, of the server.
    pub fn put_realisation(&self, realisation: &Realisation) -> Result<(), Error> {
        self.put_text(&realisation_file(&realisation.id), &realisation.to_json(), REALISATION_TYPE)
    }

    fn compress(&self, out: &mut Measured<'_>, nar: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
        match self.compression {
            Compression::Zstd => {
                let mut encoder = zstd::stream::write::Encoder::new(out, self.level.unwrap_or_default())?;
                nar(&mut encoder)?;
                encoder.finish().map(drop)
            }
            Compression::Xz => {
                let level = self.level.and_then(|level| u32::try_from(level).ok()).unwrap_or(XZ_LEVEL);
                let mut encoder = liblzma::write::XzEncoder::new(out, level.min(MAX_XZ_LEVEL));
                nar(&mut encoder)?;
                encoder.finish().map(drop)
            }
            _ => {
                let mut out = io::BufWriter::new(out);
                nar(&mut out)?;
                out.flush()
            }
        }
    }

    fn draft(&self) -> Result<Draft, Error> {
        match self.cache.place() {
            Place::Directory(directory) => named(&directory.join("nar")).map(Draft::Named),
            _ => {
                let unnamed = fs::create_dir_all(&self.scratch).and_then(|()| tempfile::tempfile_in(&self.scratch));
                unnamed.map(Draft::Unnamed).map_err(|source| Error::Write { file: self.scratch.clone(), source })
            }
        }
    }

    fn place(&self, draft: Draft, name: &str) -> Result<(), Error> {
        match (draft, self.cache.place()) {
            (Draft::Named(file), Place::Directory(directory)) => rename(file, &directory.join(name)),
            (draft, _) => self.cache.put(name, &Upload::File(draft.file()), NAR_TYPE),
        }
    }

    fn put_text(&self, name: &str, text: &str, content_type: &str) -> Result<(), Error> {
        let Place::Directory(directory) = self.cache.place() else {
            return self.cache.put(name, &Upload::Text(text), content_type);
        };
        let place = directory.join(name);
        let mut file = named(place.parent().unwrap_or(directory))?;
        file.write_all(text.as_bytes()).map_err(|source| Error::Write { file: place.clone(), source })?;
        rename(file, &place)
    }
}

impl Draft {
    fn file(&self) -> &File {
        match self {
            Self::Unnamed(file) => file,
            Self::Named(file) => file.as_file(),
        }
    }
}

/// Removes drafts whose writers died. That of a process that lives, on whatever machine, is locked.
fn remove_abandoned(directory: &Path) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten().filter(|entry| entry.file_name().as_encoded_bytes().starts_with(DRAFT.as_bytes())) {
        let is_old = |file: &File| {
            let changed = file.metadata().and_then(|metadata| metadata.modified());
            changed.is_ok_and(|changed| changed.elapsed().is_ok_and(|age| age >= ABANDONED_AFTER))
        };
        let Ok(file) = File::open(entry.path()) else { continue };
        // It is looked at while it is locked: its writer may just have been about to lock it.
        if file.try_lock().is_ok() && is_old(&file) {
            match fs::remove_file(entry.path()) {
                Ok(()) => tracing::info!(file = %entry.path().display(), "removed what an upload that died has left"),
                Err(error) => {
                    tracing::warn!(file = %entry.path().display(), %error, "cannot remove what an upload has left")
                }
            }
        }
    }
}

/// A file in a directory, which is made if it is not there. It is locked as long as it is open.
fn named(directory: &Path) -> Result<NamedTempFile, Error> {
    let permissions = fs::Permissions::from_mode(FILE_MODE);
    let make = || {
        fs::create_dir_all(directory)?;
        let file = tempfile::Builder::new().prefix(DRAFT).permissions(permissions).tempfile_in(directory)?;
        // Where there are no locks, nothing is removed within a minute of its last change.
        let _ = file.as_file().try_lock();
        Ok(file)
    };
    make().map_err(|source| Error::Write { file: directory.to_owned(), source })
}

/// Gives it its name, under which nobody sees less than all of it, not even after a crash.
fn rename(file: NamedTempFile, name: &Path) -> Result<(), Error> {
    let renamed = file.as_file().sync_all().and_then(|()| Ok(file.persist(name).map(drop)?));
    renamed.map_err(|source| Error::Write { file: name.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::SystemTime;

    use fetch::{Download, DownloadOptions};
    use nix_compat::conf::Settings;

    use super::*;

    #[test]
    fn what_dead_uploads_have_left_is_removed_by_the_next_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let nar = dir.path().join("nar");
        fs::create_dir(&nar).unwrap();
        let old = |path: &Path| {
            let file = File::create(path).unwrap();
            file.set_modified(SystemTime::now() - 2 * ABANDONED_AFTER).unwrap();
            file
        };
        old(&dir.path().join(".castored-left"));
        old(&nar.join(".castored-left"));
        old(&nar.join("0123.nar.xz"));
        let living = old(&nar.join(".castored-living"));
        living.try_lock().unwrap();
        let fresh = named(&nar).unwrap();
        File::create(nar.join(".castored-fresh")).unwrap();
        let client =
            fetch::Client::new(Arc::new(Download::gather(&DownloadOptions::new(&Settings::default()), &|_| None)));
        let url = format!("file://{}", dir.path().display());
        let writer = CacheWriter::new(&url, client, Path::new("/nowhere")).unwrap();
        writer.open(&StoreDir::default()).unwrap();
        let names = |directory: &Path| -> Vec<String> {
            let entries = fs::read_dir(directory).unwrap();
            let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        assert_eq!(names(dir.path()), ["nar", "nix-cache-info"]);
        let fresh = fresh.path().file_name().unwrap().to_str().unwrap();
        let mut expected = [fresh, ".castored-fresh", ".castored-living", "0123.nar.xz"];
        expected.sort();
        assert_eq!(names(&nar), expected);
    }
}
