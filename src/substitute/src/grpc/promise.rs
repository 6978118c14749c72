//! A path of which only the directories are fetched.

use std::collections::HashSet;
use std::ops::ControlFlow;

use castore::{Directory, DirectoryService as _, Node};
use nix_compat::path_info::PathInfo;
use rpc_client::ClientError;
use store::{NewPath, Store};

use super::Castore;
use crate::error::Error;

/// Bytes that an entry takes in a NAR at least: `entry`, `(`, `name` and the name, `node`, `(`, `type` and a type, `)`, `)`.
const ENTRY_BYTES: u64 = 160;

impl Castore {
    /// Fetches a path's directories and promises its contents. They are not compared with what was signed.
    pub(super) fn promise_path(&self, store: &Store, info: &PathInfo) -> Result<NewPath, Error> {
        let failed = self.failed("get the directories of a path from");
        let path = info.path.to_string();
        let said = self.said(&info.path).map_err(&failed)?;
        let node = said.ok_or_else(|| Error::Vanished { uri: self.name.clone(), path: path.clone() })?.node;
        let mut session = self.here.session();
        if let Node::Directory { digest, .. } = &node {
            let mut left = info.nar_size;
            let mut refused = None;
            let mut seen = HashSet::new();
            let mut put = |directory: &Directory| -> Result<(), Error> {
                // A stream that broke is begun anew.
                if !seen.insert(directory.digest()) {
                    return Ok(());
                }
                let taken = nar_bytes(directory);
                left = left.checked_sub(taken).ok_or_else(|| Error::TreeTooLarge {
                    uri: self.name.clone(),
                    path: path.clone(),
                    limit: info.nar_size,
                })?;
                session.put_directory(directory).map_err(store::Error::from)?;
                Ok(())
            };
            let mut each = |directory: std::sync::Arc<Directory>| match put(&directory) {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    refused = Some(error);
                    ControlFlow::Break(())
                }
            };
            let is_broken = |error: &castore::Error| match error {
                castore::Error::Backend(error) => error.downcast_ref().is_some_and(ClientError::is_broken),
                _ => false,
            };
            let got = self.again(is_broken, || self.directories.get_recursive(digest, &mut each));
            if let Some(error) = refused {
                return Err(error);
            }
            got.map_err(|error| match error {
                castore::Error::Backend(error) => match error.downcast::<ClientError>() {
                    Ok(error) => failed(*error),
                    Err(error) => store::Error::from(castore::Error::Backend(error)).into(),
                },
                castore::Error::DirectoryNotFound(digest) => failed(ClientError::Lacks { what: "directory", digest }),
                error => store::Error::from(error).into(),
            })?;
        }
        let directories = session.finish().map_err(store::Error::from)?;
        let new = store.expect(info.clone(), node, &self.name)?;
        // The new path has its own hold on them.
        drop(directories);
        Ok(new)
    }
}

/// What a directory takes of a NAR at least, so that a source cannot send more than it has said.
fn nar_bytes(directory: &Directory) -> u64 {
    let bytes = |node: &Node| match node {
        Node::File { size, .. } => *size,
        Node::Directory { .. } | Node::Symlink { .. } => 0,
    };
    directory.entries().fold(0, |sum, (_, node)| sum.saturating_add(ENTRY_BYTES).saturating_add(bytes(node)))
}
