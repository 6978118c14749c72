//! The disk as a mounted FUSE filesystem. Nothing is cached but what the kernel itself keeps in step, so every call of
//! the program under test arrives at the disk, in its order.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, Session, SessionACL, TimeOrNow, WriteFlags,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use crate::contents::{Change, Contents, PAGE};
use crate::disk::{Disk, Node};
use crate::load::ROOTS;

/// Nobody but the kernel changes anything, so what it knows stays true.
const KNOWN: Duration = Duration::from_secs(3600);
const GENERATION: Generation = Generation(0);
const HANDLE: FileHandle = FileHandle(0);
/// The largest write in one piece, in bytes.
const MAX_WRITE: u32 = 1 << 20;
/// Blocks of [`PAGE`] bytes that are said to be free: as few as there is a reserve with, since writing a large one would be
/// most of what a crash can fall into.
const FREE: u64 = 1 << 16;

/// A disk that is mounted; unmounted when dropped.
pub(crate) struct Mounted {
    pub(crate) disk: Arc<Disk>,
    dir: tempfile::TempDir,
    server: Option<JoinHandle<io::Result<()>>>,
}

impl Mounted {
    /// Why nothing can be mounted here, if so.
    pub(crate) fn obstacle() -> Option<&'static str> {
        if !nix::unistd::geteuid().is_root() {
            Some("mounting the recording filesystem needs root")
        } else if !Path::new("/dev/fuse").exists() {
            Some("there is no /dev/fuse")
        } else {
            None
        }
    }

    pub(crate) fn new(disk: Arc<Disk>) -> Self {
        stay_alone();
        let dir = tempfile::Builder::new().prefix("castored-disk-").tempdir_in("/var/tmp").unwrap();
        let device = OpenOptions::new().read(true).write(true).open("/dev/fuse").unwrap();
        let data = format!("fd={},rootmode=40000,user_id=0,group_id=0,default_permissions", device.as_raw_fd());
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
        mount(Some("recorder"), dir.path(), Some("fuse.recorder"), flags, Some(data.as_str())).unwrap();
        let mut config = Config::default();
        config.n_threads = Some(2);
        config.acl = SessionACL::Owner;
        let session = Session::from_fd(Fuse(Arc::clone(&disk)), device.into(), config.acl, config).unwrap();
        let server = std::thread::Builder::new().name("recorder".into()).spawn(move || session.run()).unwrap();
        Self { disk, dir, server: Some(server) }
    }

    /// The state directory for a store, as the daemon has made it: with names that are durable.
    pub(crate) fn state(&self) -> PathBuf {
        let mut dir = self.dir.path().to_owned();
        for name in Path::new("state").join(ROOTS).components() {
            let parent = dir.clone();
            dir.push(name);
            std::fs::create_dir_all(&dir).unwrap();
            File::open(parent).unwrap().sync_all().unwrap();
        }
        self.dir.path().join("state")
    }
}

/// Gives this thread, and those it starts, a mount namespace of their own: somebody who makes one meanwhile would get a
/// copy of what is mounted here, and it would not end before that one does.
fn stay_alone() {
    thread_local! {
        static ALONE: () = {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        };
    }
    ALONE.with(|()| ());
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if umount2(self.dir.path(), MntFlags::MNT_DETACH).is_ok()
            && let Some(server) = self.server.take()
            && !std::thread::panicking()
        {
            // Ends when the last file is closed, which is before this unless a test failed.
            let _ = server.join();
        }
    }
}

struct Fuse(Arc<Disk>);

impl Fuse {
    fn attr(&self, node: u64) -> Result<FileAttr, Errno> {
        self.0.with_node(node, |found| {
            let (kind, perm, size) = match found {
                Node::File(contents) => (FileType::RegularFile, 0o644, contents.length()),
                Node::Directory(_) => (FileType::Directory, 0o755, 0),
                Node::Link(target) => (FileType::Symlink, 0o777, target.as_os_str().len() as u64),
            };
            FileAttr {
                ino: INodeNo(node),
                size,
                blocks: size.div_ceil(512),
                atime: UNIX_EPOCH,
                mtime: UNIX_EPOCH,
                ctime: UNIX_EPOCH,
                crtime: UNIX_EPOCH,
                kind,
                perm,
                nlink: 1,
                uid: 0,
                gid: 0,
                rdev: 0,
                blksize: PAGE as u32,
                flags: 0,
            }
        })
    }

    fn entry(&self, found: Result<u64, Errno>, reply: ReplyEntry) {
        match found.and_then(|node| self.attr(node)) {
            Ok(attr) => reply.entry(&KNOWN, &attr, GENERATION),
            Err(error) => reply.error(error),
        }
    }
}

fn empty(result: Result<(), Errno>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error),
    }
}

impl Filesystem for Fuse {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let _previous = config.set_max_write(MAX_WRITE);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.entry(self.0.child(parent.0, name), reply);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attr(ino.0) {
            Ok(attr) => reply.attr(&KNOWN, &attr),
            Err(error) => reply.error(error),
        }
    }

    /// Only lengths are kept; modes and owners are not what this is about.
    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let changed = size.map_or(Ok(()), |size| self.0.change(ino.0, Change::Length(size)));
        match changed.and_then(|()| self.attr(ino.0)) {
            Ok(attr) => reply.attr(&KNOWN, &attr),
            Err(error) => reply.error(error),
        }
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        let target = self.0.with_node(ino.0, |node| match node {
            Node::Link(target) => Ok(target.clone()),
            _ => Err(Errno::EINVAL),
        });
        match target.and_then(|target| target) {
            Ok(target) => reply.data(target.as_os_str().as_bytes()),
            Err(error) => reply.error(error),
        }
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        self.entry(self.0.make(parent.0, name, Node::Directory(Default::default())), reply);
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(self.0.remove(parent.0, name), reply);
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(self.0.remove(parent.0, name), reply);
    }

    fn symlink(&self, _: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        self.entry(self.0.make(parent.0, name, Node::Link(target.to_owned())), reply);
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let taken = || self.0.child(new_parent.0, new_name).is_ok();
        let result = match flags {
            RenameFlags::RENAME_NOREPLACE if taken() => Err(Errno::EEXIST),
            flags if flags.intersects(!RenameFlags::RENAME_NOREPLACE) => Err(Errno::EINVAL),
            _ => self.0.rename(parent.0, name, new_parent.0, new_name),
        };
        empty(result, reply);
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // Past the page cache: every read and write of the program is one here.
        reply.opened(HANDLE, FopenFlags::FOPEN_DIRECT_IO);
    }

    fn create(&self, _: &Request, parent: INodeNo, name: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        let made = self.0.make(parent.0, name, Node::File(Contents::default()));
        match made.and_then(|node| self.attr(node)) {
            Ok(attr) => reply.created(&KNOWN, &attr, GENERATION, HANDLE, FopenFlags::FOPEN_DIRECT_IO),
            Err(error) => reply.error(error),
        }
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.0.read(ino.0, offset, size as usize) {
            Ok(bytes) => reply.data(&bytes),
            Err(error) => reply.error(error),
        }
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.0.change(ino.0, Change::Write(offset, data.into())) {
            Ok(()) => reply.written(data.len() as u32),
            Err(error) => reply.error(error),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        empty(self.0.sync(ino.0), reply);
    }

    fn fsyncdir(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        empty(self.0.sync(ino.0), reply);
    }

    fn readdir(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let listed = self.0.with_node(ino.0, |node| match node {
            Node::Directory(entries) => Ok(entries.clone()),
            _ => Err(Errno::ENOTDIR),
        });
        match listed.and_then(|listed| listed) {
            Ok(entries) => {
                for (position, (name, node)) in entries.iter().enumerate().skip(offset as usize) {
                    let kind = self.attr(*node).map_or(FileType::RegularFile, |attr| attr.kind);
                    if reply.add(INodeNo(*node), position as u64 + 1, kind, name) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(error) => reply.error(error),
        }
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        reply.statfs(FREE, FREE, FREE, FREE, FREE, PAGE as u32, 255, PAGE as u32);
    }
}
