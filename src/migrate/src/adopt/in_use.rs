//! Which old paths the running system needs where they are.

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use nix_compat::store_path::StorePath;
use store::Store;

use crate::database::Database;
use crate::error::Result;
use crate::places::StockPlaces;

/// Links outside of the profiles that say what runs.
const SYSTEM: [&str; 2] = ["/run/current-system", "/run/booted-system"];
/// A longer chain of links is a loop.
const MAX_LINKS: usize = 40;

/// Knows which old paths are in use.
pub(super) struct InUse {
    database: Database,
    /// Referrer and reference, sorted.
    references: Vec<(i64, i64)>,
    profiles: PathBuf,
}

impl InUse {
    pub(super) fn new(store: &Store, from: &StockPlaces) -> Result<Self> {
        let directory = crate::switch::database_of(from);
        let database = Database::open(&directory, store.store_dir(), &store.state_dir().join("castored"))?;
        let mut references = Vec::new();
        database.for_each_reference(&mut |referrer, reference| references.push((referrer, reference)))?;
        references.sort_unstable();
        Ok(Self { database, references, profiles: from.state.join("profiles") })
    }

    /// The closure, by stock's database, of what running processes use now, of the current generation of every profile,
    /// and of the system that was booted.
    pub(super) fn find(&self, store: &Store) -> Result<BTreeSet<StorePath>> {
        let mut roots = BTreeSet::new();
        for root in store.find_roots()? {
            if root.link.starts_with(b"/proc/") {
                roots.insert(root.path);
            }
        }
        let mut links: Vec<PathBuf> = SYSTEM.iter().map(PathBuf::from).collect();
        current_generations(&self.profiles, &mut links);
        for target in links.iter().flat_map(|link| targets(link)) {
            if let Some((path, _)) = target.to_str().and_then(|target| store.store_dir().to_store_path(target).ok()) {
                roots.insert(path);
            }
        }
        self.closure(store, roots)
    }

    fn closure(&self, store: &Store, roots: BTreeSet<StorePath>) -> Result<BTreeSet<StorePath>> {
        let mut todo = Vec::new();
        for root in &roots {
            todo.extend(self.database.id(&store.store_dir().display(root))?);
        }
        let mut closure = roots;
        let mut seen: HashSet<i64> = todo.iter().copied().collect();
        while let Some(id) = todo.pop() {
            let first = self.references.partition_point(|(referrer, _)| *referrer < id);
            for (_, reference) in self.references[first..].iter().take_while(|(referrer, _)| *referrer == id) {
                if seen.insert(*reference) {
                    todo.push(*reference);
                    closure.extend(store.store_dir().parse(&self.database.path(*reference)?));
                }
            }
        }
        Ok(closure)
    }
}

/// Where a link leads, and where that leads if it is a link, and so on. The last one need not exist.
fn targets(link: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut at = link.to_owned();
    while let Ok(target) = fs::read_link(&at) {
        at = at.parent().unwrap_or(Path::new("/")).join(target);
        found.push(at.clone());
        if found.len() > MAX_LINKS {
            break;
        }
    }
    found
}

/// Profiles are links to links: `default` to `default-7-link`, and only that one into the store.
fn current_generations(dir: &Path, links: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() {
            current_generations(&path, links);
        } else if kind.is_symlink() && !path.to_string_lossy().ends_with("-link") {
            links.push(path);
        }
    }
}
