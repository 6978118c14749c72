//! The filesystem without a kernel: which node a number or a name means, and what is in it.

use std::ops::ControlFlow;
use std::sync::Arc;

use bytes::Bytes;
use castore::{Digest, Directory, Node};
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use store::view::{Root, Space, StoreView, ViewError};

use crate::NodeId;

/// How many resolved nodes are kept; one takes about 100 bytes.
const NODE_CACHE: usize = 16 * 1024;
/// How much memory the decoded directories that are kept may take, in bytes.
pub(crate) const DIRECTORY_CACHE_BYTES: u64 = 32 << 20;
/// What an average directory takes; only sizes the cache's own table.
const DIRECTORY_BYTES: u64 = 4 << 10;
/// How many store paths are asked for at once to list the store directory.
const PATHS_PER_BATCH: usize = 256;
/// The longest name an entry can have, in bytes.
pub(crate) const NAME_MAX: usize = 255;

/// Where the first real entry of a directory is resumed: 1 stands after `.`, 2 after `..`.
const COOKIE_FIRST_ENTRY: u64 = 2;

/// A store seen as a tree of numbered nodes.
pub struct Tree {
    view: Arc<dyn StoreView>,
    nodes: Cache<NodeId, Node>,
    directories: Cache<Digest, Arc<Directory>, DirectoryWeight>,
}

/// What kind of thing a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file.
    File {
        /// Whether it may be executed.
        executable: bool,
    },
    /// A symbolic link.
    Symlink,
}

impl Kind {
    /// The permission bits: nobody may write, everybody may read.
    pub fn permissions(self) -> u16 {
        match self {
            Kind::Directory | Kind::File { executable: true } => 0o555,
            Kind::File { executable: false } => 0o444,
            Kind::Symlink => 0o777,
        }
    }
}

/// What `stat` shows of a node. Owner root, one link and modification time 1 are the same for all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// The node's number.
    pub id: NodeId,
    /// Its kind.
    pub kind: Kind,
    /// Bytes of a file or of a symlink's target; entries at every depth below a directory.
    pub size: u64,
}

impl Attributes {
    fn of(id: NodeId, node: &Node) -> Attributes {
        let (kind, size) = match node {
            Node::Directory { size, .. } => (Kind::Directory, *size),
            Node::File { size, executable, .. } => (Kind::File { executable: *executable }, *size),
            Node::Symlink { target } => (Kind::Symlink, target.as_bytes().len() as u64),
        };
        Attributes { id, kind, size }
    }
}

/// One entry of a listing.
#[derive(Clone, Copy, Debug)]
pub struct Listed<'a> {
    /// Its name.
    pub name: &'a [u8],
    /// The cookie that resumes the listing after this entry.
    pub next: u64,
    /// What it is.
    pub attributes: Attributes,
}

/// The extended attribute that tells a node's digest, named as tvix names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DigestAttribute {
    /// The attribute's name.
    pub name: &'static str,
    /// The digest; the value is its text form.
    pub digest: Digest,
}

/// Why a node cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// There is no entry of this name.
    #[error("no such entry")]
    NotFound,
    /// The number means nothing (any more): its store path was deleted.
    #[error("the node belongs to no valid store path")]
    Stale,
    /// A listing or a lookup was asked of something else than a directory.
    #[error("not a directory")]
    NotADirectory,
    /// Contents were asked of a directory.
    #[error("is a directory")]
    IsADirectory,
    /// Contents were asked of a symlink, or a target of something else.
    #[error("neither a file to read nor a link to follow")]
    WrongKind,
    /// A name longer than any entry's.
    #[error("name of {0} bytes is too long")]
    NameTooLong(usize),
    /// The tree has more nodes than 32 bits can number.
    #[error("the tree has more entries than inode numbers can tell apart")]
    TooLarge,
    /// A blob ends before the size its node claims.
    #[error("blob {digest} ends at byte {end}, its node claims {size} bytes")]
    Truncated {
        /// The blob.
        digest: Digest,
        /// Where it ended.
        end: u64,
        /// Where it should have ended.
        size: u64,
    },
    /// The store could not answer.
    #[error(transparent)]
    View(#[from] ViewError),
}

impl Tree {
    /// The tree of a store.
    pub fn new(view: Arc<dyn StoreView>) -> Tree {
        Tree::with_cache(view, DIRECTORY_CACHE_BYTES)
    }

    /// The tree of a store, with so many bytes of decoded directories in memory.
    pub(crate) fn with_cache(view: Arc<dyn StoreView>, bytes: u64) -> Tree {
        let directories = (bytes / DIRECTORY_BYTES).max(16) as usize;
        Tree {
            view,
            nodes: Cache::new(NODE_CACHE),
            directories: Cache::with_weighter(directories, bytes, DirectoryWeight),
        }
    }

    /// Bytes of the decoded directories in memory.
    pub(crate) fn cached_bytes(&self) -> u64 {
        self.directories.weight()
    }

    /// What `stat` shows of a node.
    pub fn attributes(&self, id: NodeId) -> Result<Attributes, TreeError> {
        if id == NodeId::STORE {
            return Ok(STORE_ATTRIBUTES);
        }
        Ok(Attributes::of(id, &self.node(id)?))
    }

    /// The entry of `parent` called `name`.
    pub fn lookup(&self, parent: NodeId, name: &[u8]) -> Result<Attributes, TreeError> {
        if name.len() > NAME_MAX {
            return Err(TreeError::NameTooLong(name.len()));
        }
        if parent == NodeId::STORE {
            if name == LINKS {
                return Ok(Attributes::of(NodeId::LINKS, &links()));
            }
            let name = std::str::from_utf8(name).map_err(|_| TreeError::NotFound)?;
            let root = self.view.lookup(name)?.ok_or(TreeError::NotFound)?;
            let id = NodeId::of_path(root.number);
            let attributes = Attributes::of(id, &root.node);
            self.nodes.insert(id, root.node);
            return Ok(attributes);
        }
        let directory = self.directory_at(parent)?;
        let (index, node) = directory.find(name).ok_or(TreeError::NotFound)?;
        Ok(Attributes::of(child(parent, &directory, index)?, node))
    }

    /// Lists a directory from `cookie` (0 for the beginning, later [`Listed::next`]) until `each` breaks.
    ///
    /// Cookies stay right while store paths come and go: the store directory is listed in the order of path numbers and
    /// resumed by number, so a path that is there from beginning to end is listed exactly once.
    pub fn list(
        &self,
        id: NodeId,
        cookie: u64,
        each: &mut dyn FnMut(Listed<'_>) -> ControlFlow<()>,
    ) -> Result<(), TreeError> {
        let own = self.attributes(id)?;
        if own.kind != Kind::Directory {
            return Err(TreeError::NotADirectory);
        }
        // The kernel knows the parent better than we do and shows its own number for `..`.
        for (index, name) in [b".".as_slice(), b".."].into_iter().enumerate() {
            let next = index as u64 + 1;
            if cookie < next && each(Listed { name, next, attributes: own }).is_break() {
                return Ok(());
            }
        }
        let cookie = cookie.max(COOKIE_FIRST_ENTRY);
        if id == NodeId::STORE { self.list_paths(cookie, each) } else { self.list_entries(id, cookie, each) }
    }

    /// Where a symlink points.
    pub fn target(&self, id: NodeId) -> Result<castore::SymlinkTarget, TreeError> {
        match self.node(id)? {
            Node::Symlink { target } => Ok(target),
            Node::Directory { .. } | Node::File { .. } => Err(TreeError::WrongKind),
        }
    }

    /// Up to `len` bytes of a file from `offset`; fewer only at its end.
    pub fn read(&self, id: NodeId, offset: u64, len: usize) -> Result<Bytes, TreeError> {
        let (digest, size) = match self.node(id)? {
            Node::File { digest, size, .. } => (digest, size),
            Node::Directory { .. } => return Err(TreeError::IsADirectory),
            Node::Symlink { .. } => return Err(TreeError::WrongKind),
        };
        let rest = size.saturating_sub(offset);
        let wanted = usize::try_from(rest).map_or(len, |rest| rest.min(len));
        if wanted == 0 {
            return Ok(Bytes::new());
        }
        let mut bytes = self.view.read(&digest, offset, wanted)?;
        // The kernel takes a short answer for the end of the file and fills up with zeros: never give it one.
        if bytes.len() < wanted {
            return Err(TreeError::Truncated { digest, end: offset + bytes.len() as u64, size });
        }
        bytes.truncate(wanted);
        Ok(bytes)
    }

    /// Has a blob fetched of which a read said that it is elsewhere; see [`StoreView::bring`].
    pub fn bring(&self, digest: &Digest, then: store::view::Then) {
        self.view.bring(digest, then);
    }

    /// The attribute that tells a file's or directory's digest. Symlinks and the store directory have none.
    pub fn digest_attribute(&self, id: NodeId) -> Result<Option<DigestAttribute>, TreeError> {
        if id == NodeId::STORE {
            return Ok(None);
        }
        Ok(match self.node(id)? {
            Node::Directory { digest, .. } => {
                Some(DigestAttribute { name: "user.tvix.castore.directory.digest", digest })
            }
            Node::File { digest, .. } => Some(DigestAttribute { name: "user.tvix.castore.blob.digest", digest }),
            Node::Symlink { .. } => None,
        })
    }

    /// Room on the filesystem that holds the store.
    pub fn space(&self) -> Result<Space, TreeError> {
        Ok(self.view.space()?)
    }

    /// The path of a node below the store directory, for messages; its number where the path cannot be found.
    pub fn describe(&self, id: NodeId) -> String {
        self.path_of(id).unwrap_or_else(|_| format!("(inode {})", u64::from(id)))
    }

    /// Tells the store that a node cannot be read, so that its path may be repaired.
    pub fn report_damage(&self, id: NodeId) {
        if let Ok(Some(root)) = self.view.by_number(id.number()) {
            self.view.report_damage(&root.path);
        }
    }

    /// Drops what is remembered of a store path that was removed.
    ///
    /// Nodes below its root may stay in the cache: only a process that holds one of them open can still ask for it, and
    /// numbers are never given to another path, so it sees the bytes it opened or an error, never others.
    pub fn forget_path(&self, number: u32) {
        self.nodes.remove(&NodeId::of_path(number));
    }

    fn list_paths(&self, cookie: u64, each: &mut dyn FnMut(Listed<'_>) -> ControlFlow<()>) -> Result<(), TreeError> {
        let mut after = u32::try_from(cookie - 1).map_err(|_| TreeError::Stale)?;
        loop {
            let roots = self.view.list(after, PATHS_PER_BATCH)?;
            let Some(last) = roots.last() else { return Ok(()) };
            after = last.number;
            for Root { number, path, node } in &roots {
                let listed = Listed {
                    name: path.base_name().as_bytes(),
                    next: u64::from(*number) + 1,
                    attributes: Attributes::of(NodeId::of_path(*number), node),
                };
                if each(listed).is_break() {
                    return Ok(());
                }
            }
        }
    }

    fn list_entries(
        &self,
        id: NodeId,
        cookie: u64,
        each: &mut dyn FnMut(Listed<'_>) -> ControlFlow<()>,
    ) -> Result<(), TreeError> {
        let directory = self.directory_at(id)?;
        let first = usize::try_from(cookie - COOKIE_FIRST_ENTRY).unwrap_or(usize::MAX);
        for index in first..directory.len() {
            let Some((name, node)) = directory.entry(index) else { break };
            let listed = Listed {
                name: name.as_bytes(),
                next: COOKIE_FIRST_ENTRY + index as u64 + 1,
                attributes: Attributes::of(child(id, &directory, index)?, node),
            };
            if each(listed).is_break() {
                break;
            }
        }
        Ok(())
    }

    /// The node of a number that is not the store directory's.
    fn node(&self, id: NodeId) -> Result<Node, TreeError> {
        if id == NodeId::LINKS {
            return Ok(links());
        }
        if let Some(node) = self.nodes.get(&id) {
            return Ok(node);
        }
        let root = self.view.by_number(id.number())?.ok_or(TreeError::Stale)?;
        let node = self.descend(root.node, id.position(), &mut |_| {})?;
        self.nodes.insert(id, node.clone());
        Ok(node)
    }

    /// The node at `position` of the tree under `root`; `step` sees the names on the way.
    fn descend(&self, root: Node, position: u32, step: &mut dyn FnMut(&[u8])) -> Result<Node, TreeError> {
        let mut node = root;
        let mut rest = u64::from(position);
        while rest > 0 {
            let Node::Directory { digest, .. } = &node else { return Err(TreeError::Stale) };
            let directory = self.directory(digest)?;
            let (index, below) = directory.locate(rest).ok_or(TreeError::Stale)?;
            let (name, next) = directory.entry(index).ok_or(TreeError::Stale)?;
            step(name.as_bytes());
            rest = below;
            node = next.clone();
        }
        Ok(node)
    }

    fn path_of(&self, id: NodeId) -> Result<String, TreeError> {
        let root = self.view.by_number(id.number())?.ok_or(TreeError::Stale)?;
        let mut path = root.path.base_name().to_owned();
        self.descend(root.node, id.position(), &mut |name| {
            path.push('/');
            path.push_str(&String::from_utf8_lossy(name));
        })?;
        Ok(path)
    }

    fn directory_at(&self, id: NodeId) -> Result<Arc<Directory>, TreeError> {
        match self.node(id)? {
            Node::Directory { digest, .. } => self.directory(&digest),
            Node::File { .. } | Node::Symlink { .. } => Err(TreeError::NotADirectory),
        }
    }

    fn directory(&self, digest: &Digest) -> Result<Arc<Directory>, TreeError> {
        if let Some(directory) = self.directories.get(digest) {
            return Ok(directory);
        }
        let directory = self.view.directory(digest)?;
        self.directories.insert(*digest, Arc::clone(&directory));
        Ok(directory)
    }
}

impl std::fmt::Debug for Tree {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tree").finish_non_exhaustive()
    }
}

/// A directory of stock's that it makes, if it is not there, before anything else: run as root without the daemon it would
/// stop there, because the mount is read-only, and not tell why. It is empty, and listed nowhere.
const LINKS: &[u8] = b".links";

fn links() -> Node {
    Directory::default().to_node()
}

/// Stock Nix shows the store directory as writable by the build group; here nobody writes past the daemon.
const STORE_ATTRIBUTES: Attributes = Attributes { id: NodeId::STORE, kind: Kind::Directory, size: 0 };

/// The number of the entry at `index` of the directory that `parent` stands for.
fn child(parent: NodeId, directory: &Directory, index: usize) -> Result<NodeId, TreeError> {
    parent.descendant(directory.position(index)).ok_or(TreeError::TooLarge)
}

#[derive(Clone)]
struct DirectoryWeight;

impl Weighter<Digest, Arc<Directory>> for DirectoryWeight {
    fn weight(&self, _: &Digest, directory: &Arc<Directory>) -> u64 {
        (size_of::<Digest>() + directory.memory()) as u64
    }
}
