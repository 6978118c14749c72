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
const ROWS: [Row; 8] = [
    more("connect, handshake, IsValidPath, close", "/s", 5.0, rows::connect),
    more("QueryPathInfo, one at a time", "/s", 2.0, rows::one_at_a_time),
    more("QueryPathInfo, 64 in flight", "/s", 3.0, rows::in_flight),
    more("QueryPathInfo, 4 connections, one at a time each", "/s", 2.0, rows::four_connections),
    more("QueryPathInfo, 4 connections, 64 in flight each", "/s", 2.0, rows::four_in_flight),
    more("QueryValidPaths of 20,000", "paths/s", 3.0, rows::valid_paths),
    more("AddToStoreNar of small paths, one at a time", "/s", 2.0, rows::add_small),
    Row { name: "memory of an idle connection", unit: "KiB", target: 20.0, less: true, measure: rows::idle_memory },
];

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
    let known = Known::new();
    for side in [&sides.stock, &sides.castored] {
        known.add_to(side)?;
    }
    println!(
        "{:<50} {:>12} {:>12} {:>7} {:>9}",
        "protocol, 20,000 paths known", "stock", "castored", "ratio", "to reach"
    );
    let only = std::env::var(ONLY).unwrap_or_default();
    let mut kept = true;
    for row in ROWS.iter().filter(|row| row.name.contains(&only)) {
        let (mut stock, mut castored) = (Vec::new(), Vec::new());
        for round in 0..=ROUNDS {
            let figures = ((row.measure)(&sides.stock, &known, round)?, (row.measure)(&sides.castored, &known, round)?);
            // The first round only warms up.
            if round > 0 {
                stock.push(figures.0);
                castored.push(figures.1);
            }
        }
        let (stock, castored) = (median(stock), median(castored));
        let ratio = if row.less { stock / castored } else { castored / stock };
        let reached = ratio >= row.target;
        kept &= reached;
        println!(
            "{:<50} {:>12} {:>12} {ratio:>6.1}x {:>8}x {}",
            row.name,
            figure(stock, row.unit),
            figure(castored, row.unit),
            row.target,
            if reached { "ok" } else { "WRONG" },
        );
    }
    Ok(kept)
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
