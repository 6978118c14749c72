//! `castored prefetch`: what is still elsewhere of lazy paths, and of all they need, fetched now.

pub(crate) mod serve;

use std::process::ExitCode;

use ::daemon::Locations;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

use crate::failure::Failure;
use crate::fsck::base_name;
use serve::News;

/// The exit code when something could not be had.
const INCOMPLETE: u8 = 3;

pub(crate) fn run(locations: &Locations, paths: &[String]) -> Result<ExitCode, Failure> {
    let names = paths.iter().map(|path| name_of(locations, path)).collect::<Result<_, _>>()?;
    let bar = ProgressBar::no_length();
    let style = ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} ({bytes_per_sec}, {eta})");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let (mut fetched, mut failed) = ((0, 0), 0);
    serve::ask(&locations.state_dir, names, &mut |news| match news {
        News::Total { bytes, .. } => bar.set_length(bytes),
        News::Done { blobs, bytes } => {
            bar.set_position(bytes);
            fetched = (blobs, bytes);
        }
        News::Failed { path, reason } => {
            failed += 1;
            bar.suspend(|| eprintln!("'{path}': {reason}"));
        }
        News::End | News::Refused(_) => {}
    })?;
    bar.finish_and_clear();
    println!("fetched {} files ({})", fetched.0, HumanBytes(fetched.1));
    if failed == 0 {
        return Ok(ExitCode::SUCCESS);
    }
    println!("{failed} paths are not complete");
    Ok(ExitCode::from(INCOMPLETE))
}

/// The base name of a store path, also of one that a link (as `./result`) leads to.
fn name_of(locations: &Locations, text: &str) -> Result<String, Failure> {
    match std::fs::canonicalize(text) {
        Ok(real) if real.starts_with(locations.store_dir.as_str()) => base_name(locations, &real.to_string_lossy()),
        _ => base_name(locations, text),
    }
}
