//! Paths from binary caches over HTTP: castored beside stock's newest daemon. The same client wants the same paths of one and
//! the other in turn, each time of a daemon that is started anew on an empty store; medians of the rounds. The caches are
//! directories that stock's `nix copy --to file://` wrote, signed, served by a small server of this program.
//!
//! `CASTORED_BENCH_ROWS`, `CASTORED_BENCH_ROUNDS` and `CASTORED_BENCH_PART` are those of the engine's table.

mod caches;
mod delay;
mod rows;
mod server;

use compat_tests::Result;
use compat_tests::machine::Machine;

use crate::build::Figure;
use crate::engine::ROWS_VARIABLE;
use crate::sides::{Side, compare};
use caches::Caches;
use rows::Scene;

/// How many times each row is measured.
const ROUNDS: usize = 3;

/// One thing that is measured: where the paths are, and what is done with a daemon that has them as its substituters.
struct Row {
    name: &'static str,
    scene: fn(&Caches) -> Result<Scene>,
    measure: fn(&Side, &Scene) -> Result<Vec<Figure>>,
}

const ROWS: [Row; 5] = [
    Row { name: "closure", scene: rows::far_closure, measure: rows::realise },
    Row { name: "zstd", scene: rows::large_zstd, measure: rows::realise },
    Row { name: "xz", scene: rows::large_xz, measure: rows::realise },
    Row { name: "blocks", scene: rows::large_xz_in_blocks, measure: rows::realise },
    Row { name: "missing", scene: rows::one_is_dead, measure: rows::missing },
];

/// Whether all targets are reached.
pub(crate) fn bench(machine: &Machine) -> Result<bool> {
    let wanted = std::env::var(ROWS_VARIABLE).unwrap_or_default();
    let is_wanted = |row: &&Row| wanted.is_empty() || wanted.split(',').any(|part| row.name == part);
    let caches = Caches::new(machine)?;
    println!("{:<50} {:>12} {:>14} {:>7} {:>9}", "from binary caches", "stock", "castored", "ratio", "at most");
    let mut kept = true;
    for row in ROWS.iter().filter(is_wanted) {
        let scene = (row.scene)(&caches)?;
        kept &= compare(machine, crate::rounds(ROUNDS), &scene.conf, |side| (row.measure)(side, &scene))?;
    }
    crate::show_load();
    Ok(kept)
}
