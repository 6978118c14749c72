//! A tree on disk as a NAR.
//!
//! Everything is reached through directory descriptors, without following a single link, so the tree may have been
//! made by an adversary: nothing outside of it is ever read. The walk keeps its own stack, whose height the NAR format
//! limits.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, FallocateFlags, OFlag, OpenHow, ResolveFlag, fallocate, openat2, readlinkat};
use nix::sys::stat::{FileStat, SFlag, fstat, fstatat};
use nix_compat::nar::NarWriter;

use crate::own::{self, kind};

/// Bytes read from a file at once.
const PIECE: usize = 256 * 1024;
/// Bytes of a file given back to the disk at once, where it is consumed. A multiple of any page and block size.
const CONSUMED: u64 = 1 << 20;

/// Any of these makes a file executable in a NAR.
const ANY_EXECUTE: u32 = 0o111;

/// Writes the tree `name` in `parent` as a NAR.
///
/// Files are executable if anybody may execute them; all other permission bits, owners, times and attributes are left
/// behind. A device, socket or fifo is an error.
pub fn dump_tree(parent: BorrowedFd<'_>, name: &Path, out: &mut dyn Write) -> io::Result<()> {
    Dump::new(out, Care::Foreign).run(parent, name)
}

/// A file that has several names, as long as none of them is removed and its number taken by another file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Inode {
    /// Its number on its file system.
    pub number: u64,
    /// When it was last changed or linked: seconds and nanoseconds.
    pub changed: (i64, i64),
    /// How many names it has.
    pub names: u64,
    /// Bytes.
    pub size: u64,
}

/// Somebody who may know what is in files that have several names.
pub trait KnownFiles {
    /// The contents of the file at this path below the tree's root (which is the empty path): as many bytes as it has, or
    /// none, and then they are read from the file.
    fn contents(&mut self, path: &Path, file: Inode) -> Option<Box<dyn Read + '_>>;
}

/// As [`dump_tree`], but contents that `known` has are not read.
pub fn dump_tree_knowing(
    parent: BorrowedFd<'_>,
    name: &Path,
    known: &mut dyn KnownFiles,
    out: &mut dyn Write,
) -> io::Result<()> {
    let mut dump = Dump::new(out, Care::Foreign);
    dump.known = Some(known);
    dump.run(parent, name)
}

/// As [`dump_tree`], for a tree that belongs to this process: what its owner may not read is made readable first.
pub(crate) fn dump_own_tree(parent: BorrowedFd<'_>, name: &Path, out: &mut dyn Write) -> io::Result<()> {
    Dump::new(out, Care::Own).run(parent, name)
}

/// As [`dump_own_tree`], for a tree nobody wants any more: large files are emptied behind what was read of them.
///
/// So a large output is on the disk once and not twice. It also costs a third of the time where it has not been written
/// to the disk yet: its pages are used for the copy, instead of fresh ones (which are slow to come by in a virtual
/// machine), and it never is written.
pub(crate) fn consume_own_tree(parent: BorrowedFd<'_>, name: &Path, out: &mut dyn Write) -> io::Result<()> {
    Dump::new(out, Care::Consumed).run(parent, name)
}

/// How a tree may be treated.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Care {
    /// It is somebody else's: nothing is changed.
    Foreign,
    /// It may be made readable.
    Own,
    /// It may be made readable, and its contents may go.
    Consumed,
}

/// A directory that is being written.
struct Level {
    dir: OwnedFd,
    /// Names not yet written, the next one last.
    names: Vec<Vec<u8>>,
}

struct Dump<'a> {
    nar: NarWriter<&'a mut dyn Write>,
    known: Option<&'a mut dyn KnownFiles>,
    levels: Vec<Level>,
    /// Where the walk is, for messages.
    path: PathBuf,
    care: Care,
    buffer: Vec<u8>,
}

impl<'a> Dump<'a> {
    fn new(out: &'a mut dyn Write, care: Care) -> Self {
        let (nar, buffer) = (NarWriter::new(out), vec![0; PIECE]);
        Self { nar, known: None, levels: Vec::new(), path: PathBuf::new(), care, buffer }
    }

    fn run(mut self, parent: BorrowedFd<'_>, name: &Path) -> io::Result<()> {
        self.node(parent, name)?;
        while let Some(level) = self.levels.last_mut() {
            let Some(name) = level.names.pop() else {
                self.nar.leave_directory().map_err(nar_error)?;
                self.levels.pop();
                self.path.pop();
                continue;
            };
            self.nar.entry(&name).map_err(nar_error)?;
            let dir = level.dir.try_clone()?;
            self.node(dir.as_fd(), Path::new(std::ffi::OsStr::from_bytes(&name)))?;
        }
        self.nar.finish().map_err(nar_error)?;
        Ok(())
    }

    /// Writes a file or symlink, or enters a directory.
    fn node(&mut self, dir: BorrowedFd<'_>, name: &Path) -> io::Result<()> {
        self.path.push(name);
        let stat = fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW).map_err(|e| self.error("cannot stat", e))?;
        match kind(&stat) {
            SFlag::S_IFREG => self.file(dir, name)?,
            SFlag::S_IFLNK => {
                let target = readlinkat(dir, name).map_err(|e| self.error("cannot read the link", e))?;
                self.nar.symlink(&target.into_vec()).map_err(nar_error)?;
            }
            SFlag::S_IFDIR => {
                let dir = self.open(dir, name, OFlag::O_DIRECTORY)?;
                let names = self.sorted_names(&dir)?;
                self.nar.enter_directory().map_err(nar_error)?;
                self.levels.push(Level { dir, names });
                return Ok(());
            }
            _ => {
                let text = format!("file '{}' has an unsupported type", self.path.display());
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
        }
        self.path.pop();
        Ok(())
    }

    fn file(&mut self, dir: BorrowedFd<'_>, name: &Path) -> io::Result<()> {
        let mut file = File::from(self.open(dir, name, OFlag::O_NONBLOCK)?);
        let stat = fstat(&file)?;
        let mut consumed = self.consumable(dir, name, &stat);
        if kind(&stat) != SFlag::S_IFREG {
            return Err(self.error("cannot read", Errno::ESTALE));
        }
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        self.nar.regular_header(stat.st_mode & ANY_EXECUTE != 0, size).map_err(nar_error)?;
        let mut known = None;
        if stat.st_nlink > 1
            && let Some(others) = &mut self.known
        {
            let below: PathBuf = self.path.components().skip(1).collect();
            let (number, names) = (stat.st_ino, stat.st_nlink);
            known =
                others.contents(&below, Inode { number, changed: (stat.st_ctime, stat.st_ctime_nsec), names, size });
        }
        loop {
            let length = match &mut known {
                Some(known) => known.read(&mut self.buffer)?,
                None => file.read(&mut self.buffer)?,
            };
            if length == 0 {
                break;
            }
            self.nar.contents(&self.buffer[..length]).map_err(nar_error)?;
            if let Some(consumed) = &mut consumed {
                consumed.advance(length as u64);
            }
        }
        self.nar.end_regular().map_err(nar_error)
    }

    /// The same file once more, to empty it, if that may be done and is worth it.
    fn consumable(&self, dir: BorrowedFd<'_>, name: &Path, stat: &FileStat) -> Option<Consumed> {
        // Under another name the contents may still be wanted.
        let wanted = self.care == Care::Consumed && stat.st_nlink == 1 && stat.st_size.cast_unsigned() > CONSUMED;
        let file = wanted.then(|| self.open(dir, name, OFlag::O_NONBLOCK | OFlag::O_WRONLY).ok()).flatten()?;
        let same = fstat(&file).is_ok_and(|now| (now.st_dev, now.st_ino) == (stat.st_dev, stat.st_ino));
        same.then(|| Consumed { file, emptied: 0, read: 0 })
    }

    /// Opens an entry that is no symlink, for reading unless `flags` say otherwise.
    fn open(&self, dir: BorrowedFd<'_>, name: &Path, flags: OFlag) -> io::Result<OwnedFd> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        let mut result = openat2(dir, name, how);
        let reading = !flags.contains(OFlag::O_WRONLY);
        if matches!(result, Err(Errno::EACCES)) && self.care != Care::Foreign && reading {
            // Only its owner is refused; root enters anything.
            let enter = if flags.contains(OFlag::O_DIRECTORY) { own::open_directory } else { own::open_file };
            result = enter(dir, name);
        }
        result.map_err(|e| self.error("cannot open", e))
    }

    /// The names in a directory, in reverse of the order a NAR wants.
    fn sorted_names(&self, dir: &OwnedFd) -> io::Result<Vec<Vec<u8>>> {
        let mut names = Vec::new();
        let mut listing = Dir::from_fd(dir.try_clone()?)?;
        for entry in listing.iter() {
            let entry = entry.map_err(|e| self.error("cannot list", e))?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                names.push(name.to_vec());
            }
        }
        names.sort_unstable_by(|a, b| b.cmp(a));
        Ok(names)
    }

    fn error(&self, what: &str, errno: Errno) -> io::Error {
        let source = io::Error::from(errno);
        io::Error::new(source.kind(), format!("{what} '{}': {source}", self.path.display()))
    }
}

/// A failure of the sink keeps its kind: the importing side tells a closed pipe from a bad tree by it.
fn nar_error(error: nix_compat::nar::WriteError) -> io::Error {
    match error {
        nix_compat::nar::WriteError::Io(source) => source,
        other => io::Error::new(io::ErrorKind::InvalidData, other),
    }
}

/// A file that is emptied from its beginning on.
struct Consumed {
    file: OwnedFd,
    emptied: u64,
    read: u64,
}

impl Consumed {
    /// So many bytes more have been read.
    fn advance(&mut self, length: u64) {
        self.read += length;
        if self.read - self.emptied < CONSUMED {
            return;
        }
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let length = (self.read - self.emptied) / CONSUMED * CONSUMED;
        // A file system that cannot do it keeps the file until it is deleted.
        let _ = fallocate(&self.file, hole, self.emptied.cast_signed(), length.cast_signed());
        self.emptied += length;
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use nix_compat::nar::{NarEvent, NarReader};

    use super::*;

    fn dump(dir: &Path, name: &str) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        dump_own_tree(File::open(dir).unwrap().as_fd(), Path::new(name), &mut out).map(|()| out)
    }

    /// One line for each event, to compare a tree as a whole.
    fn outline(nar: &[u8]) -> Vec<String> {
        let mut reader = NarReader::new(nar);
        let mut lines = Vec::new();
        loop {
            lines.push(match reader.next().unwrap() {
                NarEvent::Regular { executable, size } => format!("file {size}{}", if executable { "x" } else { "" }),
                NarEvent::Symlink { target } => format!("link {}", String::from_utf8_lossy(&target)),
                NarEvent::EnterDirectory => "{".into(),
                NarEvent::Entry { name } => String::from_utf8_lossy(&name).into_owned(),
                NarEvent::LeaveDirectory => "}".into(),
                NarEvent::End => return lines,
            });
        }
    }

    #[test]
    fn a_tree_is_written_in_order_and_normalised() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("out");
        fs::create_dir_all(root.join("sub/empty")).unwrap();
        fs::write(root.join("sub/plain"), "12345").unwrap();
        fs::write(root.join("a.b"), "x").unwrap();
        fs::set_permissions(root.join("a.b"), fs::Permissions::from_mode(0o4010)).unwrap();
        fs::write(root.join("a"), vec![7; PIECE + 1]).unwrap();
        fs::hard_link(root.join("a"), root.join("sub/a")).unwrap();
        symlink("/etc", root.join("link")).unwrap();
        let big = format!("file {}", PIECE + 1);
        let expected = [
            "{",
            "a",
            &big,
            "a.b",
            "file 1x",
            "link",
            "link /etc",
            "sub",
            "{",
            "a",
            &big,
            "empty",
            "{",
            "}",
            "plain",
            "file 5",
            "}",
            "}",
        ];
        assert_eq!(outline(&dump(dir.path(), "out").unwrap()), expected);
        assert_eq!(outline(&dump(&root, "link").unwrap()), ["link /etc"]);
    }

    #[test]
    fn what_is_known_of_files_with_several_names_is_not_read() {
        struct Known(Vec<(PathBuf, Inode)>);
        impl KnownFiles for Known {
            fn contents(&mut self, path: &Path, file: Inode) -> Option<Box<dyn Read + '_>> {
                self.0.push((path.to_owned(), file));
                (path == Path::new("sub/b")).then(|| Box::new(&b"known"[..]) as Box<dyn Read>)
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("out");
        fs::create_dir_all(root.join("sub")).unwrap();
        fs::write(root.join("a"), "12345").unwrap();
        fs::write(root.join("alone"), "alone").unwrap();
        fs::hard_link(root.join("a"), root.join("sub/b")).unwrap();
        let mut known = Known(Vec::new());
        let mut out = Vec::new();
        let parent = File::open(dir.path()).unwrap();
        dump_tree_knowing(parent.as_fd(), Path::new("out"), &mut known, &mut out).unwrap();
        let [(one, first), (other, second)] = &known.0[..] else { panic!("{:?}", known.0) };
        assert_eq!((one.as_path(), other.as_path()), (Path::new("a"), Path::new("sub/b")));
        assert_eq!((first, first.names, first.size), (second, 2, 5));
        let contents = |bytes: &[u8]| out.windows(5).filter(|window| *window == bytes).count();
        assert_eq!((contents(b"12345"), contents(b"known"), contents(b"alone")), (1, 1, 2), "with a name");
    }

    #[test]
    fn what_is_consumed_is_read_whole_and_has_one_name() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("out");
        fs::create_dir(&root).unwrap();
        let contents: Vec<u8> = (0..5 * CONSUMED as usize / 2).map(|n| (n / 7) as u8).collect();
        for name in ["alone", "linked", "read-only"] {
            fs::write(root.join(name), &contents).unwrap();
        }
        fs::hard_link(root.join("linked"), dir.path().join("kept")).unwrap();
        fs::set_permissions(root.join("read-only"), fs::Permissions::from_mode(0o400)).unwrap();
        let kept = dump(dir.path(), "out").unwrap();
        let mut consumed = Vec::new();
        consume_own_tree(File::open(dir.path()).unwrap().as_fd(), Path::new("out"), &mut consumed).unwrap();
        assert!(consumed == kept);
        assert!(fs::read(dir.path().join("kept")).unwrap() == contents);
        // Where holes can be made at all.
        let left = fs::read(root.join("alone")).unwrap();
        assert_eq!(left.len(), contents.len());
        assert!(left == contents || left[..2 * CONSUMED as usize].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn what_a_nar_cannot_hold_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("out")).unwrap();
        nix::unistd::mkfifo(&dir.path().join("out/pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let error = dump(dir.path(), "out").unwrap_err();
        assert_eq!(error.to_string(), "file 'out/pipe' has an unsupported type");
    }

    #[test]
    fn a_directory_too_deep_is_an_error_and_not_a_crash() {
        let dir = tempfile::tempdir().unwrap();
        let mut path = PathBuf::from("out");
        (0..300).for_each(|_| path.push("d"));
        fs::create_dir_all(dir.path().join(path)).unwrap();
        assert_eq!(dump(dir.path(), "out").unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
