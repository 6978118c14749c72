//! A check and what follows from it, told as it goes.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use nix_compat::store_path::StorePath;
use parking_lot::Mutex;
use store::Store;
use store::fsck::{Mended, Watch};

use super::news::{News, Quarantined, Request, Stage, Summary};
use super::{Tell, requested};

/// Time between two news of progress.
const INTERVAL: Duration = Duration::from_millis(100);

/// Passes on how far it is, not too often.
struct Watching<'a> {
    teller: &'a dyn Tell,
    state: Mutex<(u64, Option<Instant>)>,
}

impl Watch for Watching<'_> {
    fn stage(&self, stage: store::fsck::Stage, total: u64) {
        let stage = match stage {
            store::fsck::Stage::Objects => Stage::Objects,
            store::fsck::Stage::Tables => Stage::Tables,
            store::fsck::Stage::Contents => Stage::Contents,
            store::fsck::Stage::Paths => Stage::Paths,
            store::fsck::Stage::Repair => Stage::Repair,
        };
        *self.state.lock() = (0, None);
        let _ = self.teller.tell(News::Stage { stage, total });
    }

    fn advance(&self, done: u64) -> ControlFlow<()> {
        let mut state = self.state.lock();
        state.0 += done;
        if state.1.is_some_and(|told| told.elapsed() < INTERVAL) {
            return ControlFlow::Continue(());
        }
        state.1 = Some(Instant::now());
        self.teller.tell(News::Done(state.0))
    }
}

/// Checks the store, and repairs it if that is asked for. Blocks.
pub(super) fn run(
    store: &Store,
    request: &Request,
    mend: &mut dyn FnMut(&StorePath) -> Mended,
    teller: &dyn Tell,
) -> Result<Summary, store::Error> {
    let watch = Watching { teller, state: Mutex::new((0, None)) };
    let report = if request.paths.is_empty() {
        store.fsck(request.repair, &watch)?
    } else {
        store.fsck_paths(&requested(store, request)?, &watch)?
    };
    let display = |path: &StorePath| store.store_dir().display(path);
    let mut summary = Summary {
        objects: report.objects,
        bytes: report.bytes,
        paths: report.paths,
        affected: report.affected.len() as u64,
        repair: request.repair,
        rows_left: report.tables.iter().filter(|problem| !problem.repaired).count() as u64,
        ended: report.ended,
        ..Summary::default()
    };
    for problem in report.problems() {
        summary.found += 1;
        let _ = teller.tell(News::Problem(problem));
    }
    for (path, damage) in &report.affected {
        let _ = teller.tell(News::Affected { path: display(path), message: damage.message.clone() });
    }
    if !request.repair || report.ended {
        return Ok(summary);
    }
    let repair = store.repair(&report, mend, &watch)?;
    summary.salvaged = repair.salvaged;
    summary.mended = repair.mended.iter().map(display).collect();
    summary.released = repair.released.iter().map(display).collect();
    let quarantined = repair.quarantined.into_iter();
    summary.quarantined =
        quarantined.map(|q| Quarantined { path: display(&q.path), reason: q.reason, withheld: q.withheld }).collect();
    Ok(summary)
}
