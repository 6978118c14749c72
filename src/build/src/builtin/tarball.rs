//! A tar archive becomes files, all of them below one directory.

use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::{Component, Path, PathBuf};

use tar::{Archive, Entry, EntryType};

use super::error::{Error, On};

/// Bits of a mode of which one makes a file executable.
const EXECUTABLE: u32 = 0o111;

/// Unpacks an archive into the directory `root`, which belongs to nobody else.
///
/// No entry can leave it: names with `..` are an error, a leading `/` is passed over, and nothing is ever reached through
/// a symlink, so that it does not matter where those of the archive point. Of owners, times and modes nothing is taken
/// but whether a file is executable. A later entry takes the place of an earlier one.
pub(super) fn unpack(archive: impl Read, root: &Path) -> Result<(), Error> {
    let mut archive = Archive::new(archive);
    for entry in archive.entries().map_err(Error::Tar)? {
        unpack_entry(&mut entry.map_err(Error::Tar)?, root)?;
    }
    Ok(())
}

fn unpack_entry(entry: &mut Entry<'_, impl Read>, root: &Path) -> Result<(), Error> {
    let kind = entry.header().entry_type();
    if matches!(kind, EntryType::XGlobalHeader) {
        return Ok(());
    }
    let name = entry.path().map_err(Error::Tar)?.into_owned();
    let parts = parts(&name)?;
    let Some((last, parents)) = parts.split_last() else { return Ok(()) };
    let path = directory(root, parents)?.join(last);
    match kind {
        EntryType::Directory => {
            directory(root, &parts)?;
        }
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            remove(&path)?;
            let executable = entry.header().mode().map_err(Error::Tar)? & EXECUTABLE != 0;
            let mode = if executable { 0o777 } else { 0o666 };
            let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&path);
            io::copy(entry, &mut file.on("create", &path)?).on("unpack", &path)?;
        }
        EntryType::Symlink => {
            remove(&path)?;
            let target = entry.link_name().map_err(Error::Tar)?.ok_or_else(|| Error::TarLink(name.clone()))?;
            symlink(&target, &path).on("make the link", &path)?;
        }
        EntryType::Link => {
            let target = entry.link_name().map_err(Error::Tar)?.ok_or_else(|| Error::TarLink(name.clone()))?;
            let target = self::parts(&target)?;
            let Some((last, parents)) = target.split_last() else { return Err(Error::TarLink(name)) };
            let target = directory(root, parents)?.join(last);
            if target != path {
                remove(&path)?;
                fs::hard_link(&target, &path).on("make the link", &path)?;
            }
        }
        _ => return Err(Error::TarKind(name)),
    }
    Ok(())
}

/// The parts of a name in an archive.
fn parts(name: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut parts = Vec::new();
    for component in name.components() {
        match component {
            Component::Normal(part) => parts.push(part.into()),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return Err(Error::TarName(name.to_owned())),
        }
    }
    Ok(parts)
}

/// Makes directories inside each other, as far as they are not there, and never follows a symlink.
fn directory(root: &Path, parts: &[PathBuf]) -> Result<PathBuf, Error> {
    let mut path = root.to_owned();
    for part in parts {
        path.push(part);
        match fs::symlink_metadata(&path) {
            Ok(found) if found.is_dir() => {}
            Ok(_) => return Err(Error::TarName(path)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => fs::create_dir(&path).on("make the directory", &path)?,
            Err(e) => return Err(e).on("look at", &path),
        }
    }
    Ok(path)
}

/// Removes the file or link that an entry takes the place of.
fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e).on("replace", path),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use tar::{Builder, Header};

    use super::*;

    /// One entry: its kind, name, link target or contents, and mode. Names are written as they are, however wrong.
    fn append(builder: &mut Builder<Vec<u8>>, kind: EntryType, name: &str, text: &str, mode: u32) {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        let contents = if kind.is_file() { text } else { "" };
        header.as_old_mut().linkname[..text.len().min(100)].copy_from_slice(&text.as_bytes()[..text.len().min(100)]);
        header.set_size(contents.len() as u64);
        header.set_cksum();
        builder.append(&header, contents.as_bytes()).unwrap();
    }

    fn unpacked(entries: &[(EntryType, &str, &str, u32)]) -> (tempfile::TempDir, Result<(), Error>) {
        let mut builder = Builder::new(Vec::new());
        for (kind, name, text, mode) in entries {
            append(&mut builder, *kind, name, text, *mode);
        }
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir(&root).unwrap();
        fs::write(dir.path().join("outside"), "untouched").unwrap();
        let result = unpack(builder.into_inner().unwrap().as_slice(), &root);
        assert_eq!(fs::read_to_string(dir.path().join("outside")).unwrap(), "untouched");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "something was made outside");
        (dir, result)
    }

    #[test]
    fn all_kinds_of_files() {
        let (dir, result) = unpacked(&[
            (EntryType::Directory, "./x/closed", "", 0o555),
            (EntryType::Regular, "x/closed/file", "one", 0o444),
            (EntryType::Regular, "/x/closed/file", "two", 0o644),
            (EntryType::Regular, "x/deep/program", "#!", 0o4755),
            (EntryType::Link, "x/again", "x/deep/program", 0),
            (EntryType::Symlink, "x/link", "/etc/../passwd", 0),
        ]);
        result.unwrap();
        let root = dir.path().join("root/x");
        assert_eq!(fs::read_to_string(root.join("closed/file")).unwrap(), "two");
        assert_eq!(fs::read_link(root.join("link")).unwrap(), Path::new("/etc/../passwd"));
        let mode = |name: &str| fs::metadata(root.join(name)).unwrap().permissions().mode();
        assert_eq!(mode("again") & 0o111, 0o111);
        assert_eq!(mode("deep/program") & 0o7000, 0);
        assert_eq!(mode("closed/file") & 0o111, 0);
    }

    #[test]
    fn nothing_leaves_the_directory() {
        for entries in [
            &[(EntryType::Regular, "../outside", "x", 0o644)][..],
            &[(EntryType::Regular, "a/../../outside", "x", 0o644)],
            &[(EntryType::Symlink, "up", "..", 0), (EntryType::Regular, "up/outside", "x", 0o644)],
            &[(EntryType::Symlink, "up", "..", 0), (EntryType::Directory, "up/new", "", 0o755)],
            &[(EntryType::Symlink, "up", "..", 0), (EntryType::Directory, "up", "", 0o755)],
            &[(EntryType::Symlink, "up", "..", 0), (EntryType::Link, "got", "up/outside", 0)],
            &[(EntryType::Link, "got", "../outside", 0)],
            &[(EntryType::Fifo, "pipe", "", 0o644)],
            &[(EntryType::Char, "device", "", 0o644)],
        ] {
            let (_, result) = unpacked(entries);
            assert!(result.is_err(), "{entries:?}");
        }
        // What a link points to is replaced with it, not written through.
        let (dir, result) =
            unpacked(&[(EntryType::Symlink, "file", "../outside", 0), (EntryType::Regular, "file", "new", 0o644)]);
        result.unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("root/file")).unwrap(), "new");
    }
}
