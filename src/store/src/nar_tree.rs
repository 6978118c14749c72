//! The tree of a NAR, built in the castore from the leaves up on an explicit stack.
//!
//! A directory can be put once all its entries are known, so those of the directories that are open are held in memory:
//! their number has no bound in the format, so the memory has one here. How deep they can lie is limited by the parser.

use std::io::{self, Read};

use castore::engine::Session;
use castore::{Directory, Node, NodeName, SymlinkTarget};
use nix_compat::nar::{NarEvent, NarReader};

use crate::error::{Error, Result};

/// Memory for the entries of all directories that are open at a time: some 400,000 files in one directory.
const OPEN_DIRECTORY_BYTES: usize = 64 << 20;
/// What an entry needs beside its name and target.
const ENTRY_BYTES: usize = 128;

/// The contents of the regular file the parser stands at.
struct Contents<'a, R: Read>(&'a mut NarReader<R>);

impl<R: Read> Read for Contents<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read_contents(buf)
    }
}

/// Entries of a directory that is being read, and the name it has in its parent.
struct Level {
    name: Option<NodeName>,
    entries: Vec<(NodeName, Node)>,
    /// The memory its entries need.
    bytes: usize,
}

/// The memory an entry of an open directory needs.
fn entry_bytes(name: &NodeName, node: &Node) -> usize {
    let target = match node {
        Node::Symlink { target } => target.as_bytes().len(),
        _ => 0,
    };
    ENTRY_BYTES + name.as_bytes().len() + target
}

/// Puts the tree that `nar` describes into the castore, and gives its root.
pub(crate) fn read_tree<R: Read>(nar: &mut NarReader<R>, session: &mut Session) -> Result<Node> {
    let tree = |e: &dyn std::fmt::Display| Error::Tree(e.to_string());
    let mut levels: Vec<Level> = Vec::new();
    let mut name: Option<NodeName> = None;
    let mut root = None;
    let mut open_bytes = 0;
    loop {
        let node = match nar.next()? {
            NarEvent::Regular { executable, size } => {
                let (digest, got) = session.put_blob(&mut Contents(nar))?;
                debug_assert_eq!(got, size);
                Node::File { digest, size: got, executable }
            }
            NarEvent::Symlink { target } => {
                Node::Symlink { target: SymlinkTarget::try_from(target).map_err(|e| tree(&e))? }
            }
            NarEvent::EnterDirectory => {
                levels.push(Level { name: name.take(), entries: Vec::new(), bytes: 0 });
                continue;
            }
            NarEvent::Entry { name: entry } => {
                name = Some(NodeName::try_from(entry).map_err(|e| tree(&e))?);
                continue;
            }
            NarEvent::LeaveDirectory => {
                let Some(level) = levels.pop() else { return Err(Error::Tree("unbalanced directories".into())) };
                open_bytes -= level.bytes;
                let directory = Directory::new(level.entries).map_err(|e| tree(&e))?;
                name = level.name;
                Node::Directory { digest: session.put_directory(&directory)?, size: directory.size() }
            }
            NarEvent::End => break,
        };
        match (levels.last_mut(), name.take()) {
            (Some(level), Some(name)) => {
                let bytes = entry_bytes(&name, &node);
                open_bytes += bytes;
                if open_bytes > OPEN_DIRECTORY_BYTES {
                    return Err(Error::DirectoriesTooLarge { limit: OPEN_DIRECTORY_BYTES });
                }
                level.bytes += bytes;
                level.entries.push((name, node));
            }
            _ => root = Some(node),
        }
    }
    root.ok_or_else(|| Error::Tree("the archive holds nothing".into()))
}

#[cfg(test)]
mod tests {
    use castore::engine::{Engine, Options};
    use nix_compat::nar::NarWriter;

    use super::*;

    /// `directories` beside each other in one, each with links of 4 KiB that need `bytes` together.
    fn wide(directories: usize, bytes: usize) -> Vec<u8> {
        let mut nar = NarWriter::new(Vec::new());
        let target = [b'x'; 4000];
        nar.enter_directory().unwrap();
        for directory in 0..directories {
            nar.entry(format!("{directory:08}").as_bytes()).unwrap();
            nar.enter_directory().unwrap();
            for link in 0..bytes / 4096 {
                nar.entry(format!("{link:08}").as_bytes()).unwrap();
                nar.symlink(&target).unwrap();
            }
            nar.leave_directory().unwrap();
        }
        nar.leave_directory().unwrap();
        nar.finish().unwrap()
    }

    #[test]
    fn open_directories_have_a_bound_and_closed_ones_do_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let engine = Engine::open(dir.path(), Options::default()).unwrap();
        let read = |nar: &[u8]| read_tree(&mut NarReader::new(nar), &mut engine.session());
        assert!(read(&wide(3, OPEN_DIRECTORY_BYTES / 2)).is_ok());
        let refused = read(&wide(1, OPEN_DIRECTORY_BYTES + (1 << 20)));
        assert!(matches!(refused, Err(Error::DirectoriesTooLarge { .. })));
    }
}
