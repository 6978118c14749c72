//! The engine beside stock's newest daemon: bytes in, bytes out, bytes at rest. The same client does the same with one and
//! the other in turn, each time with a daemon that is started anew on an empty store; medians of the rounds.
//!
//! CPU time is that of the daemon, its children and the clients; memory the most that was seen of the daemon's processes,
//! pages of several of them counted for each. What is on disk is asked of the filesystem, journals and databases included, and
//! not what castored keeps free to give up when the disk is full.
//!
//! `CASTORED_BENCH_ROWS=text,text` measures the rows that have one of the texts in their names, `CASTORED_BENCH_ROUNDS=n` so
//! often, `CASTORED_BENCH_PART=n` with an n-th of what is put in (to see whether it works; the targets are for the whole).

mod disk;
mod inputs;
pub(crate) mod rows;

use compat_tests::Result;
use compat_tests::machine::Machine;
use compat_tests::subject::default_conf;

use crate::build::Figure;
use crate::sides::{Side, compare};
use inputs::Inputs;

/// How many times what takes time is measured.
const ROUNDS: usize = 3;
/// Limits the rows.
pub(crate) const ROWS_VARIABLE: &str = "CASTORED_BENCH_ROWS";

/// Measures one thing on one side; the figures are the same ones on both.
type Measure = fn(&Side, &Inputs) -> Result<Vec<Figure>>;

/// One thing that is measured, on an empty store.
struct Row {
    name: &'static str,
    /// Whether it comes out differently each time.
    varies: bool,
    measure: Measure,
}

const ROWS: [Row; 7] = [
    Row { name: "tree", varies: true, measure: rows::tree },
    Row { name: "incompressible", varies: true, measure: rows::incompressible },
    Row { name: "copy", varies: true, measure: rows::copy },
    Row { name: "instantiate", varies: true, measure: rows::instantiate },
    Row { name: "eight", varies: true, measure: rows::eight },
    Row { name: "disk", varies: false, measure: disk::imported },
    Row { name: "optimised", varies: false, measure: disk::optimised },
];

/// Whether all targets are reached.
pub(crate) fn bench(machine: &Machine) -> Result<bool> {
    let wanted = std::env::var(ROWS_VARIABLE).unwrap_or_default();
    let is_wanted = |row: &&Row| wanted.is_empty() || wanted.split(',').any(|part| row.name.contains(part));
    let inputs = Inputs::new(machine)?;
    println!("{:<50} {:>12} {:>14} {:>7} {:>9}", "engine", "stock", "castored", "ratio", "at most");
    let mut kept = true;
    for row in ROWS.iter().filter(is_wanted) {
        let rounds = if row.varies { crate::rounds(ROUNDS) } else { 1 };
        kept &= compare(machine, rounds, &default_conf(), |side| (row.measure)(side, &inputs))?;
    }
    crate::show_load();
    Ok(kept)
}
