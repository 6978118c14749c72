//! A NAR becomes files.

use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::Path;

use nix_compat::nar::{NarEvent, NarReader};

use super::error::{Error, On};

/// Unpacks an archive to `root`, where nothing may be yet. Names in an archive are single names, none twice, and every
/// file is new; so nothing outside of `root` is touched.
pub(super) fn unpack(archive: impl Read, root: &Path) -> Result<(), Error> {
    let mut reader = NarReader::new(archive);
    let mut path = root.to_owned();
    loop {
        match reader.next()? {
            NarEvent::Regular { executable, .. } => {
                let mode = if executable { 0o777 } else { 0o666 };
                let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&path);
                let mut file = file.on("create", &path)?;
                io::copy(&mut reader.contents(), &mut file).on("unpack", &path)?;
                leave(&mut path, root);
            }
            NarEvent::Symlink { target } => {
                symlink(OsStr::from_bytes(&target), &path).on("make the link", &path)?;
                leave(&mut path, root);
            }
            NarEvent::EnterDirectory => fs::create_dir(&path).on("make the directory", &path)?,
            NarEvent::Entry { name } => path.push(OsStr::from_bytes(&name)),
            NarEvent::LeaveDirectory => leave(&mut path, root),
            NarEvent::End => return Ok(()),
        }
    }
}

/// Takes the name of a node that is complete away, but never that of the root.
fn leave(path: &mut std::path::PathBuf, root: &Path) {
    if path != root {
        path.pop();
    }
}
