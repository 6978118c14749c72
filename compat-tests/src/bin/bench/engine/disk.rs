//! What closures take on disk.

use std::time::Duration;

use compat_tests::packages::Closure;
use compat_tests::{Call, Result, Who};

use super::inputs::Inputs;
use super::rows::{LIMIT, copy_in};
use crate::build::{Figure, Target, figure};
use crate::sides::Side;
use crate::usage::{Used, settled};

/// What is in use is known when no space has come back for so long.
const QUIET: Duration = Duration::from_secs(3);
/// The same after optimising, which gives back what it replaces in the background.
const QUIET_OPTIMISED: Duration = Duration::from_secs(20);
/// Mebibyte.
const MIB: f64 = 1024.0 * 1024.0;
/// Archive bytes for which castored may use one inode.
const BYTES_PER_INODE: f64 = 10e6;

/// Copies a closure into the store; what is in use after that.
fn with(side: &Side, inputs: &Inputs, closure: &Closure) -> Result<Used> {
    let (client, url, top) = (inputs.client.clone(), closure.url(), closure.top.clone());
    side.inside(move |room| {
        copy_in(room, &client, &url, &top)?;
        // What is written but not yet given its place counts as well.
        nix::unistd::sync();
        settled(QUIET).map(|(used, _)| used)
    })
}

/// Has the store optimised; what is in use after that.
fn optimise(side: &Side, inputs: &Inputs) -> Result<Used> {
    let client = inputs.client.clone();
    side.inside(move |room| {
        Call::nix(room, Who::Root, &client, "nix-store").arg("--optimise").limit(LIMIT).quiet().ok()?;
        nix::unistd::sync();
        settled(QUIET_OPTIMISED).map(|(used, _)| used)
    })
}

/// A figure in percent of the size as archives.
fn share(name: &str, bytes: u64, nar_bytes: u64, at_most: f64) -> Figure {
    figure(name, "%", bytes as f64 / nar_bytes as f64 * 100.0, Target::AtMost(at_most))
}

/// A closure, its next version, and that rebuilt, one after the other.
pub(super) fn imported(side: &Side, inputs: &Inputs) -> Result<Vec<Figure>> {
    let closures = inputs.closures()?;
    let first = with(side, inputs, &closures.first)?;
    let second = with(side, inputs, &closures.second)?;
    let rebuilt = with(side, inputs, &closures.rebuilt)?;
    let nars = [&closures.first, &closures.second, &closures.rebuilt].map(Closure::nar_bytes);
    let per_inode = second.inodes as f64 * BYTES_PER_INODE / (nars[0] + nars[1]) as f64;
    Ok(vec![
        share("on disk, of the NAR size: a closure", first.bytes, nars[0], 38.0),
        share("  with its next version", second.bytes, nars[0] + nars[1], 30.0),
        share("  which adds", second.bytes.saturating_sub(first.bytes), nars[1], 23.0),
        share(
            "  and that rebuilt with other store hashes adds",
            rebuilt.bytes.saturating_sub(second.bytes),
            nars[2],
            2.0,
        ),
        figure("  kept free for a full disk, not counted", "MiB", rebuilt.reserve as f64 / MIB, Target::None),
        figure("  inodes for each 10 MB of two versions", "", per_inode, Target::AtMost(1.0)),
    ])
}

/// A closure and its next version, each optimised.
pub(super) fn optimised(side: &Side, inputs: &Inputs) -> Result<Vec<Figure>> {
    let closures = inputs.closures()?;
    with(side, inputs, &closures.first)?;
    let first = optimise(side, inputs)?;
    with(side, inputs, &closures.second)?;
    let second = optimise(side, inputs)?;
    let nars = [&closures.first, &closures.second].map(Closure::nar_bytes);
    Ok(vec![
        share("on disk, of the NAR size, optimised: a closure", first.bytes, nars[0], 34.0),
        share("  with its next version", second.bytes, nars[0] + nars[1], 28.0),
    ])
}
