//! The adapter between the kernel's requests and [`Tree`].

use std::ffi::OsStr;
use std::io;
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, InitFlags, KernelConfig, LockOwner,
    Notifier, OpenFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry,
    ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow,
};

use crate::invalidation::{Invalidations, Kernel, Listing};
use crate::resent::{Resent, Turn};
use crate::tree::NAME_MAX;
use crate::waiting::Waiting;
use store::view::ViewError;

use crate::{Attributes, Kind, NodeId, Tree, TreeError};

/// Names and attributes never expire. The kernel counts in jiffies; this is as good as for ever and far from overflow.
const FOREVER: Duration = Duration::from_secs(i32::MAX as u64);
/// Numbers are never reused, so one generation is enough.
const GENERATION: Generation = Generation(0);
/// Every store path is as old as this (as stock Nix has it), one second after the epoch.
const MODIFIED: Duration = Duration::from_secs(1);
/// The mode stock gives its store directory, together with the build group. On a read-only mount it lets nobody write.
const SHARED_STORE: u16 = 0o1775;
/// The unit `stat` counts blocks in.
const BLOCK: u64 = 512;
/// What `stat` calls a good size for reading.
const PREFERRED_READ: u32 = 4096;
/// The largest read, in bytes: what the kernel allows without a special limit.
pub(crate) const MAX_READ: u32 = 1 << 20;
/// How many readahead requests may be under way. To the kernel nearly every read is one, and those that wait for contents
/// from elsewhere must not keep the others from being asked.
const MAX_BACKGROUND: u16 = 1024;

/// Answers the kernel.
pub(crate) struct StoreFilesystem {
    tree: Arc<Tree>,
    invalidations: Arc<Invalidations>,
    /// Watches over what an earlier server left unanswered; set when there may be one.
    resent: Arc<OnceLock<Resent>>,
    /// Whose the store directory seems to be.
    group: Option<u32>,
}

impl StoreFilesystem {
    pub(crate) fn new(
        tree: Arc<Tree>,
        invalidations: Arc<Invalidations>,
        resent: Arc<OnceLock<Resent>>,
        group: Option<u32>,
    ) -> StoreFilesystem {
        StoreFilesystem { tree, invalidations, resent, group }
    }

    /// Leave to answer a request, to be held until then; none when servers keep dying of it.
    fn turn(&self, request: &Request) -> Option<Turn<'_>> {
        match self.resent.get() {
            Some(resent) => resent.turn(request.unique().0),
            None => Some(Turn::first()),
        }
    }

    /// What `stat` shows.
    fn attr(&self, attributes: &Attributes) -> FileAttr {
        match self.group {
            Some(gid) if attributes.id == NodeId::STORE => FileAttr { gid, perm: SHARED_STORE, ..attr(attributes) },
            _ => attr(attributes),
        }
    }

    /// Lists for both kinds of readdir; `add` returns true when the reply is full.
    fn list(
        &self,
        ino: INodeNo,
        cookie: u64,
        add: &mut dyn FnMut(INodeNo, u64, &OsStr, &FileAttr) -> bool,
    ) -> Result<(), TreeError> {
        self.tree.list(NodeId::from(ino.0), cookie, &mut |entry| {
            let attr = self.attr(&entry.attributes);
            match add(attr.ino, entry.next, OsStr::from_bytes(entry.name), &attr) {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        })
    }

    /// To be held until the listing of `ino` has been answered.
    fn listing(&self, ino: INodeNo) -> Option<Listing<'_>> {
        (NodeId::from(ino.0) == NodeId::STORE).then(|| self.invalidations.listing())
    }

    /// The errno for `error`; what is the store's fault rather than the caller's is logged.
    fn errno(&self, ino: INodeNo, asked: &str, error: &TreeError) -> Errno {
        match error {
            TreeError::NotFound => Errno::ENOENT,
            TreeError::Stale => Errno::ESTALE,
            TreeError::NotADirectory => Errno::ENOTDIR,
            TreeError::IsADirectory => Errno::EISDIR,
            TreeError::WrongKind => Errno::EINVAL,
            TreeError::NameTooLong(_) => Errno::ENAMETOOLONG,
            TreeError::TooLarge | TreeError::Truncated { .. } | TreeError::View(_) => {
                let id = NodeId::from(ino.0);
                let path = self.tree.describe(id);
                let digest = self.tree.digest_attribute(id).ok().flatten().map(|attribute| attribute.digest);
                let digest = digest.map_or_else(|| "none".to_owned(), |digest| digest.to_string());
                let error = error as &dyn std::error::Error;
                tracing::error!(path, digest, asked, error, "cannot answer a request of the mount");
                self.tree.report_damage(id);
                Errno::EIO
            }
        }
    }
}

/// What `stat` shows of a node that belongs to root.
fn attr(attributes: &Attributes) -> FileAttr {
    let modified = UNIX_EPOCH + MODIFIED;
    FileAttr {
        ino: INodeNo(attributes.id.into()),
        size: attributes.size,
        blocks: match attributes.kind {
            Kind::Directory | Kind::Symlink => 0,
            Kind::File { .. } => attributes.size.div_ceil(BLOCK),
        },
        atime: modified,
        mtime: modified,
        ctime: modified,
        crtime: modified,
        kind: match attributes.kind {
            Kind::Directory => FileType::Directory,
            Kind::File { .. } => FileType::RegularFile,
            Kind::Symlink => FileType::Symlink,
        },
        perm: attributes.kind.permissions(),
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: PREFERRED_READ,
        flags: 0,
    }
}

/// Answers with an extended attribute's value, or its size when the caller gave no room.
fn reply_xattr(size: u32, value: &[u8], reply: ReplyXattr) {
    match size {
        0 => reply.size(value.len() as u32),
        room if value.len() > room as usize => reply.error(Errno::ERANGE),
        _ => reply.data(value),
    }
}

impl Filesystem for StoreFilesystem {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for capability in [
            InitFlags::FUSE_CACHE_SYMLINKS,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_NO_OPEN_SUPPORT,
            InitFlags::FUSE_NO_OPENDIR_SUPPORT,
        ] {
            // Every one of them only saves round trips: an old kernel without it is slower, not wrong.
            if let Err(missing) = config.add_capabilities(capability) {
                tracing::warn!(?missing, "this kernel's FUSE lacks a capability; the mount will be slower");
            }
        }
        // The largest read follows from the largest write the kernel is told of.
        let _previous = config.set_max_write(MAX_READ);
        let _previous = config.set_max_background(MAX_BACKGROUND);
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let Some(_turn) = self.turn(request) else { return reply.error(Errno::EIO) };
        match self.tree.lookup(NodeId::from(parent.0), name.as_bytes()) {
            Ok(found) => reply.entry(&FOREVER, &attr(&found), GENERATION),
            // An entry with the inode number 0 tells the kernel that the name will never be there. Not in the store
            // directory, where it may be there a moment later.
            Err(TreeError::NotFound) if NodeId::from(parent.0) != NodeId::STORE => {
                let nothing = FileAttr { ino: INodeNo(0), ..attr(&NOTHING) };
                reply.entry(&FOREVER, &nothing, GENERATION);
            }
            Err(error) => reply.error(self.errno(parent, "lookup", &error)),
        }
    }

    fn forget(&self, _: &Request, _: INodeNo, _: u64) {}

    fn getattr(&self, request: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let Some(_turn) = self.turn(request) else { return reply.error(Errno::EIO) };
        match self.tree.attributes(NodeId::from(ino.0)) {
            Ok(attributes) => reply.attr(&FOREVER, &self.attr(&attributes)),
            Err(error) => reply.error(self.errno(ino, "getattr", &error)),
        }
    }

    fn readlink(&self, request: &Request, ino: INodeNo, reply: ReplyData) {
        let Some(_turn) = self.turn(request) else { return reply.error(Errno::EIO) };
        match self.tree.target(NodeId::from(ino.0)) {
            Ok(target) => reply.data(target.as_bytes()),
            Err(error) => reply.error(self.errno(ino, "readlink", &error)),
        }
    }

    fn read(
        &self,
        request: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Some(_turn) = self.turn(request) else { return reply.error(Errno::EIO) };
        match self.tree.read(NodeId::from(ino.0), offset, size as usize) {
            Ok(bytes) => reply.data(&bytes),
            Err(TreeError::View(ViewError::Elsewhere(digest))) => {
                Waiting::new(&self.tree, ino, offset, size, reply).for_blob(&digest);
            }
            Err(error) => reply.error(self.errno(ino, "read", &error)),
        }
    }

    fn readdir(&self, request: &Request, ino: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let Some(_turn) = self.turn(request) else { return reply.error(Errno::EIO) };
        let _until_answered = self.listing(ino);
        match self.list(ino, offset, &mut |ino, next, name, attr| reply.add(ino, next, attr.kind, name)) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(self.errno(ino, "readdir", &error)),
        }
    }

    fn readdirplus(&self, request: &Request, ino: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectoryPlus) {
        let Some(_turn) = self.turn(request) else { return reply.error(Errno::EIO) };
        let _until_answered = self.listing(ino);
        let listed =
            self.list(ino, offset, &mut |ino, next, name, attr| reply.add(ino, next, name, &FOREVER, attr, GENERATION));
        match listed {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(self.errno(ino, "readdirplus", &error)),
        }
    }

    fn statfs(&self, request: &Request, ino: INodeNo, reply: ReplyStatfs) {
        let Some(_turn) = self.turn(request) else { return reply.error(Errno::EIO) };
        match self.tree.space() {
            Ok(space) => reply.statfs(
                space.blocks,
                space.blocks_free,
                space.blocks_available,
                space.files,
                space.files_free,
                space.block_size,
                NAME_MAX as u32,
                space.block_size,
            ),
            Err(error) => reply.error(self.errno(ino, "statfs", &error)),
        }
    }

    fn getxattr(&self, request: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let Some(_turn) = self.turn(request) else { return reply.error(Errno::EIO) };
        match self.tree.digest_attribute(NodeId::from(ino.0)) {
            Ok(Some(attribute)) if name == attribute.name => {
                reply_xattr(size, attribute.digest.to_string().as_bytes(), reply);
            }
            Ok(_) => reply.error(Errno::ENODATA),
            Err(error) => reply.error(self.errno(ino, "getxattr", &error)),
        }
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let Some(_turn) = self.turn(request) else { return reply.error(Errno::EIO) };
        match self.tree.digest_attribute(NodeId::from(ino.0)) {
            Ok(Some(attribute)) => reply_xattr(size, format!("{}\0", attribute.name).as_bytes(), reply),
            Ok(None) => reply_xattr(size, b"", reply),
            Err(error) => reply.error(self.errno(ino, "listxattr", &error)),
        }
    }

    // Refused once, never asked again: the kernel opens and keeps its cache without us.

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.error(Errno::ENOSYS);
    }

    fn opendir(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.error(Errno::ENOSYS);
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    // Without them the kernel does the usual thing by itself.

    fn lseek(&self, _: &Request, _: INodeNo, _: FileHandle, _: i64, _: i32, reply: ReplyLseek) {
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: fuser::IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    // Everything below writes. The mount is read-only, so the kernel refuses these itself; this is the second lock on the
    // same door, for a mount somebody made writable again (`mount -o remount,rw`).

    fn setattr(
        &self,
        _: &Request,
        _: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.error(Errno::EROFS);
    }

    fn mknod(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn symlink(&self, _: &Request, _: INodeNo, _: &OsStr, _: &Path, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn rename(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: INodeNo,
        _: &OsStr,
        _: fuser::RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EROFS);
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: &[u8],
        _: fuser::WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::EROFS);
    }

    fn create(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        reply.error(Errno::EROFS);
    }

    fn setxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: &[u8], _: i32, _: u32, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn fallocate(&self, _: &Request, _: INodeNo, _: FileHandle, _: u64, _: u64, _: i32, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }
}

/// The attributes of nothing at all; the kernel looks at none of them but the number, which the caller sets to 0.
const NOTHING: Attributes = Attributes { id: NodeId::STORE, kind: Kind::Symlink, size: 0 };

impl Kernel for Notifier {
    fn forget_listing(&self) -> io::Result<()> {
        // Offset and length 0: all of the inode's pages, which for a directory are its listing.
        self.inval_inode(INodeNo(NodeId::STORE.into()), 0, 0)
    }

    fn forget_name(&self, name: &str) -> io::Result<()> {
        self.inval_entry(INodeNo(NodeId::STORE.into()), OsStr::new(name))
    }
}
