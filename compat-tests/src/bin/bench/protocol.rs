//! castored's socket beside that of stock's newest daemon: the same requests, byte for byte, to one and to the other in
//! turn, medians of the rounds. What is compared is how often stock's figure castored reaches.
//!
//! Each measurement has a connection of its own, since stock remembers for a connection what it was asked.
//! `CASTORED_BENCH_ONLY=text` measures the rows that have the text in their names.

mod known;
mod rows;

use compat_tests::machine::Machine;
use compat_tests::{Error, Result};

use crate::sides::{Side, Sides};
use known::Known;

/// How many times each row is measured.
const ROUNDS: usize = 7;
/// Limits the rows.
const ONLY: &str = "CASTORED_BENCH_ONLY";

/// One thing that is measured.
struct Row {
    name: &'static str,
    unit: &'static str,
    /// castored has to be so many times better.
    target: f64,
    /// Whether less is better.
    less: bool,
    /// Measures one side, in this round.
    measure: fn(&Side, &Known, usize) -> Result<f64>,
}

/// The rows of the table, with the targets.
const ROWS: [Row; 7] = [
    more("connect, handshake, IsValidPath, close", "/s", 5.0, rows::connect),
    more("QueryPathInfo, one at a time", "/s", 2.0, rows::one_at_a_time),
    more("QueryPathInfo, 64 in flight", "/s", 3.0, rows::in_flight),
    more("QueryPathInfo, 4 connections, one at a time each", "/s", 2.0, rows::four_connections),
    more("QueryPathInfo, 4 connections, 64 in flight each", "/s", 2.0, rows::four_in_flight),
    more("QueryValidPaths of 20,000", "paths/s", 3.0, rows::valid_paths),
    more("AddToStoreNar of small paths, one at a time", "/s", 2.0, rows::add_small),
];
/// Measured on daemons that have done nothing yet: memory freed by other work would hide what connections take.
const FRESH: Row =
    Row { name: "memory of an idle connection", unit: "KiB", target: 20.0, less: true, measure: rows::idle_memory };

const fn more(
    name: &'static str,
    unit: &'static str,
    target: f64,
    measure: fn(&Side, &Known, usize) -> Result<f64>,
) -> Row {
    Row { name, unit, target, less: false, measure }
}

/// Whether all targets are reached.
pub(crate) fn bench(machine: &Machine) -> Result<bool> {
    let sides = Sides::start(machine)?;
    let kept = compare(&sides);
    sides.stop()?;
    kept
}

fn compare(sides: &Sides) -> Result<bool> {
    let only = std::env::var(ONLY).unwrap_or_default();
    let wanted = |row: &Row| row.name.contains(&only);
    println!(
        "{:<50} {:>12} {:>14} {:>7} {:>9}",
        "protocol, 20,000 paths known", "stock", "castored", "ratio", "to reach"
    );
    let known = Known::new();
    let mut kept = true;
    if wanted(&FRESH) {
        kept &= FRESH.compare(sides, &known, 1)?;
    }
    for side in [&sides.stock, &sides.castored] {
        known.add_to(side)?;
    }
    for row in ROWS.iter().filter(|row| wanted(row)) {
        kept &= row.compare(sides, &known, ROUNDS)?;
    }
    Ok(kept)
}

impl Row {
    /// Measures both sides in turn, prints the row, and answers whether the target is reached.
    fn compare(&self, sides: &Sides, known: &Known, rounds: usize) -> Result<bool> {
        let (mut stock, mut castored) = (Vec::new(), Vec::new());
        // The first of several rounds only warms up.
        for round in usize::from(rounds == 1)..=rounds {
            let figures = ((self.measure)(&sides.stock, known, round)?, (self.measure)(&sides.castored, known, round)?);
            if round > 0 {
                stock.push(figures.0);
                castored.push(figures.1);
            }
        }
        let (stock, castored) = (median(stock), median(castored));
        let ratio = if self.less { stock / castored } else { castored / stock };
        let reached = ratio >= self.target;
        println!(
            "{:<50} {:>12} {:>14} {ratio:>6.1}x {:>8}x {}",
            self.name,
            figure(stock, self.unit),
            figure(castored, self.unit),
            self.target,
            if reached { "ok" } else { "WRONG" },
        );
        Ok(reached)
    }
}

fn figure(value: f64, unit: &str) -> String {
    let digits = usize::from(value < 100.0);
    format!("{value:.digits$} {unit}")
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

/// What a daemon answered is not what it must answer.
fn wrong(what: &str) -> Error {
    Error::Wrong(what.to_owned())
}
