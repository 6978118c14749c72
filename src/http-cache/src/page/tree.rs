//! The files of a path.

use std::sync::Arc;

use castore::{Directory, Node};
use store::Store;
use store::view::{StoreView as _, ViewError};

use super::html::{Text, lossy, size};
use crate::limits::MAX_SHOWN_ENTRIES;

/// Directories that are open when the page is: those so deep.
const OPEN_DEPTH: usize = 2;
/// Characters of a name or target that are shown.
const MAX_SHOWN_NAME: usize = 255;

/// Writes the tree as HTML, up to [`MAX_SHOWN_ENTRIES`] entries.
pub(super) fn write(store: &Store, root: &Node, out: &mut String) -> Result<(), ViewError> {
    let Node::Directory { digest, .. } = root else {
        *out += "<ul>\n";
        leaf(root, b"", out);
        *out += "</ul>\n";
        return Ok(());
    };
    let mut levels: Vec<(Arc<Directory>, usize)> = vec![(store.directory(digest)?, 0)];
    *out += "<ul>\n";
    let mut left = MAX_SHOWN_ENTRIES;
    while let Some((directory, at)) = levels.last_mut() {
        let directory = directory.clone();
        *at += 1;
        match directory.entry(*at - 1) {
            Some(_) if left == 0 => break,
            Some((name, Node::Directory { digest, .. })) => {
                left -= 1;
                let inner = store.directory(digest)?;
                let open = if levels.len() < OPEN_DEPTH { " open" } else { "" };
                let name = lossy(name.as_bytes(), MAX_SHOWN_NAME);
                *out += &format!(
                    "<li><details{open}><summary>{}/ <small>{}</small></summary><ul>\n",
                    Text(&name),
                    inner.len()
                );
                levels.push((inner, 0));
            }
            Some((name, node)) => {
                left -= 1;
                leaf(node, name.as_bytes(), out);
            }
            None => {
                levels.pop();
                *out += if levels.is_empty() { "</ul>\n" } else { "</ul></details>\n" };
            }
        }
    }
    if !levels.is_empty() {
        (1..levels.len()).for_each(|_| *out += "</ul></details>\n");
        *out += &format!("</ul>\n<p>Only the first {MAX_SHOWN_ENTRIES} are shown; the listing has all.\n");
    }
    Ok(())
}

fn leaf(node: &Node, name: &[u8], out: &mut String) {
    let name = lossy(name, MAX_SHOWN_NAME);
    let name = Text(&name);
    *out += &match node {
        Node::File { size: bytes, executable, .. } => {
            let executable = if *executable { ", executable" } else { "" };
            format!("<li>{name} <small>{}{executable}</small>\n", size(*bytes))
        }
        Node::Symlink { target } => format!("<li>{name} → {}\n", Text(&lossy(target.as_bytes(), MAX_SHOWN_NAME))),
        Node::Directory { .. } => String::new(),
    };
}
