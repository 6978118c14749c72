//! A mounted store: from a view and a directory to served requests, and back.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use fuser::{Config, Session, SessionACL};
use nix::errno::Errno;
use store::view::{FIRST_ROOT_NUMBER, StoreEvent, StoreView};

use crate::fuse::StoreFilesystem;
use crate::invalidation::Invalidations;
use crate::mount_table::{self, MountEntry};
use crate::{MountError, NodeId, Tree, device, mountpoint};

/// How long unmounting waits for the serving threads to end. They end at once unless somebody still uses the mount.
const FAREWELL: Duration = Duration::from_millis(500);
/// The fewest and the most threads chosen by ourselves.
const THREADS: std::ops::RangeInclusive<usize> = 2..=8;

/// How to mount.
#[derive(Clone, Debug)]
pub struct Options {
    /// How many threads answer requests. All read from one descriptor: descriptors cloned for each would lose requests
    /// when the server is killed.
    pub threads: usize,
    /// How far the kernel reads ahead, in KiB. Set through sysfs where that is permitted, since FUSE itself caps it at 128.
    pub read_ahead_kib: u32,
    /// Show the store directory with this group and mode 1775, as stock does, instead of as root's alone.
    pub group: Option<u32>,
}

impl Default for Options {
    fn default() -> Options {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        Options { threads: processors.clamp(*THREADS.start(), *THREADS.end()), read_ahead_kib: 1024, group: None }
    }
}

/// A store that is mounted and served by this process. Dropping it unmounts it.
#[derive(Debug)]
pub struct Mount {
    mountpoint: PathBuf,
    entry: MountEntry,
    server: Option<JoinHandle<io::Result<()>>>,
    invalidations: Arc<Invalidations>,
    detached: bool,
}

impl Mount {
    /// Mounts the store on a directory, which is created when it is missing. A mount that a dead server left there is
    /// replaced. The store can be read through it when this returns.
    pub fn new(view: Arc<dyn StoreView>, mountpoint: &Path, options: Options) -> Result<Mount, MountError> {
        let mountpoint = mountpoint::prepare(mountpoint)?;
        let mounted = device::mount(&mountpoint)?;
        Mount::serve(view, &mountpoint, mounted, &options).inspect_err(|_| {
            if let Err(error) = device::detach(&mountpoint) {
                tracing::warn!(%error, "cannot clean up after a failed mount");
            }
        })
    }

    fn serve(
        view: Arc<dyn StoreView>,
        mountpoint: &Path,
        mounted: device::Mounted,
        options: &Options,
    ) -> Result<Mount, MountError> {
        let cannot_serve = |source| MountError::Serve { mountpoint: mountpoint.to_owned(), source };
        let not_in_table = |source| MountError::MountTable { mountpoint: mountpoint.to_owned(), source };

        let tree = Arc::new(Tree::new(Arc::clone(&view)));
        let invalidations = Invalidations::new();
        let filesystem = StoreFilesystem::new(Arc::clone(&tree), Arc::clone(&invalidations), options.group);
        let mut config = Config::default();
        config.n_threads = Some(options.threads.max(1));
        config.acl = if mounted.shared { SessionACL::All } else { SessionACL::Owner };
        // Shakes hands with the kernel before it returns.
        let session = Session::from_fd(filesystem, mounted.device, config.acl, config).map_err(cannot_serve)?;

        invalidations.start(session.notifier()).map_err(cannot_serve)?;
        view.subscribe(Arc::new(subscriber(Arc::downgrade(&tree), Arc::downgrade(&invalidations))));
        let server = thread::Builder::new().name("mount".into()).spawn(move || session.run()).map_err(cannot_serve)?;

        let entry = mount_table::mount_at(mountpoint)
            .and_then(|entry| entry.filter(MountEntry::is_fuse).ok_or_else(|| Errno::ENOENT.into()))
            .map_err(not_in_table)?;
        raise_read_ahead(&entry, options.read_ahead_kib);
        tracing::info!(mountpoint = %mountpoint.display(), threads = options.threads, "the store is mounted");
        Ok(Mount { mountpoint: mountpoint.to_owned(), entry, server: Some(server), invalidations, detached: false })
    }

    /// Where it is mounted, as an absolute path without symlinks.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Tells of any file, given the numbers of its device and its inode number, which store path it belongs to, by that
    /// path's number; nothing when it is not seen through this mount.
    pub fn recogniser(&self) -> impl Fn((u32, u32), u64) -> Option<u32> + Send + Sync + use<> {
        let own = self.entry.device_numbers();
        move |device, inode| {
            let number = NodeId::from(inode).number();
            (Some(device) == own && number >= FIRST_ROOT_NUMBER).then_some(number)
        }
    }

    /// Whether somebody else has unmounted it, so that there is nothing left to serve here. Other mount namespaces may still
    /// have copies of it.
    pub fn has_ended(&self) -> bool {
        self.server.as_ref().is_none_or(JoinHandle::is_finished)
            || mount_table::is_mounted(&self.entry).is_ok_and(|mounted| !mounted)
    }

    /// Takes the mount away. Processes that have files in it open, and mount namespaces that hold a copy of it, go on
    /// being served by the threads it leaves behind until they let go or this process ends; nothing here waits for them.
    pub fn unmount(mut self) -> Result<(), MountError> {
        self.detach()
    }

    fn detach(&mut self) -> Result<(), MountError> {
        if std::mem::replace(&mut self.detached, true) {
            return Ok(());
        }
        self.invalidations.close();
        // Somebody may have unmounted it, or mounted something over it, in the meantime: take away only what is ours.
        let on_top = mount_table::mount_at(&self.mountpoint)
            .map_err(|source| MountError::MountTable { mountpoint: self.mountpoint.clone(), source })?;
        if on_top.as_ref() == Some(&self.entry) {
            device::detach(&self.mountpoint)?;
        }
        let until = Instant::now() + FAREWELL;
        while self.server.as_ref().is_some_and(|server| !server.is_finished()) && Instant::now() < until {
            thread::sleep(Duration::from_millis(1));
        }
        if let Some(server) = self.server.take_if(|server| server.is_finished()) {
            match server.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "serving the mount ended with an error"),
                Err(_) => tracing::error!("serving the mount ended with a panic"),
            }
        }
        Ok(())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Err(error) = self.detach() {
            tracing::warn!(%error, "cannot unmount");
        }
    }
}

/// Passes the view's events on for as long as the mount lives.
fn subscriber(tree: Weak<Tree>, invalidations: Weak<Invalidations>) -> impl Fn(&[StoreEvent]) + Send + Sync {
    move |events| {
        if let Some(tree) = tree.upgrade() {
            for event in events {
                if let StoreEvent::Removed { number, .. } = event {
                    tree.forget_path(*number);
                }
            }
        }
        if let Some(invalidations) = invalidations.upgrade() {
            invalidations.handle(events);
        }
    }
}

/// FUSE lets a server ask for 128 KiB of readahead at most; the administrator may set more.
fn raise_read_ahead(entry: &MountEntry, kib: u32) {
    let tunable = mount_table::tunables(entry).join("read_ahead_kb");
    if let Err(error) = fs::write(&tunable, kib.to_string()) {
        tracing::info!(tunable = %tunable.display(), %error, "cannot raise the readahead; large files read slower");
    }
}
