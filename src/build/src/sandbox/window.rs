//! Store paths that a builder gets to see while it runs.
//!
//! The daemon names them on a socket of their own, one list after the other, and waits for each answer: both are lines of
//! JSON, the answer `null` or why it could not be done. The supervisor takes the store objects as detached mounts in its
//! own mount namespace, where the whole store is mounted; enters that of the builder, which may well have none of the
//! host's mounts any more; attaches them there; and comes back. It does so itself and starts no process for it: all of
//! its children would be born into the builder's pid namespace.
//!
//! The daemon of an ordinary user has no right to mount in the host's namespace, so its supervisor has one of its own.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::{fstat, fstatat};
use nix::unistd::dup2_stdout;

use super::spec::{Identity, Spec, View};
use super::view::{StoreObject, detach_from_host, open_directory};
use super::{SetupError, Step, sys};

/// Store paths in one list.
pub(crate) const MAX_SHOWN_AT_ONCE: usize = 1000;
/// Longest list taken, in bytes. A name has at most 244, and some more in JSON.
const MAX_LIST_BYTES: u64 = 256 * MAX_SHOWN_AT_ONCE as u64;

/// The supervisor's end.
pub(super) struct Window {
    daemon: BufReader<UnixStream>,
    /// The supervisor's own mount namespace.
    own: File,
    /// The store, in that.
    store_mount: OwnedFd,
    /// The store directory, as the builder sees it.
    store_dir: PathBuf,
    /// Device and inode that a sandbox's store directory has: nothing is to be put anywhere else.
    scratch: Option<(u64, u64)>,
}

impl Window {
    /// Takes the socket from the standard output, which from then on is the log like the standard error. To be called
    /// when the supervisor has entered its user namespace, before it starts the builder.
    pub(super) fn open(spec: &Spec) -> Result<Option<Self>, SetupError> {
        if !spec.grows {
            return Ok(None);
        }
        let daemon = UnixStream::from(sys::inherited(1).step(|| "taking over the standard output")?);
        dup2_stdout(io::stderr()).step(|| "redirecting the standard output")?;
        if spec.identity == Identity::Caller {
            unshare(CloneFlags::CLONE_NEWNS).step(|| "making the supervisor's mount namespace")?;
            detach_from_host()?;
        }
        let (store_mount, store_dir, scratch) = match &spec.view {
            View::Sandbox(view) => (&view.store_mount, &view.store_dir, Some(view.scratch.as_path())),
            View::Host(view) => (&view.store_mount, &view.store_mount, None),
        };
        let identity = |path| std::fs::metadata(path).map(|found| (found.dev(), found.ino()));
        let scratch =
            scratch.map(|path| identity(path).step(|| format!("looking at {}", path.display()))).transpose()?;
        Ok(Some(Self {
            daemon: BufReader::new(daemon),
            own: File::open("/proc/self/ns/mnt").step(|| "opening the supervisor's mount namespace")?,
            store_mount: open_directory(store_mount.as_path())?,
            store_dir: store_dir.as_path().to_owned(),
            scratch,
        }))
    }

    /// Does what the daemon wants; false when it will want nothing more. `builder` is the builder's pidfd.
    pub(super) fn serve(&mut self, builder: BorrowedFd<'_>) -> Result<bool, SetupError> {
        let mut line = Vec::new();
        match (&mut self.daemon).take(MAX_LIST_BYTES).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return Ok(false),
            Ok(_) => {}
        }
        let names: Vec<String> = serde_json::from_slice(&line).step(|| "decoding a list of store paths")?;
        let error = self.show(builder, &names)?.err().map(|error| error.to_string());
        let mut answer = serde_json::to_vec(&error).step(|| "encoding an answer")?;
        answer.push(b'\n');
        Ok(self.daemon.get_mut().write_all(&answer).is_ok())
    }

    /// Shows store objects to the builder. The outer error is one after which the supervisor cannot go on.
    fn show(&self, builder: BorrowedFd<'_>, names: &[String]) -> Result<Result<(), SetupError>, SetupError> {
        let take = |name: &String| {
            StoreObject::take(&self.store_mount, name).step(|| format!("taking '{name}' from the store"))
        };
        let objects = match names.iter().map(take).collect::<Result<Vec<_>, _>>() {
            Ok(objects) => objects,
            Err(error) => return Ok(Err(error)),
        };
        if let Err(error) = setns(builder, CloneFlags::CLONE_NEWNS).step(|| "entering the builder's mount namespace") {
            return Ok(Err(error));
        }
        let shown = self.show_inside(names, &objects);
        setns(&self.own, CloneFlags::CLONE_NEWNS).step(|| "leaving the builder's mount namespace")?;
        Ok(shown)
    }

    fn show_inside(&self, names: &[String], objects: &[StoreObject]) -> Result<(), SetupError> {
        let store = self.open_store_dir().step(|| format!("opening '{}' of the builder", self.store_dir.display()))?;
        for (name, object) in names.iter().zip(objects) {
            let is_there = match fstatat(&store, name.as_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
                Ok(_) => true,
                Err(Errno::ENOENT) => false,
                Err(errno) => return Err(errno).step(|| format!("looking for '{name}' in the builder's store")),
            };
            match (is_there, self.scratch) {
                // The overlay shows it, unless it was looked for before it was there.
                (true, None) => {}
                // What the builder has made itself.
                (true, Some(_)) => {
                    let error = io::Error::from(io::ErrorKind::AlreadyExists);
                    return Err(error).step(|| format!("showing '{name}' to the builder"));
                }
                (false, _) => object.show(&store, name).step(|| format!("showing '{name}' to the builder"))?,
            }
        }
        Ok(())
    }

    /// A builder with users of its own can mount there what it likes, so it is made sure what is found.
    fn open_store_dir(&self) -> io::Result<OwnedFd> {
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_NO_MAGICLINKS);
        let found = openat2(AT_FDCWD, &self.store_dir, how)?;
        let stat = fstat(&found)?;
        match self.scratch {
            Some(scratch) if scratch != (stat.st_dev, stat.st_ino) => {
                Err(io::Error::new(io::ErrorKind::PermissionDenied, "it is not where outputs are made"))
            }
            _ => Ok(found),
        }
    }
}

impl AsFd for Window {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.daemon.get_ref().as_fd()
    }
}
