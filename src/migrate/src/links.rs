//! Roots and build logs: symlinks and files that are copied where both stores do not share them.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown, lchown, symlink};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The directories in which roots are.
const ROOTS: [&str; 2] = ["gcroots", "profiles"];

/// Copies roots from one state directory into another one, for every link that is not there yet or leads elsewhere.
/// Links into the old state directory lead into the new one afterwards. `old` and `new` are how the links spell the two.
/// Owners stay.
pub(crate) fn copy_roots(from: &Path, to: &Path, old: &Path, new: &Path) -> Result<()> {
    for name in ROOTS {
        copy(&from.join(name), &to.join(name), &mut |target| match target.strip_prefix(old) {
            Ok(below) => new.join(below),
            Err(_) => target.to_owned(),
        })?;
    }
    Ok(())
}

/// Copies build logs from one log directory into another one; those that are there stay.
pub(crate) fn copy_logs(from: &Path, to: &Path) -> Result<()> {
    copy(&from.join("drvs"), &to.join("drvs"), &mut Path::to_owned)
}

/// Copies a tree of directories, links and files. A missing one is an empty one. Files that are there stay as they are.
fn copy(from: &Path, to: &Path, target: &mut dyn FnMut(&Path) -> PathBuf) -> Result<()> {
    let mut waiting = vec![(from.to_owned(), to.to_owned())];
    while let Some((from, to)) = waiting.pop() {
        let meta = match fs::symlink_metadata(&from) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            meta => meta.map_err(Error::file("examine", &from))?,
        };
        if meta.is_dir() {
            if !to.is_dir() {
                fs::create_dir_all(&to).map_err(Error::file("create", &to))?;
                fs::set_permissions(&to, meta.permissions()).map_err(Error::file("set the mode of", &to))?;
                give(&to, &meta)?;
            }
            for entry in fs::read_dir(&from).map_err(Error::file("read", &from))? {
                let name = entry.map_err(Error::file("read", &from))?.file_name();
                waiting.push((from.join(&name), to.join(&name)));
            }
        } else if meta.is_symlink() {
            let wanted = target(&fs::read_link(&from).map_err(Error::file("read the link", &from))?);
            if fs::read_link(&to).is_ok_and(|found| found == wanted) || to.is_dir() && !to.is_symlink() {
                continue;
            }
            let new = beside(&to);
            let _ = fs::remove_file(&new);
            symlink(&wanted, &new).map_err(Error::file("create", &new))?;
            give(&new, &meta)?;
            fs::rename(&new, &to).map_err(Error::file("create", &to))?;
        } else if meta.is_file() && !to.exists() {
            let new = beside(&to);
            fs::copy(&from, &new).map_err(Error::file("copy", &from))?;
            let file = fs::File::open(&new).map_err(Error::file("open", &new))?;
            let _ = fchown(&file, Some(meta.uid()), Some(meta.gid()));
            let times = fs::FileTimes::new();
            let times = meta.modified().map_or(times, |modified| times.set_modified(modified));
            file.set_times(times).map_err(Error::file("set the time of", &new))?;
            let mode = fs::Permissions::from_mode(meta.mode() & 0o7777);
            file.set_permissions(mode).map_err(Error::file("set the mode of", &new))?;
            fs::rename(&new, &to).map_err(Error::file("create", &to))?;
        }
    }
    Ok(())
}

/// Owners can be given by root only; for others everything is theirs.
fn give(path: &Path, meta: &fs::Metadata) -> Result<()> {
    match lchown(path, Some(meta.uid()), Some(meta.gid())) {
        Err(e) if e.kind() != io::ErrorKind::PermissionDenied => Err(Error::file("give away", path)(e)),
        _ => Ok(()),
    }
}

/// A name of our own in the same directory.
fn beside(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".castored-new-");
    // Names may be as long as the file system allows; the end tells them apart as well.
    let end = path.file_name().unwrap_or_default().as_bytes();
    name.push(std::ffi::OsStr::from_bytes(&end[end.len().saturating_sub(200)..]));
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_lead_where_they_led() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::create_dir_all(from.join("gcroots/auto")).unwrap();
        fs::create_dir_all(from.join("profiles")).unwrap();
        symlink("/nix/store/x", from.join("profiles/default-1-link")).unwrap();
        symlink("default-1-link", from.join("profiles/default")).unwrap();
        symlink(from.join("profiles/default"), from.join("gcroots/profile")).unwrap();
        symlink("/home/somebody/result", from.join("gcroots/auto/abc")).unwrap();
        copy_roots(&from, &to, &from, &to).unwrap();
        let link = |name: &str| fs::read_link(to.join(name)).unwrap();
        assert_eq!(link("profiles/default"), Path::new("default-1-link"));
        assert_eq!(link("gcroots/profile"), to.join("profiles/default"));
        assert_eq!(link("gcroots/auto/abc"), Path::new("/home/somebody/result"));
        // A new generation.
        symlink("/nix/store/y", from.join("profiles/default-2-link")).unwrap();
        fs::remove_file(from.join("profiles/default")).unwrap();
        symlink("default-2-link", from.join("profiles/default")).unwrap();
        copy_roots(&from, &to, &from, &to).unwrap();
        assert_eq!(link("profiles/default"), Path::new("default-2-link"));
        assert_eq!(link("profiles/default-1-link"), Path::new("/nix/store/x"));
    }
}
