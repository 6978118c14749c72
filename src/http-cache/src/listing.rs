//! `<hash>.ls`: the tree of a path as JSON, as stock writes it beside a narinfo (version 1).
//!
//! `{"root":{"entries":{…},"type":"directory"},"version":1}`; a regular file has `size`, `narOffset` (where its contents
//! lie in the NAR, in bytes) and perhaps `executable`, a link its `target`.

use std::io::{self, Write};
use std::sync::Arc;

use castore::{Directory, Node};
use nix_compat::nar::NarWriter;
use store::Store;
use store::view::StoreView as _;

use crate::failure::Failure;

/// Writes the listing of a tree.
///
/// # Errors
/// Failures of the castore or of `out`; a name that is not UTF-8, which JSON cannot express and stock does not write
/// either.
pub(crate) fn write(store: &Store, root: &Node, out: &mut dyn Write) -> Result<(), Failure> {
    // Not to be kept: it knows where contents lie.
    let mut lister = Lister { store, nar: NarWriter::new(io::sink()), out, levels: Vec::new() };
    lister.out.write_all(b"{\"root\":")?;
    lister.node(root)?;
    while let Some((directory, at)) = lister.levels.last_mut() {
        let directory = directory.clone();
        let first = *at == 0;
        *at += 1;
        match directory.entry(*at - 1) {
            Some((name, node)) => {
                lister.out.write_all(if first { b"" } else { b"," })?;
                lister.text(name.as_bytes())?;
                lister.out.write_all(b":")?;
                lister.nar.entry(name.as_bytes())?;
                lister.node(node)?;
            }
            None => {
                lister.levels.pop();
                lister.nar.leave_directory()?;
                lister.out.write_all(b"},\"type\":\"directory\"}")?;
            }
        }
    }
    Ok(lister.out.write_all(b",\"version\":1}")?)
}

struct Lister<'a> {
    store: &'a Store,
    nar: NarWriter<io::Sink>,
    out: &'a mut dyn Write,
    /// The directories around the present entry, each with how many of its entries have begun.
    levels: Vec<(Arc<Directory>, usize)>,
}

impl Lister<'_> {
    /// Writes a file or link, or begins a directory.
    fn node(&mut self, node: &Node) -> Result<(), Failure> {
        match node {
            Node::Directory { digest, .. } => {
                self.nar.enter_directory()?;
                self.levels.push((self.store.directory(digest)?, 0));
                self.out.write_all(b"{\"entries\":{")?;
            }
            Node::File { size, executable, .. } => {
                self.nar.regular_header(*executable, *size)?;
                let offset = self.nar.position();
                self.nar.empty_contents(*size)?;
                self.nar.end_regular()?;
                let executable = if *executable { "\"executable\":true," } else { "" };
                write!(self.out, "{{{executable}\"narOffset\":{offset},\"size\":{size},\"type\":\"regular\"}}")?;
            }
            Node::Symlink { target } => {
                self.nar.symlink(target.as_bytes())?;
                self.out.write_all(b"{\"target\":")?;
                self.text(target.as_bytes())?;
                self.out.write_all(b",\"type\":\"symlink\"}")?;
            }
        }
        Ok(())
    }

    fn text(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let text = std::str::from_utf8(bytes)
            .map_err(|_| io::Error::other(format!("the name '{}' is not UTF-8", bytes.escape_ascii())))?;
        Ok(serde_json::to_writer(&mut self.out, text).map_err(io::Error::from)?)
    }
}
