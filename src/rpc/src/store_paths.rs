//! [`Store`] as what PathInfoService serves.

use std::io::{self, Write};

use castore::Node;
use nix_compat::content_address::{ContentAddress, Method};
use nix_compat::hash::Hash;
use nix_compat::store_path::StoreDir;
use store::nar_digest::{NarDigest, NarFacts};
use store::view::StoreView;
use store::{Entry, Error, NewPath, Store};

use crate::paths::{PathInfos, PathsError};

impl PathInfos for Store {
    fn store_dir(&self) -> &StoreDir {
        Store::store_dir(self)
    }

    fn get(&self, digest: &[u8; 20]) -> Result<Option<Entry>, PathsError> {
        let Some(path) = self.path_from_hash_part(digest)? else { return Ok(None) };
        Ok(self.entry(&path)?)
    }

    fn list(&self, mut after: u32, limit: usize) -> Result<Vec<Entry>, PathsError> {
        loop {
            let roots = StoreView::list(self, after, limit)?;
            let Some(last) = roots.last() else { return Ok(Vec::new()) };
            after = last.number;
            let mut entries = Vec::with_capacity(roots.len());
            for root in roots {
                entries.extend(self.entry(&root.path)?);
            }
            // A page of which every path was deleted meanwhile is not the end.
            if !entries.is_empty() {
                return Ok(entries);
            }
        }
    }

    fn put(&self, mut path: NewPath) -> Result<(), PathsError> {
        let whole = self.engine().hold(&path.node).map_err(Error::from)?;
        path.pin = Some(whole.into());
        check_contents(self, &path)?;
        Ok(self.register(vec![path])?)
    }

    fn calculate_nar(&self, node: &Node) -> Result<NarFacts, PathsError> {
        let _whole = self.engine().hold(node).map_err(Error::from)?;
        Ok(self.nar_facts(node)?)
    }
}

/// Recomputes what the path info says of the contents.
fn check_contents(store: &Store, NewPath { info, node, pin: _ }: &NewPath) -> Result<(), Error> {
    let path = || store.store_dir().display(&info.path);
    let nar_algorithm = info.ca.as_ref().filter(|ca| ca.method == Method::Nar).map(|ca| ca.hash.algorithm());
    let mut sink = DigestSink(NarDigest::new(nar_algorithm, None));
    store.write_nar_of(node, &mut sink)?;
    let nar = sink.0.finish();

    if nar.nar_size != info.nar_size {
        return Err(Error::SizeMismatch { path: path(), specified: info.nar_size, got: nar.nar_size });
    }
    if nar.nar_hash != info.nar_hash {
        let (specified, got) = (info.nar_hash.to_prefixed_nix32(), nar.nar_hash.to_prefixed_nix32());
        return Err(Error::HashMismatch { path: path(), specified, got });
    }
    let Some(ca) = &info.ca else { return Ok(()) };
    let mismatch = |got| Error::ContentAddressMismatch { path: path(), specified: ca.to_string(), got };
    let hash = match ca.method {
        // The address was computed with the references to itself left out; the NAR's hash has to do.
        Method::Nar if info.references.contains(&info.path) => ca.hash,
        Method::Nar => nar.other.unwrap_or(Hash::Sha256(*nar.nar_hash.as_bytes())),
        Method::Flat | Method::Text => store.flat_hash(node, ca.hash.algorithm(), &path())?,
    };
    if hash != ca.hash {
        return Err(mismatch(ContentAddress { method: ca.method, hash }.to_string()));
    }
    if !info.is_content_addressed(store.store_dir()) {
        return Err(mismatch("a content address that belongs to another store path".to_owned()));
    }
    Ok(())
}

/// Digests what is written to it and keeps nothing.
struct DigestSink(NarDigest);

impl Write for DigestSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
