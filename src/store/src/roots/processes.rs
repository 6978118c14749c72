//! What running processes use: their executables, directories, open and mapped files, and their environment.
//!
//! A file is known by its name, as with stock, and by its device and inode number if it is seen through our own mount.
//! The second finds it whatever it is called where that process looks: in another mount namespace, below another root,
//! bound to another place. Asking for the numbers sends no request to any filesystem, so a server that does not answer,
//! ours included, holds up nobody here.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix_compat::store_path::StorePath;
use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

use super::{GcRoot, base_name, in_store, shown};
use crate::error::{Error, Result};
use crate::store::Store;

/// Bytes read of one process's environment. The kernel lets none be longer than three quarters of what it lets a stack
/// be, 6 MiB unless somebody raises that.
const MAX_ENVIRONMENT: u64 = 64 << 20;
/// Bytes of a line that describes a mapping: a path, every byte of it escaped, and some numbers.
const MAX_LINE: u64 = 4 * 4096 + 256;
/// Settings of the kernel that name programs, as stock looks at them.
const KERNEL_SETTINGS: [&str; 3] = ["modprobe", "fbsplash", "poweroff_cmd"];

/// A file, whatever its name is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId {
    /// Major and minor number of its filesystem's device.
    pub device: (u32, u32),
    /// Its inode number.
    pub inode: u64,
}

/// Tells the number of the store path that a file seen through the mount belongs to.
pub type Recognise = Arc<dyn Fn(FileId) -> Option<u32> + Send + Sync>;

/// What was found, or nothing where the process is gone or may not be looked at. Anything else, such as a lack of
/// descriptors, is an error: a collection must not go on without what a process uses.
fn unless_gone<T>(path: &Path, found: io::Result<T>) -> Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) => match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ENOENT | Errno::ESRCH | Errno::EACCES | Errno::EPERM | Errno::ENOTDIR) => Ok(None),
            _ => Err(Error::file("read", path, error)),
        },
    }
}

/// The search through `/proc`.
pub(super) struct Search<'a> {
    store: &'a Store,
    recognise: Option<Recognise>,
    /// The paths of numbers that were recognised.
    known: HashMap<u32, Option<StorePath>>,
    roots: &'a mut Vec<GcRoot>,
}

impl<'a> Search<'a> {
    pub(super) fn new(store: &'a Store, roots: &'a mut Vec<GcRoot>) -> Self {
        Self { store, recognise: store.recognise.read().clone(), known: HashMap::new(), roots }
    }

    /// Looks at every process, and at what the kernel may execute.
    pub(super) fn run(mut self) -> Result<()> {
        let proc = Path::new("/proc");
        if let Some(processes) = unless_gone(proc, fs::read_dir(proc))? {
            for process in processes {
                let Some(process) = unless_gone(proc, process)? else { continue };
                if process.file_name().as_bytes().iter().all(u8::is_ascii_digit) {
                    self.process(&process.path())?;
                }
            }
        }
        for name in KERNEL_SETTINGS {
            self.text(&Path::new("/proc/sys/kernel").join(name))?;
        }
        Ok(())
    }

    fn process(&mut self, dir: &Path) -> Result<()> {
        for name in ["exe", "cwd", "root"] {
            self.link(dir.join(name))?;
        }
        let descriptors = dir.join("fd");
        if let Some(entries) = unless_gone(&descriptors, fs::read_dir(&descriptors))? {
            for entry in entries {
                if let Some(entry) = unless_gone(&descriptors, entry)? {
                    self.link(entry.path())?;
                }
            }
        }
        self.mappings(&dir.join("maps"))?;
        self.text(&dir.join("environ"))
    }

    fn found(&mut self, at: &Path, path: StorePath) {
        self.roots.push(GcRoot { link: shown(at), path, private: true });
    }

    /// A link to something that a process has open.
    fn link(&mut self, link: PathBuf) -> Result<()> {
        match fs::read_link(&link) {
            // Too deep for the kernel to name it: any user has such files, and they must not end a collection.
            Err(error) if error.raw_os_error() == Some(Errno::ENAMETOOLONG as i32) => {}
            target => {
                let Some(target) = unless_gone(&link, target)? else { return Ok(()) };
                if !target.is_absolute() {
                    // A socket or a pipe.
                    return Ok(());
                }
                if let Some(path) = in_store(self.store.store_dir(), target.as_os_str()) {
                    self.found(&link, path);
                }
            }
        }
        if self.recognise.is_none() {
            return Ok(());
        }
        match statx(CWD, &link, AtFlags::STATX_DONT_SYNC, StatxFlags::INO) {
            // Where there is no such call, names have to do, as they do for stock.
            Err(rustix::io::Errno::NOSYS) => Ok(()),
            asked => match unless_gone(&link, asked.map_err(io::Error::from))? {
                Some(file) => {
                    let device = (file.stx_dev_major, file.stx_dev_minor);
                    self.file(&link, FileId { device, inode: file.stx_ino })
                }
                None => Ok(()),
            },
        }
    }

    /// A file that may be one of the mount's.
    fn file(&mut self, at: &Path, file: FileId) -> Result<()> {
        let Some(number) = self.recognise.as_ref().and_then(|recognise| recognise(file)) else { return Ok(()) };
        let path = match self.known.get(&number) {
            Some(known) => known.clone(),
            None => {
                let path = self.store.path_of_number(number)?;
                self.known.insert(number, path.clone());
                path
            }
        };
        if let Some(path) = path {
            self.found(at, path);
        }
        Ok(())
    }

    /// The files that a process has mapped.
    fn mappings(&mut self, maps: &Path) -> Result<()> {
        let Some(file) = unless_gone(maps, File::open(maps))? else { return Ok(()) };
        let mut lines = BufReader::new(file);
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = (&mut lines).take(MAX_LINE).read_until(b'\n', &mut line);
            match unless_gone(maps, read)? {
                None | Some(0) => return Ok(()),
                Some(_) => {}
            }
            self.paths_in(maps, &line);
            if let Some(file) = mapped(&line) {
                self.file(maps, file)?;
            }
        }
    }

    /// Store paths that stand in a text, e.g. in a process's environment.
    fn text(&mut self, file: &Path) -> Result<()> {
        let Some(opened) = unless_gone(file, File::open(file))? else { return Ok(()) };
        let mut text = Vec::new();
        if unless_gone(file, opened.take(MAX_ENVIRONMENT).read_to_end(&mut text))?.is_some() {
            self.paths_in(file, &text);
        }
        Ok(())
    }

    fn paths_in(&mut self, file: &Path, text: &[u8]) {
        let prefix = format!("{}/", self.store.store_dir().as_str()).into_bytes();
        let mut rest = text;
        while let Some(at) = rest.windows(prefix.len()).position(|window| window == prefix) {
            rest = &rest[at + prefix.len()..];
            let end =
                rest.iter().position(|b| !b.is_ascii_alphanumeric() && !b"+-._?=".contains(b)).unwrap_or(rest.len());
            if let Some(path) = base_name(std::ffi::OsStr::from_bytes(&rest[..end])) {
                self.found(file, path);
            }
        }
    }
}

/// The file of a line `addresses permissions offset major:minor inode [path]`; none for memory without a file.
fn mapped(line: &[u8]) -> Option<FileId> {
    let mut fields = std::str::from_utf8(line.get(..line.len().min(200))?)
        .or_else(|error| std::str::from_utf8(&line[..error.valid_up_to()]))
        .ok()?
        .split_ascii_whitespace()
        .skip(3);
    let (major, minor) = fields.next()?.split_once(':')?;
    let device = (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
    let inode = fields.next()?.parse().ok().filter(|inode| *inode != 0)?;
    Some(FileId { device, inode })
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use nix_compat::store_path::StoreDir;

    use super::*;
    use crate::store::Config;

    #[test]
    fn lines_of_maps_are_read() {
        let file = mapped(b"7f10a000-7f10b000 r-xp 00002000 00:2d 12884901889    /app/bin/a b (deleted)\n").unwrap();
        assert_eq!(file, FileId { device: (0, 0x2d), inode: 3 << 32 | 1 });
        assert_eq!(mapped(b"7ffd000-7ffe000 rw-p 00000000 00:00 0    [stack]\n"), None);
        assert_eq!(mapped(b"7ffd000-7ffe000 rw-p 00000000 08:01 17 /\xff\xfe\n").unwrap().inode, 17);
        assert_eq!(mapped(b"\n"), None);
    }

    fn add(store: &Store) -> StorePath {
        let options = crate::AddOptions {
            name: "text".into(),
            method: nix_compat::content_address::Method::Text,
            algorithm: nix_compat::hash::Algorithm::Sha256,
            references: std::collections::BTreeSet::new(),
        };
        store.add(&options, &mut &b"contents"[..]).unwrap().path
    }

    #[test]
    fn a_file_is_recognised_under_any_name() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(Config::new(StoreDir::default(), dir.path())).unwrap();
        let path = add(&store);
        let number = store.valid_entry(&path).unwrap().number;
        // As if this file were seen through the mount.
        let mut file = tempfile::NamedTempFile::new_in(dir.path()).unwrap();
        file.write_all(b"x").unwrap();
        let asked = statx(CWD, file.path(), AtFlags::empty(), StatxFlags::INO).unwrap();
        let this = FileId { device: (asked.stx_dev_major, asked.stx_dev_minor), inode: asked.stx_ino };
        let links = || -> Vec<String> {
            let roots = store.find_roots().unwrap().into_iter().filter(|root| root.path == path);
            roots.map(|root| String::from_utf8(root.link).unwrap()).collect()
        };
        let own = format!("/proc/{}/", std::process::id());
        store.recognise_files(Arc::new(move |file| (file == this).then_some(number)));
        assert!(links().iter().any(|link| link.starts_with(&own) && link.contains("/fd/")));
        // It stays on the disk: its inode could be that of another test's file the next moment.
        let (handle, _kept) = file.into_parts();
        drop(handle);
        assert!(links().iter().all(|link| !link.starts_with(&own)));
    }

    #[test]
    fn a_file_too_deep_to_be_named_ends_no_search_and_is_recognised() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(Config::new(StoreDir::new("/made/up/store").unwrap(), dir.path())).unwrap();
        let path = add(&store);
        let number = store.entry(&path).unwrap().unwrap().number;
        let name = "n".repeat(250);
        let mut deep = std::os::fd::OwnedFd::from(File::open(dir.path()).unwrap());
        for _ in 0..20 {
            rustix::fs::mkdirat(&deep, name.as_str(), rustix::fs::Mode::RWXU).unwrap();
            deep = rustix::fs::openat(&deep, name.as_str(), rustix::fs::OFlags::DIRECTORY, rustix::fs::Mode::empty())
                .unwrap();
        }
        let asked = statx(&deep, "", AtFlags::EMPTY_PATH, StatxFlags::INO).unwrap();
        let this = FileId { device: (asked.stx_dev_major, asked.stx_dev_minor), inode: asked.stx_ino };
        store.recognise_files(Arc::new(move |file| (file == this).then_some(number)));
        let own = format!("/proc/{}/fd/", std::process::id());
        let roots = store.find_roots().unwrap();
        assert!(roots.iter().any(|root| root.path == path && root.link.starts_with(own.as_bytes())), "{roots:?}");
    }

    #[test]
    fn the_environment_of_a_process_counts_while_it_lives() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(Config::new(StoreDir::new("/made/up/store").unwrap(), dir.path())).unwrap();
        let path = add(&store);
        let environment = format!(
            "a:{}/bin:/made/up/store/0123456789abcdfghijklmnpqrsvwxyz-gone:b",
            store.store_dir().display(&path)
        );
        let mut process =
            Command::new("sleep").arg("60").env("SOMETHING", environment).stdout(Stdio::null()).spawn().unwrap();
        let began = std::time::Instant::now();
        // Until it has executed.
        let mut found = Vec::new();
        while found.is_empty() {
            assert!(began.elapsed().as_secs() < 20, "the environment is not looked at");
            found = store.find_roots().unwrap();
        }
        let link = format!("/proc/{}/environ", process.id()).into_bytes();
        process.kill().unwrap();
        process.wait().unwrap();
        assert_eq!(found, [GcRoot { link, path, private: true }]);
        assert_eq!(store.find_roots().unwrap(), []);
    }
}
