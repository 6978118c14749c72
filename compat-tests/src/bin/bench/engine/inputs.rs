//! What is put into the stores. Each part is made when a row first asks for it.

use std::cell::OnceCell;
use std::fs::{self, File, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use compat_tests::error::Context;
use compat_tests::machine::Machine;
use compat_tests::packages::{self, Closures};
use compat_tests::{Release, Result, tree};
use tempfile::TempDir;

/// Bytes of the tree's files at least.
const TREE_BYTES: u64 = 1_100_000_000;
/// And so many files and directories.
const TREE_ENTRIES: u64 = 53_500;
/// Bytes of the file that does not pack.
const NOISE_BYTES: u64 = 1_000_000_000;
/// Paths of a closure: 1 GB.
const PATHS: usize = 200;
/// Derivations that are instantiated.
const DERIVATIONS: usize = 2_000;
/// Trees that are added at once.
pub(super) const CLIENTS: usize = 8;

/// The inputs of all rows, in a directory that goes away with them.
pub(super) struct Inputs {
    pub(super) client: Arc<Release>,
    part: usize,
    dir: TempDir,
    tree: OnceCell<PathBuf>,
    trees: OnceCell<Vec<PathBuf>>,
    noise: OnceCell<PathBuf>,
    closures: OnceCell<Closures>,
}

impl Inputs {
    pub(super) fn new(machine: &Machine) -> Result<Self> {
        // Named as rooms are, so that it is removed like one if this process is killed.
        let prefix = format!("castored-room-{}-engine-", std::process::id());
        let dir = tempfile::Builder::new().prefix(&prefix).tempdir_in("/var/tmp").doing("creating", "/var/tmp")?;
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).doing("opening to all", dir.path())?;
        let part = crate::part();
        Ok(Self {
            client: Arc::new(machine.newest().clone()),
            part,
            dir,
            tree: OnceCell::new(),
            trees: OnceCell::new(),
            noise: OnceCell::new(),
            closures: OnceCell::new(),
        })
    }

    /// A tree of files of all sizes.
    pub(super) fn tree(&self) -> Result<&Path> {
        lazily(&self.tree, || {
            let path = self.dir.path().join("tree");
            let part = self.part as u64;
            let (entries, bytes) = tree::of_usr(&path, TREE_BYTES / part, TREE_ENTRIES / part)?;
            println!("a tree of {entries} entries and {} MB", bytes / 1_000_000);
            Ok(path)
        })
        .map(PathBuf::as_path)
    }

    /// The same files, each in one of [`CLIENTS`] trees.
    pub(super) fn trees(&self) -> Result<&[PathBuf]> {
        lazily(&self.trees, || {
            let path = self.dir.path().join("trees");
            tree::divide(self.tree()?, &path, CLIENTS as u64)?;
            Ok((0..CLIENTS).map(|n| path.join(n.to_string())).collect())
        })
        .map(Vec::as_slice)
    }

    /// A file that does not pack.
    pub(super) fn noise(&self) -> Result<&Path> {
        lazily(&self.noise, || {
            let path = self.dir.path().join("noise");
            let random = File::open("/dev/urandom").doing("opening", "/dev/urandom")?;
            let mut file = File::create(&path).doing("creating", &path)?;
            io::copy(&mut random.take(NOISE_BYTES / self.part as u64), &mut file).doing("writing", &path)?;
            Ok(path)
        })
        .map(PathBuf::as_path)
    }

    /// Two releases of packages, and the second as a rebuild leaves it.
    pub(super) fn closures(&self) -> Result<&Closures> {
        lazily(&self.closures, || {
            let closures = packages::closures((PATHS / self.part).max(2))?;
            for (name, closure) in
                [("first", &closures.first), ("second", &closures.second), ("rebuilt", &closures.rebuilt)]
            {
                println!("{name}: {} paths, {} MB", closure.paths.len(), closure.nar_bytes() / 1_000_000);
            }
            Ok(closures)
        })
    }

    /// How many derivations are instantiated.
    pub(super) fn derivations(&self) -> usize {
        (DERIVATIONS / self.part).max(2)
    }
}

fn lazily<T>(cell: &OnceCell<T>, make: impl FnOnce() -> Result<T>) -> Result<&T> {
    if let Some(made) = cell.get() {
        return Ok(made);
    }
    let made = make()?;
    Ok(cell.get_or_init(|| made))
}
