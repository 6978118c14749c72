//! Checking a store through and through, beside everything else that uses it, and repairing it.
//!
//! In this order: the castore checks its objects ([`castore::check`]), the tables of the store are held against each
//! other ([`tables`]), what damaged objects are part of is looked for ([`trees`]), and every path's NAR is hashed. What
//! changes meanwhile is looked at again under the lock that changes take, before it is called a problem.
//!
//! Memory: what the castore needs, 20 bytes per path, and what is told of each problem.

mod elsewhere;
mod paths;
mod repair;
mod tables;
mod trees;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};

use castore::check::DamagedObject;
use castore::parallel;
use nix_compat::store_path::StorePath;
use parking_lot::Mutex;

use crate::error::{Error, Result, causes};
use crate::store::Store;

pub use elsewhere::Elsewhere;
pub use repair::{Mended, Repair};

/// Threads that hash NARs, at most.
const MAX_THREADS: usize = 4;

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Objects are read and hashed; counted in bytes.
    Objects,
    /// Tables are compared; counted in paths.
    Tables,
    /// NARs are hashed; counted in bytes.
    Contents,
    /// Some paths are looked at; counted in paths.
    Paths,
    /// Paths are repaired; counted in paths.
    Repair,
}

/// Who is told how far it has come.
pub trait Watch: Sync {
    /// Another stage begins, of about so much work.
    fn stage(&self, stage: Stage, total: u64);

    /// So much more of it is done. A break ends the check.
    fn advance(&self, done: u64) -> ControlFlow<()>;

    /// The contents of this path are looked at.
    fn path(&self, _: &StorePath) {}
}

/// What is wrong with a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathDamage {
    /// A sentence for the user.
    pub message: String,
    /// Whether its objects are whole and yet make other contents than those registered.
    pub other_contents: bool,
    /// A path it refers to that is not valid.
    pub missing: Option<StorePath>,
}

/// What is wrong with the tables of the index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableProblem {
    /// A sentence for the user.
    pub message: String,
    /// Whether it was put right.
    pub repaired: bool,
}

/// What a check found.
#[derive(Debug, Default)]
pub struct Report {
    /// Objects that were checked.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Paths that were checked.
    pub paths: u64,
    /// What became of the files of packs, a sentence each: some were deleted or cut short.
    pub files: Vec<String>,
    /// Packs whose headers are damaged.
    pub headers: Vec<u32>,
    /// Objects that are damaged and in use. Others are garbage, which a collection removes.
    pub damaged: Vec<DamagedObject>,
    /// Packs of which the index counts wrongly what is alive.
    pub miscounted: Vec<u32>,
    /// What is wrong with tables.
    pub tables: Vec<TableProblem>,
    /// Paths that are not what they should be: all that a damaged object is part of, and others.
    pub affected: BTreeMap<StorePath, PathDamage>,
    /// The check was ended before it had seen everything.
    pub ended: bool,
}

impl Report {
    /// Whether nothing was found.
    pub fn is_sound(&self) -> bool {
        self.files.is_empty()
            && self.headers.is_empty()
            && self.damaged.is_empty()
            && self.miscounted.is_empty()
            && self.tables.is_empty()
            && self.affected.is_empty()
    }

    /// All that was found but the affected paths, a sentence each.
    pub fn problems(&self) -> impl Iterator<Item = String> {
        let headers = self.headers.iter().map(|pack| format!("the header of pack {pack:08x} is damaged"));
        let damaged = self.damaged.iter().map(|object| format!("{}: {}", object.key, causes(&object.damage)));
        let counts =
            self.miscounted.iter().map(|pack| format!("what is alive in pack {pack:08x} is not what the index counts"));
        self.files
            .iter()
            .cloned()
            .chain(headers)
            .chain(damaged)
            .chain(counts)
            .chain(self.tables.iter().map(|problem| problem.message.clone()))
    }
}

impl Store {
    /// Checks everything: every object, every table, every path. With `repair` tables are put right on the way; the rest
    /// is for [`Store::repair`].
    ///
    /// # Errors
    /// When the index cannot be read. Damage is no error.
    pub fn fsck(&self, repair: bool, watch: &dyn Watch) -> Result<Report> {
        let mut report = Report::default();
        watch.stage(Stage::Objects, self.engine.stats().raw_bytes);
        let ended = AtomicBool::new(false);
        let advance = |bytes| {
            let flow = watch.advance(bytes);
            ended.fetch_or(flow.is_break(), Ordering::AcqRel);
            flow
        };
        let checked = self.engine.objects().check(&advance).map_err(castore::Error::from)?;
        (report.objects, report.bytes) = (checked.objects, checked.bytes);
        (report.headers, report.damaged, report.miscounted) = (checked.headers, checked.damaged, checked.miscounted);
        report.files = checked.files.iter().map(|file| causes(file)).collect();
        for pack in checked.unknown {
            let pack = pack.display();
            let message = format!("the index has forgotten '{pack}'; `castored fsck --rebuild-index` makes it anew");
            report.tables.push(TableProblem { message, repaired: false });
        }
        if checked.strange_keys > 0 {
            let message = format!("{} keys of the table of objects name no object", checked.strange_keys);
            report.tables.push(TableProblem { message, repaired: false });
        }
        // Whoever puts these contents again heals them; also what nobody uses now, since somebody may come to.
        self.engine.objects().mark_damaged(report.damaged.iter().map(|object| object.key));
        if ended.into_inner() {
            report.ended = true;
            return Ok(report);
        }
        self.check_tables(repair, &mut report, watch)?;
        if !report.ended {
            self.find_users_of_damage(&mut report)?;
            self.check_all_contents(&mut report, watch)?;
        }
        Ok(report)
    }

    /// Hashes the NARs of all paths that are not known to be damaged yet.
    fn check_all_contents(&self, report: &mut Report, watch: &dyn Watch) -> Result<()> {
        let mut total = 0_u64;
        let mut paths = Vec::new();
        let mut each = |entry: crate::Entry| {
            if !report.affected.contains_key(&entry.info.path) {
                total = total.saturating_add(entry.info.nar_size);
                paths.push(entry.info.path.digest());
            }
            ControlFlow::Continue(())
        };
        self.for_each_readable(&mut each)?;
        watch.stage(Stage::Contents, total);
        let found = Mutex::new((BTreeMap::new(), None::<Error>));
        let flow = parallel::for_each(&paths, MAX_THREADS, |digest| {
            match self.check_contents_of(digest, watch) {
                Ok(Some((path, damage))) => drop(found.lock().0.insert(path, damage)),
                Ok(None) => {}
                Err(error) => {
                    found.lock().1 = Some(error);
                    return ControlFlow::Break(());
                }
            }
            watch.advance(self.entry_by_digest(digest).ok().flatten().map_or(0, |entry| entry.info.nar_size))
        });
        let (affected, failure) = found.into_inner();
        report.affected.extend(affected);
        report.ended |= flow.is_break();
        failure.map_or(Ok(()), Err)
    }

    fn check_contents_of(&self, digest: &[u8; 20], watch: &dyn Watch) -> Result<Option<(StorePath, PathDamage)>> {
        let Some(entry) = self.entry_by_digest(digest)? else { return Ok(None) };
        let path = entry.info.path.clone();
        watch.path(&path);
        Ok(self.verify_contents(&path)?.map(|damage| (path, damage)))
    }

    /// As [`Store::for_each`], but passes over rows that cannot be read.
    pub(crate) fn for_each_readable(&self, each: &mut dyn FnMut(crate::Entry) -> ControlFlow<()>) -> Result<()> {
        Ok(self.index().scan_prefix(&self.tables.paths, &[], &mut |key, row| match crate::Entry::decode(key, row) {
            Ok(entry) => each(entry),
            Err(_) => ControlFlow::Continue(()),
        })?)
    }
}
