//! Mount points inside a root that is being assembled.
//!
//! A sandbox path may be a symlink of the host (`/bin -> /usr/bin`), and the next one may lie below it. Before the root
//! is entered such a link would lead to the host's files, so every name is resolved by the kernel *inside* the root
//! (`RESOLVE_IN_ROOT`), and nothing is ever created in a directory that belongs to the host.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat, openat2};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, mkdirat};
use nix::unistd::symlinkat;

use super::sys::{self, MountAttributes};

/// What kind of file a stat describes.
pub(super) fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

/// A path as the kernel wants it.
pub(super) fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))
}

/// A tree under construction.
pub(super) struct Root {
    fd: OwnedFd,
    path: PathBuf,
}

impl Root {
    /// The root mounted at `path`.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let fd = open(path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
        Ok(Self { fd, path: path.to_owned() })
    }

    /// Where the tree lies on the host. Only for mount points that no sandbox path can have replaced.
    pub(super) fn host_path(&self, inside: &str) -> PathBuf {
        self.path.join(inside.trim_start_matches('/'))
    }

    fn resolve(&self, path: &Path, flags: OFlag) -> Result<OwnedFd, Errno> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_PATH | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        loop {
            match openat2(&self.fd, path, how) {
                Err(Errno::EAGAIN) => {}
                other => return other,
            }
        }
    }

    /// Refuses to create anything on another filesystem than the root's own.
    fn check_ours(&self, parent: BorrowedFd<'_>) -> io::Result<()> {
        if fstat(parent)?.st_dev == fstat(&self.fd)?.st_dev {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::PermissionDenied, "would have to be created inside another sandbox path"))
    }

    /// The directory at `path`, made when it is missing.
    pub(super) fn directory(&self, path: &Path) -> io::Result<OwnedFd> {
        let mut prefix = PathBuf::from("/");
        let mut current = self.resolve(&prefix, OFlag::O_DIRECTORY)?;
        for component in path.components() {
            let name = match component {
                Component::Normal(name) => name,
                Component::ParentDir => return Err(io::Error::new(io::ErrorKind::InvalidInput, "path contains '..'")),
                _ => continue,
            };
            prefix.push(name);
            current = match self.resolve(&prefix, OFlag::O_DIRECTORY) {
                Err(Errno::ENOENT) => {
                    self.check_ours(current.as_fd())?;
                    mkdirat(&current, name, Mode::from_bits_truncate(0o755))?;
                    self.resolve(&prefix, OFlag::O_DIRECTORY)?
                }
                other => other?,
            };
        }
        Ok(current)
    }

    fn parent_and_name<'a>(&self, path: &'a Path) -> io::Result<(OwnedFd, &'a std::ffi::OsStr)> {
        let missing = || io::Error::new(io::ErrorKind::InvalidInput, "path has no last component");
        let name = path.file_name().ok_or_else(missing)?;
        Ok((self.directory(path.parent().ok_or_else(missing)?)?, name))
    }

    /// The file at `path`, made (with these contents) when it is missing.
    pub(super) fn file(&self, path: &Path, contents: &[u8]) -> io::Result<OwnedFd> {
        let (parent, name) = self.parent_and_name(path)?;
        match self.resolve(path, OFlag::empty()) {
            Err(Errno::ENOENT) => {}
            other => return Ok(other?),
        }
        self.check_ours(parent.as_fd())?;
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = openat(&parent, name, flags, Mode::from_bits_truncate(0o444))?;
        io::Write::write_all(&mut std::fs::File::from(file), contents)?;
        Ok(self.resolve(path, OFlag::empty())?)
    }

    /// A symlink at `path`, unless something is there already.
    pub(super) fn symlink(&self, path: &Path, target: &Path) -> io::Result<()> {
        let (parent, name) = self.parent_and_name(path)?;
        if self.resolve(path, OFlag::O_NOFOLLOW).is_ok() {
            return Ok(());
        }
        self.check_ours(parent.as_fd())?;
        Ok(symlinkat(target, &parent, name)?)
    }

    /// Shows the host's directory `source` at `path`, without the mounts below it.
    pub(super) fn bind_directory(&self, source: &Path, path: &Path, attributes: MountAttributes) -> io::Result<()> {
        let target = self.directory(path)?;
        let mount = sys::clone_mount(&self.fd, &c_path(source)?, false)?;
        sys::restrict_mount(mount.as_fd(), attributes, false)?;
        sys::attach_mount(mount.as_fd(), target.as_fd())
    }

    /// Shows whatever `source` is on the host at `path`: a directory with all that is mounted below it, a file, or a
    /// symlink (which is copied, as it is).
    pub(super) fn bind(&self, source: &Path, path: &Path) -> io::Result<()> {
        let file_type = std::fs::symlink_metadata(source)?.file_type();
        if file_type.is_symlink() {
            return self.symlink(path, &std::fs::read_link(source)?);
        }
        let target = if file_type.is_dir() { self.directory(path)? } else { self.file(path, b"")? };
        let mount = sys::clone_mount(&self.fd, &c_path(source)?, file_type.is_dir())?;
        sys::attach_mount(mount.as_fd(), target.as_fd())
    }
}
