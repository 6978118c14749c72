//! A mounted store: from a view and a directory to served requests, and back.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use fuser::{Config, SessionACL};
use nix::errno::Errno;
use store::view::{FIRST_ROOT_NUMBER, StoreEvent, StoreView};

use crate::fuse::StoreFilesystem;
use crate::handshake::{self, Asked};
use crate::invalidation::Invalidations;
use crate::journal::{Journal, Recent};
use crate::kept::{Head, Kept, State};
use crate::mount_table::{self, MountEntry};
use crate::resent::Resent;
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
    /// Bytes of decoded directories in memory.
    pub directory_cache_bytes: u64,
}

impl Default for Options {
    fn default() -> Options {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        Options {
            threads: processors.clamp(*THREADS.start(), *THREADS.end()),
            read_ahead_kib: 1024,
            group: None,
            directory_cache_bytes: crate::tree::DIRECTORY_CACHE_BYTES,
        }
    }
}

/// A store that is mounted and served by this process. Dropping it unmounts it.
#[derive(Debug)]
pub struct Mount {
    mountpoint: PathBuf,
    entry: MountEntry,
    tree: Arc<Tree>,
    server: Option<JoinHandle<io::Result<()>>>,
    invalidations: Arc<Invalidations>,
    detached: bool,
}

/// Opens what a mount's server leaves to its successors.
type Keep<'a> = dyn FnOnce(&Kept) -> io::Result<()> + 'a;

/// What there is of a mount before somebody serves it.
struct Unserved {
    mountpoint: PathBuf,
    entry: MountEntry,
    device: OwnedFd,
    shared: bool,
    init: Vec<u8>,
}

impl Mount {
    /// Mounts the store on a directory, which is created when it is missing. A mount that a dead server left there is
    /// replaced. The store can be read through it when this returns.
    pub fn new(view: Arc<dyn StoreView>, mountpoint: &Path, options: Options) -> Result<Mount, MountError> {
        Mount::begin(view, mountpoint, options, None)
    }

    /// As [`Mount::new`], for a mount that is to outlive this process: `keep` is called before anybody can use it, and
    /// sees to it that copies of both descriptors stay open. `note` is for the successors.
    ///
    /// Where the kernel is too old for that (before Linux 6.9), `keep` is not called, and the mount ends with the process.
    ///
    /// # Errors
    /// As [`Mount::new`], and when `keep` fails.
    pub fn kept(
        view: Arc<dyn StoreView>,
        mountpoint: &Path,
        options: Options,
        note: &[u8],
        keep: impl FnOnce(&Kept) -> io::Result<()>,
    ) -> Result<Mount, MountError> {
        Mount::begin(view, mountpoint, options, Some((note, Box::new(keep))))
    }

    fn begin(
        view: Arc<dyn StoreView>,
        mountpoint: &Path,
        options: Options,
        keep: Option<(&[u8], Box<Keep<'_>>)>,
    ) -> Result<Mount, MountError> {
        let mountpoint = mountpoint::prepare(mountpoint)?;
        let mounted = device::mount(&mountpoint)?;
        Mount::serve_new(view, &mountpoint, mounted, &options, keep).inspect_err(|_| {
            if let Err(error) = device::detach(&mountpoint) {
                tracing::warn!(%error, "cannot clean up after a failed mount");
            }
        })
    }

    fn serve_new(
        view: Arc<dyn StoreView>,
        mountpoint: &Path,
        mounted: device::Mounted,
        options: &Options,
        keep: Option<(&[u8], Box<Keep<'_>>)>,
    ) -> Result<Mount, MountError> {
        let device::Mounted { device, shared } = mounted;
        let entry = mount_table::mount_at(mountpoint)
            .and_then(|entry| entry.filter(MountEntry::is_fuse).ok_or_else(|| Errno::ENOENT.into()))
            .map_err(|source| MountError::MountTable { mountpoint: mountpoint.to_owned(), source })?;
        let init = handshake::first_request(device.as_fd()).map_err(cannot_serve(mountpoint))?;
        let mut keep = keep;
        if keep.is_some() && !handshake::can_resend(&init) {
            tracing::warn!("this kernel cannot repeat requests (Linux 6.9 can); the mount ends with this process");
            keep = None;
        }
        let unserved = Unserved { mountpoint: mountpoint.to_owned(), entry, device, shared, init };
        let mount = Mount::serve(view, unserved, options, |unserved, reply| {
            let Some((note, keep)) = keep else { return Ok(None) };
            let head = Head {
                mountpoint: unserved.mountpoint.clone(),
                device: unserved.entry.device.clone(),
                shared,
                init: unserved.init.clone(),
                reply: reply.to_vec(),
                note: note.to_vec(),
            };
            let kept = Kept { device: unserved.device.try_clone()?, state: State::new(&head)?, head };
            keep(&kept)?;
            Ok(Some((kept, None)))
        })?;
        tracing::info!(mountpoint = %mountpoint.display(), threads = options.threads, "the store is mounted");
        Ok(mount)
    }

    /// Goes on serving a mount where its last server stopped. Who uses the mount does not notice; who has asked something
    /// meanwhile is answered now. The mountpoint is not looked at: nobody would answer.
    ///
    /// # Errors
    /// When the kernel has let go of the mount, or there is something wrong with what was kept.
    pub fn take_over(view: Arc<dyn StoreView>, kept: Kept, options: Options) -> Result<Mount, MountError> {
        let recent = Journal::recent(&kept.state.0).map_err(MountError::Kept)?;
        let Head { mountpoint, device, shared, init, reply: first, .. } = kept.head.clone();
        let kind = device::kind();
        let entry = MountEntry { device, mountpoint: mountpoint.clone(), kind };
        let copy = kept.device.try_clone().map_err(cannot_serve(&mountpoint))?;
        let unserved = Unserved { mountpoint: mountpoint.clone(), entry, device: copy, shared, init };
        let mount = Mount::serve(view, unserved, &options, |_, reply| {
            if reply != first {
                tracing::info!("the mount was made by another version; what that one agreed on with the kernel stays");
            }
            Ok(Some((kept, Some(recent))))
        })?;
        tracing::info!(mountpoint = %mountpoint.display(), threads = options.threads, "took the mount over");
        Ok(mount)
    }

    /// Serves. `keep` gets the answer to the kernel's first request before the kernel does, and tells what is kept and
    /// what the last server left, if there was one.
    fn serve(
        view: Arc<dyn StoreView>,
        unserved: Unserved,
        options: &Options,
        keep: impl FnOnce(&Unserved, &[u8]) -> io::Result<Option<(Kept, Option<Recent>)>>,
    ) -> Result<Mount, MountError> {
        let cannot_serve = cannot_serve(&unserved.mountpoint);
        let tree = Arc::new(Tree::with_cache(Arc::clone(&view), options.directory_cache_bytes));
        let invalidations = Invalidations::new();
        let resent = Arc::new(OnceLock::new());
        let filesystem =
            StoreFilesystem::new(Arc::clone(&tree), Arc::clone(&invalidations), Arc::clone(&resent), options.group);
        let mut config = Config::default();
        config.n_threads = Some(options.threads.max(1));
        config.acl = if unserved.shared { SessionACL::All } else { SessionACL::Owner };
        let asked = Asked::new(filesystem, &unserved.init, config.acl, config).map_err(&cannot_serve)?;
        let kept = keep(&unserved, &asked.reply).map_err(&cannot_serve)?;
        let (mut journal, mut recent, mut reply) = (None, None, None);
        if let Some((kept, left)) = kept {
            let copy = || kept.state.0.try_clone();
            let watch = copy().and_then(|file| Resent::new(State(file))).map_err(&cannot_serve)?;
            // Nobody else has set it.
            let _ = resent.set(watch);
            journal = Some(copy().and_then(Journal::open).map_err(&cannot_serve)?);
            (recent, reply) = (left, Some(kept.head.reply));
        }
        let Unserved { mountpoint, entry, device, .. } = unserved;
        let first = reply.as_ref().unwrap_or(&asked.reply).clone();
        let session = asked.connect(device.as_fd(), &first).map_err(&cannot_serve)?;

        invalidations.start(session.notifier()).map_err(&cannot_serve)?;
        view.subscribe(Arc::new(subscriber(Arc::downgrade(&tree), Arc::downgrade(&invalidations), journal)));
        let server = thread::Builder::new().name("mount".into()).spawn(move || session.run()).map_err(&cannot_serve)?;
        if let Some(recent) = recent {
            handshake::ask_for_the_rest(device.as_fd()).map_err(&cannot_serve)?;
            if recent.overflown
                && let Err(error) = handshake::outdate_all_names(device.as_fd())
            {
                tracing::warn!(%error, "more paths changed at once than could be noted; some names may be outdated");
            }
            invalidations.forget(recent.names);
        }
        raise_read_ahead(&entry, options.read_ahead_kib);
        Ok(Mount { mountpoint, entry, tree, server: Some(server), invalidations, detached: false })
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

    /// Tells how many bytes of decoded directories are in memory; [`Options::directory_cache_bytes`] at most.
    pub fn directories_in_memory(&self) -> impl Fn() -> u64 + Send + Sync + use<> {
        let tree = Arc::downgrade(&self.tree);
        move || tree.upgrade().map_or(0, |tree| tree.cached_bytes())
    }

    /// Whether somebody else has unmounted it, so that there is nothing left to serve here. Other mount namespaces may still
    /// have copies of it.
    pub fn has_ended(&self) -> bool {
        self.server.as_ref().is_none_or(JoinHandle::is_finished)
            || mount_table::is_mounted(&self.entry.mountpoint, &self.entry.device).is_ok_and(|mounted| !mounted)
    }

    /// Takes the mount away. Processes that have files in it open, and mount namespaces that hold a copy of it, go on
    /// being served by the threads it leaves behind until they let go or this process ends; nothing here waits for them.
    pub fn unmount(mut self) -> Result<(), MountError> {
        self.detach()
    }

    /// Lets go of a mount that is kept, for a successor to take over. It is served until this process ends.
    pub fn leave(mut self) {
        self.detached = true;
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

/// Takes away a mount that nobody serves and nobody will: who waits for it gets an error, also in other mount namespaces.
pub fn abandon(kept: Kept) -> Result<(), MountError> {
    let Kept { device, head, .. } = kept;
    device::abort(&head.device);
    // The last descriptor of it: this ends it where the kernel's switch cannot be reached.
    drop(device);
    let on_top = mount_table::mount_at(&head.mountpoint)
        .map_err(|source| MountError::MountTable { mountpoint: head.mountpoint.clone(), source })?;
    match on_top {
        Some(entry) if entry.device == head.device => device::detach(&head.mountpoint),
        _ => Ok(()),
    }
}

fn cannot_serve(mountpoint: &Path) -> impl Fn(io::Error) -> MountError + use<> {
    let mountpoint = mountpoint.to_owned();
    move |source| MountError::Serve { mountpoint: mountpoint.clone(), source }
}

/// Passes the view's events on for as long as the mount lives.
fn subscriber(
    tree: Weak<Tree>,
    invalidations: Weak<Invalidations>,
    journal: Option<Journal>,
) -> impl Fn(&[StoreEvent]) + Send + Sync {
    move |events| {
        if let Some(journal) = &journal {
            let names = events.iter().filter_map(|event| match event {
                StoreEvent::Changing { name } => Some(name.as_str()),
                StoreEvent::Added { .. } | StoreEvent::Removed { .. } | StoreEvent::Outdated => None,
            });
            if let Err(error) = journal.note(names) {
                tracing::warn!(%error, "cannot note which paths change; a crash now may leave outdated names");
            }
        }
        if events.iter().all(|event| matches!(event, StoreEvent::Changing { .. })) {
            // Nothing has happened yet, and whoever tells holds locks that the view needs.
            return;
        }
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
