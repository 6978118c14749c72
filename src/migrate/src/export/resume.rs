//! An export that was interrupted goes on where it was.
//!
//! As long as an export is not finished, its directory has a note of what is exported. A path's files are written under
//! another name and renamed when they are all there. After a crash of the machine a file may lack its contents all the
//! same, so **what was written before is kept only if it has the hash of the path's NAR.**

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix_compat::store_path::StorePath;
use parking_lot::Mutex;
use store::Store;
use store::nar_digest::NarDigest;

use super::tree::Digesting;
use super::{Options, in_parallel};
use crate::adopt::remove_tree;
use crate::error::{Error, Result};
use crate::progress::{Progress, Stage};

/// The note in the directory of an export.
const NOTE: &str = ".castored-export";
/// Its name until it is written.
const NEW_NOTE: &str = ".castored-export.new";
/// What names of paths that are being written begin with. No store path does.
const UNFINISHED: &str = ".castored-export-";

/// An export's directory until it is finished.
pub(super) struct Unfinished {
    root: PathBuf,
    /// Whether there was a beginning.
    pub(super) resumed: bool,
}

impl Unfinished {
    /// Takes an empty directory, or one with a beginning of the same export.
    pub(super) fn begin(store: &Store, root: &Path, options: &Options) -> Result<Self> {
        let note = note(store, options);
        let place = root.join(NOTE);
        let counts = |entry: io::Result<fs::DirEntry>| entry.is_ok_and(|entry| entry.file_name() != NEW_NOTE);
        let resumed = match fs::read_dir(root).map(|mut entries| entries.any(counts)) {
            Ok(true) => match fs::read(&place) {
                Ok(found) if found == note.as_bytes() => true,
                Ok(_) => return Err(Error::OtherExport(root.to_owned())),
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(Error::NotEmpty(root.to_owned())),
                Err(e) => return Err(Error::file("read", &place)(e)),
            },
            Ok(false) => false,
            Err(e) if e.kind() == io::ErrorKind::NotFound => false,
            Err(e) => return Err(Error::file("read", root)(e)),
        };
        if !resumed {
            fs::create_dir_all(root).map_err(Error::file("create", root))?;
            // In one step: half a note would be another export's.
            let new = root.join(NEW_NOTE);
            let written = File::create(&new).and_then(|mut file| {
                file.write_all(note.as_bytes())?;
                file.sync_all()
            });
            written.and_then(|()| fs::rename(&new, &place)).map_err(Error::file("write", &place))?;
        }
        Ok(Self { root: root.to_owned(), resumed })
    }

    /// It is all there, on disk.
    pub(super) fn finish(self) -> Result<()> {
        let place = self.root.join(NOTE);
        fs::remove_file(&place).map_err(Error::file("remove", &place))
    }
}

/// What is exported, and how.
fn note(store: &Store, options: &Options) -> String {
    let mut paths: Vec<String> = options.paths.iter().map(|path| store.store_dir().display(path)).collect();
    paths.sort();
    let links = if options.optimise { "linked" } else { "plain" };
    format!("castored export 1\n{}\n{links}\n{}\n", store.store_dir().as_str(), paths.join("\n"))
}

/// The name that a path has while it is written.
pub(super) fn unfinished(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(UNFINISHED);
    name.push(path.file_name().unwrap_or_default());
    path.with_file_name(name)
}

/// Looks through what was written before: keeps the paths that are whole and wanted, which it answers, and removes the rest.
pub(super) fn keep_whole(
    store: &Store,
    store_dir: &Path,
    wanted: &BTreeSet<StorePath>,
    threads: NonZeroUsize,
    progress: &dyn Progress,
) -> Result<BTreeSet<StorePath>> {
    let mut there = BTreeSet::new();
    for entry in fs::read_dir(store_dir).map_err(Error::file("read", store_dir))? {
        let path = entry.map_err(Error::file("read", store_dir))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        match StorePath::from_base_name(name) {
            _ if name == ".links" => {}
            Ok(path) if wanted.contains(&path) => drop(there.insert(path)),
            _ => remove_tree(&path)?,
        }
    }
    let mut bytes = 0;
    for path in &there {
        bytes += store.valid_entry(path)?.info.nar_size;
    }
    progress.begin(Stage::Verifying, there.len() as u64, bytes);
    let dir = File::open(store_dir).map_err(Error::file("open", store_dir))?;
    let whole = Mutex::new(BTreeSet::new());
    in_parallel(&there, threads, |path| {
        let info = store.valid_entry(path)?.info;
        let mut digesting = Digesting(NarDigest::new(None, None));
        let dumped = build::dump_tree(dir.as_fd(), Path::new(path.base_name()), &mut digesting);
        if dumped.is_ok() && digesting.0.finish().nar_hash == info.nar_hash {
            whole.lock().insert(path.clone());
        } else {
            remove_tree(&store_dir.join(path.base_name()))?;
        }
        progress.bytes(info.nar_size);
        progress.path();
        Ok(())
    })?;
    // What is left of equal files is right where a path that is whole has it.
    let links = store_dir.join(".links");
    for entry in fs::read_dir(&links).map_err(Error::file("read", &links))? {
        let link = entry.map_err(Error::file("read", &links))?.path();
        if fs::symlink_metadata(&link).map_err(Error::file("examine", &link))?.nlink() == 1 {
            fs::remove_file(&link).map_err(Error::file("remove", &link))?;
        }
    }
    Ok(whole.into_inner())
}
