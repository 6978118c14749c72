//! Temporary roots in files, as stock Nix has them: `<state>/temproots/<process>`, which its owner holds locked, with
//! `<full path>\0` for each root. One that can be locked belongs to a dead process and goes.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};

use nix_compat::store_path::{StoreDir, StorePath};

use crate::error::{Error, Result};

/// Bytes read of one file.
const MAX_FILE: u64 = 64 << 20;
/// What is written into a file that is given up, so that an owner who opened it meanwhile makes another.
const GIVEN_UP: &[u8] = b"d";

/// The file of one set of roots. It comes with the first root and goes with the set.
#[derive(Debug, Default)]
pub(super) struct RootsFile(Option<(File, PathBuf)>);

impl RootsFile {
    /// Appends a root (full path). Failures are logged only: our own collector does not go by the file.
    pub(super) fn append(&mut self, dir: &Path, path: &str) {
        let written = self.open(dir).and_then(|mut file| file.write_all(&[path.as_bytes(), b"\0"].concat()));
        if let Err(error) = written {
            tracing::warn!(path, %error, "cannot write a temporary root where stock tools look");
        }
    }

    fn open(&mut self, dir: &Path) -> io::Result<&File> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let opened = match self.0.take() {
            Some(opened) => opened,
            None => {
                // One process has many sets; stock reads the number at the front as the process.
                let name = format!("{}{}", own_prefix(), NEXT.fetch_add(1, Ordering::Relaxed));
                let path = dir.join(name);
                fs::create_dir_all(dir)?;
                let file = File::create(&path)?;
                file.lock()?;
                (file, path)
            }
        };
        Ok(&self.0.insert(opened).0)
    }
}

impl Drop for RootsFile {
    fn drop(&mut self) {
        if let Some((_locked, path)) = &self.0 {
            let _ = fs::remove_file(path);
        }
    }
}

/// What the names of this process's files begin with.
fn own_prefix() -> String {
    format!("{}-", process::id())
}

/// The temporary roots of other processes, with the name of each one's file. Files of dead processes are removed, and
/// `stale` is told.
///
/// # Errors
/// When the directory or a file in it cannot be read: a collection must not go on without it.
pub(crate) fn others(
    dir: &Path,
    store_dir: &StoreDir,
    stale: &mut dyn FnMut(PathBuf),
) -> Result<Vec<(String, StorePath)>> {
    let mut roots = Vec::new();
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(roots),
        entries => entries.map_err(|e| Error::file("read", dir, e))?,
    };
    for entry in entries {
        let entry = entry.map_err(|e| Error::file("read", dir, e))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with('.') || name.starts_with(&own_prefix()) {
            continue;
        }
        let path = entry.path();
        let text = match read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            text => text.map_err(|e| Error::file("read", &path, e))?,
        };
        if text.is_none() {
            stale(path);
        }
        for root in text.iter().flat_map(|text| text.split(|byte| *byte == 0)) {
            if let Some((path, _)) = std::str::from_utf8(root).ok().and_then(|root| store_dir.to_store_path(root).ok())
            {
                roots.push((name.clone(), path));
            }
        }
    }
    Ok(roots)
}

/// What a file holds, unless its process is dead; then it is removed.
fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let mut file = File::options().read(true).write(true).open(path)?;
    match file.try_lock() {
        Ok(()) => {
            fs::remove_file(path)?;
            file.write_all(GIVEN_UP)?;
            Ok(None)
        }
        Err(TryLockError::WouldBlock) => {
            let mut text = Vec::new();
            (&mut file).take(MAX_FILE).read_to_end(&mut text)?;
            Ok(Some(text))
        }
        Err(TryLockError::Error(error)) => Err(error),
    }
}
