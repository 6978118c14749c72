//! A filesystem in memory that writes down what is done to it, in order, and every fsync.
//!
//! [`crate::mounted`] shows it to the kernel; [`crate::crash`] makes of its log what a crash might leave. It can also be
//! told to fail, or to lie.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::sync::Arc;

use fuser::Errno;
use parking_lot::Mutex;

use crate::contents::{Change, Contents};

/// The root directory's number.
pub(crate) const ROOT: u64 = 1;

/// A file, directory or link.
#[derive(Clone, Debug)]
pub(crate) enum Node {
    File(Contents),
    Directory(BTreeMap<OsString, u64>),
    Link(PathBuf),
}

/// Everything on a disk.
pub(crate) type Nodes = HashMap<u64, Node>;

/// A name that comes or goes.
#[derive(Clone, Debug)]
pub(crate) enum Naming {
    Add {
        directory: u64,
        name: OsString,
        node: u64,
    },
    Remove {
        directory: u64,
        name: OsString,
        node: u64,
    },
    /// Both halves happen together, as in every filesystem with a journal.
    Move {
        from: u64,
        name: OsString,
        to: u64,
        new_name: OsString,
        node: u64,
    },
}

/// What was done to the disk.
#[derive(Clone, Debug)]
pub(crate) enum Operation {
    /// A node came to be; it has no name yet. A link's target is never seen half written.
    New(u64, Node),
    Name(Naming),
    Change(u64, Change),
    /// fsync or fdatasync of a file that succeeded. No difference is made: what fdatasync may leave out is not looked at.
    Sync(u64),
    /// An fsync that failed. Whether its data reached the disk nobody knows, and no later one says.
    FailedSync(u64),
    SyncDirectory(u64),
}

/// What can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Read,
    Write,
    Sync,
    Create,
}

/// A rule by which calls fail, or are answered with success without anything being done for it.
#[derive(Clone, Debug)]
pub(crate) struct Fault {
    pub(crate) call: Call,
    /// What the file's name ends with.
    pub(crate) suffix: &'static str,
    /// None: the call lies.
    pub(crate) error: Option<Errno>,
    /// So many calls are hit.
    pub(crate) times: usize,
}

/// The disk; see the module.
pub(crate) struct Disk {
    state: Mutex<State>,
    /// What it held in the beginning, all of it durable.
    first: Nodes,
}

struct State {
    nodes: Nodes,
    /// The name each node had last, for [`Fault`]s.
    names: HashMap<u64, OsString>,
    next: u64,
    log: Vec<Operation>,
    faults: Vec<Fault>,
}

impl Disk {
    /// A disk that holds `first`, or nothing but its root.
    pub(crate) fn new(first: Option<Nodes>) -> Arc<Self> {
        let first = first.unwrap_or_else(|| HashMap::from([(ROOT, Node::Directory(BTreeMap::new()))]));
        let mut names = HashMap::new();
        for node in first.values() {
            if let Node::Directory(entries) = node {
                names.extend(entries.iter().map(|(name, node)| (*node, name.clone())));
            }
        }
        let next = first.keys().max().map_or(ROOT, |last| *last) + 1;
        let state = State { nodes: first.clone(), names, next, log: Vec::new(), faults: Vec::new() };
        Arc::new(Self { state: Mutex::new(state), first })
    }

    /// What it held in the beginning.
    pub(crate) fn first(&self) -> &Nodes {
        &self.first
    }

    /// How many operations there were so far.
    pub(crate) fn position(&self) -> usize {
        self.state.lock().log.len()
    }

    /// All operations so far.
    pub(crate) fn log(&self) -> Vec<Operation> {
        self.state.lock().log.clone()
    }

    /// Adds a fault.
    pub(crate) fn inject(&self, fault: Fault) {
        self.state.lock().faults.push(fault);
    }

    /// Takes all faults back.
    pub(crate) fn heal(&self) {
        self.state.lock().faults.clear();
    }

    /// What looking at the state gives.
    pub(crate) fn with_node<T>(&self, node: u64, look: impl FnOnce(&Node) -> T) -> Result<T, Errno> {
        self.state.lock().nodes.get(&node).map(look).ok_or(Errno::ENOENT)
    }

    pub(crate) fn child(&self, directory: u64, name: &OsStr) -> Result<u64, Errno> {
        self.state.lock().child(directory, name)
    }

    pub(crate) fn read(&self, node: u64, offset: u64, length: usize) -> Result<Vec<u8>, Errno> {
        let mut state = self.state.lock();
        if let Some(Some(error)) = state.fault(Call::Read, node) {
            return Err(error);
        }
        match state.nodes.get(&node) {
            Some(Node::File(contents)) => Ok(contents.read(offset, length)),
            _ => Err(Errno::EISDIR),
        }
    }

    /// Makes a node under a name that is not taken.
    pub(crate) fn make(&self, directory: u64, name: &OsStr, made: Node) -> Result<u64, Errno> {
        let mut state = self.state.lock();
        if state.child(directory, name).is_ok() {
            return Err(Errno::EEXIST);
        }
        let node = state.next;
        state.names.insert(node, name.to_owned());
        if let Some(Some(error)) = state.fault(Call::Create, node) {
            return Err(error);
        }
        state.next += 1;
        state.log.push(Operation::New(node, made.clone()));
        state.nodes.insert(node, made);
        state.name(Naming::Add { directory, name: name.to_owned(), node });
        Ok(node)
    }

    pub(crate) fn remove(&self, directory: u64, name: &OsStr) -> Result<(), Errno> {
        let mut state = self.state.lock();
        let node = state.child(directory, name)?;
        if matches!(state.nodes.get(&node), Some(Node::Directory(entries)) if !entries.is_empty()) {
            return Err(Errno::ENOTEMPTY);
        }
        state.name(Naming::Remove { directory, name: name.to_owned(), node });
        Ok(())
    }

    pub(crate) fn rename(&self, from: u64, name: &OsStr, to: u64, new_name: &OsStr) -> Result<(), Errno> {
        let mut state = self.state.lock();
        let node = state.child(from, name)?;
        state.names.insert(node, new_name.to_owned());
        state.name(Naming::Move { from, name: name.to_owned(), to, new_name: new_name.to_owned(), node });
        Ok(())
    }

    pub(crate) fn change(&self, node: u64, change: Change) -> Result<(), Errno> {
        let mut state = self.state.lock();
        if let Some(Some(error)) = state.fault(Call::Write, node) {
            return Err(error);
        }
        match state.nodes.get_mut(&node) {
            Some(Node::File(contents)) => contents.apply(&change),
            _ => return Err(Errno::EISDIR),
        }
        state.log.push(Operation::Change(node, change));
        Ok(())
    }

    pub(crate) fn sync(&self, node: u64) -> Result<(), Errno> {
        let mut state = self.state.lock();
        match state.fault(Call::Sync, node) {
            Some(None) => return Ok(()),
            Some(Some(error)) => {
                state.log.push(Operation::FailedSync(node));
                return Err(error);
            }
            None => {}
        }
        let operation = match state.nodes.get(&node) {
            Some(Node::Directory(_)) => Operation::SyncDirectory(node),
            _ => Operation::Sync(node),
        };
        state.log.push(operation);
        Ok(())
    }
}

impl State {
    fn child(&self, directory: u64, name: &OsStr) -> Result<u64, Errno> {
        match self.nodes.get(&directory) {
            Some(Node::Directory(entries)) => entries.get(name).copied().ok_or(Errno::ENOENT),
            Some(_) => Err(Errno::ENOTDIR),
            None => Err(Errno::ENOENT),
        }
    }

    fn name(&mut self, naming: Naming) {
        apply_naming(&mut self.nodes, &naming);
        self.log.push(Operation::Name(naming));
    }

    /// Some(what happens) when a fault hits this call.
    fn fault(&mut self, call: Call, node: u64) -> Option<Option<Errno>> {
        let name = self.names.get(&node)?.to_str()?;
        let hit = |fault: &&mut Fault| fault.call == call && fault.times > 0 && name.ends_with(fault.suffix);
        let fault = self.faults.iter_mut().find(hit)?;
        fault.times -= 1;
        Some(fault.error)
    }
}

/// Changes the directories. A name that now stands for something else is left alone: of two changes that were never
/// synced, the later may have survived alone.
pub(crate) fn apply_naming(nodes: &mut Nodes, naming: &Naming) {
    let mut entries = |directory: &u64, change: &mut dyn FnMut(&mut BTreeMap<OsString, u64>)| {
        if let Some(Node::Directory(entries)) = nodes.get_mut(directory) {
            change(entries);
        }
    };
    match naming {
        Naming::Add { directory, name, node } => entries(directory, &mut |entries| {
            entries.insert(name.clone(), *node);
        }),
        Naming::Remove { directory, name, node } => entries(directory, &mut |entries| {
            if entries.get(name) == Some(node) {
                entries.remove(name);
            }
        }),
        Naming::Move { from, name, to, new_name, node } => {
            entries(from, &mut |entries| {
                if entries.get(name) == Some(node) {
                    entries.remove(name);
                }
            });
            entries(to, &mut |entries| {
                entries.insert(new_name.clone(), *node);
            });
        }
    }
}
