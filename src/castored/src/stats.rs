//! `castored stats`: the sizes of a store, from its daemon or, when none runs, from its directory.

use std::process::ExitCode;

use ::daemon::Locations;
use remote::ClientError;
use store::{Config, Store};

use crate::failure::Failure;
use crate::sizes::Stats;
use crate::{state, status};

pub(crate) fn run(locations: &Locations, json: bool) -> Result<ExitCode, Failure> {
    let stats = match status::ask(&locations.state_dir) {
        Ok(status) => status.stats,
        Err(Failure::Client(ClientError::NoDaemon { .. })) => {
            state::prepare(locations)?;
            Stats::of(&*Store::open(Config::new(locations.store_dir.clone(), &locations.state_dir))?)?
        }
        Err(failure) => return Err(failure),
    };
    if json {
        println!("{}", serde_json::to_string_pretty(&stats).unwrap_or_default());
    } else {
        stats.print();
    }
    Ok(ExitCode::SUCCESS)
}
