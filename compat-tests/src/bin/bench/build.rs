//! Builds through castored beside builds through stock's newest daemon: the same expressions, built by the same client
//! in one and the other room in turn, with the sandbox on, medians of the rounds. Most rows are times, and what is
//! compared is castored's part of stock's.
//!
//! `CASTORED_BENCH_ONLY=text` measures the rows that have the text in their names, `CASTORED_BENCH_ROUNDS=n` so often.

mod hello;
pub(crate) mod rows;
pub(crate) mod watch;

use std::sync::Arc;

use compat_tests::machine::Machine;
use compat_tests::{Error, Release, Result};

use crate::sides::{Side, Sides};

/// How many times each row is measured.
const ROUNDS: usize = 3;
/// Limits the rows.
const ONLY: &str = "CASTORED_BENCH_ONLY";

/// What is promised of a figure.
#[derive(Clone, Copy)]
pub(crate) enum Target {
    /// castored's figure is at most so many times stock's.
    OfStock(f64),
    /// castored's figure is at most this, whatever stock's is.
    AtMost(f64),
    /// It is only shown.
    None,
}

/// One figure of a measurement.
pub(crate) struct Figure {
    pub(crate) name: String,
    pub(crate) unit: &'static str,
    pub(crate) value: f64,
    pub(crate) target: Target,
}

pub(crate) fn figure(name: impl Into<String>, unit: &'static str, value: f64, target: Target) -> Figure {
    Figure { name: name.into(), unit, value, target }
}

/// Who builds, and with what.
#[derive(Clone)]
pub(crate) struct Bench {
    pub(crate) client: Arc<Release>,
    /// Makes names differ, so that nothing is built already.
    pub(crate) tag: String,
}

/// Measures one thing on one side; the figures are the same ones on both.
type Measure = fn(&Side, &Bench) -> Result<Vec<Figure>>;

/// What is measured, by names that can be asked for.
const ROWS: [(&str, Measure); 10] = [
    ("idle", rows::idle),
    ("independent", rows::independent),
    ("chain", rows::chain),
    ("inputs", rows::inputs),
    ("log", rows::log),
    ("files", rows::files),
    ("large", rows::large),
    ("shared", rows::shared),
    ("clients", rows::clients),
    ("hello", hello::hello),
];

/// Whether all targets are reached.
pub(crate) fn bench(machine: &Machine) -> Result<bool> {
    let sides = Sides::start(machine)?;
    let kept = compare(&sides, machine);
    sides.stop()?;
    kept
}

fn compare(sides: &Sides, machine: &Machine) -> Result<bool> {
    let only = std::env::var(ONLY).unwrap_or_default();
    let rounds = crate::rounds(ROUNDS);
    let client = Arc::new(machine.newest().clone());
    println!("{:<50} {:>12} {:>14} {:>7} {:>9}", "builds, sandboxed", "stock", "castored", "ratio", "at most");
    let mut kept = true;
    for (name, measure) in ROWS.iter().filter(|(name, _)| name.contains(&only)) {
        let (mut stock, mut castored) = (Vec::new(), Vec::new());
        for round in 0..rounds {
            let bench = Bench { client: Arc::clone(&client), tag: format!("{name}-{round}") };
            stock.push(measure(&sides.stock, &bench)?);
            castored.push(measure(&sides.castored, &bench)?);
        }
        for n in 0..castored[0].len() {
            kept &= show(&castored[0][n], median(&stock, n), median(&castored, n));
        }
    }
    crate::show_load();
    Ok(kept)
}

/// Prints a line of the table; answers whether the target is reached.
pub(crate) fn show(figure: &Figure, stock: f64, castored: f64) -> bool {
    let ratio = castored / stock;
    let (asked, reached) = match figure.target {
        Target::OfStock(most) => (format!("{most}x"), ratio <= most),
        Target::AtMost(most) => (format!("{most} {}", figure.unit), castored <= most),
        Target::None => ("-".into(), true),
    };
    let ratio = if stock == 0.0 { "-".into() } else { format!("{ratio:.2}x") };
    let verdict = match (figure.target, reached) {
        (Target::None, _) => "",
        (_, true) => "ok",
        (_, false) => "WRONG",
    };
    let text = |value: f64| {
        let digits = if value >= 100.0 || value.fract() == 0.0 { 0 } else { 2 };
        format!("{value:.digits$} {}", figure.unit)
    };
    println!("{:<50} {:>12} {:>14} {ratio:>7} {asked:>9} {verdict}", figure.name, text(stock), text(castored));
    reached
}

pub(crate) fn median(rounds: &[Vec<Figure>], n: usize) -> f64 {
    let mut values: Vec<f64> = rounds.iter().map(|figures| figures[n].value).collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A result is not the right one.
pub(crate) fn wrong(what: impl Into<String>) -> Error {
    Error::Wrong(what.into())
}
