//! NARs that were uploaded and not described yet.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use nix_compat::path_info::PathInfo;
use nix_compat::store_path::StorePath;
use parking_lot::Mutex;
use store::nar_digest::NarFacts;
use store::{Ingested, NewPath, Pin, Store, TempRoots};

use crate::limits::{MAX_PENDING, PUSH_TIME};

/// Uploads by their names. Each keeps its contents from being swept for [`PUSH_TIME`] at most; when there are
/// [`MAX_PENDING`], the oldest makes room.
#[derive(Debug, Default)]
pub(crate) struct Pending(Mutex<HashMap<String, Upload>>);

#[derive(Debug)]
struct Upload {
    node: castore::Node,
    nar_hash: nix_compat::hash::NarHash,
    nar_size: u64,
    since: Instant,
    kept: Kept,
}

/// What keeps the contents.
#[derive(Clone, Debug)]
enum Kept {
    /// Nothing refers to them yet.
    Pin(Pin),
    /// A path that has them, if it is still valid. Clients upload equal contents of several paths once.
    Path(StorePath),
}

impl Pending {
    pub(crate) fn put(&self, name: String, ingested: Ingested) {
        let Ingested { node, nar, pin } = ingested;
        let (nar_hash, nar_size) = (nar.nar_hash, nar.nar_size);
        let mut uploads = self.0.lock();
        if uploads.len() >= MAX_PENDING && !uploads.contains_key(&name) {
            let age = |upload: &Upload| (matches!(upload.kept, Kept::Pin(_)), upload.since);
            let oldest = uploads.iter().min_by_key(|(_, upload)| age(upload)).map(|(name, _)| name.clone());
            oldest.and_then(|name| uploads.remove(&name));
        }
        uploads.insert(name, Upload { node, nar_hash, nar_size, since: Instant::now(), kept: Kept::Pin(pin) });
    }

    /// Whether it is there, and for so long still that a client can rely on it.
    pub(crate) fn has(&self, name: &str, store: &Store) -> store::Result<bool> {
        let kept = {
            let uploads = self.0.lock();
            let fresh = uploads.get(name).filter(|upload| upload.since.elapsed() < PUSH_TIME / 2);
            fresh.map(|upload| upload.kept.clone())
        };
        match kept {
            None => Ok(false),
            Some(Kept::Pin(_)) => Ok(true),
            Some(Kept::Path(path)) => store.is_valid(&path),
        }
    }

    /// The contents of that name as those of `info`, when they are what it claims. What they are kept by stays so: until
    /// `roots` or the result go.
    pub(crate) fn claim(
        &self,
        name: &str,
        info: PathInfo,
        roots: &TempRoots,
        store: &Store,
    ) -> store::Result<Option<NewPath>> {
        let (node, facts, kept) = {
            let uploads = self.0.lock();
            let Some(upload) = uploads.get(name) else { return Ok(None) };
            let (nar_hash, nar_size) = (upload.nar_hash, upload.nar_size);
            let facts = NarFacts { nar_hash, nar_size, other: None, references: Default::default() };
            (upload.node.clone(), facts, upload.kept.clone())
        };
        let pin = match kept {
            Kept::Pin(pin) => Some(pin),
            Kept::Path(path) => {
                roots.add(&path);
                if store.shared_entry(&path)?.is_none_or(|entry| entry.node != node) {
                    return Ok(None);
                }
                None
            }
        };
        let new = NewPath { info, node, pin };
        store.check_imported(&new, &facts)?;
        Ok(Some(new))
    }

    /// From here on the contents of that name are kept by `path`.
    pub(crate) fn used(&self, name: &str, path: &StorePath) {
        if let Some(upload) = self.0.lock().get_mut(name) {
            upload.kept = Kept::Path(path.clone());
        }
    }

    pub(crate) fn forget_old(&self, age: Duration) {
        self.0.lock().retain(|_, upload| upload.since.elapsed() < age);
    }
}

#[cfg(test)]
mod tests {
    use nix_compat::hash::sha256;
    use nix_compat::nar::NarWriter;
    use nix_compat::store_path::StoreDir;
    use store::Config;
    use store::nar_digest::NarDigest;

    use super::*;

    fn store() -> (tempfile::TempDir, std::sync::Arc<Store>) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(Config::new(StoreDir::default(), dir.path())).unwrap();
        (dir, store)
    }

    fn ingest(store: &Store, text: &str) -> Ingested {
        let mut nar = NarWriter::new(Vec::new());
        nar.regular_header(false, text.len() as u64).unwrap();
        nar.contents(text.as_bytes()).unwrap();
        nar.end_regular().unwrap();
        store.import_nar(&mut &nar.finish().unwrap()[..], NarDigest::new(None, None)).unwrap()
    }

    fn info(name: &str, ingested: &Ingested) -> PathInfo {
        let path = StorePath::from_parts(sha256(name.as_bytes())[..20].try_into().unwrap(), name).unwrap();
        PathInfo {
            path,
            deriver: None,
            nar_hash: ingested.nar.nar_hash,
            references: Default::default(),
            registration_time: 0,
            nar_size: ingested.nar.nar_size,
            ultimate: false,
            signatures: Default::default(),
            ca: None,
        }
    }

    #[test]
    fn there_are_never_more_than_so_many() {
        let (_dir, store) = store();
        let pending = Pending::default();
        for number in 0..MAX_PENDING + 3 {
            pending.put(format!("nar/{number}.nar"), ingest(&store, "x"));
        }
        assert_eq!(pending.0.lock().len(), MAX_PENDING);
        assert!(!pending.has("nar/0.nar", &store).unwrap(), "the oldest made room");
        assert!(pending.has(&format!("nar/{}.nar", MAX_PENDING + 2), &store).unwrap());
        pending.forget_old(Duration::ZERO);
        assert!(pending.0.lock().is_empty());
    }

    #[test]
    fn equal_contents_are_claimed_twice_while_the_first_path_is_there() {
        let (_dir, store) = store();
        let pending = Pending::default();
        let ingested = ingest(&store, "both");
        let (one, two) = (info("one", &ingested), info("two", &ingested));
        let other = PathInfo { nar_hash: ingest(&store, "other").nar.nar_hash, ..one.clone() };
        pending.put("nar/a.nar".into(), ingested);
        let roots = store.new_temp_roots();
        assert!(pending.claim("nar/b.nar", one.clone(), &roots, &store).unwrap().is_none());
        assert!(pending.claim("nar/a.nar", other, &roots, &store).is_err(), "it is not what that claims");
        let new = pending.claim("nar/a.nar", one.clone(), &roots, &store).unwrap().unwrap();
        // Before it is registered the path does not keep it.
        pending.used("nar/a.nar", &one.path);
        assert!(!pending.has("nar/a.nar", &store).unwrap());
        assert!(pending.claim("nar/a.nar", two.clone(), &roots, &store).unwrap().is_none());
        store.register(vec![new]).unwrap();
        assert!(pending.has("nar/a.nar", &store).unwrap());
        let new = pending.claim("nar/a.nar", two, &roots, &store).unwrap().unwrap();
        store.register(vec![new]).unwrap();
    }
}
