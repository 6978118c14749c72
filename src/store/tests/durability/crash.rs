//! What a crash may leave of a disk: from the log of what was done to it, any disk that the rules allow.
//!
//! The rules are as cruel as POSIX:
//!
//! * An fsync (or fdatasync) of a file makes its bytes and its length durable, and nothing else: **not its name**. A name
//!   that came, went or moved is durable after an fsync of its directory. (ext4, xfs and btrfs keep a new file's name with
//!   its fsync. Nothing here relies on that.)
//! * Of what was not synced, any part may be there. Names are lost and kept one by one, whatever their order. Bytes are
//!   lost and kept page by page, 4 KiB each, also within one write; a page is as it was after some number of the writes to
//!   it. The length is one the file has had since. What was kept of the length and not of the bytes is zero.
//! * A rename is there as a whole or not at all. No page that was synced is touched. No stray bytes turn up.
//! * After an fsync that failed, each page it was about is as it was or as it should have become, and no later fsync says
//!   which (what Linux does).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;

use crate::contents::{Change, Contents, PAGE};
use crate::disk::{Disk, Naming};
use crate::disk::{Node, Nodes, Operation, ROOT, apply_naming};
use crate::random::Random;

/// How much of what was not synced is lost.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Loss {
    /// All of it.
    Everything,
    /// None: a killed process, or luck.
    Nothing,
    /// All names and no bytes, or the other way round.
    OneKind { names: bool },
    /// As a journalling filesystem does it: names in their order up to some point, bytes at random.
    InOrder,
    /// Anything at random.
    Random,
}

impl Loss {
    pub(crate) fn any(random: &mut Random) -> Self {
        match random.below(10) {
            0 => Self::Everything,
            1 => Self::Nothing,
            2 => Self::OneKind { names: random.once_in(2) },
            3 | 4 => Self::InOrder,
            _ => Self::Random,
        }
    }
}

/// The disk at some point of its log: what is durable, and what may be.
pub(crate) struct Replay {
    log: Vec<Operation>,
    at: usize,
    durable: Nodes,
    changes: BTreeMap<u64, Vec<Change>>,
    names: Vec<Naming>,
    /// Says what failed fsyncs have left.
    doubt: Random,
}

impl Replay {
    /// At the beginning of the log.
    pub(crate) fn new(disk: &Disk, seed: u64) -> Self {
        Self {
            log: disk.log(),
            at: 0,
            durable: disk.first().clone(),
            changes: BTreeMap::new(),
            names: Vec::new(),
            doubt: Random::new(seed),
        }
    }

    pub(crate) fn length(&self) -> usize {
        self.log.len()
    }

    /// The position right after each fsync.
    pub(crate) fn syncs(&self) -> Vec<usize> {
        let is_sync = |operation: &Operation| matches!(operation, Operation::Sync(_) | Operation::SyncDirectory(_));
        (1..=self.log.len()).filter(|at| is_sync(&self.log[at - 1])).collect()
    }

    /// Goes on until `to` operations have happened.
    pub(crate) fn advance(&mut self, to: usize) {
        while self.at < to {
            let operation = self.log[self.at].clone();
            self.at += 1;
            match operation {
                Operation::New(node, made) => drop(self.durable.insert(node, made)),
                Operation::Name(naming) => self.names.push(naming),
                Operation::Change(node, change) => self.changes.entry(node).or_default().push(change),
                Operation::Sync(node) => {
                    let changes = self.changes.remove(&node).unwrap_or_default();
                    if let Some(Node::File(contents)) = self.durable.get_mut(&node) {
                        changes.iter().for_each(|change| contents.apply(change));
                    }
                }
                Operation::FailedSync(node) => {
                    let changes = self.changes.remove(&node).unwrap_or_default();
                    if let Some(Node::File(contents)) = self.durable.get_mut(&node) {
                        tear(contents, &changes, &mut self.doubt);
                    }
                }
                Operation::SyncDirectory(synced) => {
                    for naming in std::mem::take(&mut self.names) {
                        let here = match &naming {
                            Naming::Add { directory, .. } | Naming::Remove { directory, .. } => *directory == synced,
                            Naming::Move { from, to, .. } => *from == synced || *to == synced,
                        };
                        if here {
                            apply_naming(&mut self.durable, &naming);
                        } else {
                            self.names.push(naming);
                        }
                    }
                }
            }
        }
    }

    /// A disk that a crash at this point may leave.
    pub(crate) fn image(&self, loss: Loss, random: &mut Random) -> Nodes {
        let mut image = self.durable.clone();
        let in_order = random.below(self.names.len() + 1);
        for (number, naming) in self.names.iter().enumerate() {
            let kept = match loss {
                Loss::Everything => false,
                Loss::Nothing => true,
                Loss::OneKind { names } => !names,
                Loss::InOrder => number < in_order,
                Loss::Random => random.once_in(2),
            };
            if kept {
                apply_naming(&mut image, naming);
            }
        }
        for (node, changes) in &self.changes {
            let Some(Node::File(contents)) = image.get_mut(node) else { continue };
            let all = match loss {
                Loss::Everything => continue,
                Loss::Nothing => true,
                Loss::OneKind { names: false } => continue,
                Loss::OneKind { names: true } => true,
                Loss::InOrder | Loss::Random => match random.below(4) {
                    0 => continue,
                    1 => true,
                    _ => false,
                },
            };
            if all {
                changes.iter().for_each(|change| contents.apply(change));
            } else {
                tear(contents, changes, random);
            }
        }
        image
    }
}

/// Keeps some of `changes`, page by page.
fn tear(contents: &mut Contents, changes: &[Change], random: &mut Random) {
    let mut lengths = vec![contents.length()];
    let mut touched = BTreeSet::new();
    for change in changes {
        let before = lengths.last().copied().unwrap_or_default();
        match change {
            Change::Write(offset, bytes) => {
                let end = offset + bytes.len() as u64;
                touched.extend(offset / PAGE..end.div_ceil(PAGE));
                lengths.push(before.max(end));
            }
            Change::Length(length) => {
                touched.extend(contents.pages().map(|(offset, _)| offset / PAGE).filter(|page| page * PAGE >= *length));
                touched.insert(length / PAGE);
                lengths.push(*length);
            }
        }
    }
    // Every loss of a page is rare in some tears and common in others, lest a long write never survives but for one page.
    let rarity = 1 + random.below(8);
    let mut torn = contents.clone();
    for page in touched {
        let here: Vec<&Change> = changes.iter().filter(|change| concerns(change, page)).collect();
        let kept = if random.once_in(rarity) { random.below(here.len() + 1) } else { here.len() };
        here[..kept].iter().for_each(|change| torn.apply_to_page(page, change));
    }
    let length = if random.once_in(2) { lengths.len() - 1 } else { random.below(lengths.len()) };
    torn.force_length(lengths[length]);
    *contents = torn;
}

fn concerns(change: &Change, page: u64) -> bool {
    match change {
        Change::Write(offset, bytes) => offset / PAGE <= page && page < (offset + bytes.len() as u64).div_ceil(PAGE),
        Change::Length(length) => (page + 1) * PAGE > *length,
    }
}

/// Writes what can be reached from the root to a directory.
pub(crate) fn write_out(nodes: &Nodes, dir: &Path) {
    let mut waiting = vec![(ROOT, dir.to_owned())];
    while let Some((number, path)) = waiting.pop() {
        match nodes.get(&number) {
            Some(Node::Directory(entries)) => {
                fs::create_dir_all(&path).unwrap();
                waiting.extend(entries.iter().map(|(name, node)| (*node, path.join(name))));
            }
            Some(Node::File(contents)) => {
                let file = File::create(&path).unwrap();
                for (offset, page) in contents.pages() {
                    file.write_all_at(page, offset).unwrap();
                }
                file.set_len(contents.length()).unwrap();
            }
            Some(Node::Link(target)) => symlink(target, &path).unwrap(),
            None => unreachable!("a name without a node"),
        }
    }
}
