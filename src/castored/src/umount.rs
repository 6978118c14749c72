//! `castored umount`: a mount goes, also one that a dead process left.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ::daemon::Locations;
use clap::Args;

use crate::failure::Failure;
use crate::status;

/// Unmount a store that `castored mount` mounted, or that a daemon left mounted when it died.
#[derive(Debug, Args)]
pub(crate) struct UmountArgs {
    /// Where it is mounted. The store directory, if nothing is named.
    #[arg(value_name = "DIR")]
    directory: Option<PathBuf>,
}

pub(crate) fn run(locations: &Locations, args: UmountArgs) -> Result<ExitCode, Failure> {
    let store_dir = Path::new(locations.store_dir.as_str());
    let directory = args.directory.unwrap_or_else(|| store_dir.to_owned());
    // A daemon would go on, with a store that nobody can read.
    if directory == store_dir && status::ask(&locations.state_dir).is_ok() {
        return Err(Failure::Served(directory));
    }
    ::mount::unmount(&directory)?;
    Ok(ExitCode::SUCCESS)
}
